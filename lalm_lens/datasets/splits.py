"""Two disjoint parts of a set of clips."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import pandas as pd

from lalm_lens.datasets.clip import Clip
from lalm_lens.datasets.sample import Sample
from lalm_lens.draws import drawing
from lalm_lens.errors import DataError

T = TypeVar("T", Sample, Clip)


def split(samples: Sequence[T], n: int, seed: int = 0, *, by_speaker: bool = False) -> tuple[list[T], list[T]]:
    """`n` clips, and the others, both in the proportions of the labels, up to one clip of each; `seed` says which.

    With `by_speaker` nobody speaks in both: whole speakers are taken, as they come by chance, while they bring the
    first part nearer to its share of every label, so that it may have some clips more or less. Raises `DataError` where
    a part would be empty, or a speaker is not known.
    """
    if not 0 < n < len(samples):
        raise DataError(f"{len(samples)} clips cannot be split into {n} and some others.")
    first = speakers_first(samples, n, seed) if by_speaker else clips_first(samples, n, seed)
    inside, outside = ([sample for at, sample in enumerate(samples) if (at in first) == side] for side in (True, False))
    if not inside or not outside:
        raise DataError(f"The speakers of {len(samples)} clips cannot be split into about {n} clips and some others.")
    return inside, outside


def clips_first(samples: Sequence[T], n: int, seed: int) -> set[int]:
    rng = drawing(seed)
    drawn = pd.DataFrame({"label": [sample.label for sample in samples]}).iloc[rng.permutation(len(samples))]
    by_label = drawn.groupby("label").label
    share = (by_label.cumcount() + 0.5) / by_label.transform("size")
    return set(share.sort_values(kind="stable").index[:n])


def speakers_of(samples: Sequence[Sample | Clip]) -> list[str]:
    """Who speaks in each. Raises `DataError` where that is not known."""
    if unknown := [sample.name for sample in samples if sample.speaker is None]:
        raise DataError(f"Who speaks in {unknown[0]} is not known ({len(unknown)} such clips): leave out by_speaker.")
    return [str(sample.speaker) for sample in samples]


def speakers_first(samples: Sequence[T], n: int, seed: int) -> set[int]:
    clips = pd.DataFrame({"label": [its.label for its in samples], "speaker": speakers_of(samples)})
    by_speaker = pd.crosstab(clips.speaker, clips.label)
    wanted = by_speaker.sum() * n / len(clips)
    taken, speakers = 0 * wanted, []
    for at in drawing(seed).permutation(len(by_speaker)):
        with_them = taken + by_speaker.iloc[at]
        if (with_them - wanted).abs().sum() < (taken - wanted).abs().sum():
            taken, speakers = with_them, [*speakers, by_speaker.index[at]]
    return set(np.flatnonzero(clips.speaker.isin(speakers)).tolist())
