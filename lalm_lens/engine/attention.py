"""Attention of branches to keys that they share with the run they come from, and to their own.

The scores against both stand side by side in one buffer, under one softmax: the shared keys and values are never
copied, and a row that sees none of them needs no special care.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from lalm_lens.engine.reach import as_list, behind
from lalm_lens.interventions import Edit, OnScores
from lalm_lens.shapes import at_least_float32


@dataclass(frozen=True)
class View:
    """What the queries of a group of branches may see in one block: shared keys from `first` to before `last`, and
    then the group's own. Sets of positions are those of `reach`."""

    own: int
    out: int
    window: int | None
    on_scores: tuple[OnScores, ...]
    n_heads: int
    first: int
    last: int

    @classmethod
    def of(
        cls, own: int, out: int, window: int | None, on_scores: tuple[OnScores, ...], n_heads: int, all_keys: int | None
    ) -> "View":
        """`all_keys` is how many shared keys there are where all of them have to be in view, seen or not."""
        shared = behind(out, window) & ~own
        first, last = ((shared & -shared).bit_length() - 1, shared.bit_length()) if shared else (0, 0)
        return cls(own, out, window, on_scores, n_heads, *((first, last) if all_keys is None else (0, all_keys)))

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
class Changed:
    """What happens to the scores of the keys in view, from `start` on: which are not to be seen, and what is added to
    those of the others."""

    start: int
    hidden: Bool[Tensor, "one_or_head query_pos key_pos"]
    added: Float[Tensor, "one_or_head query_pos key_pos"] | None


@lru_cache(maxsize=64)
def changed(view: View, device: torch.device) -> Changed | None:
    """None where all that is in view is seen as it is. By head only where a change is."""
    queries, own_keys = np.array(as_list(view.out)), np.array(as_list(view.own), dtype=np.int64)
    keys = np.concatenate([np.arange(view.first, view.last), own_keys])
    back = queries[:, None] - keys
    seen = (back >= 0) if view.window is None else (back >= 0) & (back < view.window)
    seen[:, : view.n_shared] &= ~np.isin(keys[: view.n_shared], own_keys)
    by_head = any(each.heads is not None for each in view.on_scores)
    added = np.where(np.stack([seen] * (view.n_heads if by_head else 1)), np.float32(0), -np.float32("inf"))
    for each in view.on_scores:
        hit = np.isin(queries, each.queries_at)[:, None] & np.isin(keys, each.keys_at)
        added[slice(None) if each.heads is None else list(each.heads)] += np.where(hit, each.log_factor, 0)
    columns = np.flatnonzero(added.reshape(-1, len(keys)).any(0))
    if not len(columns):
        return None
    start = int(columns[0])
    is_hidden = np.isneginf(added[..., start:])
    finite = np.where(is_hidden, 0, added[..., start:])
    return Changed(
        start,
        torch.from_numpy(is_hidden).to(device),
        torch.from_numpy(finite).to(device) if finite.any() else None,
    )


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
    change(scores, view, n_branches, n_queries)
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


def change(scores: Float[Tensor, "kv_head row key_pos"], view: View, n_branches: int, n_queries: int) -> None:
    its = changed(view, scores.device)
    if its is None:
        return
    part = scores.view(len(scores), n_branches, n_queries, -1, view.n_keys)[..., its.start :]
    part.masked_fill_(by_group(its.hidden, len(scores)), -torch.inf)
    if its.added is not None:
        part.add_(by_group(its.added, len(scores)))


def by_group(
    x: Shaped[Tensor, "one_or_head query_pos key_pos"], n_kv: int
) -> Shaped[Tensor, "one_or_kv_head 1 query_pos one_or_group key_pos"]:
    return x.unflatten(0, (-1, 1) if len(x) == 1 else (n_kv, -1)).transpose(1, 2)[:, None]


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
