"""The exact fast executor: what a change cannot reach is not computed again.

A branch is born from the run it belongs to where its first change is. In each block, the positions that its changes
have reached, and that are still read, are computed; to all others it looks through keys and values of that run, which
all its branches share. All branches go through a block together, so its weights are read once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lalm_lens.engine.attention import View, attend
from lalm_lens.engine.branches import Branch, States, source_name
from lalm_lens.engine.reach import Reach, Reader, Step, Touch, as_list, as_set, behind, reach
from lalm_lens.errors import InputError
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import Edit, Knockout, Patch, Recompute, Valued
from lalm_lens.model import HookedLALM
from lalm_lens.nn.block import DecoderBlock
from lalm_lens.offload import held
from lalm_lens.readouts import Readout, Resid, n_blocks
from lalm_lens.runs import OWN, Run, Source
from lalm_lens.transformer import HookedTransformer

RESID = ("resid_pre", "resid_mid", "resid_post")
Part = Literal["rows", "own", "out", "left"]  # of the positions that a branch has in a block


@dataclass(frozen=True)
class Base:
    """What the branches of a run share: its residual stream before each block and behind the last, its keys and values,
    its states where something is changed, and what is read from the run itself. Padding is cut off."""

    resid: list[Float[Tensor, "pos d_model"]]
    k: list[Float[Tensor, "kv_head pos d_head"]]
    v: list[Float[Tensor, "kv_head pos d_head"]]
    states: dict[str, Tensor]
    value: Tensor
    n_pad: int

    @property
    def n_pos(self) -> int:
        return len(self.resid[0])


def needed(n_run: int) -> set[str]:
    """The hook points of a run that a `Base` is made of."""
    by_block = ("hook_resid_pre", "attn.hook_rot_k", "attn.hook_v")
    return {f"blocks.{layer}.{name}" for layer in range(n_run) for name in by_block} | {
        f"blocks.{n_run - 1}.hook_resid_post"
    }


def compared(branch: Branch) -> set[str]:
    """The hook points of the base run whose states tell whether a change is one, or are taken by the branch itself."""
    edits = [change for change in branch.changes if isinstance(change, Edit) and not change.is_heard]
    taken = [(edit, edit.value) for edit in edits if isinstance(edit, Valued) and isinstance(edit.value, Source)]
    own = {source_name(source, edit) for edit, source in taken if source.run is OWN}
    return {edit.name for edit in edits if edit.site != "pattern"} | own


def base_of(run: Run, states: States, value: Tensor, n_run: int) -> Base:
    n_pad = run.n_pad
    cut = {name: state[n_pad:] for name, state in states.items() if "pattern" not in name}
    resid = [cut[f"blocks.{layer}.hook_resid_pre"] for layer in range(n_run)]
    k, v = (
        [cut[f"blocks.{layer}.attn.hook_{which}"].transpose(0, 1).contiguous() for layer in range(n_run)]
        for which in ("rot_k", "v")
    )
    return Base([*resid, cut[f"blocks.{n_run - 1}.hook_resid_post"]], k, v, cut, value, n_pad)


@dataclass(frozen=True)
class Planned:
    """A branch, its changes by positions without padding, and what has to be computed for it."""

    number: int
    branch: Branch
    edits: tuple[Edit, ...]
    knockouts: tuple[Knockout, ...]
    reach: Reach

    @property
    def run(self) -> Run:
        return self.branch.run

    @property
    def heard(self) -> tuple[Edit, ...]:
        """Its changes of the encoder and adapter."""
        return tuple(change for change in self.branch.changes if isinstance(change, Edit) and change.is_heard)

    def edits_at(self, layer: int, *sites: str) -> Iterator[Edit]:
        return (edit for edit in self.edits if edit.layer == layer and edit.site in sites)

    def knockouts_at(self, layer: int) -> tuple[Knockout, ...]:
        return tuple(knockout for knockout in self.knockouts if layer in knockout.layers)


@dataclass(frozen=True)
class Group:
    """Branches of one run that compute the same positions in a block, and look at it in the same way."""

    members: list[Planned]
    step: Step
    view: View | None  # None where nothing comes out of the block


@dataclass(frozen=True)
class Space:
    """Where each branch has its rows in a flat tensor of all of them."""

    first: dict[int, int] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)  # as sets
    n_rows: int = 0

    def find(self, number: int, positions: Sequence[int]) -> tuple[list[int], list[int]]:
        """Of the positions that a branch has here: their numbers among `positions`, and their rows."""
        if number not in self.first:
            return [], []
        here, rows = self.local(number, positions)
        return here, [self.first[number] + row for row in rows]

    def local(self, number: int, positions: Sequence[int]) -> tuple[list[int], list[int]]:
        """As `find`, with rows counted from the branch's first."""
        held = self.positions[number]
        here = [n for n, position in enumerate(positions) if held >> position & 1]
        return here, [(held & ((1 << positions[n]) - 1)).bit_count() for n in here]

    @classmethod
    def of(cls, groups: Sequence[Group], what: Part) -> "Space":
        first, positions, n_rows = {}, {}, 0
        for group in groups:
            held: int = getattr(group.step, what)
            for member in group.members:
                first[member.number], positions[member.number] = n_rows, held
                n_rows += held.bit_count()
        return cls(first, positions, n_rows)


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
        heard = [change for change in branch.changes if isinstance(change, Edit) and change.is_heard]
        edits = [self.heard(branch)] if heard else []
        knockouts = []
        for change in branch.changes:
            if isinstance(change, Knockout):
                knockouts.append(unpadded_knockout(change, base.n_pad))
            elif isinstance(change, Edit) and not change.is_heard:
                edits += unpadded(change, base.n_pad)
        edits = [edit for edit in edits if edit.layer < self.n_run]
        touches = [self.touch(edit, base) for edit in edits]
        touches += [*self.knocked(knockouts), *taken_before(edits)]
        reader = Reader(base.n_pos, self.windows, as_set(self.read_positions(base)), self.read_early(edits))
        if reader not in self.seen:
            self.seen[reader] = reader.seen()
        reached = reach(touches, reader, self.seen[reader])
        return Planned(number, branch, tuple(edits), tuple(knockouts), reached)

    def read_positions(self, base: Base) -> tuple[int, ...]:
        n_all = base.n_pos + base.n_pad
        positions = [int(position) % n_all - base.n_pad for position in self.readout.positions]
        if min(positions) < 0:
            raise InputError(f"Of {self.readout.positions}, some are padding: the prompt has {base.n_pos} positions.")
        return tuple(positions)

    def heard(self, branch: Branch) -> Edit:
        """A change of the encoder or adapter as one of the embeddings: not yet known, so every audio position."""
        if not isinstance(self.model, HookedLALM) or not isinstance(branch.run.inputs, Inputs):
            raise InputError("A change of the encoder or adapter needs a run of `Inputs`, which hears its audio again.")
        is_audio = branch.run.inputs.tokens[0] == self.model.lalm_cfg.audio_token
        positions = tuple((is_audio.nonzero()[:, 0] - branch.run.n_pad).tolist())
        return Recompute("resid_pre", 0, positions)

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

    def knocked(self, knockouts: Sequence[Knockout]) -> Iterator[Touch]:
        found: dict[tuple, int] = {}  # the same in all layers where the same knockouts and window are
        for layer in sorted({layer for knockout in knockouts for layer in knockout.layers}):
            if layer < self.n_run:
                here = tuple(n for n, knockout in enumerate(knockouts) if layer in knockout.layers)
                key = here, self.windows[layer]
                if key not in found:
                    found[key] = self.hit([knockouts[n] for n in here], self.windows[layer])
                yield Touch("inside", layer, found[key], found[key])

    def hit(self, here: Sequence[Knockout], window: int | None) -> int:
        """The queries that lose a key that they see. Raises `InputError` where a head loses them all."""
        sets = [(as_set(each.queries_at), as_set(each.keys_at), each.heads) for each in here]
        one_for_all = all(heads is None for _, _, heads in sets)
        hit = 0
        for query in as_list(as_set(query for knockout in here for query in knockout.queries_at)):
            seen = behind(1 << query, window)
            for head in range(1 if one_for_all else self.model.decoder_cfg.n_heads):
                lost = 0
                for queries, keys, heads in sets:
                    if queries >> query & 1 and (heads is None or head in heads):
                        lost |= keys
                if not seen & ~lost:
                    raise InputError(f"This knockout leaves the query at position {query} no key to look at.")
                if seen & lost:
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

    @torch.no_grad()
    def run(self, members: Sequence[Planned]) -> dict[int, Tensor]:
        """What is read from each of these branches: [at, ...]."""
        values = {member.number: self.bases[member.run].value for member in members if member.reach.is_void}
        members = [member for member in members if not member.reach.is_void]
        if members:
            values |= Pass(self, [self.born(member) for member in members]).values()
        return values

    def born(self, member: Planned) -> Planned:
        """With what the front-end makes of the branch's changes there."""
        if not member.heard:
            return member
        first, *rest = member.edits
        embed = heard_again(self.model, member)[list(first.at)]
        return replace(member, edits=(Patch("resid_pre", 0, first.at, embed), *rest))

    def groups(self, members: Sequence[Planned], layer: int) -> list[Group]:
        """The branches that are computed in a block, those together that can be."""
        together: dict[tuple, list[Planned]] = {}
        for member in members:
            step = member.reach.steps.get(layer)
            if step is not None:
                has_pattern = any(member.edits_at(layer, "pattern"))
                key = (member.run, step, member.knockouts_at(layer), has_pattern)
                together.setdefault(key, []).append(member)
        return [
            Group(its, step, self.view_of(its[0], layer) if step.out else None)
            for (_, step, _, _), its in together.items()
        ]

    def view_of(self, member: Planned, layer: int) -> View:
        step, knockouts, window = member.reach.steps[layer], member.knockouts_at(layer), self.windows[layer]
        all_keys = self.bases[member.run].n_pos if any(member.edits_at(layer, "pattern")) else None
        return View.of(step.own, step.out, window, knockouts, self.model.decoder_cfg.n_heads, all_keys)

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


