"""A whole study in one TOML file: models x datasets x attributes x prompts x experiments, as units of work."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lalm_lens.attributes import ATTRIBUTES, Attribute, Form
from lalm_lens.audio_visual import rows_of_audio_visual
from lalm_lens.conflict import Conflict
from lalm_lens.corrupt import OtherClip
from lalm_lens.datasets import Clip, split
from lalm_lens.datasets.clip import Row, spelled, told_apart
from lalm_lens.datasets.folder import folder_of, rows_of_folder
from lalm_lens.datasets.hub import rows_of_hub, rows_of_sakura
from lalm_lens.discovery import Experiment, experiment_named, made, refuse_unknown, value_of
from lalm_lens.draws import refuse_seed
from lalm_lens.errors import InputError, PromptError, reason
from lalm_lens.units import Opened
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
    name: str | None = None  # in tables, where that of its folder is not its own


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
        refuse_seed(self.seed)
        if self.made < 0:
            raise InputError(f"made is how many clips are made, 0 or more; got {self.made}.")
        if self.hub is None and (self.columns or self.config or self.split != "test"):
            raise InputError("split, config and columns belong to a dataset of the hub: leave them out, or give hub.")
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
        asked = [f"{its.called}, {name}" for its in study.datasets for name in its.attributes]
        if twice := [its for its in asked if asked.count(its) > 1]:
            raise InputError(f"Two datasets are {twice[0]}: give each a name of its own.")
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
        return Opened(here(table.path), table.dtype, conversion, parts, table.device_map, table.name)


def tables(given: Mapping[str, Any], key: str, least: int = 1) -> list[dict[str, Any]]:
    found = given.get(key, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found) or len(found) < least:
        raise InputError(f"A study has one [[{key}]] or more, in double brackets.")
    return found
