"""Stimuli of which a transcript says something else, in files like those of ALME (arXiv 2602.11488).

One stimulus is a clip, what it says (`true_text`), a transcript in which a word is another (`false_text`), a question,
and its choices, of which one follows from each text. The names of the fields are those of the authors' own code.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lalm_lens.attributes import Attribute
from lalm_lens.audio import read_audio
from lalm_lens.conflict import (
    CONDITIONS,
    Claim,
    Condition,
    ConflictItem,
    Framing,
    Strength,
    TextOnly,
    conditioned,
    frames_of,
)
from lalm_lens.datasets import Sample
from lalm_lens.errors import DataError
from lalm_lens.pieces import Order
from lalm_lens.shapes import typed

FIELDS = {
    "name": "stimulus_id",
    "audio": "audio_path",  # inside the folder of the audio
    "true_text": "ref_text",
    "false_text": "conflict_text",
    "question": "question.question_text",  # of an object in an object, or a column of that name
    "choices": "question.choices",  # a list, in a CSV as JSON
    "answer": "question.correct_answer",
}
OPTIONAL = {"kind": "question.flip_type", "stated": "question.conflict_answer"}


@typed
def read_alme(
    path: str | Path,
    audio: str | Path,
    *,
    fields: Mapping[str, str] | None = None,
    prefix: str = "The answer is",
    conditions: Sequence[Condition] = CONDITIONS,
    framing: str | Framing | Sequence[str | Framing] = "transcript",
    strength: Strength | Sequence[Strength] = "baseline",
    order: Order | Sequence[Order] = "audio_first",
    text_only: TextOnly = "no_audio",
    n: int | None = None,
) -> list[ConflictItem]:
    """The items of a `.jsonl` or `.csv` file, whose clips are in the folder `audio`; of the first `n` stimuli alone,
    because all clips are held in memory.

    `fields` says what is called otherwise than in `FIELDS`, by our names for it: `{"answer": "gold"}`; there may be a
    `kind` of stimulus too, which becomes the attribute's name, and the choice that the false text has `stated`, by
    default the first that is not the answer. `prefix` is what answers are forced to begin with. The text alone is the
    true one, as in the paper. What stands around a text is the framing's; the rest is as in `make_conflict`.

    Raises `DataError` for a file that is not that, `AudioError` for a clip that cannot be read.
    """
    path, names = Path(path), {**FIELDS, **OPTIONAL, **(fields or {})}
    if unknown := sorted(set(names) - {*FIELDS, *OPTIONAL}):
        raise DataError(
            f"There is no field {unknown[0]!r} to be called otherwise, only {', '.join(FIELDS | OPTIONAL)}."
        )
    frames = frames_of(framing, strength, order)
    items, seen = [], Counter()
    for where, row in islice(rows_of(path), n):
        stimulus = fields_of(row, names, where)
        seen[stimulus["name"]] += 1
        if seen[stimulus["name"]] > 1:
            raise DataError(f"{where}: {stimulus['name']} is there twice. Name every stimulus once.")
        sample, attribute, claims = read_stimulus(stimulus, Path(audio), prefix, where)
        items += conditioned(sample, attribute, claims, conditions, frames, text_only)
    if not items:
        raise DataError(f"{path} holds no stimulus.")
    return items


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each stimulus stands, and what stands there."""
    if path.suffix not in (".jsonl", ".csv") or not path.is_file():
        raise DataError(f"Stimuli are in a .jsonl or .csv file; got {path}.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            for number, row in enumerate(csv.DictReader(file), 2):
                yield f"{path}, row {number}", row
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", parsed(line, f"{path}, line {number}")


def parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}).") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is no JSON object: {line[:80]}")
    return row


def fields_of(row: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    """By our names; an optional one may be missing."""
    found = {ours: value_of(row, theirs) for ours, theirs in names.items()}
    if missing := [ours for ours in FIELDS if found[ours] in (None, "")]:
        raise DataError(
            f"{where} has no {names[missing[0]]!r}, but {', '.join(map(str, row))}. Say which field is the "
            f"{missing[0]}: fields={{{missing[0]!r}: ...}}."
        )
    found["choices"] = choices_of(found["choices"], where)
    if wrong := [ours for ours, value in found.items() if ours != "choices" and not isinstance(value, str | None)]:
        raise DataError(f"{where}: {names[wrong[0]]!r} must be text, got {found[wrong[0]]!r}.")
    return found


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """Of a field, or of one inside another."""
    outer, _, inner = name.partition(".")
    if name not in row and inner and isinstance(row.get(outer), dict):
        return value_of(row[outer], inner)
    return row.get(name)


def choices_of(value: object, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(f'{where}: choices are a JSON list, as ["two", "five"]; got {value!r}.') from None
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(each, str) for each in value):
        raise DataError(f"{where}: choices are a list of two texts or more; got {value!r}.")
    return tuple(value)


def read_stimulus(
    its: Mapping[str, Any], audio: Path, prefix: str, where: str
) -> tuple[Sample, Attribute, dict[Condition, Claim]]:
    stated = its["stated"] or next((each for each in its["choices"] if each != its["answer"]), "")
    for label in (its["answer"], stated):
        if label not in its["choices"]:
            raise DataError(f"{where}: {label!r} is none of the choices {', '.join(its['choices'])}.")
    if stated == its["answer"] or its["true_text"] == its["false_text"]:
        raise DataError(f"{where}: its two texts, and their answers, must differ, or nothing is in conflict.")
    file_name = Path(its["audio"])
    if file_name.is_absolute() or ".." in file_name.parts:
        raise DataError(f"{where}: the clip must be a path inside the folder of the audio, got {its['audio']}")
    attribute = Attribute(its["kind"] or "stimulus", its["question"], its["choices"], prefix)
    true = Claim(its["answer"], its["true_text"])
    claims: dict[Condition, Claim] = {
        "text_only": true,
        "aligned": true,
        "conflict": Claim(stated, its["false_text"]),
    }
    return Sample(its["name"], its["answer"], read_audio(audio / file_name)), attribute, claims
