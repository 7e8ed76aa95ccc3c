"""Rotary position embedding (arXiv 2104.09864), rotating halves as HF does.

One class per scheme, chosen once from its config: dynamic NTK, llama3 scaling or M-RoPE each add a config in
config.py and a class here that turns positions into a `Rotation`.
"""

import math
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lalm_lens.config import DecoderConfig, DynamicNTK, Llama3Rope, MRope, Rope
from lalm_lens.shapes import widened

Positions = Int[Tensor, "batch pos"] | Int[Tensor, "axis batch pos"]


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine of the angle of each position, shared by all blocks of one forward."""

    cos: Float[Tensor, "batch pos 1 d_head"]
    sin: Float[Tensor, "batch pos 1 d_head"]

    def __call__(self, x: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        first, second = x.chunk(2, dim=-1)
        return (x * self.cos + torch.cat([-second, first], dim=-1) * self.sin).to(x.dtype)

    def of_queries(self, q: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        """Queries turn as keys do."""
        return self(q)

    def at(self, positions: Int[Tensor, " at"]) -> "Rotation":
        """Of some of the positions alone."""
        return type(self)(*(table[:, positions] for table in vars(self).values()))

    def of_row(self, row: int) -> "Rotation":
        """Of one prompt alone."""
        return type(self)(*(table if len(table) == 1 else table[row : row + 1] for table in vars(self).values()))

    def to(self, device: torch.device | str) -> "Rotation":
        """As `Tensor.to`, for a block that runs on another GPU."""
        return type(self)(*(table.to(device) for table in vars(self).values()))

    def behind(self, *others: "Rotation") -> "Rotation":
        """This table of positions, and those of others behind it."""
        return type(self)(
            *(torch.cat(tables, 1) for tables in zip(*(vars(its).values() for its in (self, *others)), strict=True))
        )


@dataclass(frozen=True)
class ScaledRotation(Rotation):
    """One under which queries grow too."""

    scale: Float[Tensor, "batch pos 1 1"]

    def of_queries(self, q: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        return self(q) * self.scale


class RotaryScheme(nn.Module):
    """How positions become a rotation."""

    def kind(self, n_tokens: int) -> Hashable:
        """Prompts of one kind are rotated by one table of angles, whatever their length: here they all are."""
        return None

    @abstractmethod
    def forward(self, positions: Positions, dtype: torch.dtype, n_tokens: Sequence[int] = ()) -> Rotation:
        """`n_tokens` says how long the prompts are, for schemes under which that matters."""


class Rotary(RotaryScheme):
    """Plain rotary embedding. Holds no buffer: the angles are computed in float32 where the positions are."""

    def __init__(self, rope: Rope, d_head: int):
        super().__init__()
        self.theta = rope.theta
        self.d_head = d_head

    def forward(
        self, positions: Int[Tensor, "batch pos"], dtype: torch.dtype, n_tokens: Sequence[int] = ()
    ) -> Rotation:
        angle = positions[..., None].float() * self.rates(positions.device)  # HF's order: angles grow to 1e4
        angle = torch.cat([angle, angle], dim=-1)[:, :, None]
        return Rotation(angle.cos().to(dtype), angle.sin().to(dtype))

    def rates(self, device: torch.device) -> Float[Tensor, " pair"]:
        """How far each pair turns from one position to the next."""
        exponent = torch.arange(0, self.d_head, 2, device=device, dtype=torch.float32) / self.d_head
        return 1.0 / self.theta**exponent


class Llama3Rotary(Rotary):
    """The same at Llama 3.1's rates."""

    def __init__(self, rope: Llama3Rope, d_head: int):
        super().__init__(Rope(rope.theta), d_head)
        self.rope = rope

    def rates(self, device: torch.device) -> Float[Tensor, " pair"]:
        rates, rope = super().rates(device), self.rope
        n_turns = rope.n_ctx / (2 * math.pi / rates)  # in HF's order, to the bit
        kept = ((n_turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)
        return (1 - kept) * rates / rope.factor + kept * rates


class DynamicNTKRotary(RotaryScheme):
    """Rotary embedding whose base grows with the length of a prompt. What is written behind it changes the base no
    more."""

    def __init__(self, rope: DynamicNTK, d_head: int):
        super().__init__()
        self.rope, self.d_head = rope, d_head

    def kind(self, n_tokens: int) -> int:
        """Alpha."""
        return max(1, 2 ** math.ceil(math.log2(n_tokens / self.rope.n_trained) + 1) - 1)

    def forward(
        self, positions: Int[Tensor, "batch pos"], dtype: torch.dtype, n_tokens: Sequence[int] = ()
    ) -> Rotation:
        kinds = [self.kind(n) for n in n_tokens]
        growth = self.d_head / (self.d_head - 2)
        tables = {
            alpha: Rotary(Rope(self.rope.theta * alpha**growth), self.d_head)(positions, widened(dtype))
            for alpha in set(kinds)
        }
        if len(tables) == 1:
            return tables[kinds[0]]
        rows = [tables[alpha].of_row(row) for row, alpha in enumerate(kinds)]
        return Rotation(torch.cat([row.cos for row in rows]), torch.cat([row.sin for row in rows]))


class LogN(RotaryScheme):
    """Another scheme, under which queries also grow with the logarithm of their position, counted from 1, where that is
    beyond `n_trained`: by log(position) / log(n_trained) (Qwen)."""

    def __init__(self, scheme: RotaryScheme, n_trained: int):
        super().__init__()
        self.scheme, self.n_trained = scheme, n_trained

    def kind(self, n_tokens: int) -> Hashable:
        return self.scheme.kind(n_tokens)

    def forward(
        self, positions: Int[Tensor, "batch pos"], dtype: torch.dtype, n_tokens: Sequence[int] = ()
    ) -> Rotation:
        rotation = self.scheme(positions, dtype, n_tokens)
        scale = (positions[..., None, None] + 1).float().log() / math.log(self.n_trained)
        return ScaledRotation(rotation.cos, rotation.sin, scale.clamp(min=1.0).to(dtype))


class MRotary(RotaryScheme):
    """Rotary embedding by time, height and width. Where the three are one, it is the plain one."""

    def __init__(self, rope: MRope, d_head: int):
        super().__init__()
        self.plain = Rotary(Rope(rope.theta), d_head)
        self.sections = rope.sections

    def forward(self, positions: Positions, dtype: torch.dtype, n_tokens: Sequence[int] = ()) -> Rotation:
        if positions.ndim == 2:
            return self.plain(positions, dtype)
        by_axis = [self.plain(its, dtype) for its in positions]
        return Rotation(self.mixed([its.cos for its in by_axis]), self.mixed([its.sin for its in by_axis]))

    def mixed(self, by_axis: list[Float[Tensor, "batch pos 1 d_head"]]) -> Float[Tensor, "batch pos 1 d_head"]:
        """Each section of both halves from the axis that it turns by."""
        parts = [its.split(self.sections * 2, dim=-1) for its in by_axis]
        n_sections = len(self.sections)
        return torch.cat([parts[n % n_sections % 3][n] for n in range(2 * n_sections)], dim=-1)


class AxialRotary(nn.Module):
    """Of patches: the first half of the pairs of a head turns by the row, the second by the column. In float32, as HF's
    vision towers do it."""

    def __init__(self, theta: float, d_head: int):
        super().__init__()
        self.plain = Rotary(Rope(theta), d_head // 2)

    def forward(self, rows: Int[Tensor, "frame pos"], columns: Int[Tensor, "frame pos"]) -> Rotation:
        by_axis = [self.plain(its, torch.float32) for its in (rows, columns)]
        cos, sin = (
            torch.cat([x.chunk(2, dim=-1)[0] for x in its] * 2, dim=-1)
            for its in ([r.cos for r in by_axis], [r.sin for r in by_axis])
        )
        return Rotation(cos, sin)


ROTARY = {Rope: Rotary, Llama3Rope: Llama3Rotary, MRope: MRotary, DynamicNTK: DynamicNTKRotary}


def rotary_of(cfg: DecoderConfig) -> RotaryScheme:
    scheme = ROTARY[type(cfg.rope)](cfg.rope, cfg.d_head)
    return scheme if cfg.log_n is None else LogN(scheme, cfg.log_n)
