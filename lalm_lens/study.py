"""A whole study in one TOML file: models x datasets x attributes x prompts x experiments, as units of work."""

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch

from lalm_lens.attributes import ATTRIBUTES, Attribute, Form
from lalm_lens.audio import check_audible
from lalm_lens.conflict import Conflict
from lalm_lens.corrupt import OtherClip
from lalm_lens.datasets import Clip, Sample, cleaned, list_hub, sakura, split
from lalm_lens.datasets.folder import list_track
from lalm_lens.discovery import Experiment, experiment_named, made, refuse_unknown, value_of
from lalm_lens.errors import AudioError, DataError, InputError, LensError, PromptError, reason
from lalm_lens.loading import without_weights
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import Processor
from lalm_lens.units import Listed, Opened, Unit, fingerprint
from lalm_lens.weights import Conversion

SHARD = 16  # clips of a unit
KEYS = ("out", "prompts", "model", "dataset", "attribute", "experiment")


@dataclass(frozen=True)
class ModelTable:
    """[[model]]: a checkpoint, as `from_pretrained` opens it."""

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    parts: Mapping[str, str] = field(default_factory=dict)
    device_map: str | None = None
    conversion: str | None = None  # module:NAME


@dataclass(frozen=True)
class DatasetTable:
    """[[dataset]]: labelled clips of some attributes. One of `folder`, `hub` and `sakura` says where they are; a
    "{attribute}" in it is the attribute's name. A folder without a list may hold one folder of each attribute's name.
    `n_clips` takes so many, in the proportions of the labels; `cut` cuts those that are longer than a model hears;
    `made` is how many clips the command makes, such as the tiny models hear, in a folder that is not there yet."""

    attributes: tuple[str, ...]
    name: str | None = None
    folder: str | None = None
    hub: str | None = None
    sakura: bool | str = False  # or a copy of it
    split: str = "test"
    config: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # audio, label, transcript, speaker, question
    n_clips: int | None = None
    seed: int = 0
    cut: bool = False
    made: int = 0

    def __post_init__(self) -> None:
        if sum(map(bool, (self.folder, self.hub, self.sakura))) != 1:
            raise InputError("A dataset is one of a folder, a dataset of the hub, or sakura: give that one.")
        if self.made and "{attribute}" not in (self.folder or ""):
            raise InputError('Clips are made in a folder for each attribute, as folder = "clips/{attribute}".')
        if not self.attributes:
            raise InputError("A dataset needs attributes: what is asked about its clips.")

    @property
    def called(self) -> str:
        return self.name or self.folder or self.hub or "SAKURA"

    def at(self, base: Path, attribute: str) -> Path:
        """The folder beside the study's file, with the attribute's name as it is, or as Gender where that is there."""
        path = str(self.folder or self.hub or self.sakura)
        folders = [base / Path(written(path, name)).expanduser() for name in (attribute, attribute.capitalize())]
        return next((folder for folder in folders if folder.is_dir()), folders[0])

    def list(self, attribute: Attribute, base: Path) -> list[Clip]:
        """Raises `DataError` for a list that cannot be read."""
        folder = self.at(base, attribute.name)
        if self.sakura:
            clips = sakura(attribute, None if self.sakura is True else folder)
        elif self.folder:
            clips = list_track(folder, attribute)
        else:
            where = str(folder) if folder.is_dir() else written(str(self.hub), attribute.name)
            clips = list_hub(where, split=self.split, config=self.config, **self.columns)
        return clips if self.n_clips is None or self.n_clips >= len(clips) else split(clips, self.n_clips, self.seed)[0]


def written(path: str, attribute: str) -> str:
    return path.replace("{attribute}", attribute)


