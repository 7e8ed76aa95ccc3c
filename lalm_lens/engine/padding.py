"""The changes of a padded prompt, by positions that do not count its padding."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lalm_lens.errors import InputError
from lalm_lens.interventions import BY_HEAD, Edit, OnScores, Valued
from lalm_lens.runs import Source


class PaddingReadError(InputError):
    """What the sweep cannot do, because it leaves padding out."""


def unpadded(edit: Edit, n_pad: int) -> list[Edit]:
    """The same change where padding does not count; on padding itself, nothing can see it."""
    if not n_pad:
        return [edit]
    here = [n for n, position in enumerate(edit.at) if position >= n_pad]
    if not here:
        return []
    changes: dict = {"positions": tuple(edit.at[n] - n_pad for n in here)}
    if isinstance(edit, Valued) and isinstance(edit.value, Tensor):
        n_axes = 2 + (edit.site in BY_HEAD)
        changes["value"] = edit.value.movedim(-n_axes, 0)[here].movedim(0, -n_axes)
    elif isinstance(edit, Valued) and isinstance(edit.value, Source):
        taken = tuple(edit.value.at[n] - n_pad for n in here)
        if min(taken) < 0:
            raise PaddingReadError(
                'A branch takes its own state from padding: give other positions, or engine="hooks".'
            )
        changes["value"] = replace(edit.value, positions=taken)
    moved = replace(edit, **changes)
    return unpadded_keys(moved, n_pad) if edit.site == "pattern" else [moved]


def unpadded_keys(edit: Edit, n_pad: int) -> list[Edit]:
    """A change of a pattern without those of its keys that are padding."""
    changes, kept = {}, slice(n_pad, None)
    if edit.keys is not None:
        kept = [n for n, key in enumerate(edit.keys) if key >= n_pad]
        changes["keys"] = tuple(edit.keys[n] - n_pad for n in kept)
    if isinstance(edit, Valued) and isinstance(edit.value, Tensor):
        changes["value"] = edit.value[..., kept]
        if edit.value.count_nonzero() > changes["value"].count_nonzero():
            raise PaddingReadError(
                'This pattern lets a query look at padding: let its columns there be 0, or engine="hooks".'
            )
    return [replace(edit, **changes)] if kept else []


def unpadded_scores(change: OnScores, n_pad: int) -> list[OnScores]:
    def shifted(positions: Sequence[int]) -> tuple[int, ...]:
        return tuple(position - n_pad for position in positions if position >= n_pad)

    queries, keys = shifted(change.queries_at), shifted(change.keys_at)
    return [replace(change, queries=queries, keys=keys)] if queries and keys else []
