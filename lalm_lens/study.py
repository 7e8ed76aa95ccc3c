"""A whole study in one TOML file: models x datasets x attributes x prompts x experiments, as units of work."""

import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch

from lalm_lens.attributes import ATTRIBUTES, Attribute, Form
from lalm_lens.audio import check_audible, check_sounding
from lalm_lens.audio_visual import SeenClip, rows_of_audio_visual, swap_clips
from lalm_lens.conflict import Conflict
from lalm_lens.corrupt import OtherClip
from lalm_lens.datasets import Clip, Refused, split
from lalm_lens.datasets.clip import Row, spelled, told_apart
from lalm_lens.datasets.folder import folder_of, rows_of_folder
from lalm_lens.datasets.hub import rows_of_hub, rows_of_sakura
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
    `n_clips` takes so many of the good ones, in the proportions of the labels, and with `by_speaker` whole speakers;
    `cut` cuts those that are longer than a model hears;
    `seen` shows a model the pictures that are listed beside each clip, or with "swapped" those beside another clip;
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
    by_speaker: bool = False
    seen: Literal["own", "swapped"] | None = None
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
        if self.n_clips is not None and self.n_clips < 1:
            raise InputError(f"n_clips of a dataset is {self.n_clips}: it is a number of clips, 1 or more.")
        if self.seen and (self.folder is None or self.cut):
            raise InputError("What is seen is listed in a folder, beside whole clips: give folder, without cut.")
        if self.by_speaker and self.n_clips is None:
            raise InputError("by_speaker says how n_clips are taken of a dataset: give n_clips too.")

    @property
    def called(self) -> str:
        return self.name or self.folder or self.hub or "SAKURA"

    def at(self, base: Path, attribute: str) -> Path:
        """The folder beside the study's file, with the attribute's name as it is, or as Gender where that is there."""
        path = str(self.folder or self.hub or self.sakura)
        folders = [base / Path(written(path, name)).expanduser() for name in (attribute, attribute.capitalize())]
        return next((folder for folder in folders if folder.is_dir()), folders[0])

    def list(self, attribute: Attribute, base: Path) -> list[Row]:
        """What is listed, clips with labels as the attribute spells them, or not. Raises `DataError` for a list that
        cannot be read."""
        folder = self.at(base, attribute.name)
        if self.sakura:
            rows = rows_of_sakura(attribute, None if self.sakura is True else folder)
        elif self.folder:
            rows = (rows_of_audio_visual if self.seen else rows_of_folder)(folder_of(folder, attribute))
        else:
            where = str(folder) if folder.is_dir() else written(str(self.hub), attribute.name)
            rows = rows_of_hub(where, split=self.split, config=self.config, **self.columns)
        return spelled(told_apart(rows), attribute)

    def drawn(self, clips: Sequence[Clip]) -> Sequence[Clip]:
        """`n_clips` of them. Raises `DataError` where a speaker is not known."""
        if self.n_clips is None or self.n_clips >= len(clips):
            return clips
        return split(clips, self.n_clips, self.seed, by_speaker=self.by_speaker)[0]


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
    """The clips of a dataset that can be read and are labelled as the attribute's are, how long they are, and what is
    left out, and why."""

    dataset: DatasetTable
    attribute: Attribute
    clips: tuple[Listed, ...]
    lengths: tuple[int, ...]
    excluded: tuple[Refused, ...]

    @classmethod
    def of(cls, dataset: DatasetTable, attribute: Attribute, rows: Sequence[Row]) -> "Screened":
        """All sounds are read before some are drawn, so that what is broken changes nothing of what is drawn."""
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(looked_at, rows))
        bad = tuple(its for its in found if isinstance(its, Refused))
        good = {its[0].clip.name: its for its in found if not isinstance(its, Refused)}
        drawn = dataset.drawn([listed.clip for listed, _ in good.values()])
        kept = [good[clip.name] for clip in drawn]
        if dataset.seen == "swapped":
            kept = swapped(kept, dataset.seed)
        return cls(dataset, attribute, *unzipped(kept), bad)

    @property
    def called(self) -> str:
        return f"{self.dataset.called}, {self.attribute.name}"

    @property
    def lack(self) -> str:
        """Why there are no clips."""
        why = self.excluded[0].reason if self.excluded else "no clip is listed."
        return f"No clip of {self.dataset.called} can be asked about {self.attribute.name}: {why}"

    def heard_by(self, processor: Processor) -> "Screened":
        """Without those that the model cannot hear to their end, unless they are cut; none if it cannot see them."""
        if self.dataset.seen and processor.cfg.vision is None:
            why = Refused("every clip", f"A {processor.cfg.model_type} model hears and does not see.")
            return replace(self, clips=(), lengths=(), excluded=(why,))
        kept, bad = [], list(self.excluded)
        for listed, n in zip(self.clips, self.lengths, strict=True):
            try:
                processor.check_audible(torch.zeros(min(n, processor.n_samples) if self.dataset.cut else n), "")
                kept.append((listed, n))
            except AudioError as error:
                bad.append(Refused(listed.clip.name, f"{listed.clip.name}{error}"))
        clips, lengths = unzipped(kept)
        return replace(self, clips=clips, lengths=lengths, excluded=tuple(bad))