def heard_again(model: HookedTransformer, member: Planned) -> Float[Tensor, "pos d_model"]:
    """The embeddings of a run whose encoder or adapter is changed, without padding."""
    assert isinstance(model, HookedLALM)
    hooks = [change.hook() for change in member.heard]
    with model.hooks(fwd_hooks=[*hooks]):
        embedded = model.embed_inputs(member.run.inputs.to(model.device))  # pyright: ignore[reportArgumentType]
    return embedded.embed[0, member.run.n_pad :]


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


def unpadded(edit: Edit, n_pad: int) -> list[Edit]:
    """The same change where padding does not count; on padding itself, nothing can see it."""
    if not n_pad:
        return [edit]
    here = [n for n, position in enumerate(edit.at) if position >= n_pad]
    if not here:
        return []
    changes: dict = {"positions": tuple(edit.at[n] - n_pad for n in here)}
    if edit.site == "pattern":
        raise InputError("A pattern of a padded prompt has keys that are padding: give the run without it.")
    if isinstance(edit, Valued) and isinstance(edit.value, Tensor):
        n_axes = edit.value.ndim - (1 if edit.value.ndim > 2 + (edit.site in ("q", "k", "v", "z")) else 0)
        changes["value"] = edit.value.movedim(-n_axes, 0)[here].movedim(0, -n_axes)
    elif isinstance(edit, Valued) and isinstance(edit.value, Source):
        taken = tuple(edit.value.at[n] - n_pad for n in here)
        if min(taken) < 0:
            raise InputError("A branch cannot take its own state from padding.")
        changes["value"] = replace(edit.value, positions=taken)
    return [replace(edit, **changes)]


