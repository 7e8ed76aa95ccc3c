"""How much of one example's answer each patch brings back."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lalm_lens.experiments.patching import Run, Site, patched_layers, sweep
from lalm_lens.metrics import METRICS, Answer, Metric, log_probabilities
from lalm_lens.model import HookedLALM
from lalm_lens.results import Kind
from lalm_lens.shapes import typed

Direction = Literal["denoise", "noise"]  # clean states into the corrupted run; corrupted states into the clean run


@dataclass(frozen=True)
class Cell:
    """One patched run: where the states of the other run go. `layer` -1 is the merged embedding."""

    kind: Kind
    layer: int
    where: Bool[Tensor, " pos"]


@dataclass(frozen=True)
class Recovery:
    """The numbers of one example: p is the probability of the true label's first token, m the metric.

    `noise` is the largest change, in recovery rate, that a run in which nothing is patched shows for being one of a
    batch. `p_patched`, `m_patched` and `rate` belong to `patches`, one to one. A rate is measured from the unpatched
    run in the same row of a batch of the same shape, so without that noise.
    """

    p_clean: float
    p_corrupted: float
    m_clean: float
    m_corrupted: float
    noise: float
    patches: list[Cell]
    p_patched: Float[Tensor, " patch"]
    m_patched: Float[Tensor, " patch"]
    rate: Float[Tensor, " patch"]


@typed
def recover(
    model: HookedLALM,
    clean: Run,
    corrupted: Run,
    is_audio: Bool[Tensor, " pos"],
    answer: Answer,
    *,
    metric: Metric = "probability",
    site: Site = "resid_post",
    direction: Direction = "denoise",
    batch_size: int = 32,
) -> Recovery:
    """Every patched run of one example. `is_audio` is as long as the prompt; in the runs, the tokens of the answer
    that are forced stand behind it."""
    answer = answer.against(corrupted.logits[0])

    def read(logits: Float[Tensor, "batch at d_vocab"]) -> Float[Tensor, "batch score"]:
        log_p = log_probabilities(logits)
        return torch.stack([METRICS["probability"](log_p, answer), METRICS[metric](log_p, answer)], dim=-1)

    source, base = (clean, corrupted) if direction == "denoise" else (corrupted, clean)
    kinds, where = zip(*patches_of(is_audio), strict=True)
    runs = sweep(model, source, base, torch.stack(where), read, site, batch_size)
    (p_source, m_source), (p_base, m_base) = (read(each.logits[None])[0].tolist() for each in (source, base))
    gap = (m_source - m_base) or float("nan")
    p_patched, m_patched = runs.patched.flatten(0, 1).unbind(-1)
    scores = [(p_source, m_source), (p_base, m_base)]
    (p_clean, m_clean), (p_corrupted, m_corrupted) = scores if direction == "denoise" else reversed(scores)
    layers = patched_layers(site, model.cfg.n_layers)
    return Recovery(
        p_clean,
        p_corrupted,
        m_clean,
        m_corrupted,
        noise=float((runs.nothing[:, 1] - m_base).abs().max()) / abs(gap),
        patches=[Cell(kind, layer, its) for layer in layers for kind, its in zip(kinds, where, strict=True)],
        p_patched=p_patched,
        m_patched=m_patched,
        rate=(runs.patched - runs.nothing)[..., 1].flatten() / gap,
    )


def patches_of(is_audio: Bool[Tensor, " pos"]) -> Iterator[tuple[Kind, Bool[Tensor, " pos"]]]:
    """What is patched in each layer. Text is every position outside the audio, template and audio tags included."""
    after_audio = int(is_audio.nonzero().max()) + 1
    yield "layer", ~is_audio
    yield "audio_layer", is_audio
    for where in torch.eye(len(is_audio), dtype=torch.bool)[after_audio:]:
        yield "token", where
