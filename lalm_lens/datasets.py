"""Labelled clips: single files, and folders in Hugging Face's audiofolder layout."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lalm_lens.audio import Waveform, read_audio
from lalm_lens.errors import DataError
from lalm_lens.pieces import Statement


@dataclass(frozen=True)
class Sample:
    """A clip and the label that is true of it; what it says too, where that is known and a model reads it; and what the
    prompt states of it beside the question, true or not."""

    name: str
    label: str
    waveform: Waveform = field(repr=False)
    transcript: str | None = None
    statement: Statement | None = None

    @property
    def is_heard(self) -> bool:
        """Whether the clip is in the prompt at all."""
        return True

    @property
    def columns(self) -> dict[str, str | None]:
        """What a table says of it, beside its name and label."""
        return {}


def read_sample(path: str | Path, label: str, transcript: str | None = None) -> Sample:
    return Sample(name=Path(path).name, label=label, waveform=read_audio(path), transcript=transcript)


def read_folder(folder: str | Path) -> list[Sample]:
    """The clips of `metadata.jsonl`: one JSON object a line, with `file_name` (relative to the folder), `label` and,
    where it is known, `transcript`.

    Raises `DataError` for a line that is not that or a clip that is listed twice, `AudioError` for a clip that cannot
    be read.
    """
    folder = Path(folder)
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise DataError(
            f"{folder} has no metadata.jsonl. Write one JSON object a line: "
            '{"file_name": "clip.wav", "label": "male"}.'
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    samples = [read_row(folder, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    refuse_repeated(samples)
    return samples


def cut_to(samples: Sequence[Sample], n_samples: int) -> list[Sample]:
    """The clips without what is behind their first `n_samples` (16 kHz) samples, and then without the transcript of the
    whole; shorter ones are as they were."""
    return [
        replace(sample, waveform=sample.waveform[:n_samples], transcript=None)
        if len(sample.waveform) > n_samples
        else sample
        for sample in samples
    ]


def heard(samples: Sequence[Sample]) -> list[Waveform]:
    """The clips of those that have one in their prompt."""
    return [sample.waveform for sample in samples if sample.is_heard]


def refuse_repeated(samples: Sequence[Sample]) -> None:
    """A clip listed twice would count twice, or contradict itself. Raises `DataError`; also if there are no clips."""
    if not samples:
        raise DataError("There is nothing to trace: no clip is listed.")
    name, n = Counter(sample.name for sample in samples).most_common(1)[0]
    if n > 1:
        labels = sorted({sample.label for sample in samples if sample.name == name})
        raise DataError(f"{name} is listed {n} times, labelled {', '.join(labels)}. Name every clip once.")


def read_row(folder: Path, number: int, line: str) -> Sample:
    where = f"{folder / 'metadata.jsonl'}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}).") from None
    if not isinstance(row, dict) or not {"file_name", "label"} <= set(row):
        raise DataError(f"{where} needs the keys file_name and label, got: {line[:80]}")
    if not isinstance(row["file_name"], str) or not isinstance(row["label"], str):
        raise DataError(f"{where}: file_name and label must be text, got: {line[:80]}")
    if not isinstance(row.get("transcript"), str | None):
        raise DataError(f"{where}: transcript must be text, got: {line[:80]}")
    file_name = Path(row["file_name"])
    if file_name.is_absolute() or ".." in file_name.parts:
        raise DataError(f"{where}: file_name must be a path inside the folder, got {row['file_name']}")
    clip = read_audio(folder / row["file_name"])
    return Sample(file_name.as_posix(), row["label"], clip, row.get("transcript"))
