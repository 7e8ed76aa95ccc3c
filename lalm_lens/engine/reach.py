"""Which positions of a branch have to be computed, block by block: what its changes can reach, and is still read.

A set of positions is an integer whose bits they are, so that a set is grown or shrunk by a shift.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

ORDER = ("resid_pre", "qkv", "attention", "resid_mid", "mlp", "resid_post")  # the points of a block, in their order


def as_set(positions: Iterable[int]) -> int:
    return sum(1 << position for position in set(positions))


@lru_cache(maxsize=4096)
def as_list(positions: int) -> tuple[int, ...]:
    bits = np.frombuffer(positions.to_bytes(-(-positions.bit_length() // 8), "little"), dtype=np.uint8)
    return tuple(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist())


def ahead(keys: int, window: int | None, n_pos: int) -> int:
    """The positions that can see one of `keys`: they themselves, and those behind them within the window."""
    if not keys:
        return 0
    everything = (1 << n_pos) - 1
    if window is None:
        return everything & ~((keys & -keys) - 1)
    return everything & spread(keys, window - 1)


def behind(queries: int, window: int | None) -> int:
    """The positions that one of `queries` can see."""
    if window is None:
        return (1 << queries.bit_length()) - 1
    n_pos = queries.bit_length()
    return mirrored(spread(mirrored(queries, n_pos), window - 1) & ((1 << n_pos) - 1), n_pos)


def spread(positions: int, by: int) -> int:
    """Every position from each of `positions` to `by` after it."""
    done = 0
    while done < by:
        step = min(done + 1, by - done)
        positions |= positions << step
        done += step
    return positions


def mirrored(positions: int, n_pos: int) -> int:
    return int(f"{positions:0{n_pos}b}"[::-1], 2) if n_pos else 0


@dataclass(frozen=True)
class Touch:
    """What a change does to sets of positions. `differs` are those at which the base run's own state would be changed;
    if it `replaces` the state, the rest of `positions` becomes the base run's. `looks_at` are positions whose states
    before the block count there, in the sight of attention or not."""

    point: str
    layer: int
    positions: int
    differs: int
    replaces: bool = False
    on_keys: bool = False
    looks_at: int = 0

    def applied(self, changed: int) -> int:
        return (changed & ~self.positions if self.replaces else changed) | self.differs


@dataclass(frozen=True)
class Step:
    """One branch in one block: the positions whose keys and values are its own, those that come out of it, and those
    that are first changed behind it."""

    own: int
    out: int
    born: int = 0

    @property
    def rows(self) -> int:
        return self.own | self.out

    @property
    def left(self) -> int:
        return self.out | self.born


@dataclass(frozen=True)
class Reach:
    """One branch from its first change to what is read: `steps` by layer, where there is one, and the positions whose
    state in the end is its own."""

    steps: dict[int, Step]
    final: int
    is_void: bool = field(default=False)


@dataclass(frozen=True)
class Reader:
    """What is read: positions after the last of some blocks, with these windows, and states on the way."""

    n_pos: int
    windows: Sequence[int | None]
    positions: int
    also: tuple[tuple[int, int], ...] = ()  # (number of blocks that have run, positions)

    def seen(self) -> list[int]:
        """The positions whose state before each block, and after the last, is read in the end."""
        also: dict[int, int] = {}
        for n_run, positions in self.also:
            also[n_run] = also.get(n_run, 0) | positions
        seen = [self.positions | also.get(len(self.windows), 0)]
        for layer in reversed(range(len(self.windows))):
            seen.append(behind(seen[-1], self.windows[layer]) | also.get(layer, 0))
        return seen[::-1]


def reach(touches: Sequence[Touch], reader: Reader, seen: Sequence[int]) -> Reach:
    """Follow the changes of one branch through the blocks."""
    steps: dict[int, Step] = {}
    by_layer: dict[int, list[Touch]] = {}
    for touch in touches:
        by_layer.setdefault(touch.layer, []).append(touch)
    changed = 0
    first = min(by_layer, default=len(reader.windows))
    for layer in range(first, len(reader.windows)):
        window, here = reader.windows[layer], by_layer.get(layer, ())
        changed, keys = entered(changed, here)
        after = passed(changed, keys, window, here, reader.n_pos)
        out = after & seen[layer + 1]
        own = keys & in_sight(out, window, here)
        changed = left(after, here) & seen[layer + 1]
        if own | out | changed:
            steps[layer] = Step(own, out, changed & ~out)
    return Reach(steps, changed & reader.positions, is_void=not steps)


def entered(changed: int, here: Sequence[Touch]) -> tuple[int, int]:
    """The changed positions before a block, and those whose keys or values are changed in it."""
    for touch in here:
        if touch.point == "resid_pre":
            changed = touch.applied(changed)
    keys = changed
    for touch in here:
        if touch.on_keys:
            keys |= touch.differs
    return changed, keys


def passed(changed: int, keys: int, window: int | None, here: Sequence[Touch], n_pos: int) -> int:
    """The positions at which a block does something else than in the base run."""
    out = changed | ahead(keys, window, n_pos)
    for touch in here:
        if touch.point == "inside" and not touch.on_keys:
            out |= touch.differs
    return out


def in_sight(queries: int, window: int | None, here: Sequence[Touch]) -> int:
    """The positions before a block whose states count in it."""
    keys = behind(queries, window)
    for touch in here:
        keys |= touch.looks_at
    return keys


def left(out: int, here: Sequence[Touch]) -> int:
    """The changed positions behind the block."""
    for touch in here:
        if touch.point == "resid_post":
            out = touch.applied(out)
    return out
