"""A whole logit lens at the last position: one forward per layer, as users do it, against one forward for all.

    python -m benchmarks.lens                                  # the reference shape
    python -m benchmarks.lens --shape tiny --rounds 3 --batch 4

Rivals take turns within each round. Ratios are medians of those within a round; the reference against itself is the
noise of this machine. The aim is a ratio of 0.8 times the number of layers, or more.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Annotated

import torch
import typer
from jaxtyping import Float
from torch import Tensor

from benchmarks.hf import HF, causal_lm, hooked
from benchmarks.measure import seconds
from benchmarks.task import SHAPES, Embed, Shape, build
from benchmarks.tracing import median_ratio, versions
from lalm_lens.experiments.lens import Reading, lens
from lalm_lens.inputs import Embedded
from lalm_lens.loading import from_hf

Lens = Float[Tensor, "layer clip token"]  # log-probabilities
TOKENS = tuple(range(10, 19))  # of nine labels
ONE_EACH, AGAIN = "HF, one forward per layer", "HF, one forward per layer, again"
OURS, TOGETHER = "lalm_lens, one forward", "lalm_lens, one forward for all clips"


def rivals(hf: HF, clips: Float[Tensor, "clip pos d_model"]) -> dict[str, Callable[[], Lens]]:
    """All read the same states; the first two are the same."""
    ours, one_each, hidden = from_hf(hf), OneEach(hf), HiddenStates(hf)

    def read(embed: Float[Tensor, "clip pos d_model"]) -> Lens:
        where = torch.zeros(embed.shape[:2], dtype=torch.bool, device=embed.device)
        where[:, -1] = True
        return lens(ours, Embedded(embed, torch.ones_like(where)), where, Reading(TOKENS)).log_prob

    def by_clip(of: Callable[[Embed], Lens]) -> Callable[[], Lens]:
        return lambda: torch.cat([of(clip[None]) for clip in clips], dim=1)

    return {
        ONE_EACH: by_clip(one_each),
        AGAIN: by_clip(one_each),
        "HF, output_hidden_states": by_clip(hidden),
        OURS: by_clip(read),
        TOGETHER: lambda: read(clips),
    }


class OneEach:
    """As Patchscopes does it: a run for each layer, in which the last block's output becomes that layer's."""

    def __init__(self, hf: HF):
        self.lm, self.layers = causal_lm(hf), hf.model.language_model.layers

    def __call__(self, embed: Embed) -> Lens:
        return log_probs(torch.stack([self.logits(embed, layer) for layer in range(len(self.layers))]))

    def logits(self, embed: Embed, layer: int) -> Float[Tensor, "1 d_vocab"]:
        kept: list[Tensor] = []
        hooks = (
            (self.layers[layer], lambda module, inputs, output: kept.append(output)),
            (self.layers[-1], lambda module, inputs, output: kept[0]),
        )
        with hooked(hooks):
            return self.lm(inputs_embeds=embed, use_cache=False, logits_to_keep=1).logits[:, -1]


class HiddenStates(OneEach):
    """As a careful user does it. The last of transformers' hidden states has the final norm already."""

    def __call__(self, embed: Embed) -> Lens:
        made = self.lm(inputs_embeds=embed, use_cache=False, logits_to_keep=1, output_hidden_states=True)
        states = torch.stack([state[:, -1] for state in made.hidden_states[1:-1]])
        return log_probs(torch.cat([self.lm.lm_head(self.lm.model.norm(states)), made.logits[None, :, -1]]))


def log_probs(logits: Float[Tensor, "layer clip d_vocab"]) -> Lens:
    return logits.float().log_softmax(-1)[..., list(TOKENS)].cpu()


@torch.no_grad()
def compare(shape: Shape, n_clips: int, rounds: int, device: str, dtype: str) -> str:
    task = build(shape, device, getattr(torch, dtype))
    clips = torch.cat([task.clean + 0.01 * n * task.corrupt for n in range(n_clips)])
    timed = rivals(task.hf, clips)
    answers = {name: each() for name, each in timed.items()}  # warms up as well
    taken: dict[str, list[float]] = {name: [] for name in timed}
    start = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        for name, each in timed.items():
            taken[name].append(seconds(each, device))
    share = (time.process_time() - start[1]) / (time.perf_counter() - start[0])
    rows = [
        f"| {name} | {median(its):.3f} | {min(its):.3f} to {max(its):.3f} | {median_ratio(taken[ONE_EACH], its):.2f} | "
        f"{float((answers[name] - answers[ONE_EACH]).abs().max()):.1e} |"
        for name, its in taken.items()
    ]
    return "\n".join(
        [
            f"{str(shape).rpartition(',')[0]}; {n_clips} clips. {device}, {dtype}, {torch.get_num_threads()} thread, "
            f"{versions()}. Median of {rounds} interleaved rounds, in which the process had {share:.0%} of a core. The "
            f"aim is {0.8 * shape.n_layers:.1f} times as fast.",
            "",
            "| rival | seconds | from to | times as fast | log-probability differs by |",
            "|---|---:|---:|---:|---:|",
            *rows,
        ]
    )


def run(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "reference",
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    batch: Annotated[int, typer.Option(min=1, help="Clips.")] = 1,
    device: str = "cpu",
    dtype: str = "float32",
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    torch.set_num_threads(threads)
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is no shape. Choose from {', '.join(SHAPES)}.")
    print(compare(SHAPES[shape], batch, rounds, device, dtype))


if __name__ == "__main__":
    typer.run(run)
