"""The experiments that a study can run, found rather than listed, and their settings as a TOML file has them."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from inspect import Parameter, isfunction, signature
from types import ModuleType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from beartype.door import is_bearable

import lalm_lens.experiments
from lalm_lens.errors import InputError, LensError
from lalm_lens.shapes import choices_of
from lalm_lens.tables import Table

GIVEN = ("model", "samples", "attribute")  # by the study
FORMS = ("form", "forms")  # the prompts of a study
NOT_SET = (*GIVEN, *FORMS, "progress")


@dataclass(frozen=True)
class Experiment:
    """A function of a model and samples that gives a table."""

    name: str
    function: Callable[..., Table]
    table: type[Table]

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        return signature(self.function).parameters

    @property
    def form_parameter(self) -> str | None:
        """What the prompt is called, where there is a choice."""
        return next((name for name in FORMS if name in self.parameters), None)

    def settings(self, given: Mapping[str, Any], n_layers: int = 1) -> dict[str, Any]:
        """Those of a TOML file as the function takes them, and its defaults for the others.

        Raises `InputError` for one that there is not, or of another type.
        """
        free = {name: its for name, its in self.parameters.items() if name not in NOT_SET}
        refuse_unknown(f"The experiment {self.name}", given, free)
        hints = {name: its.annotation for name, its in free.items()}
        set_here = {
            name: value_of(value, hints[name], f"{name} of {self.name}", n_layers) for name, value in given.items()
        }
        return {name: its.default for name, its in free.items()} | set_here

    def asked_in(self, form: str | None) -> dict[str, Any]:
        """The prompt, as the function takes it."""
        if self.form_parameter is None:
            return {}
        return {self.form_parameter: form if self.form_parameter == "form" else (form,)}

    def run(self, *args: Any, **settings: Any) -> Table:
        quiet = {"progress": False} if "progress" in self.parameters else {}
        return self.function(*args, **settings, **quiet)


@cache
def experiments() -> dict[str, Experiment]:
    """All functions of `lalm_lens.experiments` that need a model, samples and an attribute alone, and give a table."""
    modules = pkgutil.iter_modules(lalm_lens.experiments.__path__, "lalm_lens.experiments.")
    return {each.name: each for found in modules for each in experiments_in(importlib.import_module(found.name))}


def experiments_in(module: ModuleType) -> Iterator[Experiment]:
    for name, function in vars(module).items():
        if not isfunction(function) or function.__module__ != module.__name__:
            continue
        needed = signature(function)
        required = [its.name for its in needed.parameters.values() if its.default is Parameter.empty]
        table = needed.return_annotation
        table = getattr(module, table, None) if isinstance(table, str) else table
        if required[:2] != ["model", "samples"] or not set(required) <= set(GIVEN):
            continue
        if isinstance(table, type) and issubclass(table, Table):
            yield Experiment(name, function, table)


def experiment_named(name: str) -> Experiment:
    found = experiments()
    if name not in found:
        raise InputError(f"There is no experiment {name!r}. Choose one of {', '.join(sorted(found))}.")
    return found[name]


def refuse_unknown(what: str, given: Mapping[str, Any], known: Mapping[str, Any] | Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            advice = f"Did you mean {near[0]}?" if near else f"It has {', '.join(known)}."
            raise InputError(f"{what} has no setting {name!r}. {advice}")


def value_of(value: Any, hint: Any, what: str, n_layers: int = 1) -> Any:
    """A value of a TOML file as a parameter with this annotation takes it.

    A whole number may stand for another, a list is a tuple, {range = [0, 8]} a range, and {type = "WhiteNoise",
    snr_db = 0} that dataclass. Raises `InputError` for another type.
    """
    found = built(value, hint, what, n_layers)
    if is_bearable(found, hint) and (not isinstance(value, bool) or takes_bool(hint)):
        return found
    choices = choices_of(hint)
    if choices is not None:
        choices.check(what, found)
    raise InputError(f"{what} is {value!r}, and that must be {told(hint)}.")


def built(value: Any, hint: Any, what: str, n_layers: int) -> Any:
    if isinstance(value, list):
        return tuple(built(each, hint, what, n_layers) for each in value)
    if type(value) is int and not is_bearable(value, hint) and is_bearable(float(value), hint):
        return float(value)
    if not isinstance(value, dict) or is_bearable(value, hint):
        return value
    if set(value) == {"range"} and is_bearable(value["range"], list[int]) and 1 <= len(value["range"]) <= 3:
        return range(*value["range"])
    kinds = {kind.__name__: kind for kind in dataclasses_in(hint)}
    kind = kinds.get(value.get("type", ""))
    if kind is None:
        written = ", ".join(f'{{type = "{name}"}}' for name in kinds) or "no table"
        raise InputError(f"{what} is {value!r}; it may be {written}.")
    return made(kind, {name: its for name, its in value.items() if name != "type"}, what, n_layers)


def made(kind: type, given: Mapping[str, Any], what: str, n_layers: int = 1) -> Any:
    """The dataclass of those fields. `layers = "all"` are the model's, where the field takes no words."""
    hints = get_type_hints(kind)
    hints = {field.name: hints[field.name] for field in fields(kind) if field.init and field.repr}
    refuse_unknown(f"{what}, a {kind.__name__},", given, hints)
    values = {}
    for name, value in given.items():
        is_all = name == "layers" and value == "all" and not is_bearable(value, hints[name])
        values[name] = range(n_layers) if is_all else value_of(value, hints[name], f"{name} of {what}", n_layers)
    needed = [its.name for its in fields(kind) if its.default is MISSING and its.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise InputError(f"{what} needs {', '.join(missing)}.")
    try:
        return kind(**values)
    except LensError as error:
        raise InputError(f"{what}: {error}") from None


def takes_bool(hint: Any) -> bool:
    """Whether an annotation names `bool`, which Python counts among whole numbers."""
    return hint is bool or any(map(takes_bool, get_args(hint)))


def dataclasses_in(hint: Any) -> Iterator[type]:
    if is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for part in get_args(hint):
        yield from dataclasses_in(part)


def told(hint: Any) -> str:
    """An annotation in a user's words."""
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    if get_origin(hint) in (tuple, Sequence) and (of := [each for each in get_args(hint) if each is not ...]):
        return f"a list of {' and '.join(map(told, dict.fromkeys(of)))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(told(each) for each in get_args(hint) if each is not NoneType)
    return str(hint).replace("typing.", "").replace("collections.abc.", "").replace("lalm_lens.", "")
