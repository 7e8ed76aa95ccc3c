"""What papers leave open, and the rows of a specification curve that come of a choice."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lalm_lens.corrupt import Corruption
from lalm_lens.errors import InputError
from lalm_lens.experiments.claim import Claim, Evidence, Quantity, Reads
from lalm_lens.experiments.claims import CLAIMS
from lalm_lens.metrics import Metric, Predict
from lalm_lens.transcripts import Reading

Average = Literal["mean", "ratio_of_means"]
Template = Literal["text", "no text"]  # what tokens of the chat template behind the audio are
Objects = Literal["all", "correct"]  # whose option tokens are the object
Reasons = Mapping[object, str]  # why a choice cannot be made


@dataclass(frozen=True)
class Choices:
    """What the papers leave open."""

    corruptions: tuple[Corruption, ...]
    transcripts: tuple[Reading | str | None, ...]
    templates: tuple[Template, ...]
    label_spaces: tuple[bool, ...]
    metrics: tuple[Metric, ...]
    predicts: tuple[Predict, ...]
    averages: tuple[Average, ...]
    objects: tuple[Objects, ...]
    layer_bases: tuple[int, ...]
    norms: tuple[bool, ...]

    def check(self) -> None:
        for name, chosen in vars(self).items():
            if not chosen:
                raise InputError(f"No specification is left: name at least one of {name}.")
        if "label_score" in self.metrics:
            raise InputError("A specification reads labels by their first tokens: leave out the metric label_score.")


def claims_of(reads: Reads) -> list[Claim]:
    return [claim for claim in CLAIMS.values() if claim.reads == reads]


def rows_of(
    subjects: Sequence[Claim | Quantity], evidence: Evidence | None, row: Mapping, reason: str, resampled: Mapping
) -> Iterator[dict]:
    if not subjects:
        return
    found = [None] * len(subjects)
    if evidence is not None:
        found = evidence.find_all([its.measure for its in subjects], **resampled)
    for subject, finding in zip(subjects, found, strict=True):
        its = {**row, "claim": subject.name}
        if isinstance(subject, Claim):
            its |= {"words": subject.words, "source": subject.source, "condition": subject.condition}
        if finding is None:
            yield {**its, "reason": reason}
        elif not np.isfinite(finding.measured):
            yield {**its, "n": finding.n, "reason": "undefined on these clips"}
        else:
            holds = subject.holds(finding.measured) if isinstance(subject, Claim) else None
            numbers = {"effect": finding.measured, "low": finding.low, "high": finding.high, "n": finding.n}
            yield {**its, **numbers, "holds": holds}