def unzipped(pairs: Sequence[tuple[Listed, int]]) -> tuple[tuple[Listed, ...], tuple[int, ...]]:
    return tuple(listed for listed, _ in pairs), tuple(n for _, n in pairs)


def swapped(kept: Sequence[tuple[Listed, int]], seed: int) -> list[tuple[Listed, int]]:
    """What is seen of each with the sound of another, as long as its own. Raises what `swap_audio` does."""
    lengths = {listed.clip.name: n for listed, n in kept}
    clips = swap_clips([listed.clip for listed, _ in kept if isinstance(listed.clip, SeenClip)], seed)
    return [(Listed(clip, clip.digest), lengths[clip.seen.name]) for clip in clips]


def looked_at(row: Row) -> tuple[Listed, int] | Refused:
    """A clip with its hash and its length, or why it is left out."""
    if isinstance(row, Refused):
        return row
    try:
        sample, digest = row.read(), row.digest
        check_audible(sample.waveform, len(sample.waveform), row.name)
        check_sounding(sample.waveform, row.name)
    except (AudioError, DataError, OSError) as error:  # DataError: of a picture
        return Refused(row.name, reason(error))
    return Listed(row, digest), len(sample.waveform)


@dataclass(frozen=True)
class Planned:
    """The units of a study in their order, and what is left out of it: clips; models by their paths, datasets with the
    attribute that is asked about, and the pair where a model hears none of its clips."""

    study: Study
    units: tuple[Unit, ...]
    excluded: pd.DataFrame  # model, dataset, attribute, sample, reason
    failed: Mapping[str, str] = field(default_factory=dict)  # what is left out altogether, and why

    @cached_property
    def n_clips(self) -> int:
        return sum(len(unit.clips) for unit in self.units)


def planned(study: Study, conversion_named: Callable[[str | None], Conversion | None] = lambda name: None) -> Planned:
    """Read all clips and the files of all models once, and no weights into memory.

    Models that cannot be opened, datasets that cannot be listed or have no good clip, and what cannot be asked of them
    are left out, and the rest is planned. Raises `InputError` if no model can be opened, and `DataError` if nothing is
    left for another reason, with all reasons."""
    failed: dict[str, str] = {}
    screened = screened_of(study, failed)
    refuse_nothing(study, failed, [each for each in screened if each.clips])
    units, left_out, n_opened = {}, [], 0
    for table in study.models:
        opened = study.opened(table, conversion_named)
        try:
            model, weights = that_hears(opened), fingerprint(opened)
        except (LensError, OSError) as error:
            failed[table.path] = str(error)
            continue
        assert model.processor is not None
        n_opened += 1
        heard = [each.heard_by(model.processor) for each in screened]
        failed |= {
            f"{table.path}, {after.called}": after.lack
            for before, after in zip(screened, heard, strict=True)
            if before.clips and not after.clips
        }
        left_out += [
            {"model": model.cfg.model_name, "dataset": each.dataset.called, "attribute": each.attribute.name}
            | {"sample": its.name, "reason": its.reason}
            for each in heard
            for its in each.excluded
        ]
        for chosen, each in product(study.experiments, heard):
            if each.clips and chosen.is_about(table.path, each.attribute.name):
                try:
                    units |= {unit.hash: unit for unit in units_of(chosen, each, opened, model, weights)}
                except LensError as error:
                    failed[f"{chosen.experiment.name}, {table.path}, {each.called}"] = str(error)
    if not n_opened:
        reasons = "; ".join(why for what, why in failed.items() if what in {table.path for table in study.models})
        raise InputError(f"No model of {study.path} can be opened. {reasons}")
    refuse_nothing(study, failed, units)
    columns = ["model", "dataset", "attribute", "sample", "reason"]
    return Planned(study, tuple(units.values()), pd.DataFrame(left_out, columns=columns, dtype="str"), failed)


def screened_of(study: Study, failed: dict[str, str]) -> list[Screened]:
    """Each dataset about each of its attributes; `failed` is told which cannot be listed, or have no good clip."""
    found = []
    for dataset in study.datasets:
        for attribute in map(study.attribute, dataset.attributes):
            try:
                found.append(Screened.of(dataset, attribute, dataset.list(attribute, study.path.parent)))
            except (LensError, OSError) as error:
                failed[f"{dataset.called}, {attribute.name}"] = str(error)
    failed |= {each.called: each.lack for each in found if not each.clips}
    return found


def refuse_nothing(study: Study, failed: Mapping[str, str], left: Collection) -> None:
    if not left:
        reasons = "; ".join(dict.fromkeys(failed.values())) or "No experiment is about its models and attributes."
        raise DataError(f"Nothing of {study.path} can be run. {reasons}")


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
