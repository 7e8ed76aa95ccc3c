"""The words for axes, and `typed`, which checks them on public functions.

batch             prompts in one forward              clip       recordings in one forward
pos               positions of the merged sequence    audio_pos  positions that hold audio (40 ms each in Qwen2-Audio)
query_pos key_pos the two axes of an attention map    layer      0-based index of a block
head kv_head      attention heads, key-value heads    d_head d_model d_mlp d_vocab   widths
frame             images, and instants of videos     vision_pos positions that hold what is seen
tap clip_tap      states of the encoder that a Q-Former looks at; those of each clip, one clip after the other
state_pos         positions of the encoder            pair       two numbers of a head that rotate together
samples           16 kHz audio samples                frames mel 10 ms mel frames, mel bins
"""

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from inspect import signature
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin

import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor

from lalm_lens.errors import InputError

F = TypeVar("F", bound=Callable)


def typed(function: F) -> F:
    """Check the shapes of a public function at each call (about 20 us). Inner code is checked in tests only.

    A word that is none of the choices raises `InputError`, which names them."""
    checked = jaxtyped(typechecker=beartype)(function)
    found = {name: choices_of(its.annotation) for name, its in signature(function).parameters.items()}
    choices = {name: its for name, its in found.items() if its is not None}

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in choices.keys() & kwargs.keys():
            choices[name].check(name, kwargs[name])
        return checked(*args, **kwargs)

    return cast(F, call if choices else checked)


class Choices(NamedTuple):
    words: tuple[str, ...]
    is_list: bool

    def check(self, name: str, given: object) -> None:
        if self.is_list and isinstance(given, str):
            raise InputError(f"{name} is a list of {', '.join(self.words)}; got {given!r}.")
        words = given if self.is_list and isinstance(given, Iterable) else (given,)
        for word in words:
            if isinstance(word, str) and word not in self.words:
                raise InputError(f"{name} is one of {', '.join(self.words)}; got {word!r}.")


def choices_of(hint: Any) -> Choices | None:
    """The words of a `Literal`, of a sequence of them, or of what may also be something else."""
    if get_origin(hint) is Literal:
        return Choices(get_args(hint), is_list=False)
    if get_origin(hint) is Sequence and get_origin(get_args(hint)[0]) is Literal:
        return Choices(get_args(get_args(hint)[0]), is_list=True)
    if get_origin(hint) in (Union, UnionType):
        return next(filter(None, map(choices_of, get_args(hint))), None)
    return None


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it was: what norms, rotations and softmaxes are computed in."""
    return x.to(widened(x.dtype))


def widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
