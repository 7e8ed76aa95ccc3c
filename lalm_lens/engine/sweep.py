"""The exact fast executor: what a change cannot reach is not computed again.

A branch is born from the run it belongs to where its first change is. In each block, the positions that its changes
have reached, and that are still read, are computed; to all others it looks through keys and values of that run, which
all its branches share. All branches go through a block together, so its weights are read once.

Here is said what each branch computes; `passing` computes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lalm_lens.engine.attention import View
from lalm_lens.engine.base import Base
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.padding import PaddingReadError, unpadded, unpadded_scores
from lalm_lens.engine.reach import Reach, Reader, Step, Touch, as_list, as_set, behind, reach
from lalm_lens.errors import InputError
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import Edit, Knockout, OnScores, Patch, Recompute, Valued
from lalm_lens.model import HookedLALM
from lalm_lens.readouts import Readout, n_blocks
from lalm_lens.runs import Run, Source
from lalm_lens.transformer import HookedTransformer

RESID = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True)
class Planned:
    """A branch, its changes by positions without padding, and what has to be computed for it."""

    number: int
    branch: Branch
    edits: tuple[Edit, ...]
    on_scores: tuple[OnScores, ...]
    reach: Reach

    @property
    def run(self) -> Run:
        return self.branch.run

    @property
    def perceived(self) -> tuple[Edit, ...]:
        """Its changes of encoders and adapters."""
        return tuple(change for change in self.branch.changes if isinstance(change, Edit) and change.is_perceived)

    def edits_at(self, layer: int, *sites: str) -> Iterator[Edit]:
        return (edit for edit in self.edits if edit.layer == layer and edit.site in sites)

    def on_scores_at(self, layer: int) -> tuple[OnScores, ...]:
        return tuple(each for each in self.on_scores if layer in each.layers)


@dataclass(frozen=True)
class Group:
    """Branches of one run that compute the same positions in a block, and look at it in the same way."""

    members: list[Planned]
    step: Step
    view: View | None  # None where nothing comes out of the block


class Sweep:
    """Branches of some runs, made ready: `planned` says what each of them will compute."""

    def __init__(
        self,
        model: HookedTransformer,
        branches: Sequence[Branch],
        bases: dict[Run, Base],
        readout: Readout,
    ) -> None:
        self.model, self.bases, self.readout = model, bases, readout
        self.max_scores = 2**27 if model.device.type == "cuda" else 2**21  # what stays in a CPU's cache
        self.max_logits = 2**24
        self.n_run = n_blocks(readout, model.decoder_cfg.n_layers)
        self.windows = model.decoder_cfg.windows[: self.n_run]
        self.seen: dict[Reader, list[int]] = {}
        self.planned = [self.plan(number, branch) for number, branch in enumerate(branches)]

    def plan(self, number: int, branch: Branch) -> Planned:
        base = self.bases[branch.run]
        edits = self.perceived(branch)
        on_scores = []
        for change in branch.changes:
            if isinstance(change, OnScores):
                on_scores += unpadded_scores(change, base.n_pad)
            elif isinstance(change, Edit) and not change.is_perceived:
                edits += unpadded(change, base.n_pad)
        edits = [edit for edit in edits if edit.layer < self.n_run]
        touches = [self.touch(edit, base) for edit in edits]
        touches += [*self.rescored(on_scores, base.n_pad), *taken_before(edits)]
        reader = Reader(base.n_pos, self.windows, as_set(self.read_positions(base)), self.read_early(edits))
        if reader not in self.seen:
            self.seen[reader] = reader.seen()
        reached = reach(touches, reader, self.seen[reader])
        return Planned(number, branch, tuple(edits), tuple(on_scores), reached)

    def read_positions(self, base: Base) -> tuple[int, ...]:
        n_all = base.n_pos + base.n_pad
        positions = [int(position) % n_all - base.n_pad for position in self.readout.positions]
        if min(positions) < 0:
            raise PaddingReadError(
                f"Of the positions {self.readout.positions} that are read, some are padding, the first {base.n_pad}: "
                'read others, or engine="hooks".'
            )
        return tuple(positions)

    def perceived(self, branch: Branch) -> list[Edit]:
        """Changes of encoders and adapters as one of the embeddings: not yet known, so of all that these make."""
        stacks = {its.stack for its in branch.changes if isinstance(its, Edit) and its.is_perceived}
        if not stacks:
            return []
        assert isinstance(self.model, HookedLALM)
        assert isinstance(branch.run.inputs, Inputs)
        tokens = branch.run.inputs.tokens[0]
        is_fed = torch.stack([self.model.fed(tokens, stack) for stack in stacks]).any(0)
        return [Recompute("resid_pre", 0, tuple((is_fed.nonzero()[:, 0] - branch.run.n_pad).tolist()))]

    def touch(self, edit: Edit, base: Base) -> Touch:
        point = edit.site if edit.site in ("resid_pre", "resid_post") else "inside"
        replaces = isinstance(edit, Patch) and edit.site in RESID and isinstance(edit.value, Tensor)
        where = as_set(edit.at)
        on_keys = edit.site in ("k", "v")
        unknown = edit.site == "pattern" or isinstance(edit, Recompute)
        if unknown or (isinstance(edit, Valued) and not isinstance(edit.value, Tensor)):
            return Touch(point, edit.layer, where, where, on_keys=on_keys, looks_at=looked_at(edit))
        before = base.states[edit.name][list(edit.at)]
        differs = (edit.edited(before[None])[0] != before).flatten(1).any(1).tolist()
        changed = as_set(position for position, its in zip(edit.at, differs, strict=True) if its)
        return Touch(point, edit.layer, where, changed, replaces, on_keys)

    def rescored(self, on_scores: Sequence[OnScores], n_pad: int) -> Iterator[Touch]:
        found: dict[tuple, int] = {}  # the same in all layers where the same changes and window are
        for layer in sorted({layer for each in on_scores for layer in each.layers}):
            if layer < self.n_run:
                here = tuple(n for n, each in enumerate(on_scores) if layer in each.layers)
                key = here, self.windows[layer]
                if key not in found:
                    found[key] = self.hit([on_scores[n] for n in here], self.windows[layer], n_pad)
                yield Touch("inside", layer, found[key], found[key])

    def hit(self, here: Sequence[OnScores], window: int | None, n_pad: int) -> int:
        """The queries of which a key that they see is changed. Raises `InputError` where a head loses all keys."""
        sets = [(each, as_set(each.queries_at), as_set(each.keys_at)) for each in here if each.log_factor]
        one_for_all = all(each.heads is None for each, _, _ in sets)
        hit = 0
        for query in as_list(as_set(query for each, _, _ in sets for query in each.queries_at)):
            seen = behind(1 << query, window)
            for head in range(1 if one_for_all else self.model.decoder_cfg.n_heads):
                changed = lost = 0
                for each, queries, keys in sets:
                    if queries >> query & 1 and (each.heads is None or head in each.heads):
                        changed |= keys
                        lost |= keys if isinstance(each, Knockout) else 0
                if not seen & ~lost:
                    raise InputError(f"This knockout leaves the query at position {query + n_pad} no key to look at.")
                if seen & changed:
                    hit |= 1 << query
        return hit

    def read_early(self, edits: Sequence[Edit]) -> tuple[tuple[int, int], ...]:
        """What branches take from themselves, and what their patterns look at, as a `Reader` wants it."""
        read = []
        for edit in edits:
            if isinstance(edit, Valued) and isinstance(edit.value, Source):
                source = edit.value
                assert source.layer is not None
                read.append((source.layer + (source.site != "resid_pre"), as_set(source.at)))
            if keys := looked_at(edit):
                read.append((edit.layer, keys))
        return tuple(read)

    def groups(self, members: Sequence[Planned], layer: int) -> list[Group]:
        """The branches that are computed in a block, those together that can be."""
        together: dict[tuple, list[Planned]] = {}
        for member in members:
            step = member.reach.steps.get(layer)
            if step is not None:
                has_pattern = any(member.edits_at(layer, "pattern"))
                key = (member.run, step, member.on_scores_at(layer), has_pattern)
                together.setdefault(key, []).append(member)
        return [
            Group(its, step, self.view_of(its[0], layer) if step.out else None)
            for (_, step, _, _), its in together.items()
        ]

    def view_of(self, member: Planned, layer: int) -> View:
        step, on_scores, window = member.reach.steps[layer], member.on_scores_at(layer), self.windows[layer]
        all_keys = self.bases[member.run].n_pos if any(member.edits_at(layer, "pattern")) else None
        return View.of(step.own, step.out, window, on_scores, self.model.decoder_cfg.n_heads, all_keys)

    def in_order(self) -> list[Planned]:
        """The branches, those beside each other that compute the same positions."""
        order = {run: number for number, run in enumerate(self.bases)}

        def key(member: Planned) -> tuple:
            last = next(reversed(member.reach.steps.values()), Step(0, 0))
            return order[member.run], last.own, last.out, member.number

        return sorted(self.planned, key=key)

    def within(self, members: Sequence[Planned], token_budget: int) -> list[Planned]:
        """The first of these branches, as many as can go through every block together; at least one."""
        n_rows, chosen = np.zeros(self.n_run, dtype=int), []
        for member in members:
            n_rows = n_rows + self.rows_of(member)
            if chosen and n_rows.max() > token_budget:
                break
            chosen.append(member)
        return chosen

    def tokens(self, members: Sequence[Planned]) -> int:
        """The most tokens that go through a block together."""
        return int(np.sum([self.rows_of(member) for member in members], axis=0).max())

    def rows_of(self, member: Planned) -> np.ndarray:
        steps = member.reach.steps
        each = (steps.get(layer, Step(0, 0)) for layer in range(self.n_run))
        return np.array([(step.rows | step.left).bit_count() for step in each])


def taken_before(edits: Sequence[Edit]) -> Iterator[Touch]:
    """What branches take from themselves before a block, where the block itself may have no need of it."""
    for edit in edits:
        if isinstance(edit, Valued) and isinstance(edit.value, Source) and edit.value.site == "resid_pre":
            assert edit.value.layer is not None
            yield Touch("inside", edit.value.layer, 0, 0, looks_at=as_set(edit.value.at))


def looked_at(edit: Edit) -> int:
    """The keys to which a changed pattern gives weight: also such as attention itself would not let it see."""
    if edit.site != "pattern" or not isinstance(edit, Valued) or not isinstance(edit.value, Tensor):
        return 0
    columns = edit.value.flatten(0, -2).ne(0).any(0).nonzero()[:, 0].tolist()
    return as_set(columns if edit.keys is None else (edit.keys[column] for column in columns))