def unpadded_knockout(knockout: Knockout, n_pad: int) -> Knockout:
    def shifted(positions: Sequence[int]) -> tuple[int, ...]:
        return tuple(position - n_pad for position in positions if position >= n_pad)

    return replace(knockout, queries=shifted(knockout.queries_at), keys=shifted(knockout.keys_at))


class Pass:
    """Some branches on their way through the blocks, all of them in one."""

    def __init__(self, sweep: Sweep, members: Sequence[Planned]) -> None:
        self.sweep, self.model, self.members, self.bases = sweep, sweep.model, members, sweep.bases
        self.edits: dict[tuple[int, str], list[tuple[Planned, Edit]]] = {}
        self.takes: dict[tuple[int | None, str | None], list[tuple[Planned, Valued]]] = {}
        for member in members:
            for edit in member.edits:
                self.edits.setdefault((edit.layer, edit.site), []).append((member, edit))
                if isinstance(edit, Valued) and isinstance(edit.value, Source):
                    self.takes.setdefault((edit.value.layer, edit.value.site), []).append((member, edit))
        self.taken: dict[tuple[int, int], Tensor] = {}  # what branches took from themselves, by branch and change
        like = self.bases[members[0].run].resid[0]
        self.device, self.resid, self.space = like.device, like[:0], Space()  # no branch is born yet
        longest = max(self.bases[member.run].n_pos for member in members)
        self.rotation = self.model.rotary(torch.arange(longest, device=self.device)[None], like.dtype)

    def values(self) -> dict[int, Tensor]:
        for layer in range(self.sweep.n_run):
            groups = self.sweep.groups(self.members, layer)
            if any(group.step.rows for group in groups):
                with held(self.model.each_block[layer]):  # offloaded weights are read once
                    self.through(layer, groups)
            else:
                self.resid, self.space = self.resid[:0], Space()
            if groups:
                self.behind(layer, groups)
        with held(self.model.ln_final), held(self.model.unembed):
            return self.read()

    def through(self, layer: int, groups: list[Group]) -> None:
        """All branches that are computed in a block, through it."""
        block = self.model.each_block[layer]
        rows, own, out = Space.of(groups, "rows"), Space.of(groups, "own"), Space.of(groups, "out")
        resid = self.at_point(self.gathered(layer, groups, rows, "rows"), rows, layer, "resid_pre")
        from_rows = self.index(groups, "out")
        attn_out = self.looked(block, layer, groups, resid, own, out)
        resid = self.at_point(picked(resid, from_rows) + attn_out, out, layer, "resid_mid")
        self.resid, self.space = resid + self.thought(block, layer, resid, out), out

    def behind(self, layer: int, groups: list[Group]) -> None:
        """What is changed behind a block: of what it computed, and of what it left as it is in the base run."""
        left = self.space
        if any(group.step.born for group in groups):
            left = Space.of(groups, "left")
            self.resid = self.gathered(layer + 1, groups, left, "left")
        self.resid, self.space = self.at_point(self.resid, left, layer, "resid_post"), left

    def at_point(
        self, resid: Float[Tensor, "row d_model"], space: Space, layer: int, site: str
    ) -> Float[Tensor, "row d_model"]:
        """The residual stream with its changes there; what branches take from themselves is kept."""
        self.edit(resid, space, layer, site)
        for member, edit in self.takes.get((layer, site), ()):
            source = edit.value
            assert isinstance(source, Source)
            taken = self.base_rows(member, edit).clone()
            here, rows = space.find(member.number, source.at)
            taken[here] = resid[rows]
            self.taken[member.number, id(edit)] = taken
        return resid

    def base_rows(self, member: Planned, edit: Valued) -> Tensor:
        source = edit.value
        assert isinstance(source, Source)
        return self.bases[member.run].states[source_name(source, edit)][list(source.at)]

    def edit(self, states: Float[Tensor, "row *unit"], space: Space, layer: int, *sites: str) -> None:
        """Make the changes of these sites, in place."""
        for site in sites:
            for member, edit in self.edits.get((layer, site), ()):
                here, rows = space.find(member.number, edit.at)
                if here:
                    states[rows] = self.ready(member, edit).edited(states[rows][None], here)[0]

    def ready(self, member: Planned, edit: Edit) -> Edit:
        """With the value that the branch took from itself; where it had not begun yet, that is the base run's."""
        if not (isinstance(edit, Valued) and isinstance(edit.value, Source)):
            return edit
        taken = self.taken.get((member.number, id(edit)))
        return replace(edit, value=self.base_rows(member, edit) if taken is None else taken)

    def gathered(self, n_run: int, groups: Sequence[Group], rows: Space, what: Part) -> Float[Tensor, "row d_model"]:
        """The residual stream after some blocks: what branches have changed, and the rest from their runs."""
        ours, from_ours = [], []
        theirs: dict[Run, tuple[list[np.ndarray], list[np.ndarray]]] = {}
        for group in groups:
            wanted = getattr(group.step, what)
            positions = np.array(as_list(wanted), dtype=int)
            for member in group.members:
                first = rows.first[member.number]
                held = self.space.positions.get(member.number, 0)
                is_ours = held_at(held, wanted)
                ours.append(first + np.flatnonzero(is_ours))
                from_ours.append(self.space.first.get(member.number, 0) + rank(held, wanted))
                to, which = theirs.setdefault(member.run, ([], []))
                to.append(first + np.flatnonzero(~is_ours))
                which.append(positions[~is_ours])
        resid = self.resid.new_empty(rows.n_rows, self.resid.shape[1])
        resid[self.tensor(ours)] = self.resid[self.tensor(from_ours)]
        for run, (to, which) in theirs.items():
            resid[self.tensor(to)] = self.bases[run].resid[n_run][self.tensor(which)]
        return resid

    def tensor(self, parts: list[np.ndarray]) -> Int[Tensor, " at"]:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(self.device)

    def index(self, groups: Sequence[Group], what: Part) -> Int[Tensor, " at"] | None:
        """Which of the rows of a block are own keys, or come out of it; None for all of them."""
        if all(getattr(group.step, what) == group.step.rows for group in groups):
            return None
        parts, first = [], 0
        for group in groups:
            n_rows = group.step.rows.bit_count()
            local = rank(group.step.rows, getattr(group.step, what))
            starts = first + n_rows * np.arange(len(group.members))
            parts.append((starts[:, None] + local).ravel())
            first += n_rows * len(group.members)
        return self.tensor(parts)

    def positions(self, groups: Sequence[Group], what: Part) -> Int[Tensor, " at"]:
        return self.tensor([np.tile(as_list(getattr(group.step, what)), len(group.members)) for group in groups])

    def looked(
        self,
        block: DecoderBlock,
        layer: int,
        groups: Sequence[Group],
        resid: Float[Tensor, "row d_model"],
        own: Space,
        out: Space,
    ) -> Float[Tensor, "out d_model"]:
        """What attention adds to the residual stream."""
        attn, normed = block.attn, block.ln1(resid)
        for_queries, for_keys = (picked(normed, self.index(groups, what)) for what in ("out", "own"))
        q = attn.q_proj(for_queries).unflatten(-1, (-1, attn.d_head))
        k = attn.k_proj(for_keys).unflatten(-1, (-1, attn.d_head))
        v = attn.v_proj(for_keys).unflatten(-1, (-1, attn.d_head))
        self.edit(q, out, layer, "q")
        self.edit(k, own, layer, "k")
        self.edit(v, own, layer, "v")
        q = self.rotation.at(self.positions(groups, "out"))(q[None])[0]
        k = self.rotation.at(self.positions(groups, "own"))(k[None])[0]
        z = torch.empty_like(q)
        for group in groups:
            if group.view is not None:
                self.attend(layer, group, group.view, q, k, v, z, own, out)
        self.edit(z, out, layer, "z")
        attn_out = attn.output(z[None])[0]
        self.edit(attn_out, out, layer, "attn_out")
        return attn_out

    def attend(
        self,
        layer: int,
        group: Group,
        view: View,
        q: Float[Tensor, "out head d_head"],
        k: Float[Tensor, "own kv_head d_head"],
        v: Float[Tensor, "own kv_head d_head"],
        z: Float[Tensor, "out head d_head"],
        own: Space,
        out: Space,
    ) -> None:
        """One group's attention, into its rows of `z`: as many branches at a time as have room."""
        base, step = self.bases[group.members[0].run], group.step
        n_out, n_own = step.out.bit_count(), step.own.bit_count()
        size = max(1, self.sweep.max_scores // (n_out * view.n_keys * q.shape[1]))
        for start in range(0, len(group.members), size):
            members = group.members[start : start + size]
            first_out, first_own = (space.first[members[0].number] for space in (out, own))
            mine, mine_own = (
                slice(first_out, first_out + n_out * len(members)),
                slice(first_own, first_own + n_own * len(members)),
            )
            edits = [
                (n, edit, *out.local(member.number, edit.at))
                for n, member in enumerate(members)
                for edit in member.edits_at(layer, "pattern")
            ]
            z[mine] = attend(
                q[mine].unflatten(0, (-1, n_out)),
                k[mine_own].unflatten(0, (len(members), n_own)),
                v[mine_own].unflatten(0, (len(members), n_own)),
                base.k[layer],
                base.v[layer],
                view,
                edits,
                as_list(step.own),
            ).flatten(0, 1)

    def thought(
        self, block: DecoderBlock, layer: int, resid: Float[Tensor, "row d_model"], out: Space
    ) -> Float[Tensor, "row d_model"]:
        """What the MLP adds to the residual stream."""
        post = block.mlp.neurons(block.ln2(resid))
        self.edit(post, out, layer, "post")
        mlp_out = block.mlp.out_proj(post)
        self.edit(mlp_out, out, layer, "mlp_out")
        return mlp_out

    def read(self) -> dict[int, Tensor]:
        """What is read from each branch, as many at a time as have room."""
        values: dict[int, Tensor] = {}
        n_read = len(self.sweep.readout.positions)
        size = max(1, self.sweep.max_logits // (n_read * self.model.decoder_cfg.d_vocab))
        for start in range(0, len(self.members), size):
            members = self.members[start : start + size]
            resid = torch.stack([self.final(member) for member in members])
            read = self.sweep.readout(
                resid if isinstance(self.sweep.readout, Resid) else self.model.unembed(self.model.ln_final(resid))
            )
            values |= {member.number: value for member, value in zip(members, read, strict=True)}
        return values

    def final(self, member: Planned) -> Float[Tensor, "at d_model"]:
        """The state after the last block at the positions that are read."""
        base = self.bases[member.run]
        positions = self.sweep.read_positions(base)
        resid = base.resid[-1][list(positions)]
        here, rows = self.space.find(member.number, positions)
        resid[here] = self.resid[rows]
        return resid


@lru_cache(maxsize=4096)
def held_at(held: int, positions: int) -> np.ndarray:
    """For each of the positions, whether it is among those held."""
    return np.array([bool(held >> position & 1) for position in as_list(positions)], dtype=bool)


@lru_cache(maxsize=4096)
def rank(held: int, positions: int) -> np.ndarray:
    """Which of those held each of the positions is; those that are not held are left out."""
    return np.array([(held & ((1 << position) - 1)).bit_count() for position in as_list(held & positions)], dtype=int)


def picked(x: Float[Tensor, "row width"], index: Int[Tensor, " at"] | None) -> Float[Tensor, "at width"]:
    return x if index is None else x[index]
