"""Folders of sound files with a list of them: Hugging Face's audiofolder, and SAKURA's as it is on GitHub."""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lalm_lens.attributes import ATTRIBUTES, Attribute
from lalm_lens.datasets.clip import Clip, Refused, Row, accepted, cleaned, read_clips, told_once
from lalm_lens.datasets.sample import Sample
from lalm_lens.errors import DataError

LISTS = ("metadata.jsonl", "metadata.csv")
FILE, LABEL = ("file_name", "file"), ("label", "attribute_label")  # keys, the second of each is SAKURA's
QUESTION = ("question", "prompt")
TEXTS = ("transcript", *QUESTION)
NOT_UTF8 = " is not UTF-8 text. Save it as UTF-8."
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
    return told_once(rows_of_folder(Path(folder)))


def rows_of_folder(folder: Path) -> list[Row]:
    """What a folder lists, clips or not. Raises `DataError` where there is no list."""
    return [line if isinstance(line, Refused) else clip_of(folder, line) for line in lines_of(folder)]


@dataclass(frozen=True)
class Line:
    """What a list says of a clip, and where."""

    path: Path
    number: int
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.path}, line {self.number}"

    def refused(self, why: str) -> Refused:
        """By the file that it names, if it does."""
        file = first_of(self.told, FILE)
        name = file if isinstance(file, str) and file else f"{self.path.name}, line {self.number}"
        return Refused(name, f"{self.where}{why}")


def lines_of(folder: Path) -> Iterator[Line | Refused]:
    """What a folder says of each clip. Raises `DataError` where it has no list, and for one without a first line that
    names its columns."""
    if not is_listed(folder):
        raise DataError(
            f"{folder} has no metadata.jsonl, and no metadata.csv. Write one JSON object a line: "
            '{"file_name": "clip.wav", "label": "male"}.'
        )
    path = next(folder / name for name in LISTS if (folder / name).is_file())
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    return json_lines(path, text) if path.suffix == ".jsonl" else csv_lines(path, text)


def json_lines(path: Path, text: str) -> Iterator[Line | Refused]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield json_line(Line(path, number), line)


def json_line(line: Line, text: str) -> Line | Refused:
    if not is_utf8(text):
        return line.refused(NOT_UTF8)
    try:
        told = json.loads(text, object_pairs_hook=of_pairs)
    except (ValueError, RecursionError) as error:
        return line.refused(f" is not JSON ({error}).")
    if not isinstance(told, dict):
        return line.refused(f" needs the keys file_name and label, got: {text[:80]}")
    return replace(line, told=told) if is_utf8(told) else line.refused(NOT_UTF8)


def of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises `ValueError` for a key that it has twice."""
    told = dict(pairs)
    if len(told) < len(pairs):
        raise ValueError(f"it has a key twice: {', '.join(name for name, _ in pairs)}")
    return told


def csv_lines(path: Path, text: str) -> Iterator[Line | Refused]:
    records = csv_records(io.StringIO(text, newline="").readlines())
    header = next((of_record(Line(path, number), record) for number, record in records if record), None)
    names = [] if header is None else list(accepted([header])[0].told)
    for number, record in records:
        if record:
            yield of_record(Line(path, number), record, names)


def csv_records(lines: Sequence[str]) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Each record, or why there is none, and the line on which it begins. What is behind a broken line is read."""
    at = 0
    while at < len(lines):
        begin, table = at, csv.reader(islice(lines, at, None), strict=True)
        try:
            for record in table:
                yield begin + 1, record
                begin = at + table.line_num
            return
        except csv.Error as error:
            yield begin + 1, error
            at = begin + 1


def of_record(line: Line, record: list[str] | csv.Error, names: Sequence[str] | None = None) -> Line | Refused:
    """By the names of its columns, or of the first record, whose fields they are."""
    if isinstance(record, csv.Error):
        return line.refused(f" is not CSV ({record}).")
    if not is_utf8(record):
        return line.refused(NOT_UTF8)
    names = record if names is None else names
    told = replace(line, told={name: value or None for name, value in zip(names, record, strict=False)})
    if any(record[len(names) :]):
        return told.refused(f" has {len(record)} fields for {len(names)} columns. Put text that has commas in quotes.")
    return told


def is_utf8(told: object) -> bool:
    """Whether it can be written: what could not be decoded cannot, nor half of a character that JSON escapes."""
    try:
        json.dumps(told, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def clip_of(folder: Path, line: Line) -> Row:
    file, label, question = (first_of(line.told, keys) for keys in (FILE, LABEL, QUESTION))
    got = json.dumps(line.told, ensure_ascii=False)[:80]
    if file in (None, "") or label is None:
        return line.refused(f" needs the keys file_name and label, got: {got}")
    if not isinstance(file, str) or not isinstance(label, str):
        return line.refused(f": file_name and label must be text, got: {got}")
    for key in TEXTS:
        if not isinstance(line.told.get(key), str | None):
            return line.refused(f": {key} must be text, got: {got}")
    name = Path(file)
    if name.is_absolute() or ".." in name.parts:
        return line.refused(f": file_name must be a path inside the folder, got {file}")
    beside, inside = folder / name, folder / AUDIO / name
    source = inside if os.path.isfile(inside) and not os.path.isfile(beside) else beside  # of any name at all
    speaker = None if line.told.get("speaker") is None else str(line.told["speaker"])
    return Clip(name.as_posix(), label, source, line.told.get("transcript"), speaker, question)


def first_of(told: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((told[key] for key in keys if key in told), None)


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


def folder_of(folder: Path, attribute: Attribute) -> Path:
    """Where the list is: in a folder, or else in the one in it that has the attribute's name, as in SAKURA's."""
    inside = {} if is_listed(folder) else folders_named(folder, [attribute.name])
    return inside.get(attribute.name, folder)


def list_as(folder: Path, attribute: Attribute) -> list[Clip]:
    """The clips that a folder lists, their labels as the attribute spells them."""
    return cleaned(list_folder(folder), attribute)
