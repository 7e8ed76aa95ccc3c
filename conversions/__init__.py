"""One file per checkpoint family, data more than code. A file that defines a `Conversion` is found by itself.

A conversion imports only `lalm_lens.{config,errors,weights,nn,encoders,adapters,prompts}`.
"""

import importlib
import pkgutil

from lalm_lens.weights import Conversion

OWNER = "lalm_lens"  # PyPI has an unrelated package `conversions`: this tells ours from it


def available() -> dict[str, Conversion]:
    """Every built-in conversion, by HF `model_type`."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Conversion)]
    return {conversion.model_type: conversion for conversion in found}
