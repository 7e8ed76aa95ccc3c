"""What to change in a run, as typed values. A *branch* is a run with a list of such changes, made in their order.

Patch("resid_post", 12, "object", Source(clean))                       states of another run
Add("resid_post", 17, (-1,), Source(OWN, layer=12), factor=0.5)        what the branch itself knew earlier
Scale("z", 9, (-1,), factor=0.0, heads=(3, 5))                         two heads cut off at the last position
Knockout(range(32), queries=(-1,), keys="audio")                       the last position cannot look at the audio
ScaleAttention((9, 10), queries=(-1,), keys="audio", factor=2.0)       it looks at the audio more than it did
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from math import isfinite, log
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from lalm_lens.errors import HookError, InputError
from lalm_lens.runs import Positions, Source, as_index, whole_numbers

BlockSite = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "post"
]
Site = Literal[BlockSite, "adapter_in", "adapter_out"]
Stack = Literal["decoder", "audio_encoder", "vision_encoder"]
NamedHook = tuple[str, Callable[[Any, HookPoint], Any]]

FRONT_END = ("audio_encoder", "adapter", "vision_")  # what hears and sees: its rows are no prompts
BY_HEAD = ("q", "k", "v", "z", "pattern")
ADAPTER = {"adapter_in": "adapter.hook_in", "adapter_out": "adapter.hook_out"}
HOOKS = {
    **{site: f"hook_{site}" for site in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")},
    **{site: f"attn.hook_{site}" for site in BY_HEAD},
    "post": "mlp.hook_post",
}


def hook_name(site: str, layer: int, stack: Stack = "decoder") -> str:
    if site in ADAPTER:
        return f"{'vision_' if stack == 'vision_encoder' else ''}{ADAPTER[site]}"
    return f"{'' if stack == 'decoder' else f'{stack}.'}blocks.{layer}.{HOOKS[site]}"


def some(name: str, chosen: Iterable[int]) -> tuple[int, ...]:
    """As whole numbers. Raises `InputError` for none."""
    if not (numbers := whole_numbers(name, chosen)):
        raise InputError(f"A change of no {name} changes nothing: give one or more, or leave them out for all.")
    return numbers


def refuse_endless(factor: float) -> None:
    if not isfinite(factor):
        raise InputError(f"A factor is a finite number; got {factor}.")


@dataclass(frozen=True)
class Edit:
    """A change of the states of some positions at one place.

    `resid_*`, `attn_out`, `mlp_out` are [pos, d_model]; `q k v z` [pos, head, d_head], of which `heads` are changed;
    `pattern` [query_pos, head, key_pos], of which `heads` and `keys`; `post` [pos, d_mlp], of which `neurons`; None is
    all of them. In the `audio_encoder`, positions are its states (20 ms in Qwen2-Audio), in the `vision_encoder` its
    patches; `adapter_in` and `adapter_out` have those of the adapter, and layer 0; what enters a Q-Former is [pos, tap,
    d_model]. A clip of several windows has a row of states for each, and what is seen has one for each frame: `row` is
    the one that is changed, None is all.

    As a `.hook()`, positions are absolute: counted from the first of the prompt, padding included, and on through what
    is generated. In generation the change acts in the step that computes a position, and in no other. A position that
    the run cannot come to raises `HookError`; on rows where it is padding, nothing can see it.
    """

    site: Site
    layer: int
    positions: Positions
    _: KW_ONLY
    heads: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None
    keys: tuple[int, ...] | None = None
    stack: Stack = "decoder"
    row: int | None = None

    def __post_init__(self) -> None:
        for name, choices in {"site": (*HOOKS, *ADAPTER), "stack": get_args(Stack)}.items():
            if getattr(self, name) not in choices:
                raise InputError(f"A {name} is one of {', '.join(choices)}; got {getattr(self, name)!r}.")
        if not hasattr(self.layer, "__index__"):
            raise InputError(f"A layer is a whole number; got {self.layer!r}.")
        if not isinstance(self.positions, str):
            object.__setattr__(self, "positions", whole_numbers("positions", self.positions))
        if not self.positions or (
            len(set(self.positions)) < len(self.positions) and not isinstance(self.positions, str)
        ):
            raise InputError(f"A change needs different positions, at least one; got {self.positions}.")
        for name, sites in {"heads": BY_HEAD, "neurons": ("post",), "keys": ("pattern",)}.items():
            chosen = getattr(self, name)
            if chosen is None:
                continue
            if self.site not in sites:
                raise InputError(f"{name} are of {' '.join(sites)}, and not of {self.site}.")
            object.__setattr__(self, name, some(name, chosen))
        if self.row is not None and (not self.is_perceived or not hasattr(self.row, "__index__")):
            raise InputError(f"A row is a whole number, of the states of an encoder or adapter; got {self.row!r}.")

    @property
    def name(self) -> str:
        return hook_name(self.site, self.layer, self.stack)

    @property
    def at(self) -> tuple[int, ...]:
        """The positions, once they are indices."""
        assert not isinstance(self.positions, str)
        return tuple(self.positions)

    @property
    def is_perceived(self) -> bool:
        """Whether it is made before the decoder, in an encoder or adapter."""
        return self.stack != "decoder" or self.site in ADAPTER

    def hook(self) -> NamedHook:
        """The change as a hook: `model.run_with_hooks(inputs, fwd_hooks=[patch.hook()])`."""
        if isinstance(self.positions, str) or min(self.positions) < 0:
            raise InputError(f"A hook needs positions from 0 on; {self.positions!r} only a branch of a run can find.")
        return self.name, self.apply

    def apply(self, state: Float[Tensor, "batch _ *_"], hook: HookPoint) -> Float[Tensor, "batch _ *_"]:
        if self.row is None:
            return self.applied(state, hook)
        if not 0 <= self.row < len(state):
            raise HookError(f"There is no row {self.row} of {hook.name}: this run has {len(state)}.")
        changed = state.clone()
        changed[self.row] = self.applied(state[[self.row]], hook)[0]
        return changed

    def applied(self, state: Float[Tensor, "batch _ *_"], hook: HookPoint) -> Float[Tensor, "batch _ *_"]:
        by_position = state.transpose(1, 2) if self.site == "pattern" else state
        here, where = self.reached(by_position.shape[1], {} if self.is_perceived else hook.ctx)
        if not here:
            return state
        changed = by_position.clone()
        index = as_index(where, state.device)
        changed[:, index] = self.edited(changed[:, index], here)
        return changed.transpose(1, 2) if self.site == "pattern" else changed

    def reached(self, n_pos: int, ctx: Mapping[str, Any]) -> tuple[list[int], tuple[int, ...]]:
        """Which of the positions this step computes, as numbers among them and as places in the state."""
        offset, n_more = ctx.get("offset", 0), ctx.get("n_more", 0)
        if n_more == float("inf") and not offset <= min(self.at) <= max(self.at) < offset + n_pos:
            raise HookError(f"This step computes positions {offset} to {offset + n_pos - 1}, not {self.positions}.")
        if max(self.at) >= offset + n_pos + n_more:
            raise HookError(f"Position {max(self.at)} is never computed: this run has {offset + n_pos}.")
        here = [n for n, position in enumerate(self.at) if offset <= position < offset + n_pos]
        return here, tuple(self.at[n] - offset for n in here)

    def edited(
        self, states: Float[Tensor, "batch at *unit"], here: list[int] | slice = slice(None)
    ) -> Float[Tensor, "batch at *unit"]:
        """The states at the positions, changed. `here` are those of the positions that these states belong to."""
        units = self.units(states.device)
        changed = states.clone()
        changed[units] = self.change(changed[units], here)
        return changed

    def units(self, device: torch.device) -> tuple[Any, ...]:
        """What is changed of [batch, at, head, d_head or key_pos] or [batch, at, d_mlp]."""
        everything = slice(None)
        chosen = self.neurons if self.heads is None else self.heads
        if chosen is None:
            return (everything, everything) if self.keys is None else (..., as_index(self.keys, device))
        index = as_index(chosen, device)
        if self.keys is None:
            return everything, everything, index
        return everything, everything, index[:, None], as_index(self.keys, device)

    def change(self, states: Tensor, here: list[int] | slice) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Valued(Edit):
    """An edit by a value: one row for each position, or states of a run."""

    value: Tensor | Source = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.value, Tensor | Source):
            raise InputError(
                f"A value is a tensor, or states of a run: Source(run); got a {type(self.value).__name__}."
            )
        if isinstance(self.value, Tensor) and not isinstance(self.positions, str):
            n_axes = (3,) if self.site in BY_HEAD else (2, 3) if self.site == "adapter_in" else (2,)
            if len(self.positions) not in [self.value.shape[-n] for n in n_axes if n <= self.value.ndim]:
                raise InputError(f"{len(self.positions)} positions need as many rows, got {tuple(self.value.shape)}.")

    def hook(self) -> NamedHook:
        if not isinstance(self.value, Tensor):
            raise InputError("States of another run are looked up where branches run: `run_branches` of lalm_lens.")
        return super().hook()

    def rows(self, states: Tensor, here: list[int] | slice) -> Tensor:
        """The value's rows for these states."""
        assert isinstance(self.value, Tensor)
        n_axes = states.ndim - 1
        value = self.value  # of too few axes, it does not fit
        if value.ndim >= n_axes:
            value = value.movedim(-n_axes, 0)[here].movedim(0, -n_axes)
        if value.shape[-n_axes:] != states.shape[1:] or value.shape[:-n_axes] not in ((), (1,), states.shape[:1]):
            raise InputError(
                f"A value of shape {tuple(self.value.shape)} does not fit states of shape {tuple(states.shape)}: "
                f"{self.site} at {len(self.positions)} positions."
            )
        return value.to(states)


