"""What a decoder remembers of the positions it has passed, so that the next run computes the new ones alone."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Keys = Float[Tensor, "batch key_pos kv_head d_head"]


@dataclass
class KeysValues:
    """Rotated keys, and values, of one block."""

    k: Keys
    v: Keys


class KeyValueCache:
    """Keys and values of every block, and which positions are no padding.

    Empty at first; each forward that is given it appends what it computes. A forward that fails leaves it as it was:
    its length is that of the last forward that came to its end. `n_more` bounds how many positions may still come after
    the first forward.
    """

    def __init__(self, n_more: int | float = float("inf")) -> None:
        self.n_more = n_more
        self.blocks: dict[int, KeysValues] = {}
        self.is_token: Bool[Tensor, "batch pos"] | None = None
        self.begun: Bool[Tensor, "batch pos"] | None = None

    @property
    def n_pos(self) -> int:
        """Positions it holds, padding included: where the next run begins."""
        return 0 if self.is_token is None else self.is_token.shape[1]

    def with_tokens(self, is_token: Bool[Tensor, "batch new_pos"]) -> Bool[Tensor, "batch pos"]:
        """The old positions and these, which count once the forward has come to its end."""
        self.begun = is_token if self.is_token is None else torch.cat([self.is_token, is_token], dim=1)
        return self.begun

    def commit(self) -> None:
        """The forward has come to its end."""
        self.is_token = self.begun

    def extend(self, layer: int, new: KeysValues) -> KeysValues:
        """The keys and values of a block, the new ones behind the old."""
        if self.n_pos:
            old = self.blocks[layer]
            new = KeysValues(
                torch.cat([old.k[:, : self.n_pos], new.k], dim=1), torch.cat([old.v[:, : self.n_pos], new.v], dim=1)
            )
        self.blocks[layer] = new
        return new

    def __repr__(self) -> str:
        return f"KeyValueCache({len(self.blocks)} blocks, {self.n_pos} positions)"


@dataclass(frozen=True)
class Memory:
    """One block's part of a cache."""

    cache: KeyValueCache
    layer: int

    def extend(
        self, k: Float[Tensor, "batch new_pos kv_head d_head"], v: Float[Tensor, "batch new_pos kv_head d_head"]
    ) -> tuple[Keys, Keys]:
        both = self.cache.extend(self.layer, KeysValues(k, v))
        return both.k, both.v
