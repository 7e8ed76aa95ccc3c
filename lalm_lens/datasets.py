"""Labelled clips: single files, and folders in Hugging Face's audiofolder layout."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from lalm_lens.audio import Waveform, read_audio
from lalm_lens.errors import DataError


@dataclass(frozen=True)
class Sample:
    """A clip and the label that is true of it."""

    name: str
    label: str
    waveform: Waveform = field(repr=False)


def read_sample(path: str | Path, label: str) -> Sample:
    return Sample(name=Path(path).name, label=label, waveform=read_audio(path))


def read_folder(folder: str | Path) -> list[Sample]:
    """The clips of `metadata.jsonl`: one JSON object a line, with `file_name` (relative to the folder) and `label`.

    Raises `DataError` for a line that is not that, and `AudioError` for a clip that cannot be read.
    """
    folder = Path(folder)
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise DataError(
            f"{folder} has no metadata.jsonl. Write one JSON object a line: "
            '{"file_name": "clip.wav", "label": "male"}.'
        )
    rows = [
        (number, line) for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()
    ]
    samples = [read_row(folder, number, line) for number, line in rows]
    if not samples:
        raise DataError(f"{path} lists no clips.")
    return samples


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
    return Sample(name=row["file_name"], label=row["label"], waveform=read_audio(folder / row["file_name"]))
