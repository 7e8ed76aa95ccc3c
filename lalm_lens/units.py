"""The unit of a study: one experiment on some clips, and the one file that it becomes.

The file is named by a hash of all that decides what stands in it, so that a unit that is finished is known by its name,
and what was computed of other weights, clips or settings is never taken for it.
"""

import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from hashlib import file_digest, sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lalm_lens.attributes import Attribute
from lalm_lens.conflict import Conflict
from lalm_lens.corrupt import OtherClip
from lalm_lens.datasets import Clip, Sample, cut_to
from lalm_lens.discovery import Experiment
from lalm_lens.errors import DataError, InputError
from lalm_lens.loading import UNWANTED, WANTED, Files
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import Processor
from lalm_lens.tables import Table
from lalm_lens.weights import Conversion

ABOUT = b"lalm_lens"  # the key of the provenance among a file's metadata
CLAIMS = ".claims"  # a folder beside the files
PACKAGES = ("lalm_lens", "torch", "transformers", "transformer_lens", "numpy", "soxr")


@dataclass(frozen=True)
class Opened:
    """Which model, and how it is opened."""

    path: str
    dtype: str
    conversion: Conversion | None = field(default=None, repr=False)
    parts: Mapping[str, str] = field(default_factory=dict)
    device_map: str | None = None
    name: str | None = None  # in tables; else that of its folder

    @property
    def files(self) -> dict:
        return {"conversion": self.conversion, "parts": dict(self.parts)}

    def named(self, model: HookedLALM) -> HookedLALM:
        """The model, called as the study calls it."""
        if self.name is not None:
            model.cfg.model_name = self.name
        return model


def fingerprint(model: Opened) -> str:
    """A hash of the content of all files that a model is read from, its weights, config and processor."""
    found = Files.find(model.path, model.conversion, model.parts)
    folders = {"": found.folder, **found.parts}
    paths = [(f"{part}/{path.name}", path) for part, folder in folders.items() for path in files_of(folder)]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest_of, [path for _, path in paths]))
    return sha256(json.dumps(sorted(zip((name for name, _ in paths), digests, strict=True))).encode()).hexdigest()


def code_of(conversion: Conversion | None) -> str | None:
    """A hash of the files that a conversion of the user's own is written in; of others the version tells."""
    if conversion is None:
        return None
    modules = {str(getattr(getattr(conversion, its.name), "__module__", "")) for its in fields(conversion)}
    files = [getattr(sys.modules.get(name), "__file__", None) for name in modules if not is_ours(name)]
    return sha256("".join(sorted(digest_of(Path(file)) for file in files if file)).encode()).hexdigest()


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("lalm_lens", "conversions", "builtins")


def files_of(folder: Path) -> list[Path]:
    wanted = {path for pattern in WANTED for path in folder.glob(pattern)}
    return sorted(wanted - {path for pattern in UNWANTED for path in folder.glob(pattern)})


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, eq=False)
class Listed:
    """A clip that is not broken, and the hash of what it was when that was found."""

    clip: Clip
    digest: str

    def given_to(self, processor: Processor) -> Sample:
        """Raises `DataError` if it has changed since."""
        if self.clip.digest != self.digest:
            raise DataError(f"{self.clip.name} has changed since this run began. Run the study again.")
        return self.clip.given_to(processor)


