"""Runs to branch off from, and positions and states in them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from operator import index

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens import ActivationCache

from lalm_lens.errors import InputError
from lalm_lens.inputs import Embedded, Inputs
from lalm_lens.prompts import Prompt

Cache = Mapping[str, Tensor] | ActivationCache  # the latter is no mapping, and is read like one
Positions = tuple[int, ...] | range | str  # by index, from the end if negative, or the name of a region of the prompt


@dataclass(frozen=True, eq=False)
class Run:
    """One prompt, as the model takes it. Branches of the same `Run` share the work that it takes.

    `prompt` says which position belongs to which region; without it, positions are indices.
    """

    inputs: Inputs | Embedded
    prompt: Prompt | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.inputs.attention_mask) != 1:
            raise InputError(f"A run is of one prompt, and these inputs hold {len(self.inputs.attention_mask)}.")
        if self.prompt is not None and len(self.prompt) != self.n_pos - self.n_pad:
            raise InputError(f"The prompt has {len(self.prompt)} positions, and the inputs {self.n_pos - self.n_pad}.")

    def __repr__(self) -> str:
        return f"Run({self.n_pos - self.n_pad} positions{f' behind {self.n_pad} of padding' if self.n_pad else ''})"

    @property
    def is_token(self) -> Bool[Tensor, " pos"]:
        return self.inputs.attention_mask[0]

    @property
    def n_pos(self) -> int:
        """Positions, padding included."""
        return len(self.is_token)

    @property
    def n_pad(self) -> int:
        """Padding, which is on the left."""
        return int((~self.is_token).sum())

    def indices(self, positions: Positions) -> tuple[int, ...]:
        """Absolute positions, padding included. Raises `InputError` for what this run does not have."""
        if isinstance(positions, str):
            return self.region(positions)
        return indices(positions, self.n_pos)

    def has(self, region: str) -> bool:
        """Whether some position of its prompt is of that region."""
        return self.prompt is not None and any(position.region == region for position in self.prompt.positions)

    def region(self, name: str) -> tuple[int, ...]:
        if self.prompt is None:
            raise InputError(f"Where is {name!r}? Give the run its prompt: Run(inputs, prompt), or say positions.")
        hits = self.prompt.is_region(name).nonzero()[:, 0]  # pyright: ignore[reportArgumentType]  checked below
        if not len(hits):
            known = sorted({position.region for position in self.prompt.positions})
            raise InputError(f"No position of this prompt is {name!r}; its regions are {', '.join(known)}.")
        return tuple((hits + self.n_pad).tolist())


def whole_numbers(what: str, chosen: Iterable[int]) -> tuple[int, ...]:
    try:
        return tuple(map(index, chosen))
    except TypeError:
        raise InputError(f"{what} are whole numbers, in a tuple or a range; got {chosen!r}.") from None


def indices(positions: tuple[int, ...] | range, n_pos: int) -> tuple[int, ...]:
    whole = whole_numbers("positions", positions)
    if not whole or min(whole) < -n_pos or max(whole) >= n_pos:
        raise InputError(f"Positions are from 0 to {n_pos - 1}, or from the end from -1; got {whole}.")
    return tuple(position + n_pos if position < 0 else position for position in whole)


def aligned(positions: tuple[int, ...], run: Run, other: Run) -> tuple[int, ...]:
    """Where positions of a run are in another one, which is as long or has a longer or shorter transcript only."""
    if run.n_pos == other.n_pos:
        return positions
    there = dict(zip(words(run), words(other), strict=True))
    return tuple(there[position] for position in positions)


def words(run: Run) -> list[int]:
    """The positions outside of its transcript."""
    assert run.prompt is not None, "runs of different lengths are aligned by their prompts"
    return [pos + run.n_pad for pos, its in enumerate(run.prompt.positions) if its.region != "transcript"]


class Own(Enum):
    """The state that the branch itself has come to."""

    OWN = "own"


OWN = Own.OWN


@dataclass(frozen=True)
class Source:
    """States of another run, or of the branch itself, to be put somewhere.

    `run` is a `Run`, a cache of a run of one prompt, or `OWN`: what the branch itself has at an earlier point. `layer`,
    `positions`, `site` and `row` are by default those of the change that uses it.
    """

    run: Run | Cache | Own = field(repr=False)
    layer: int | None = None
    positions: Positions | None = None
    site: str | None = None
    row: int | None = None

    @property
    def at(self) -> tuple[int, ...]:
        """The positions, once they are indices."""
        assert isinstance(self.positions, tuple)
        return self.positions


def rows(state: Tensor, positions: tuple[int, ...]) -> Tensor:
    """The states at some positions: [at, ...] of [pos, ...]."""
    return state[as_index(positions, state.device)]


def as_index(positions: tuple[int, ...], device: torch.device) -> Int[Tensor, " at"]:
    return torch.tensor(positions, dtype=torch.long, device=device)
