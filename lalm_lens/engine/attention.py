"""Attention of branches to keys that they share with the run they come from, and to their own.

The scores against both stand side by side in one buffer, under one softmax: the shared keys and values are never
copied, and a row that sees none of them needs no special care.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lalm_lens.engine.reach import as_list, behind
from lalm_lens.interventions import Edit, Knockout
from lalm_lens.shapes import at_least_float32


@dataclass(frozen=True)
class View:
    """What the queries of a group of branches may see in one block: shared keys from `first` to before `last`, and
    then the group's own. Sets of positions are those of `reach`."""

    own: int
    out: int
    window: int | None
    knockouts: tuple[Knockout, ...]
    n_heads: int
    first: int
    last: int

    @classmethod
    def of(
        cls, own: int, out: int, window: int | None, knockouts: tuple[Knockout, ...], n_heads: int, all_keys: int | None
    ) -> "View":
        """`all_keys` is how many shared keys there are where all of them have to be in view, seen or not."""
        shared = behind(out, window) & ~own
        first, last = ((shared & -shared).bit_length() - 1, shared.bit_length()) if shared else (0, 0)
        return cls(own, out, window, knockouts, n_heads, *((first, last) if all_keys is None else (0, all_keys)))

    @property
    def n_own(self) -> int:
        return self.own.bit_count()

    @property
    def n_shared(self) -> int:
        return self.last - self.first

    @property
    def n_keys(self) -> int:
        return self.n_shared + self.n_own


@dataclass(frozen=True)
class Hidden:
    """Which of the keys in view, from `start` on, are not to be seen."""

    start: int
    mask: Bool[Tensor, "one_or_head query_pos key_pos"]


@lru_cache(maxsize=64)
def hidden(view: View, device: torch.device) -> Hidden | None:
    """None where all that is in view is seen. By head only where a knockout is."""
    queries, own_keys = np.array(as_list(view.out)), np.array(as_list(view.own), dtype=np.int64)
    keys = np.concatenate([np.arange(view.first, view.last), own_keys])
    back = queries[:, None] - keys
    seen = (back >= 0) if view.window is None else (back >= 0) & (back < view.window)
    seen[:, : view.n_shared] &= ~np.isin(keys[: view.n_shared], own_keys)
    by_head = any(knockout.heads is not None for knockout in view.knockouts)
    seen = np.stack([seen] * (view.n_heads if by_head else 1))
    for knockout in view.knockouts:
        hit = np.isin(queries, knockout.queries_at)[:, None] & np.isin(keys, knockout.keys_at)
        seen[slice(None) if knockout.heads is None else list(knockout.heads)] &= ~hit
    columns = np.flatnonzero(~seen.reshape(-1, len(keys)).all(0))
    if not len(columns):
        return None
    start = int(columns[0])
    return Hidden(start, torch.from_numpy(~seen[..., start:]).to(device))


def attend(
    q: Float[Tensor, "branch query_pos head d_head"],
    k: Float[Tensor, "branch own_pos kv_head d_head"],
    v: Float[Tensor, "branch own_pos kv_head d_head"],
    shared_k: Float[Tensor, "kv_head pos d_head"],
    shared_v: Float[Tensor, "kv_head pos d_head"],
    view: View,
    edits: Sequence[tuple[int, Edit, list[int], list[int]]] = (),
    own_keys: tuple[int, ...] = (),
) -> Float[Tensor, "branch query_pos head d_head"]:
    """`edits` are changes of the pattern: the branch, the change, which of its positions are here, and their rows."""
    n_branches, n_queries, n_heads, d_head = q.shape
    n_kv, n_shared = shared_k.shape[0], view.n_shared
    group = n_heads // n_kv
    queries = q.unflatten(2, (n_kv, group)).permute(2, 0, 1, 3, 4).reshape(n_kv, -1, d_head).contiguous()
    scores = q.new_empty(n_kv, queries.shape[1], view.n_keys)
    scale = d_head**-0.5
    if n_shared:
        keys = shared_k[:, view.first : view.last].transpose(1, 2)
        part = scores[..., :n_shared]
        torch.baddbmm(part, queries, keys, beta=0, alpha=scale, out=part)
    if view.n_own:
        part = by_branch(scores, n_branches)[..., n_shared:]
        torch.baddbmm(part, by_branch(queries, n_branches), per_branch(k).mT, beta=0, alpha=scale, out=part)
    hide(scores, view, n_branches, n_queries)
    pattern = torch.softmax(at_least_float32(scores), -1).to(q.dtype)
    for branch, edit, here, rows in edits:
        of_branch = pattern.view(n_kv, n_branches, n_queries, group, -1)[:, branch]
        of_branch[:, rows] = edited(of_branch[:, rows], edit, here, n_shared, own_keys)
    z = q.new_zeros(queries.shape) if not n_shared else pattern[..., :n_shared] @ shared_v[:, view.first : view.last]
    if view.n_own:
        part = by_branch(z, n_branches)
        torch.baddbmm(part, by_branch(pattern, n_branches)[..., n_shared:], per_branch(v), out=part)
    return z.view(n_kv, n_branches, n_queries, group, d_head).permute(1, 2, 0, 3, 4).flatten(2, 3)


def by_branch(
    x: Float[Tensor, "kv_head branch_query width"], n_branches: int
) -> Float[Tensor, "kv_head_branch query width"]:
    return x.view(x.shape[0] * n_branches, -1, x.shape[-1])


def per_branch(x: Float[Tensor, "branch own_pos kv_head d_head"]) -> Float[Tensor, "kv_head_branch own_pos d_head"]:
    return x.permute(2, 0, 1, 3).flatten(0, 1)


def hide(scores: Float[Tensor, "kv_head row key_pos"], view: View, n_branches: int, n_queries: int) -> None:
    its = hidden(view, scores.device)
    if its is None:
        return
    part = scores.view(len(scores), n_branches, n_queries, -1, view.n_keys)[..., its.start :]
    by_group = its.mask.unflatten(0, (-1, 1) if len(its.mask) == 1 else (len(scores), -1))
    part.masked_fill_(by_group.transpose(1, 2)[:, None], -torch.inf)  # [kv_head, branch, query, group, key]


def edited(
    pattern: Float[Tensor, "kv_head at group key_pos"],
    edit: Edit,
    here: list[int],
    n_shared: int,
    own_keys: tuple[int, ...],
) -> Float[Tensor, "kv_head at group key_pos"]:
    """Changed rows of one branch's pattern, which is laid out with the branch's own keys behind the shared ones."""
    taken = pattern.transpose(0, 1).flatten(1, 2)  # [at, head, key_pos]
    own = torch.tensor(own_keys, dtype=torch.long, device=pattern.device)
    whole = taken[..., :n_shared].clone()
    whole[..., own] = taken[..., n_shared:]
    whole = edit.edited(whole[None], here)[0]
    changed = torch.cat([whole.index_fill(-1, own, 0.0), whole[..., own]], dim=-1)
    return changed.unflatten(1, (len(pattern), -1)).transpose(0, 1)
