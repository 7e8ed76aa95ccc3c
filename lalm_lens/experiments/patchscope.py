"""Patchscopes: a state is put into another prompt, another layer or another model, which says what it finds in it.

    h'[l', p'] of the target run <- h[l, p] of the source run        (arXiv 2401.06102, with the identity as mapping)

The logit lens is the special case of the same prompt and model whose target is the last block at the same position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lalm_lens.engine.branches import Branch, check
from lalm_lens.engine.plan import Engine, Plan
from lalm_lens.errors import InputError
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import Patch, hook_name
from lalm_lens.model import HookedLALM
from lalm_lens.readouts import LogProbs
from lalm_lens.runs import Positions, Run
from lalm_lens.shapes import typed
from lalm_lens.tables import Table


@dataclass(frozen=True, repr=False)
class Patchscope(Table):
    """What is read from a prompt into which a state was put: one row per state, target layer and token."""

    NAME: ClassVar[str] = "a patchscope"
    COLUMNS: ClassVar[dict[str, str]] = {
        "model": "str",  # of the source
        "into": "str",  # the model of the target
        "source_layer": "int64",  # 0-based block, behind which the state is
        "source_position": "int64",  # absolute
        "target_layer": "int64",
        "target_position": "int64",
        "rank": "int64",  # in the vocabulary: 0 is the most probable token
        "token_id": "int64",
        "word": "str",
        "log_prob": "float64",  # over the whole vocabulary
        "text": "str",  # what the model writes on, where it was asked to
    }

    def top(self) -> pd.DataFrame:
        """The most probable token of every state, by source position and layer: one column for each target layer."""
        rows = self.frame[self.frame["rank"] == 0]
        return rows.pivot(index=["source_position", "source_layer"], columns="target_layer", values="word")

    def __repr__(self) -> str:
        first = self.frame.iloc[0]
        n_states = len(self.frame.drop_duplicates(["source_layer", "source_position"]))
        return f"Patchscope({n_states} states of {first.model} into {first.into})\n{self.top().to_string()}"


@typed
def patchscope(
    model: HookedLALM,
    source: Run,
    target: Run | str,
    *,
    positions: Positions = (-1,),
    layers: Sequence[int] | None = None,
    target_position: int = -1,
    target_layers: Sequence[int] | None = None,
    into: HookedLALM | None = None,
    read: int = -1,
    top_k: int = 1,
    max_new_tokens: int = 0,
    engine: Engine = "auto",
    token_budget: int | None = None,
    progress: bool = True,
) -> Patchscope:
    """Put single states of a run into another prompt, and read what its position `read` says.

    The states are those behind `layers` (all by default) at `positions`, and go behind `target_layers`, by default
    those that they come from. A target may be a text without a clip. `into` is another model, which has the same width.
    With `max_new_tokens` it writes on, greedily, from each state by itself.

    Raises `InputError` for models of different widths, and for layers and positions that there are not.
    """
    there = model if into is None else into
    width, its_width = model.decoder_cfg.d_model, there.decoder_cfg.d_model
    if width != its_width:
        raise InputError(f"A state of {width} numbers has no place in a model with states of {its_width}.")
    target = Run(Inputs(*there.read([target]))) if isinstance(target, str) else target
    (to,) = target.indices((target_position,))
    n_layers = model.decoder_cfg.n_layers
    layers = range(n_layers) if layers is None else layers
    check(layers, n_layers, "layers in the decoder")
    check(target_layers or (), there.decoder_cfg.n_layers, "layers in the decoder that reads")
    if not layers or (target_layers is not None and not target_layers):
        raise InputError("No state is put anywhere: name one layer or more, or leave layers and target_layers out.")
    if not 1 <= top_k <= there.decoder_cfg.d_vocab:
        raise InputError(f"top_k is 1 or more, of {there.decoder_cfg.d_vocab} tokens; got {top_k}.")
    where = source.indices(positions)
    states = states_of(model, source, layers, where)
    every = (
        (layer, position, target_layer)
        for position, layer in product(where, layers)
        for target_layer in ([layer] if target_layers is None else target_layers)
    )
    cells = list(dict.fromkeys(every))
    patches = [Patch("resid_post", at, (to,), states[layer, position]) for layer, position, at in cells]
    branches = [Branch(target, (patch,)) for patch in patches]
    outcome = Plan(there, branches, LogProbs((read,)), engine=engine, token_budget=token_budget).run(progress)
    log_p, tokens = outcome.values[:, 0].topk(top_k)
    told = {"model": model.cfg.model_name, "into": there.cfg.model_name, "target_position": to}
    frames = []
    for n, (layer, position, at) in enumerate(tqdm(cells, "writing", disable=not (progress and max_new_tokens))):
        its = {"source_layer": layer, "source_position": position, "target_layer": at}
        said = written(there, target, patches[n], max_new_tokens)
        rows = {"rank": range(top_k), "token_id": tokens[n].tolist(), "log_prob": log_p[n].tolist()}
        words = [there.tokenizer.decode([token]) for token in tokens[n].tolist()] if there.tokenizer else [""] * top_k
        frames.append(pd.DataFrame({**told, **its, **rows, "word": words, "text": said}))
    return Patchscope.concat(frames)


@torch.no_grad()
def states_of(
    model: HookedLALM, run: Run, layers: Sequence[int], where: tuple[int, ...]
) -> dict[tuple[int, int], Float[Tensor, "1 d_model"]]:
    """By layer and position."""
    names = {layer: hook_name("resid_post", layer) for layer in layers}
    _, cache = model.run_with_cache(run.inputs.to(model.device), names_filter=sorted(names.values()), logits_at=-1)
    return {(layer, position): cache[names[layer]][0, [position]] for layer in layers for position in where}


def written(model: HookedLALM, target: Run, patch: Patch, max_new_tokens: int) -> str | None:
    if not max_new_tokens:
        return None
    generated = model.generate(target.inputs, max_new_tokens, fwd_hooks=[patch.hook()])
    return generated.texts[0] if generated.texts else str(generated.tokens[0].tolist())