@dataclass(frozen=True)
class Chosen:
    """[[experiment]]: which, with which settings, in which prompts, with which models and about which attributes (all,
    if there are none), how many clips a unit, and of which texts that agree or disagree with them."""

    experiment: Experiment
    given: Mapping[str, Any]
    prompts: tuple[Form | None, ...]
    models: tuple[str, ...]  # paths, as they are written
    attributes: tuple[str, ...]
    shard: int | None  # None: all clips of a dataset
    conflict: Conflict | None = None

    def is_about(self, model: str, attribute: str) -> bool:
        return model in (self.models or (model,)) and attribute in (self.attributes or (attribute,))

    @classmethod
    def of(cls, table: Mapping[str, Any], prompts: tuple[Form, ...]) -> "Chosen":
        given = dict(table)
        experiment = experiment_named(name_of(given))
        own = given.pop("prompts", None)
        asked: tuple[Form | None, ...] = prompts if own is None else prompts_of(own, f"prompts of {experiment.name}")
        if experiment.form_parameter is None:
            if own is not None:
                raise InputError(f"The experiment {experiment.name} asks in one prompt alone: leave out prompts.")
            asked = (None,)
        models, attributes = (
            value_of(given.pop(key, []), tuple[str, ...], f"{key} of {experiment.name}")
            for key in ("models", "attributes")
        )
        shard = value_of(given.pop("shard", SHARD if experiment.table.BY_CLIP else None), int | None, "shard")
        if shard is not None and (shard < 1 or not experiment.table.BY_CLIP):
            raise InputError(
                f"shard is {shard}: it is a number of clips, 1 or more."
                if experiment.table.BY_CLIP
                else f"What {experiment.name} says of a clip depends on the others: leave out shard."
            )
        conflict = conflict_of(given.pop("conflict", None))
        settings = experiment.settings(given)
        if conflict is not None and any(isinstance(value, OtherClip) for value in settings.values()):
            raise InputError(
                f"{experiment.name} of a conflict can be corrupted by silence or noise, not by other clips."
            )
        return cls(experiment, given, asked, models, attributes, shard, conflict)


def conflict_of(given: Any) -> Conflict | None:
    if not isinstance(given, dict | None):
        raise InputError(
            f'conflict is {given!r}; write what make_conflict takes, as conflict = {{ order = "text_first" }}.'
        )
    return None if given is None else made(Conflict, given, "conflict")


def name_of(table: dict[str, Any]) -> str:
    if not isinstance(name := table.pop("name", None), str):
        raise InputError('Each [[experiment]] needs its name, as name = "causal_trace".')
    return name


def prompts_of(given: Any, what: str) -> tuple[Form, ...]:
    prompts = value_of(given, Sequence[Form], what)
    if not prompts:
        raise InputError(f"{what} are none: name one or more of {', '.join(get_args(Form))}.")
    return prompts


