"""Branches of a sweep on their way through the blocks, all of them in one, and what is read from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lalm_lens.engine.attention import View, attend
from lalm_lens.engine.base import Base
from lalm_lens.engine.branches import source_name
from lalm_lens.engine.reach import as_list
from lalm_lens.engine.sweep import Group, Planned, Sweep
from lalm_lens.interventions import Edit, Patch, Valued
from lalm_lens.model import HookedLALM
from lalm_lens.nn.block import DecoderBlock
from lalm_lens.nn.rope import RotaryScheme, Rotation
from lalm_lens.offload import held
from lalm_lens.readouts import Resid
from lalm_lens.runs import Run, Source
from lalm_lens.transformer import HookedTransformer

Part = Literal["rows", "own", "out", "left"]  # of the positions that a branch has in a block


@torch.no_grad()
def go_through(sweep: Sweep, members: Sequence[Planned]) -> dict[int, Tensor]:
    """What is read from each of these branches: [at, ...]."""
    values = {member.number: sweep.bases[member.run].value for member in members if member.reach.is_void}
    members = [born(sweep.model, member) for member in members if not member.reach.is_void]
    return values | Pass(sweep, members).values() if members else values


def born(model: HookedTransformer, member: Planned) -> Planned:
    """With what the front-end makes of the branch's changes there."""
    if not member.perceived:
        return member
    first, *rest = member.edits
    embed = perceived_again(model, member)[list(first.at)]
    return replace(member, edits=(Patch("resid_pre", 0, first.at, embed), *rest))


def perceived_again(model: HookedTransformer, member: Planned) -> Float[Tensor, "pos d_model"]:
    """The embeddings of a run in which an encoder or adapter is changed, without padding."""
    assert isinstance(model, HookedLALM)
    hooks = [change.hook() for change in member.perceived]
    with model.hooks(fwd_hooks=[*hooks]):
        embedded = model.embed_inputs(member.run.inputs.to(model.device))  # pyright: ignore[reportArgumentType]
    return embedded.embed[0, member.run.n_pad :]


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
        bases = {member.run: self.bases[member.run] for member in members}
        self.rotation, self.first_angle = angles(self.model.rotary, bases, like)

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
        """All branches that are computed in a block, through it: where its weights are, and back."""
        block = self.model.each_block[layer]
        rows, own, out = Space.of(groups, "rows"), Space.of(groups, "own"), Space.of(groups, "out")
        gathered = self.gathered(layer, groups, rows, "rows").to(block.attn.q_proj.weight.device)
        resid = self.at_point(gathered, rows, layer, "resid_pre")
        from_rows = self.index(groups, "out")
        attn_out = self.looked(block, layer, groups, resid, own, out)
        resid = self.at_point(picked(resid, from_rows) + attn_out, out, layer, "resid_mid")
        self.resid, self.space = (resid + self.thought(block, layer, resid, out)).to(self.device), out

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
            taken[here] = resid[rows].to(taken.device)
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
        """Where the angles of these rows stand in the table."""
        return self.tensor(
            [
                np.tile(as_list(getattr(group.step, what)), len(group.members)) + self.first_angle[group.members[0].run]
                for group in groups
            ]
        )

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
        q = self.rotation.at(self.positions(groups, "out")).to(q.device).of_queries(q[None])[0]
        k = self.rotation.at(self.positions(groups, "own")).to(k.device)(k[None])[0]
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
        shared_k, shared_v = (shared[layer].to(q.device) for shared in (base.k, base.v))
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
                shared_k,
                shared_v,
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


def angles(rotary: RotaryScheme, bases: Mapping[Run, Base], like: Tensor) -> tuple[Rotation, dict[Run, int]]:
    """What the positions of some runs are rotated by, and where the table of each of them begins: one for all of a
    kind, or one after the other, where some are not counted."""
    if all(base.positions is None for base in bases.values()):
        kinds = {run: rotary.kind(base.n_pos) for run, base in bases.items()}
        longest = {kind: max(bases[run].n_pos for run in bases if kinds[run] == kind) for kind in kinds.values()}
        tables = [rotary(torch.arange(n, device=like.device)[None], like.dtype, [n]) for n in longest.values()]
        firsts = dict(zip(longest, np.cumsum([0, *longest.values()]).tolist(), strict=False))
        return tables[0].behind(*tables[1:]), {run: firsts[kind] for run, kind in kinds.items()}
    tables = [
        torch.arange(base.n_pos).expand(3, -1) if base.positions is None else base.positions.cpu()
        for base in bases.values()
    ]
    firsts = np.cumsum([0, *(base.n_pos for base in bases.values())])
    positions = torch.cat(tables, dim=1)[:, None].to(like.device)
    return rotary(positions, like.dtype), dict(zip(bases, firsts.tolist(), strict=False))


@lru_cache(maxsize=4096)
def held_at(held: int, positions: int) -> np.ndarray:
    """For each of the positions, whether it is among those held."""
    return np.array([bool(held >> position & 1) for position in as_list(positions)], dtype=bool)


@lru_cache(maxsize=4096)
def rank(held: int, positions: int) -> np.ndarray:
    """Which of those held each of the positions is; those that are not held are left out."""
    return np.array([(held & ((1 << position) - 1)).bit_count() for position in as_list(held & positions)], dtype=int)


def picked(x: Float[Tensor, "row width"], index: Int[Tensor, " at"] | None) -> Float[Tensor, "at width"]:
    return x if index is None else x[index.to(x.device)]
