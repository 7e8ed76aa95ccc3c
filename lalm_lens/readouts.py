"""What to read from a run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lalm_lens.errors import InputError
from lalm_lens.runs import whole_numbers
from lalm_lens.shapes import at_least_float32

Last = (-1,)


def check_read(what: str, chosen: object) -> None:
    """Raise `InputError` for anything but some whole numbers. What a region is differs from run to run."""
    if isinstance(chosen, str) or not whole_numbers(what, chosen):  # pyright: ignore[reportArgumentType]
        raise InputError(f"What is read is at some {what}, each a whole number; got {chosen!r}.")


@dataclass(frozen=True)
class Logits:
    """Logits of the chosen tokens (None is all) at the chosen positions: [branch, at, token]."""

    positions: tuple[int, ...] = Last
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_read("positions", self.positions)
        if self.tokens is not None:
            check_read("tokens", self.tokens)

    def __call__(self, logits: Float[Tensor, "branch at d_vocab"]) -> Tensor:
        return logits if self.tokens is None else logits[..., list(self.tokens)]


@dataclass(frozen=True)
class LogProbs(Logits):
    """Log-probabilities over the whole vocabulary, in float32 or wider."""

    def __call__(self, logits: Float[Tensor, "branch at d_vocab"]) -> Tensor:
        return super().__call__(at_least_float32(logits).log_softmax(-1))


@dataclass(frozen=True)
class Probabilities(Logits):
    """Probabilities over the whole vocabulary, in float32 or wider."""

    def __call__(self, logits: Float[Tensor, "branch at d_vocab"]) -> Tensor:
        return super().__call__(at_least_float32(logits).softmax(-1))


@dataclass(frozen=True)
class Score:
    """Any function of the logits at the chosen positions: a number, or more, for each branch. Several branches come
    together: what the function returns has one row for each."""

    of: Callable[[Float[Tensor, "branch at d_vocab"]], Tensor]
    positions: tuple[int, ...] = Last

    def __post_init__(self) -> None:
        check_read("positions", self.positions)

    def __call__(self, logits: Float[Tensor, "branch at d_vocab"]) -> Tensor:
        value = self.of(logits)
        if not isinstance(value, Tensor) or value.shape[:1] != logits.shape[:1]:
            raise InputError(
                f"The function of a Score is given the logits of {len(logits)} branches, {tuple(logits.shape)}, and "
                f"returns a tensor of as many rows; this one returned {of_what(value)}."
            )
        return value


@dataclass(frozen=True)
class Resid:
    """The residual stream after a block, at the chosen positions: [branch, at, d_model]."""

    layer: int
    positions: tuple[int, ...] = Last

    def __post_init__(self) -> None:
        check_read("positions", self.positions)

    def __call__(self, resid: Float[Tensor, "branch at d_model"]) -> Tensor:
        return resid


def of_what(value: object) -> str:
    return f"a shape of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


Readout = Logits | Score | Resid


def n_blocks(readout: Readout, n_layers: int) -> int:
    """How many blocks have to run. Raises `InputError` for a block that the model does not have."""
    if not isinstance(readout, Resid):
        return n_layers
    if not 0 <= readout.layer < n_layers:
        raise InputError(f"The state after block {readout.layer} is read; there are {n_layers}, counted from 0.")
    return readout.layer + 1


def stacked(values: list[Tensor]) -> Tensor:
    return torch.cat(values) if values else torch.empty(0)