@dataclass(frozen=True)
class Study:
    """What a TOML file says; relative folders in it are beside the file."""

    path: Path
    text: str
    out: Path
    models: tuple[ModelTable, ...]
    datasets: tuple[DatasetTable, ...]
    attributes: Mapping[str, Attribute]
    experiments: tuple[Chosen, ...]

    @classmethod
    def read(cls, path: str | Path, out: str | Path | None = None) -> "Study":
        """Raises `InputError` for what a study does not have, and for settings that an experiment does not."""
        path = Path(path).absolute()  # workers may run elsewhere
        try:
            return cls.of(path.read_text(encoding="utf-8"), path, out)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path} cannot be read as a study ({reason(error)}).") from None

    @classmethod
    def of(cls, text: str, path: Path, out: str | Path | None = None) -> "Study":
        """What a text says as if it stood at `path`. Raises what `read` does, and `TOMLDecodeError`."""
        given = tomllib.loads(text)
        refuse_unknown(str(path), given, KEYS)
        own = tuple(made(Attribute, each, "attribute") for each in tables(given, "attribute", least=0))
        attributes = {**ATTRIBUTES, **{each.name: each for each in own}}
        prompts = prompts_of(given.get("prompts", ["P3"]), "prompts")
        study = cls(
            path=path,
            text=text,
            out=Path(out) if out is not None else path.parent / value_of(given.get("out", path.stem), str, "out"),
            models=tuple(made(ModelTable, each, "model") for each in tables(given, "model")),
            datasets=tuple(made(DatasetTable, each, "dataset") for each in tables(given, "dataset")),
            attributes=attributes,
            experiments=tuple(Chosen.of(each, prompts) for each in tables(given, "experiment")),
        )
        for asked in (*study.datasets, *study.experiments):
            for name in asked.attributes:
                study.attribute(name)
        paths = [model.path for model in study.models]
        if unknown := [path for chosen in study.experiments for path in chosen.models if path not in paths]:
            raise InputError(f"No [[model]] has the path {unknown[0]!r}, only {', '.join(paths)}.")
        return study

    def attribute(self, name: str) -> Attribute:
        if name not in self.attributes:
            raise PromptError(
                f"There is no attribute {name!r}. Choose one of {', '.join(self.attributes)}, or write one as an "
                "[[attribute]]."
            )
        return self.attributes[name]

    def opened(self, table: ModelTable, conversion_named: Callable[[str | None], Conversion | None]) -> Opened:
        def here(path: str) -> str:
            folder = self.path.parent / Path(path).expanduser()
            return str(folder) if folder.is_dir() else path  # else an id on the Hub

        parts = {name: here(path) for name, path in table.parts.items()}
        conversion = conversion_named(table.conversion)
        return Opened(here(table.path), table.dtype, conversion, parts, table.device_map)


def tables(given: Mapping[str, Any], key: str, least: int = 1) -> list[dict[str, Any]]:
    found = given.get(key, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found) or len(found) < least:
        raise InputError(f"A study has one [[{key}]] or more, in double brackets.")
    return found


@dataclass(frozen=True)
class Screened:
    """The clips of a dataset that can be read and are labelled as the attribute's are, how long they are, and why
    others are left out."""

    dataset: DatasetTable
    attribute: Attribute
    clips: tuple[Listed, ...]
    lengths: tuple[int, ...]
    excluded: Mapping[str, str]

    @classmethod
    def of(cls, dataset: DatasetTable, attribute: Attribute, clips: Sequence[Clip]) -> "Screened":
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda clip: looked_at(clip, attribute), clips))
        good = [its for its in found if not isinstance(its, str)]
        bad = {clip.name: its for clip, its in zip(clips, found, strict=True) if isinstance(its, str)}
        listed, lengths = zip(*good, strict=True) if good else ((), ())
        return cls(dataset, attribute, listed, lengths, bad)

    def heard_by(self, processor: Processor) -> "Screened":
        """Without those that the model cannot hear to their end, unless they are cut."""
        too_long = {}
        for listed, n in zip(self.clips, self.lengths, strict=True):
            try:
                processor.check_audible(torch.zeros(min(n, processor.n_samples) if self.dataset.cut else n), "")
            except AudioError as error:
                too_long[listed.clip.name] = f"{listed.clip.name}{error}"
        kept = [pair for pair in zip(self.clips, self.lengths, strict=True) if pair[0].clip.name not in too_long]
        if not kept:
            first = next(iter({**self.excluded, **too_long}.values()))
            raise DataError(f"No clip of {self.dataset.called} can be asked about {self.attribute.name}: {first}")
        listed, lengths = zip(*kept, strict=True)
        return replace(self, clips=listed, lengths=lengths, excluded={**self.excluded, **too_long})


def looked_at(clip: Clip, attribute: Attribute) -> tuple[Listed, int] | str:
    """The clip with its hash and its length, or why it is left out."""
    try:
        (clip,) = cleaned([clip], attribute)
        sample, digest = clip.read(), clip.digest
        check_audible(sample.waveform, len(sample.waveform), clip.name)
        refuse_silence(sample)
    except (AudioError, DataError, OSError) as error:
        return reason(error)
    return Listed(clip, digest), len(sample.waveform)


