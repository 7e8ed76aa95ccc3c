"""Labelled sounds that have not been read yet: a list of thousands is short, and one that is broken stops no other."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from lalm_lens.attributes import Attribute
from lalm_lens.audio import decode_audio, read_audio
from lalm_lens.datasets.sample import Sample, digest, refuse_repeated
from lalm_lens.errors import DataError
from lalm_lens.prompts import Processor

LETTER = re.compile(r"^\s*\([a-z]\)\s*", re.IGNORECASE)  # of an option, as in "(a) Female"


@dataclass(frozen=True)
class Clip:
    """A sound as a file or its content, and what is known of it; see `Sample`."""

    name: str
    label: str
    source: Path | bytes = field(repr=False)
    transcript: str | None = None
    speaker: str | None = None
    question: str | None = None

    def read(self) -> Sample:
        """Raises `AudioError` for a sound that cannot be read."""
        source = self.source
        waveform = read_audio(source) if isinstance(source, Path) else decode_audio(source, self.name)
        about: dict = {"speaker": self.speaker, "question": self.question}
        return Sample(self.name, self.label, waveform, self.transcript, **about)

    def given_to(self, processor: Processor) -> Sample:
        """What a model is given of it. Raises what `read` does."""
        return self.read()

    @property
    def digest(self) -> str:
        """A hash of the sound as it is stored and of what is known of it, wherever it lies."""
        content = self.source.read_bytes() if isinstance(self.source, Path) else self.source
        told = (self.label, self.transcript, self.question)
        return digest(content, *(repr(each).encode() for each in told))


def read_clips(clips: Sequence[Clip]) -> list[Sample]:
    """All of them. Raises what `Clip.read` does for the first that cannot be read."""
    samples = [clip.read() for clip in clips]
    refuse_repeated(samples)
    return samples


def cleaned(clips: Sequence[Clip], attribute: Attribute) -> list[Clip]:
    """With labels as the attribute spells them, without spaces around, "(a)" before or other capitals.

    Raises `DataError` for labels that are none of the attribute's even so, with how many clips have each.
    """
    spelled = {label.casefold(): label for label in attribute.labels}
    found = [spelled.get(LETTER.sub("", clip.label).strip().casefold()) for clip in clips]
    unknown = pd.Series([clip.label for clip, label in zip(clips, found, strict=True) if label is None], dtype=object)
    if len(unknown):
        counted = ", ".join(f"{label!r} ({n})" for label, n in unknown.value_counts().items())
        raise DataError(f"Not options of {attribute.name} ({', '.join(attribute.labels)}): {counted}.")
    return [replace(clip, label=label) for clip, label in zip(clips, found, strict=True) if label is not None]


def balance(clips: Sequence[Clip] | Sequence[Sample]) -> pd.DataFrame:
    """How many clips, and what share of them, have each label; how many speakers, where they are known."""
    frame = pd.DataFrame({"label": [its.label for its in clips], "speaker": [its.speaker for its in clips]})
    table = frame.groupby("label").agg(n=("label", "size"), speakers=("speaker", "nunique")).reset_index()
    table.insert(2, "share", table.n / len(frame))
    return table if frame.speaker.notna().any() else table.drop(columns="speakers")
