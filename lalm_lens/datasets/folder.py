"""Folders of sound files with a list of them: Hugging Face's audiofolder, and SAKURA's as it is on GitHub."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from lalm_lens.attributes import ATTRIBUTES, Attribute
from lalm_lens.datasets.clip import Clip, cleaned, read_clips
from lalm_lens.datasets.sample import Sample, refuse_repeated
from lalm_lens.errors import DataError

LISTS = ("metadata.jsonl", "metadata.csv")
FILE, LABEL = ("file_name", "file"), ("label", "attribute_label")  # keys, the second of each is SAKURA's
QUESTION = ("question", "prompt")
TEXTS = ("transcript", *QUESTION)
AUDIO = "audio"  # a folder that SAKURA's lists leave out


def read_folder(folder: str | Path) -> list[Sample]:
    """The clips that `list_folder` lists. Raises `AudioError` for one that cannot be read."""
    return read_clips(list_folder(folder))


def is_listed(folder: Path) -> bool:
    return any((folder / name).is_file() for name in LISTS)


def list_folder(folder: str | Path) -> list[Clip]:
    """The clips of `metadata.jsonl` or `metadata.csv`: a row each with `file_name` (relative to the folder), `label`
    and, where they are known, `transcript`, `speaker` and `question`, its own in place of the attribute's.

    Raises `DataError` for a row that is not that or a clip that is listed twice.
    """
    clips = [clip_of(Path(folder), where, row) for where, row in list_rows(Path(folder))]
    refuse_repeated(clips)
    return clips


def list_rows(folder: Path) -> list[tuple[str, dict]]:
    """What a folder says of each clip, and where it says so."""
    if not is_listed(folder):
        raise DataError(
            f"{folder} has no metadata.jsonl, and no metadata.csv. Write one JSON object a line: "
            '{"file_name": "clip.wav", "label": "male"}.'
        )
    path = next(folder / name for name in LISTS if (folder / name).is_file())
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    return list(json_rows(path, text) if path.suffix == ".jsonl" else csv_rows(path, text))


def json_rows(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise DataError(f"{where} needs the keys file_name and label, got: {line[:80]}")
        yield where, row


def csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict]]:
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in table:
            yield f"{path}, line {table.line_num}", {name: value or None for name, value in row.items()}
    except csv.Error as error:
        raise DataError(f"{path}, line {table.line_num} is not CSV ({error}).") from None


def clip_of(folder: Path, where: str, row: dict) -> Clip:
    file, label, question = (next((row[key] for key in keys if key in row), None) for keys in (FILE, LABEL, QUESTION))
    shown = json.dumps(row, ensure_ascii=False)[:80]
    if file is None or label is None:
        raise DataError(f"{where} needs the keys file_name and label, got: {shown}")
    if not isinstance(file, str) or not isinstance(label, str):
        raise DataError(f"{where}: file_name and label must be text, got: {shown}")
    for key in TEXTS:
        if not isinstance(row.get(key), str | None):
            raise DataError(f"{where}: {key} must be text, got: {shown}")
    name = Path(file)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{where}: file_name must be a path inside the folder, got {file}")
    beside, inside = folder / name, folder / AUDIO / name
    source = inside if inside.is_file() and not beside.is_file() else beside
    speaker = None if row.get("speaker") is None else str(row["speaker"])
    return Clip(name.as_posix(), label, source, row.get("transcript"), speaker, question)


def read_attributes(folder: str | Path, names: Sequence[str]) -> dict[str, list[Sample]]:
    """The clips of each folder of an attribute. Labels are spelled as the attribute does.

    Raises what `attribute_folders` and `read_folder` raise.
    """
    return {name: read_clips(list_as(its, ATTRIBUTES[name])) for name, its in attribute_folders(folder, names).items()}


def attribute_folders(folder: str | Path, names: Sequence[str]) -> dict[str, Path]:
    """Each folder inside `folder`, or its folder `data`, that has one of these names, in capitals or not: SAKURA as it
    is on GitHub. Raises `DataError` if there is none."""
    found = folders_named(Path(folder), names)
    if not found:
        raise DataError(
            f"{folder} has neither metadata.jsonl nor a folder of an attribute ({', '.join(names)}) that has one."
        )
    return found


def folders_named(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    roots = [root for root in (folder, folder / "data") if root.is_dir()]
    inside = {path.name.lower(): path for root in reversed(roots) for path in root.iterdir() if path.is_dir()}
    return {name: inside[name] for name in names if name in inside}


def list_track(folder: Path, attribute: Attribute) -> list[Clip]:
    """The clips that a folder lists, or else the folder in it that has the attribute's name, as in SAKURA's."""
    inside = {} if is_listed(folder) else folders_named(folder, [attribute.name])
    return list_folder(inside.get(attribute.name, folder))


def list_as(folder: Path, attribute: Attribute) -> list[Clip]:
    """The clips that a folder lists, their labels as the attribute spells them."""
    return cleaned(list_folder(folder), attribute)
