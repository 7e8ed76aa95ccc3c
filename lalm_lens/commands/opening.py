"""The model of a command."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lalm_lens.errors import InputError

if TYPE_CHECKING:
    from lalm_lens.model import HookedLALM
    from lalm_lens.weights import Conversion


def opened(
    model: str, *, part: list[str] | None, conversion: str | None, device: str, device_map: str | None, dtype: str
) -> "HookedLALM":
    """The checkpoint, as the options say."""
    parts, own = parts_named(part), conversion_named(conversion)
    import torch

    from lalm_lens.loading import from_pretrained

    how = {"parts": parts, "conversion": own, "dtype": getattr(torch, dtype)}
    return from_pretrained(model, device=device, device_map=device_map, **how)


def parts_named(part: list[str] | None) -> dict[str, str]:
    """The parts of a model, as they are given: name=path."""
    parts = {name: path for name, _, path in (each.partition("=") for each in part or [])}
    if not all(name and path for name, path in parts.items()) or len(parts) < len(part or []):
        raise InputError(f"--part names each part once and where it is, as llm=FOLDER; got {', '.join(part or [])}.")
    return parts


def conversion_named(named: str | None) -> "Conversion | None":
    """A `Conversion` of the user's own, which is found as Python finds modules, and in this folder first."""
    if named is None:
        return None
    from lalm_lens.weights import Conversion

    found = imported("conversion", named)
    if not isinstance(found, Conversion):
        raise InputError(f"--conversion names a Conversion as module:NAME, as my_model:MINE; {named} is none.")
    return found


def function_named(option: str, named: str) -> Callable:
    """A function of the user's own, which is found in the same way."""
    found = imported(option, named)
    if not callable(found):
        raise InputError(f"--{option} names a function as module:NAME, as my_{option}:{option}; {named} is none.")
    return found


def imported(option: str, named: str) -> Any:
    """What module:NAME stands for; None for a name that the module does not have."""
    module, _, name = named.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise InputError(f"--{option} {named} cannot be imported ({error}). Give it as module:NAME.") from error
