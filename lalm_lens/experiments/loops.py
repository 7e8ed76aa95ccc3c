"""Back-patching again and again, until the answer stays: each run is the source of the next."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from lalm_lens.datasets import Sample
from lalm_lens.experiments.asked import Question, Told
from lalm_lens.experiments.changed import How, Variant, frame_of
from lalm_lens.experiments.layer_pairs import Spot, states_of, where
from lalm_lens.interventions import Patch, hook_name
from lalm_lens.runs import Run


def looped(
    question: Question, samples: Sequence[Sample], spots: Sequence[Spot], max_loops: int, how: How
) -> Iterator[pd.DataFrame]:
    """One table for each clip: of each spot, the last loop."""
    readout = Told.readout(question.tokens)
    for sample in tqdm(samples, f"looping, {question.attribute.name}", unit="clip", disable=not how.progress):
        run = question.run(sample)
        with torch.no_grad():
            base = readout(question.model(run.inputs.to(question.model.device), logits_at=-1))
        rows, values = [], []
        for spot in spots:
            value, n_loops = last_loop(question, run, spot, base[0], max_loops)
            variant = spot.variant(question.model, run)
            rows.append(Variant({**variant.columns, "loops": n_loops}, variant.changes))
            values.append(value)
        values, before = torch.stack([*values, base[0]]), base.expand(len(rows) + 1, -1, -1)
        frame = frame_of(question, sample, rows, values, before, how.predict)
        yield frame.assign(predict=how.predict, engine="hooks")


@torch.no_grad()
def last_loop(
    question: Question, run: Run, spot: Spot, value: Float[Tensor, "at twice"], max_loops: int
) -> tuple[Float[Tensor, "at twice"], int]:
    """What the last loop says, and which one it is. `value` is what the unchanged run says."""
    model, readout, loop = question.model, Told.readout(question.tokens), 0
    put, at = spot.pair.put(model.decoder_cfg.n_layers, spot.later), where(run, spot.place, spot.seed)
    patched = set(spot.pair.put(model.decoder_cfg.n_layers, "recomputed"))
    first = states_of(model, run, sorted(set(put.values())), at)
    own, before = dict(first), None
    while loop < max_loops and said(value) != before:
        loop, before = loop + 1, said(value)
        states = {to: own[source] if to in patched else first[source] for to, source in put.items()}
        patches = [Patch("resid_post", to, at, state).hook() for to, state in states.items()]
        takes = [(hook_name("resid_post", put[to]), taking(own, put[to], at)) for to in patched]
        logits = model.run_with_hooks(run.inputs.to(model.device), fwd_hooks=[*patches, *takes], logits_at=-1)
        value = readout(logits)[0]
    return value, loop


def taking(states: dict[int, Tensor], layer: int, at: tuple[int, ...]) -> Any:
    """A hook that keeps what the run has there."""

    def take(state: Float[Tensor, "batch pos d_model"], hook: HookPoint) -> None:
        states[layer] = state[0, list(at)].clone()

    return take


def said(value: Float[Tensor, "at twice"]) -> int:
    return int(Told.of(value).log_p[0].argmax())
