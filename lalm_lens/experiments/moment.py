"""Which moment of a clip decided: windows of audio, from coarse to fine.

The audio embeddings of one window at a time are those of the other run. The windows that bring back most are halved,
again and again, to one audio position. A branch at the embedding costs the positions from its window on, in every
block; so this costs a few dozen forwards, where every single position would cost hundreds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch

from lalm_lens.engine.cost import Cost
from lalm_lens.engine.plan import Engine
from lalm_lens.engine.recorded import Recorded
from lalm_lens.errors import InputError
from lalm_lens.experiments.cells import Cell
from lalm_lens.experiments.recovery import Case, Direction, Recovery, recover
from lalm_lens.metrics import Metric
from lalm_lens.model import HookedLALM
from lalm_lens.results import EMBED_LAYER
from lalm_lens.runs import Run
from lalm_lens.shapes import typed
from lalm_lens.windows import audio_windows, position_s


@dataclass(frozen=True)
class Search:
    """How a moment is looked for: windows of `window_s` seconds first, and the `n_best` of each size halved."""

    window_s: float = 1.0
    n_best: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.n_best, int) or self.n_best < 1 or not 0 < self.window_s < inf:
            raise InputError(f"A search needs windows longer than 0 s and 1 best or more; got {self}.")

    def n_most(self, n_pos: int, each_s: float) -> int:
        """The most branches that a search among so many audio positions takes: none costs more than a forward."""
        size = max(1, round(self.window_s / each_s))
        n_windows = -(-n_pos // size)
        n_halvings = (min(size, n_pos) - 1).bit_length()
        return n_windows + n_halvings * 2 * self.n_best


def coarse(model: HookedLALM, run: Run, search: Search) -> list[Cell]:
    """The windows that a search begins with."""
    return [
        Cell("moment", "resid_post", EMBED_LAYER, where, span_s=span)
        for where, span, _ in audio_windows(model, run, search.window_s)
    ]


def halves(cell: Cell, each_s: float) -> Iterator[Cell]:
    """The two halves of a window, the earlier one the longer."""
    assert cell.span_s is not None
    middle = -(-len(cell.positions) // 2)
    start_s, end_s = cell.span_s
    middle_s = start_s + middle * each_s
    yield replace(cell, positions=cell.positions[:middle], span_s=(start_s, middle_s))
    yield replace(cell, positions=cell.positions[middle:], span_s=(middle_s, end_s))


@typed
def find_moments(
    model: HookedLALM,
    cases: Sequence[Case],
    search: Search = Search(),
    *,
    metric: Metric = "probability",
    direction: Direction = "denoise",
    engine: Engine = "auto",
    token_budget: int | None = None,
    recorded: Recorded | None = None,
    progress: bool = False,
) -> list[Recovery]:
    """Every window that was tried, of each case; the cells of the cases are not looked at. The runs run once, or not at
    all where they are `recorded`."""
    each_s, recorded = position_s(model), Recorded(model) if recorded is None else recorded
    how: dict = {"metric": metric, "direction": direction, "engine": engine, "token_budget": token_budget}
    asked = [replace(case, cells=coarse(model, case.clean, search)) for case in cases]
    found: list[list[Recovery]] = [[] for _ in cases]
    while going := [n for n, case in enumerate(asked) if case.cells]:
        done = recover(model, [asked[n] for n in going], **how, recorded=recorded, progress=progress)
        for n, recovery in zip(going, done, strict=True):
            found[n].append(recovery)
            asked[n] = replace(asked[n], cells=finer(recovery, search, each_s))
    return [joined(its) for its in found]


def finer(recovery: Recovery, search: Search, each_s: float) -> list[Cell]:
    """Halves of the best windows of the last size; none, once they are single positions."""
    best = recovery.rate.nan_to_num(nan=-torch.inf).argsort(descending=True)[: search.n_best].tolist()
    return [half for n in best if len(recovery.cells[n].positions) > 1 for half in halves(recovery.cells[n], each_s)]


def joined(rounds: Sequence[Recovery]) -> Recovery:
    """The rounds of one case as one."""
    parts = {name: torch.cat([getattr(its, name) for its in rounds]) for name in ("p_patched", "m_patched", "rate")}
    costs = [its.cost for its in rounds]
    cost = Cost(
        sum(its.n_branches for its in costs),
        sum(its.n_skipped for its in costs),
        sum(its.forwards for its in costs),
        sum(its.flops for its in costs),
    )
    cells = [cell for its in rounds for cell in its.cells]
    return replace(rounds[0], cells=cells, cost=cost, noise=max(its.noise for its in rounds), **parts)
