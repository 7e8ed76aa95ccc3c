"""Branches made ready to run: positions as indices, states of other runs as values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lalm_lens.config import DecoderConfig, EncoderConfig, VisionConfig
from lalm_lens.engine.recorded import States
from lalm_lens.errors import InputError
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import ADAPTER, BY_HEAD, HOOKS, Change, Edit, NamedHook, OnScores, Valued, hook_name
from lalm_lens.model import HookedLALM
from lalm_lens.runs import OWN, Cache, Run, Source, indices, rows
from lalm_lens.transformer import HookedTransformer

EARLIER = ("resid_pre", "resid_mid", "resid_post")  # what a branch can take from itself


@dataclass(frozen=True)
class Branch:
    """A run in which something is changed. Beside typed changes, any hook will do: `(name, function)`."""

    run: Run
    changes: tuple[Change | NamedHook, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.run, Run):
            raise InputError(f"A branch is of a Run: Run(inputs, prompt); got a {type(self.run).__name__}.")
        if not isinstance(self.changes, Sequence) or not all(map(is_change, self.changes)):
            raise InputError(f"The changes of a branch are a tuple of changes, even of one; got {self.changes!r}.")
        object.__setattr__(self, "changes", tuple(self.changes))


def is_change(change: object) -> bool:
    return isinstance(change, Edit | OnScores) or (isinstance(change, tuple) and len(change) == 2)


def indexed(change: Change | NamedHook, run: Run, model: HookedTransformer) -> Change | NamedHook:
    """With positions as indices of the run. Raises `InputError` for what the model or the run does not have."""
    if isinstance(change, tuple):
        return change
    if isinstance(change, OnScores):
        check(change.layers, model.decoder_cfg.n_layers, "layers")
        check(change.heads or (), model.decoder_cfg.n_heads, "heads")
        return replace(change, queries=run.indices(change.queries), keys=run.indices(change.keys))
    cfg = model.decoder_cfg if not change.is_perceived else encoder_of(model, change)
    n_kv_heads = cfg.n_kv_heads if isinstance(cfg, DecoderConfig) else cfg.n_heads
    check((change.layer,), cfg.n_layers, f"layers in the {change.stack}")
    check(change.heads or (), n_kv_heads if change.site in ("k", "v") else cfg.n_heads, "heads")
    check(change.neurons or (), cfg.d_mlp, "neurons")
    positions = perceived_positions(change) if change.is_perceived else run.indices(change.positions)
    n_pos = n_perceived(change, run, model) if change.is_perceived else run.n_pos
    check(change.keys or (), n_pos, "keys")
    if change.is_perceived:
        check(positions, n_pos, f"positions of {change.name}")
    elif len(set(positions)) < len(positions):
        raise InputError(f"A change needs different positions; got {change.positions}, of {run.n_pos}.")
    if not isinstance(change, Valued):
        return replace(change, positions=positions)
    value = change.value
    if isinstance(value, Source):
        if value.layer is not None:
            check((value.layer,), cfg.n_layers, f"layers in the {change.stack}")
        value = pointed(value, change, positions, run)
    return replace(change, positions=positions, value=value)


def encoder_of(model: HookedTransformer, change: Edit) -> EncoderConfig | VisionConfig:
    cfg = model.lalm_cfg if isinstance(model, HookedLALM) else None
    encoder = cfg and (cfg.vision if change.stack == "vision_encoder" else cfg.encoder)
    if encoder is None:
        raise InputError(f"This model has no {change.name.split('.')[0]} to change anything in.")
    return encoder


def n_perceived(change: Edit, run: Run, model: HookedTransformer) -> int:
    """States of the encoder, or of the adapter, that belong to what is heard or seen, in the row that is changed."""
    assert isinstance(model, HookedLALM)
    rows = model.perceived(run.inputs, change.stack) if isinstance(run.inputs, Inputs) else ()
    if not rows:
        raise InputError(
            f"A change of {change.name} needs a run of `Inputs`, which hears its audio and sees its images again, and "
            "this one holds none."
        )
    if change.row is None and len(rows) > 1:
        raise InputError(f"{change.name} has {len(rows)} rows in this run: say which one is changed, as row=0.")
    check((change.row or 0,), len(rows), f"rows of {change.name}")
    n_states, n_entering, n_tokens = rows[change.row or 0]
    if change.site in ADAPTER:
        check((change.layer,), 1, "layers of the adapter")
        return n_tokens if change.site == "adapter_out" else n_entering
    return n_states


def perceived_positions(change: Edit) -> tuple[int, ...]:
    if isinstance(change.positions, str) or min(change.positions) < 0:
        raise InputError(f"Positions of the {change.name} are indices from 0 on, got {change.positions!r}.")
    return tuple(change.positions)


def check(chosen: Iterable[int], n: int, what: str) -> None:
    wrong = [each for each in chosen if not 0 <= each < n]
    if wrong:
        raise InputError(f"There are {n} {what}, counted from 0; got {wrong}.")


def pointed(source: Source, change: Edit, positions: tuple[int, ...], run: Run) -> Source:
    """A source that says everything: its layer, positions and site are no longer those of the change."""
    layer = change.layer if source.layer is None else source.layer
    site = source.site or change.site
    if site not in HOOKS and site not in ADAPTER:
        raise InputError(f"A site is one of {', '.join((*HOOKS, *ADAPTER))}; got {site!r}.")
    if (site == "pattern") != (change.site == "pattern"):
        raise InputError(f"A pattern goes where a pattern is: {site} cannot become {change.site}.")
    at = positions if source.positions is None else source.positions
    if change.is_perceived:
        at = perceived_positions(replace(change, positions=at))
    elif isinstance(source.run, Run):
        at = source.run.indices(change.positions if source.positions is None else at)
    elif source.run is OWN:
        at = run.indices(at)
    elif isinstance(at, str):
        raise InputError(f"A cache has no regions: say which positions {at!r} is, or give a `Run` with its prompt.")
    else:
        at = indices(at, n_pos_of(source.run, hook_name(site, layer, change.stack), change))
    if len(at) != len(positions):
        raise InputError(f"{len(at)} states are to go to {len(positions)} positions: give as many.")
    if source.run is OWN and not (site in EARLIER and earlier(site, layer, change)):
        raise InputError(
            f"A branch can take its own {', '.join(EARLIER)} from before the change, not {site} of block {layer}."
        )
    return Source(source.run, layer, tuple(at), site, change.row if source.row is None else source.row)


def earlier(site: str, layer: int, change: Edit) -> bool:
    order = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "post", "mlp_out", "resid_post")
    return not change.is_perceived and (layer, order.index(site)) < (change.layer, order.index(change.site))


def n_pos_of(cache: Cache, name: str, change: Edit) -> int:
    return unbatched(cache, name, change).shape[1 if change.site == "pattern" else 0]


def sources(branches: Sequence[Branch]) -> dict[Run, set[str]]:
    """The hook points of other runs that the branches take states from."""
    wanted: dict[Run, set[str]] = {}
    for branch in branches:
        for change in branch.changes:
            if isinstance(change, Valued) and isinstance(change.value, Source) and isinstance(change.value.run, Run):
                wanted.setdefault(change.value.run, set()).add(source_name(change.value, change))
    return wanted


def source_name(source: Source, change: Edit) -> str:
    assert source.site is not None
    assert source.layer is not None
    return hook_name(source.site, source.layer, change.stack)


def resolved(change: Change | NamedHook, states: Mapping[Run, States]) -> Change | NamedHook:
    """With the states of other runs as values."""
    if not (isinstance(change, Valued) and isinstance(change.value, Source)) or change.value.run is OWN:
        return change
    source, name = change.value, source_name(change.value, change)
    run = source.run
    assert run is not OWN
    if isinstance(run, Run):
        state = states[run][name]
        state = row_of(state, source, name) if change.is_perceived else state
    else:
        state = unbatched(run, name, change, source)
    return replace(change, value=value_of(state, change, source.at))


def row_of(state: Tensor, source: Source, name: str) -> Tensor:
    """What one window of a clip, or one frame, has of a state."""
    if source.row is None and len(state) > 1:
        raise InputError(f"{name} has {len(state)} rows in the run that it is taken from: say which, as row=0.")
    check((source.row or 0,), len(state), f"rows of {name}")
    return state[source.row or 0]


def unbatched(cache: Cache, name: str, change: Edit, source: Source | None = None) -> Tensor:
    """The state of the only prompt of a cache, which may have lost the axis of the batch."""
    try:
        state = cache[name]
    except KeyError:
        raise InputError(f"This cache does not hold {name}: name it when you make the cache.") from None
    if state.ndim == 3 + (change.site in BY_HEAD):
        if source is not None and change.is_perceived:
            return row_of(state, source, name)
        if len(state) != 1:
            raise InputError(f"A source is a run of one prompt, and this cache holds {len(state)}.")
        return state[0]
    return state


def value_of(state: Tensor, change: Edit, positions: tuple[int, ...]) -> Tensor:
    """The part of a state that a change of this kind takes: [at, ...]."""
    by_position = state.transpose(0, 1) if change.site == "pattern" else state
    if max(positions) >= len(by_position):
        raise InputError(f"Position {max(positions)} is asked of a state that has {len(by_position)}.")
    taken = rows(by_position, positions)[None]
    return taken[change.units(taken.device)][0]
