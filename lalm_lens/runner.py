"""Runs the units of a study, and keeps what is finished.

A unit is claimed, run and written by one process, whichever it is: its clips are the batch, so the numbers are the same
whoever computes them. What ends a process early leaves no file; the next run begins with what is missing.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from traceback import extract_tb

import torch
from pyarrow.parquet import read_metadata

from lalm_lens.datasets import Sample
from lalm_lens.errors import ConversionError, InputError, LensError, reason
from lalm_lens.experiments.asked import processor_of
from lalm_lens.loading import from_pretrained
from lalm_lens.model import HookedLALM
from lalm_lens.planning import Planned
from lalm_lens.study import Study
from lalm_lens.tables import Table
from lalm_lens.units import ABOUT, Opened, Unit, claimed, forget_claims, writable

ENDING = ".study.json"  # of the file that says which units a study has
# Of one unit, that leave the others be: a file that has gone, memory that is full, numbers that a method cannot take.
FAILURES = LensError, OSError, MemoryError, RuntimeError, ArithmeticError, LookupError, ValueError
AGAIN_S = 0.2  # until a unit that somebody else has claimed is looked at again


@dataclass(frozen=True)
class Outcome:
    """What became of a unit: finished, or the reason why it is not."""

    unit: Unit
    wall_s: float = 0.0
    excluded: dict[str, str] = field(default_factory=dict)  # clips that the model could not be asked about, and why
    failure: str | None = None
    was_there: bool = False  # it had been finished, or somebody else did it


class Models:
    """The model of a unit, opened; one at a time."""

    def __init__(self, device: str = "cpu"):
        self.device = device
        self.which: Opened | None = None
        self.lens: HookedLALM | None = None
        self.failure = ""

    def of(self, which: Opened) -> HookedLALM:
        """Raises `ConversionError` for one that cannot be opened, which is tried once."""
        if self.which != which:
            self.lens, self.which = None, which  # before the next comes into memory
            try:
                self.lens = self.opened(which)
            except (LensError, OSError, MemoryError, torch.OutOfMemoryError) as error:
                self.failure = f"{which.path} cannot be opened: {reason(error)}"
        if self.lens is None:
            raise ConversionError(self.failure)
        return self.lens

    def opened(self, which: Opened) -> HookedLALM:
        dtype, device_map = getattr(torch, which.dtype), which.device_map
        device = "cpu" if device_map is not None else self.device
        return which.named(
            from_pretrained(which.path, dtype=dtype, device=device, device_map=device_map, **which.files)
        )


def finish(unit: Unit, out: Path, models: Models) -> Outcome | None:
    """Run a unit and write its file, unless that is there. None if somebody else has claimed it."""
    with claimed(unit, out) as is_mine:
        if not is_mine:
            return None
        if unit.is_finished(out):
            return Outcome(unit, was_there=True)
        try:
            lens, start = models.of(unit.model), time.perf_counter()
            table, excluded = table_of(unit, lens)
        except FAILURES as error:
            return Outcome(unit, failure=said(error))
        wall_s = time.perf_counter() - start
        unit.write(table, out, excluded, wall_s, str(lens.device))
        return Outcome(unit, wall_s, excluded)


def said(error: Exception) -> str:
    """What an error says; and where it is from, if nobody meant it to be read."""
    if isinstance(error, LensError | OSError):
        return str(error)
    last = extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}: {reason(error)}"


def table_of(unit: Unit, lens: HookedLALM) -> tuple[Table, dict[str, str]]:
    """The table of a unit, and which clips were left out of it, and why.

    Where the experiment refuses its clips, each is tried alone, and what can be done is done together. Raises what the
    experiment raises if that is none, or if its clips need each other.
    """
    processor = processor_of(lens)
    samples, arguments = unit.read(processor), unit.arguments(processor)

    def run(some: Sequence[Sample]) -> Table:
        return unit.experiment.run(lens, some, **arguments)

    try:
        return run(samples), {}
    except LensError:
        if not unit.experiment.table.BY_CLIP:
            raise
        refused = {}
        for sample in samples:
            try:
                run([sample])
            except LensError as error:
                refused[sample.name] = reason(error)
        kept = [sample for sample in samples if sample.name not in refused]
        if not refused or not kept:
            raise
        return run(kept), refused


def unfinished(units: Sequence[Unit], out: Path) -> list[Unit]:
    return [unit for unit in units if not unit.is_finished(out)]


def write_list(plan: Planned, out: Path, done: Sequence[Outcome] = ()) -> Path:
    """Say which units the study has, in their order, what is left out of it, why some of what is done failed, and what
    file it is (from the folder on too: both may be moved). Raises `InputError` where the list is that of another
    study's file."""
    writable(out)
    path = out / f"{plan.study.path.stem}{ENDING}"
    refuse_another(path, plan.study)
    forget_claims(plan.units, out)
    told = {
        "study": plan.study.text,
        "path": str(plan.study.path),
        "from_here": os.path.relpath(plan.study.path, out),
        "units": [unit.path(out).name for unit in plan.units],
        "excluded": plan.excluded.to_dict("records"),
        "failed": plan.failed,
        "failures": {
            its.unit.path(out).name: {"of": its.unit.called, "reason": its.failure} for its in done if its.failure
        },
    }
    new = path.with_name(f".{path.name}.{time.time_ns()}")
    try:
        new.write_text(json.dumps(told, indent=1), encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    return path


def refuse_another(path: Path, study: Study) -> None:
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = told.get("path", str(study.path))
    if told and before != str(study.path) and told["study"] != study.text:
        raise InputError(
            f"{path} is the list of another study, {before}. Give {study.path} another --out or another name, or "
            "delete that list if its results are done with."
        )


def measured(unit: Unit, alike: Sequence[Unit], out: Path, models: Models) -> float | None:
    """Seconds that a clip takes: of those of `alike` that are finished, else of the first clip of `unit`, run once
    more after the first time. None where clips cannot be asked about alone."""
    told = [json.loads(read_metadata(its.path(out)).metadata[ABOUT]) for its in alike if its.is_finished(out)]
    if told:
        return sum(its["wall_s"] for its in told) / sum(len(its["clips"]) for its in told)
    if not unit.experiment.table.BY_CLIP:
        return None
    lens = models.of(unit.model)
    processor = processor_of(lens)
    samples, arguments = unit.read(processor, 1), unit.arguments(processor)
    unit.experiment.run(lens, samples, **arguments)
    start = time.perf_counter()
    unit.experiment.run(lens, samples, **arguments)
    return time.perf_counter() - start


def run_local(units: Sequence[Unit], out: Path, device: str = "cpu") -> Iterator[Outcome]:
    """In this process, one after the other. Units that another process has claimed are waited for at the end, and done
    here if it ends without them."""
    models, waiting = Models(device), list(units)
    while waiting:
        claimed_elsewhere = []
        for unit in waiting:
            outcome = finish(unit, out, models)
            if outcome is None:
                claimed_elsewhere.append(unit)
            else:
                yield outcome
        waiting = claimed_elsewhere
        time.sleep(AGAIN_S if waiting else 0)