def refuse_silence(sample: Sample) -> None:
    if not sample.waveform.any():
        raise AudioError(f"{sample.name} is digital silence, so there is nothing to hear in it.")


@dataclass(frozen=True)
class Planned:
    """The units of a study in their order, and the clips and models that are left out of it."""

    study: Study
    units: tuple[Unit, ...]
    excluded: pd.DataFrame  # model, dataset, attribute, sample, reason
    failed: Mapping[str, str] = field(default_factory=dict)  # why models cannot be opened, by their paths

    @cached_property
    def n_clips(self) -> int:
        return sum(len(unit.clips) for unit in self.units)


def planned(study: Study, conversion_named: Callable[[str | None], Conversion | None] = lambda name: None) -> Planned:
    """Read all clips and the files of all models once, and no weights into memory.

    Models that cannot be opened are left out. Raises `InputError` if that is all of them, and `DataError` for a dataset
    without a clip that a model can be asked about."""
    screened = [
        Screened.of(dataset, attribute, dataset.list(attribute, study.path.parent))
        for dataset in study.datasets
        for attribute in map(study.attribute, dataset.attributes)
    ]
    units, left_out, failed = {}, [], {}
    for table in study.models:
        opened = study.opened(table, conversion_named)
        try:
            model, weights = that_hears(opened), fingerprint(opened)
        except (LensError, OSError) as error:
            failed[table.path] = str(error)
            continue
        assert model.processor is not None
        heard = [each.heard_by(model.processor) for each in screened]
        left_out += [
            {"model": model.cfg.model_name, "dataset": each.dataset.called, "attribute": each.attribute.name}
            | {"sample": name, "reason": why}
            for each in heard
            for name, why in each.excluded.items()
        ]
        for chosen, each in product(study.experiments, heard):
            if chosen.is_about(table.path, each.attribute.name):
                units |= {unit.hash: unit for unit in units_of(chosen, each, opened, model, weights)}
    if len(failed) == len(study.models):
        raise InputError(f"No model of {study.path} can be opened. {'; '.join(failed.values())}")
    columns = ["model", "dataset", "attribute", "sample", "reason"]
    return Planned(study, tuple(units.values()), pd.DataFrame(left_out, columns=columns, dtype="str"), failed)


def that_hears(opened: Opened) -> HookedLALM:
    model = without_weights(opened.path, **opened.files)
    if model.processor is None:
        raise InputError(f"{opened.path} has no tokenizer and feature extractor beside it: save the processor there.")
    return model


def units_of(chosen: Chosen, screened: Screened, opened: Opened, model: HookedLALM, weights: str) -> Iterator[Unit]:
    assert model.processor is not None
    settings = chosen.experiment.settings(chosen.given, model.decoder_cfg.n_layers)
    about = (opened, model.cfg.model_name, weights, screened.dataset.called, screened.attribute)
    n_heard = model.processor.n_samples if screened.dataset.cut else None
    n = chosen.shard or len(screened.clips)
    every = [its.clip for its in screened.clips]
    conflict = None if chosen.conflict is None else chosen.conflict.among(every, screened.attribute)
    for form in chosen.prompts:
        for start in range(0, len(screened.clips), n):
            clips = screened.clips[start : start + n]
            others = others_of(clips, screened.clips, settings)
            yield Unit(*about, form, chosen.experiment, settings, clips, others, n_heard, conflict)


def others_of(clips: Sequence[Listed], every: Sequence[Listed], settings: Mapping[str, Any]) -> tuple[Listed, ...]:
    """What may be heard in place of these clips: of all that there are, those that are chosen."""
    by_name = {its.clip.name: its for its in every}
    corruptions = [value for value in settings.values() if isinstance(value, OtherClip)]
    chosen = {
        corruption.choose(its.clip, [other.clip for other in every]).name: None
        for corruption in corruptions
        for its in clips
    }
    return tuple(by_name[name] for name in chosen)