@dataclass(frozen=True)
class Patch(Valued):
    """Let the states be `value`."""

    def change(self, states: Tensor, here: list[int] | slice) -> Tensor:
        return self.rows(states, here).expand_as(states)


@dataclass(frozen=True)
class Add(Valued):
    """Add `factor` times `value` to the states."""

    _: KW_ONLY
    factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_endless(self.factor)

    def change(self, states: Tensor, here: list[int] | slice) -> Tensor:
        return states + self.factor * self.rows(states, here)


@dataclass(frozen=True)
class Scale(Edit):
    """Multiply the states by `factor`; 0 takes them out."""

    _: KW_ONLY
    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_endless(self.factor)

    def change(self, states: Tensor, here: list[int] | slice) -> Tensor:
        return states * self.factor


@dataclass(frozen=True)
class Recompute(Edit):
    """Change nothing, and yet compute again from here on: what is left of the branch's difference is rounding."""

    def change(self, states: Tensor, here: list[int] | slice) -> Tensor:
        return states


@dataclass(frozen=True)
class OnScores:
    """A change of the scores of some queries on some keys before the softmax, in these layers and heads (None is all).

    A key that a query could not see anyway, behind it or outside of its window, changes nothing.
    """

    layers: Sequence[int]
    queries: Positions
    keys: Positions
    heads: tuple[int, ...] | None = None
    stack: ClassVar[Stack] = "decoder"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", some("layers", self.layers))
        for name in ("queries", "keys"):
            if not isinstance(positions := getattr(self, name), str):
                object.__setattr__(self, name, some(name, positions))
        if self.heads is not None:
            object.__setattr__(self, "heads", some("heads", self.heads))

    def hooks(self) -> list[NamedHook]:
        """As hooks on the scores of each layer. Queries and keys are absolute, as in `Edit`."""
        return [(f"blocks.{layer}.attn.hook_attn_scores", self.apply) for layer in self.layers]

    def apply(
        self, scores: Float[Tensor, "batch head query_pos key_pos"], hook: HookPoint
    ) -> Float[Tensor, "batch head query_pos key_pos"]:
        n_query, n_key = scores.shape[-2:]
        offset = hook.ctx["offset"]
        queries = [query - offset for query in self.queries_at if offset <= query < offset + n_query]
        keys = [key for key in self.keys_at if key < n_key]
        index = as_index(tuple(range(scores.shape[1])) if self.heads is None else self.heads, scores.device)
        changed = scores.clone()
        rows_, columns = as_index(tuple(queries), scores.device), as_index(tuple(keys), scores.device)
        changed[:, index[:, None, None], rows_[:, None], columns] += self.log_factor
        self.check(changed[:, :, rows_])
        return changed

    @property
    def log_factor(self) -> float:
        """What is added to the scores."""
        raise NotImplementedError

    def check(self, scores: Float[Tensor, "batch head query key_pos"]) -> None:
        """Of the queries, when all is done."""

    @property
    def queries_at(self) -> tuple[int, ...]:
        return self.numbered(self.queries)

    @property
    def keys_at(self) -> tuple[int, ...]:
        return self.numbered(self.keys)

    def numbered(self, positions: Positions) -> tuple[int, ...]:
        if isinstance(positions, str) or min(positions, default=0) < 0:
            raise InputError(f"A hook needs positions from 0 on; {positions!r} only a branch of a run can find.")
        return tuple(positions)


