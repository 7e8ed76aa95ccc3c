"""A prompt as tokens, each of which knows what it is."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from lalm_lens.pieces import Piece, Region, Segment


@dataclass(frozen=True)
class Position:
    """What one position of the merged sequence is."""

    token: str
    region: Region
    segment: Segment = "none"
    label: str | None = None  # of an object token: the option it belongs to
    is_correct: bool = False  # and whether that option is the answer


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids with `Position`s beside them, unpadded."""

    tokens: tuple[int, ...]
    positions: tuple[Position, ...]

    @classmethod
    def of(cls, tokens: Sequence[int], owners: Iterable[Piece], decode: Callable[[list[int]], str]) -> "Prompt":
        """From tokens and the piece that each of them belongs to. The last one is where the answer is read."""
        positions = [
            Position(decode([token]), piece.region, piece.segment, piece.label)
            for token, piece in zip(tokens, owners, strict=True)
        ]
        positions[-1] = replace(positions[-1], region="last", segment="last")
        return cls(tuple(tokens), tuple(positions))

    def insert(self, at: int, tokens: Sequence[int], texts: Sequence[str], region: Region) -> "Prompt":
        """With tokens of one region before the position `at`."""
        new = (Position(text, region) for text in texts)
        return Prompt(
            (*self.tokens[:at], *tokens, *self.tokens[at:]), (*self.positions[:at], *new, *self.positions[at:])
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def is_region(self, *regions: Region) -> Bool[Tensor, " pos"]:
        return torch.tensor([position.region in regions for position in self.positions])
