"""Counterfactual pairs: what is seen of one sample with what is heard of another (arXiv 2604.02605)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import pad

from lalm_lens.corrupt import number
from lalm_lens.datasets import Sample, refuse_repeated
from lalm_lens.datasets.sample import Named
from lalm_lens.errors import DataError
from lalm_lens.shapes import typed

BESIDE = " | "  # in a name, what is seen and what is heard
N = TypeVar("N", bound=Named)
Distance = Callable[[Sample, Sample], float]  # of what is seen and what would be heard with it: larger is less alike


@dataclass(frozen=True, kw_only=True)
class Swapped(Sample):
    """A sample with the clip of another. `label` is what is heard."""

    seen_label: str  # of the sample whose pictures these are
    heard_clip: str  # the name of the other

    @property
    def columns(self) -> dict[str, str | None]:
        return {"seen_label": self.seen_label}


@typed
def swap_audio(samples: Sequence[Sample], distance: Distance | None = None, seed: int = 0) -> list[Swapped]:
    """What is seen of every sample with the clip of another one in which something else is heard, each clip once.

    What is seen is the `label`, or the `seen_label` where samples have one.

    Of all ways to do so, the one with the largest sum of `distance(sample, other)` (Hungarian assignment), say 1 -
    cosine of their captions' embeddings: then they are maximally mismatched. Without it, distances are drawn: they
    depend on `seed` and the names. Clips are cut, or followed by zeros, to the length of the one they replace.

    Raises `DataError` for samples that come twice or are not heard, a distance that is not finite, and where labels
    leave no such way: when more than half of the samples are of one label.
    """
    refuse_repeated(samples)
    if unheard := [sample.name for sample in samples if not sample.is_heard]:
        raise DataError(f"There is no clip to swap in {unheard[0]}: give samples that are heard.")
    return [swapped(*pair) for pair in pairs_of(samples, distance or drawn(seed))]


def drawn(seed: int) -> Callable[[Named, Named], float]:
    """Distances by chance, of names."""
    return lambda sample, other: number(seed, sample.name, other.name) / 2**256


def pairs_of(samples: Sequence[N], distance: Callable[[N, N], float]) -> list[tuple[N, N]]:
    """Each with the other that it is to hear."""
    far = np.array([[apart(sample, other, distance) for other in samples] for sample in samples])
    try:
        _, chosen = linear_sum_assignment(-far)
    except ValueError:
        raise DataError(
            "There is no way to give every sample a clip of another label: more than half are of one. Leave some out."
        ) from None
    return [(sample, samples[other]) for sample, other in zip(samples, chosen, strict=True)]


def apart(sample: N, other: N, distance: Callable[[N, N], float]) -> float:
    """-infinity for what must not be put together."""
    if sample is other or seen_label(sample) == other.label:
        return -np.inf
    found = float(distance(sample, other))
    if not np.isfinite(found):
        raise DataError(f"The distance of {sample.name} and {other.name} is {found}. Give finite ones.")
    return found


def seen_label(sample: Named) -> str:
    """What the pictures are of."""
    return getattr(sample, "seen_label", sample.label)


def heard_clip(sample: Sample) -> str:
    """The name of the clip that is heard, which several samples may have in common."""
    return sample.heard_clip if isinstance(sample, Swapped) else sample.columns.get("clip") or sample.name


def swapped(sample: Sample, other: Sample) -> Swapped:
    n_samples = len(sample.waveform)
    clip = other.waveform[:n_samples]
    its = {each.name: getattr(sample, each.name) for each in fields(Sample)}
    its |= {"name": f"{sample.name}{BESIDE}{other.name}", "label": other.label, "speaker": other.speaker}
    its |= {"waveform": pad(clip, (0, n_samples - len(clip)))}
    its |= {"transcript": other.transcript if len(clip) == len(other.waveform) else None}  # a part of a clip says less
    return Swapped(**its, seen_label=seen_label(sample), heard_clip=heard_clip(other))
