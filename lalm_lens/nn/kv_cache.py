"""What a decoder remembers of the positions it has passed, so that the next run computes the new ones alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
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
        self.n_tokens: Sequence[int] = ()  # of each prompt, as the first forward met it
        self.begun: Bool[Tensor, "batch pos"] | None = None
        self.shift: Int[Tensor, "batch 1"] | int = 0  # how far positions are ahead of the number of tokens
        self.begun_shift: Int[Tensor, "batch 1"] | int = 0

    @property
    def n_pos(self) -> int:
        """Positions it holds, padding included: where the next run begins."""
        return 0 if self.is_token is None else self.is_token.shape[1]

    def with_tokens(self, is_token: Bool[Tensor, "batch new_pos"]) -> Bool[Tensor, "batch pos"]:
        """The old positions and these, which count once the forward has come to its end."""
        self.begun_shift = self.shift
        self.begun = is_token if self.is_token is None else torch.cat([self.is_token, is_token], dim=1)
        return self.begun

    def with_positions(self, positions: Int[Tensor, "axis batch new_pos"], is_token: Bool[Tensor, "batch pos"]) -> None:
        """What comes next goes on after the largest of these positions, once the forward has come to its end."""
        is_new = is_token[:, -positions.shape[-1] :]
        self.begun_shift = positions.amax(0).masked_fill(~is_new, -1).amax(-1, True) + 1 - is_token.sum(-1, True)

    def of_prompts(self, n_tokens: Sequence[int]) -> Sequence[int]:
        """The lengths of the prompts, which a first forward brings: what comes behind them is no part of them."""
        if not self.n_pos:
            self.n_tokens = n_tokens
        return self.n_tokens

    def commit(self) -> None:
        """The forward has come to its end."""
        self.is_token, self.shift = self.begun, self.begun_shift

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
