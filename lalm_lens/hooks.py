"""TransformerLens' hook interface, made strict: a hook that would never fire raises, and says which names are near."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.slice import Slice

from lalm_lens.axes import axes_of, n_bytes
from lalm_lens.errors import HookError, InputError

NamesFilter = Callable[[str], bool] | str | list[str] | None
NamedHook = tuple[str | Callable, Callable]  # a name or a filter of names, and what to do there


class StrictHooks(HookedRootModule):
    """A `HookedRootModule` that knows which of its hook points a run passes."""

    def switch_of(self, name: str) -> str | None:
        """What has to be called before a hook point fires; None for one that fires as the model is set now."""
        raise NotImplementedError

    def switched_on(self) -> set[str]:
        """The hook points that fire as the model is set now."""
        raise NotImplementedError

    def live(self, *args: Any, **kwargs: Any) -> set[str]:
        """The hook points that fire in a run with these arguments."""
        raise NotImplementedError

    def run_with_hooks(
        self, *args: Any, fwd_hooks: Iterable[NamedHook] = (), bwd_hooks: Iterable[NamedHook] = (), **kwargs: Any
    ) -> Any:
        """TransformerLens' `run_with_hooks`. A name that this run does not pass raises `HookError`; a filter selects
        among the hook points that it does pass, and raises if there is none."""
        model_kwargs = {key: value for key, value in kwargs.items() if key not in ("reset_hooks_end", "clear_contexts")}
        live = self.live(*args, **model_kwargs) if fwd_hooks or bwd_hooks else set()
        fwd, bwd = self.by_name(fwd_hooks, live), self.by_name(bwd_hooks, live)
        return super().run_with_hooks(*args, fwd_hooks=fwd, bwd_hooks=bwd, **kwargs)

    def by_name(self, hooks: Iterable[NamedHook], live: set[str]) -> list[NamedHook]:
        return [(name, hook) for names, hook in hooks for name in sorted(self.chosen(names, live))]

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]  an ActivationCache, not its dict
        self,
        *args: Any,
        names_filter: NamesFilter = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        device: Any = None,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """TransformerLens' `run_with_cache`, by default of all that the run passes; names and filters as above."""
        if incl_bwd:
            raise InputError(
                "Gradients need a number to be taken of, and this model returns logits: use bwd_hooks, or "
                "transformer_lens.tools.analysis.attribution_patching.cache_activation_and_gradient."
            )
        names = self.chosen(names_filter, self.live(*args, **model_kwargs))
        if pos_slice is None:
            self.refuse_too_much(names, torch.device(device or self.device), *args)
        elif elsewhere := {name for name in names if axes_of(name).startswith(("clip", "audio_pos"))}:
            raise InputError(
                f"pos_slice chooses positions of the prompt, and {min(elsewhere)} has others. Name what you need, "
                "as in names_filter=lambda name: name.startswith('blocks.')."
            )
        out, cache = super().run_with_cache(
            *args,
            names_filter=names.__contains__,
            remove_batch_dim=remove_batch_dim,
            device=device,
            reset_hooks_end=reset_hooks_end,
            clear_contexts=clear_contexts,
            pos_slice=pos_slice,
            **model_kwargs,
        )
        if remove_batch_dim and len(out) != 1:
            raise InputError(f"The batch dimension of {len(out)} prompts cannot be removed. Run one at a time.")
        if not return_cache_object:
            return out, cache
        return out, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def sizes(self, *args: Any) -> dict[str, dict[str, int]]:
        """How long the axes are in a run with these arguments, for the hook points that begin with a prefix."""
        raise NotImplementedError

    def cache_bytes(self, names: set[str], *args: Any) -> int:
        """Memory of the states that a run with these arguments would leave at these hook points."""
        return sum(
            n_bytes([name for name in names if name.startswith(prefix)], sizes, self.itemsize(prefix))
            for prefix, sizes in self.sizes(*args).items()
        )

    def itemsize(self, prefix: str) -> int:
        """Bytes of a number of the states in a part of the model: a few weights may be wider."""
        part = getattr(self, prefix.removesuffix("."), self)
        return min(parameter.element_size() for parameter in part.parameters())

    def refuse_too_much(self, names: set[str], device: torch.device, *args: Any) -> None:
        """Raise `InputError` where a cache of these hook points would not fit into the memory that is free."""
        needed, free = self.cache_bytes(names, *args), free_bytes(device)
        if needed > free:
            raise InputError(
                f"A cache of these {len(names)} hook points would take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
                f"are free on {device}. Name what you need, as in names_filter=lambda name: "
                "name.endswith('hook_resid_post'); scores and patterns take the most."
            )

    def chosen(self, names_filter: NamesFilter, live: set[str]) -> set[str]:
        """The hook points that a filter selects among the live ones; None selects them all."""
        if names_filter is None:
            return live
        if callable(names_filter):
            matched = self.matched(names_filter)
            if not matched & live:
                raise self.silent(min(matched))
            return matched & live
        names = {names_filter} if isinstance(names_filter, str) else set(names_filter)
        if not names:
            raise HookError("The list of hook names is empty. Leave it out to take all.")
        for name in sorted(names):
            self.check_name(name)
            if name not in live:
                raise self.silent(name)
        return names

    def matched(self, names_filter: Callable[[str], bool]) -> set[str]:
        matched = {name for name in self.hook_dict if names_filter(name)}
        if not matched:
            raise HookError("The names filter matches no hook point. `model.hook_dict` lists them all.")
        on = matched & self.switched_on()
        if not on:
            self.check_name(min(matched))
        return on

    def check_name(self, name: str) -> None:
        if name not in self.hook_dict:
            nearest = difflib.get_close_matches(name, self.hook_dict, n=3, cutoff=0.0)
            raise HookError(f"There is no hook point {name!r}. The nearest are {', '.join(nearest)}.")
        self.check_switch(name)

    def check_switch(self, name: str) -> None:
        switch = self.switch_of(name)
        if switch is not None:
            raise HookError(f"{name} never fires: call `model.{switch}` first.")

    def silent(self, name: str) -> HookError:
        return HookError(
            f"A hook on {name} would not fire: this run, from start_at_layer to stop_at_layer, is elsewhere."
        )

    def hooked(self) -> set[str]:
        """Where hooks are attached, but for permanent ones: they are there for other runs too."""
        hooked = {name for name, point in self.hook_dict.items() if point.fwd_hooks or point.bwd_hooks}
        return {name for name in hooked if self.hook_dict[name].has_hooks(including_permanent=False)}

    def refuse_silent_hooks(self, *args: Any, **kwargs: Any) -> None:
        """Raise for a hook that is attached where this run does not pass."""
        for name, point in self.hook_dict.items():
            if point.has_hooks():
                self.check_switch(name)
        hooked = self.hooked()
        silent = hooked - self.live(*args, **kwargs) if hooked else set()
        if silent:
            raise self.silent(min(silent))

    @contextmanager
    def told(self, **facts: int | float) -> Iterator[None]:
        """Let every hook read these facts about the run it is in from `hook.ctx`."""
        points = [(point, dict(point.ctx)) for point in self.hook_dict.values() if point.has_hooks()]
        for point, _ in points:
            point.ctx.update(facts)
        try:
            yield
        finally:
            for point, before in points:  # a hook may run the model itself: what was told there ends there
                for fact in facts:
                    point.ctx.pop(fact, None)
                point.ctx.update({fact: before[fact] for fact in facts if fact in before})

    def get_caching_hooks(
        self, names_filter: NamesFilter = None, *args: Any, pos_slice: Any = None, **kwargs: Any
    ) -> tuple[dict, list, list]:
        """TransformerLens' own, but for `pos_slice`, which there takes `hook_rot_q` to have its heads at `pos`."""
        names = self.chosen(names_filter, self.switched_on())
        cache, fwd, bwd = super().get_caching_hooks(names.__contains__, *args, **kwargs)
        if Slice.unwrap(pos_slice).mode == "identity":
            return cache, fwd, bwd
        fwd, bwd = ([(name, of_positions(name, save, pos_slice)) for name, save in hooks] for hooks in (fwd, bwd))
        return cache, fwd, bwd

    def add_caching_hooks(self, names_filter: NamesFilter = None, *args: Any, **kwargs: Any) -> dict:
        names = self.chosen(names_filter, self.switched_on())
        return super().add_caching_hooks(names.__contains__, *args, **kwargs)

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        for chosen in [name] if isinstance(name, str) else sorted(self.matched(name)):
            self.check_name(chosen)
            super().add_hook(chosen, *args, **kwargs)

    def _enable_hook_with_name(self, name: str, hook: Callable, dir: Any) -> None:
        self.check_name(name)
        super()._enable_hook_with_name(name, hook, dir)

    def _enable_hooks_for_points(
        self, hook_points: Iterable[tuple[str, HookPoint]], enabled: Callable, hook: Callable, dir: Any
    ) -> None:
        super()._enable_hooks_for_points(hook_points, self.matched(enabled).__contains__, hook, dir)


def of_positions(name: str, save: Callable, pos_slice: Any) -> Callable:
    """Save only some positions, on the axis where this hook point has them."""
    chosen, axes = Slice.unwrap(pos_slice), axes_of(name).split(", ")
    axis = axes.index("query_pos" if "query_pos" in axes else "pos")
    return lambda state, hook: save(chosen.apply(state, dim=axis), hook=hook)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses yet."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