@dataclass(frozen=True)
class Knockout(OnScores):
    """Let some queries not see some keys, in these layers and heads (None is all): their scores are -infinity.

    Arxiv 2304.14767's attention knockout. A key that a query could not see anyway, behind it or outside of its window,
    changes nothing. A query must be left with a key to look at: otherwise `InputError`.
    """

    @property
    def log_factor(self) -> float:
        return -torch.inf

    def check(self, scores: Float[Tensor, "batch head query key_pos"]) -> None:
        if scores.amax(-1).eq(-torch.inf).any():
            raise InputError(f"This knockout leaves one of the queries {self.queries} no key to look at.")


@dataclass(frozen=True)
class ScaleAttention(OnScores):
    """Let some queries look `factor` times as much at some keys, in these layers and heads (None is all).

    log(factor) is added to the scores, so a row still sums to 1: what these keys had together, a, becomes
    factor a / (1 + (factor - 1) a). Weights that are multiplied and not made to sum to 1 again are
    `Scale("pattern", layer, queries, keys=..., factor=...)`.
    """

    _: KW_ONLY
    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.factor < float("inf"):
            raise InputError(f"Attention is scaled by a factor above 0, got {self.factor}: a `Knockout` takes it away.")

    @property
    def log_factor(self) -> float:
        return log(self.factor)


Change = Edit | OnScores