@dataclass(frozen=True, eq=False)
class Unit:
    """An experiment with a model, about some clips of a dataset."""

    model: Opened
    model_name: str
    fingerprint: str
    dataset: str
    attribute: Attribute
    form: str | None
    experiment: Experiment = field(repr=False)
    settings: Mapping[str, Any]
    clips: tuple[Listed, ...] = field(repr=False)
    others: tuple[Listed, ...] = field(repr=False, default=())  # what is heard in place of them
    n_heard: int | None = None  # samples that clips are cut to
    conflict: Conflict | None = None  # what is made of the clips

    @property
    def called(self) -> str:
        first, last = self.clips[0].clip.name, self.clips[-1].clip.name
        about = (self.experiment.name, self.model_name, self.attribute.name, self.form, f"{first} to {last}")
        return ", ".join(filter(None, about))

    @cached_property
    def told(self) -> dict[str, str]:
        """All settings, in words."""
        settings = dict(self.settings) if self.conflict is None else {**self.settings, "conflict": self.conflict}
        return {name: repr(value) for name, value in sorted(settings.items())}

    @property
    def states(self) -> dict[str, dict[str, str]]:
        """What texts state of the clips, where there are any."""
        if self.conflict is None:
            return {}
        stated = self.conflict.states or {}
        return {"states": {its.clip.name: stated[its.clip.name] for its in self.clips}}

    @cached_property
    def key(self) -> dict[str, Any]:
        """All that decides the numbers."""
        return {
            "lalm_lens": version("lalm_lens"),
            "model": self.model_name,
            "fingerprint": self.fingerprint,
            "dtype": self.model.dtype,
            "conversion": code_of(self.model.conversion),
            "dataset": self.dataset,
            "attribute": asdict(self.attribute),
            "form": self.form,
            "experiment": self.experiment.name,
            "settings": self.told,
            "clips": [(its.clip.name, its.digest, its.clip.speaker) for its in self.clips],
            "others": [(its.clip.name, its.digest) for its in self.others],
            "n_heard": self.n_heard,
            **self.states,
        }

    @cached_property
    def hash(self) -> str:
        return sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:32]

    def path(self, out: Path) -> Path:
        return out / f"{self.experiment.name}-{self.hash}.parquet"

    def is_finished(self, out: Path) -> bool:
        return self.path(out).is_file()

    def read(self, processor: Processor, n: int | None = None) -> list[Sample]:
        """What the experiment is given: all clips, or the first `n`; or what a conflict makes of them."""
        samples = self.as_given(self.clips[:n], processor)
        return samples if self.conflict is None else [*self.conflict.of(samples, self.attribute)]

    def as_given(self, clips: tuple[Listed, ...], processor: Processor) -> list[Sample]:
        samples = [its.given_to(processor) for its in clips]
        return samples if self.n_heard is None else cut_to(samples, self.n_heard)

    def arguments(self, processor: Processor) -> dict[str, Any]:
        """Of the experiment, beside model and samples."""
        settings = dict(self.settings)
        for name, value in settings.items():
            if isinstance(value, OtherClip):
                settings[name] = replace(value, among=tuple(self.as_given(self.others, processor)))
        return {"attribute": self.attribute, **self.experiment.asked_in(self.form), **settings}

    @property
    def seed(self) -> str | None:
        """The experiment's own, else that of one of its settings, else that of the conflict."""
        if "seed" in self.settings:
            return repr(self.settings["seed"])
        drawn: list[Any] = [*self.settings.values(), self.conflict]
        return next((repr(its.seed) for its in drawn if hasattr(its, "seed")), None)

    def write(self, table: Table, out: Path, excluded: Mapping[str, str], wall_s: float, device: str) -> Path:
        told = {
            **self.key,
            "excluded": dict(excluded),
            "seed": self.seed,
            "wall_s": wall_s,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device,
            "device_map": self.model.device_map,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "command": sys.argv,
            "path": self.model.path,
        }
        return table.write(self.path(out), {ABOUT.decode(): json.dumps(told)})


@contextmanager
def claimed(unit: Unit, out: Path) -> Iterator[bool]:
    """Whether the unit is ours, to run and write: nobody else's who writes to the same folder. The system gives up the
    claim of a process that has ended, however it did."""
    folder = out / CLAIMS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / unit.hash
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
        if unit.is_finished(out):
            path.unlink(missing_ok=True)
    finally:
        lock.release()


def forget_claims(units: Iterable[Unit], out: Path) -> None:
    """On units that are finished, of processes that ended just then."""
    finished = {unit.hash for unit in units if unit.is_finished(out)}
    for path in (out / CLAIMS).glob("*"):
        if path.name in finished:
            path.unlink(missing_ok=True)


def writable(out: Path) -> None:
    """Make the folder of a study. Raises `InputError` where none can be, or nothing can be written to it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Nothing can be written to {out} ({error.strerror}).") from None
    if not os.access(out, os.W_OK):
        raise InputError(f"Nothing can be written to {out}: you may not write there.")
