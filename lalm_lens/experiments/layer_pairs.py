"""Where back-patching puts which states: of the blocks around one layer, to as many around an earlier one."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lalm_lens.draws import drawing
from lalm_lens.engine.branches import check
from lalm_lens.errors import InputError
from lalm_lens.experiments.changed import Variant
from lalm_lens.experiments.cuts import place_name, positions
from lalm_lens.interventions import NamedHook, Patch, hook_name
from lalm_lens.model import HookedLALM
from lalm_lens.runs import Run, Source

Regions = str | tuple[str, ...]
Later = Literal["recomputed", "pinned"]
States = Mapping[int, Float[Tensor, "at d_model"]]  # behind some blocks, at the positions that are patched

CONTROL, MATCHED = "control", "audio_matched"


@dataclass(frozen=True)
class Pair:
    """Where states go: of the blocks around `source` to as many around `target`."""

    source: int
    target: int
    window: int = 1

    def __post_init__(self) -> None:
        if self.window < 1 or not self.window % 2:
            raise InputError(f"A window is an odd number of layers, around each of the two; got {self.window}.")

    def put(self, n_layers: int, later: Later) -> dict[int, int]:
        """Behind which blocks the states are replaced, and by those behind which blocks of run 1."""
        check((self.source, self.target), n_layers, "layers in the decoder")
        half = self.window // 2
        pairs = [(self.target + k, self.source + k) for k in range(-half, half + 1)]
        put = {to: source for to, source in pairs if min(to, source) >= 0 and max(to, source) < n_layers}
        return put if later == "recomputed" else put | {layer: layer for layer in range(max(put) + 1, n_layers)}


def where(run: Run, place: Regions, seed: int) -> tuple[int, ...]:
    """The positions of a place, `audio_matched` among the places."""
    if place != MATCHED:
        return positions(run, place)
    audio, n_control = positions(run, "audio"), len(positions(run, CONTROL))
    drawn = drawing(seed).choice(audio, min(n_control, len(audio)), replace=False)
    return tuple(sorted(drawn.tolist()))


@dataclass(frozen=True)
class Spot:
    """One back-patched run of a clip."""

    place: Regions
    pair: Pair
    later: Later
    seed: int = 0

    def columns(self) -> dict[str, Any]:
        return {"place": place_name(self.place), **asdict(self.pair), "later": self.later, "loops": 1}

    def variant(self, model: HookedLALM, run: Run) -> Variant:
        at, put = where(run, self.place, self.seed), self.pair.put(model.decoder_cfg.n_layers, self.later)
        changes = tuple(Patch("resid_post", to, at, Source(run, layer=source)) for to, source in put.items())
        return Variant({**self.columns(), "n_positions": len(at)}, changes)


@torch.no_grad()
def states_of(model: HookedLALM, run: Run, layers: Sequence[int], at: tuple[int, ...]) -> dict[int, Tensor]:
    """Of the unchanged run."""
    by_name = {hook_name("resid_post", layer): layer for layer in layers}
    _, cache = model.run_with_cache(run.inputs.to(model.device), names_filter=list(by_name), logits_at=-1)
    return {layer: cache[name][0, list(at)] for name, layer in by_name.items()}


def hooks_of(put: Mapping[int, int], states: States, at: tuple[int, ...]) -> list[NamedHook]:
    return [Patch("resid_post", to, at, states[source]).hook() for to, source in put.items()]
