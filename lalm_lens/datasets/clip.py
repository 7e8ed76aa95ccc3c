"""Labelled sounds that have not been read yet: a list of thousands is short, and one that is broken stops no other."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import pandas as pd

from lalm_lens.attributes import Attribute
from lalm_lens.audio import decode_audio, read_audio
from lalm_lens.datasets.sample import Sample, digest, refuse_repeated, repeated
from lalm_lens.errors import DataError
from lalm_lens.prompts import Processor

T = TypeVar("T")
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


@dataclass(frozen=True)
class Refused:
    """What a list has in the place of a clip: its file's name, or where it stands if it has none, and what is wrong."""

    name: str
    reason: str


Row = Clip | Refused
C = TypeVar("C", bound=Clip)


def accepted(rows: Iterable[T | Refused]) -> list[T]:
    """All of them. Raises `DataError` for the first that is refused."""
    found = []
    for row in rows:
        if isinstance(row, Refused):
            raise DataError(row.reason)
        found.append(row)
    return found


def told_once(rows: Iterable[C | Refused]) -> list[C]:
    """The clips. Raises `DataError` for the first row that is none, and for a clip that is listed twice."""
    clips = accepted(rows)
    refuse_repeated(clips)
    return clips


def told_apart(rows: Sequence[Row]) -> list[Row]:
    """Rows of one name have one clip where they are the same in all, its first; else none of them is one."""
    named: dict[str, list[Clip]] = defaultdict(list)
    for row in rows:
        if isinstance(row, Clip):
            named[row.name].append(row)
    kept = {name: its[0] for name, its in named.items() if all(clip == its[0] for clip in its)}

    def told(row: Row) -> Row:
        if isinstance(row, Refused) or row is kept.get(row.name):
            return row
        return Refused(row.name, repeated(named[row.name]) + (" One is kept." if row.name in kept else ""))

    return [told(row) for row in rows]


def read_clips(clips: Sequence[Clip]) -> list[Sample]:
    """All of them. Raises what `Clip.read` does for the first that cannot be read."""
    samples = [clip.read() for clip in clips]
    refuse_repeated(samples)
    return samples


def spelled(rows: Iterable[Row], attribute: Attribute) -> list[Row]:
    """With labels as the attribute spells them, without spaces around, "(a)" before or other capitals; a clip with
    another label is none."""
    spelling = {label.casefold(): label for label in attribute.labels} | {label: label for label in attribute.labels}
    options = f"the options of {attribute.name} ({', '.join(attribute.labels)})"

    def told(row: Row) -> Row:
        if isinstance(row, Refused):
            return row
        word = LETTER.sub("", row.label).strip()
        label = spelling.get(word, spelling.get(word.casefold()))
        if label is None:
            return Refused(row.name, f"{row.name} is labelled {row.label!r}, which is none of {options}.")
        return replace(row, label=label)

    return [told(row) for row in rows]


def cleaned(clips: Sequence[Clip], attribute: Attribute) -> list[Clip]:
    """With labels as the attribute spells them, as `spelled` does.

    Raises `DataError` for labels that are none of the attribute's even so, with how many clips have each.
    """
    found = spelled(clips, attribute)
    unknown = [clip.label for clip, its in zip(clips, found, strict=True) if isinstance(its, Refused)]
    if unknown:
        counts = pd.Series(unknown, dtype=object).value_counts()
        counted = ", ".join(f"{label!r} ({n})" for label, n in counts.items())
        raise DataError(f"Not options of {attribute.name} ({', '.join(attribute.labels)}): {counted}.")
    return accepted(found)


def balance(clips: Sequence[Clip] | Sequence[Sample]) -> pd.DataFrame:
    """How many clips, and what share of them, have each label; how many speakers, where they are known."""
    frame = pd.DataFrame({"label": [its.label for its in clips], "speaker": [its.speaker for its in clips]})
    table = frame.groupby("label").agg(n=("label", "size"), speakers=("speaker", "nunique")).reset_index()
    table.insert(2, "share", table.n / len(frame))
    return table if frame.speaker.notna().any() else table.drop(columns="speakers")
