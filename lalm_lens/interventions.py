"""What to change in a run, as typed values."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from lalm_lens.errors import HookError, InputError

Site = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]


@dataclass(frozen=True)
class Patch:
    """Let the state of some positions of one decoder block be `value`.

    Positions are absolute: counted from the first of the prompt, padding included, and on through what is generated.
    In generation the patch acts in the step that computes a position, and in no other. A position that the run cannot
    come to raises `HookError`; on rows where it is padding, nothing can see it.
    """

    site: Site
    layer: int
    positions: tuple[int, ...]
    value: Float[Tensor, "*batch at d_model"] = field(repr=False)  # one row for each position

    def __post_init__(self) -> None:
        if not self.positions or min(self.positions) < 0 or len(set(self.positions)) < len(self.positions):
            raise InputError(f"A patch needs different positions, 0 or more; got {self.positions}.")
        if self.value.ndim < 2 or self.value.shape[-2] != len(self.positions):
            raise InputError(f"{len(self.positions)} positions need as many rows, got {tuple(self.value.shape)}.")

    @property
    def name(self) -> str:
        return f"blocks.{self.layer}.hook_{self.site}"

    def hook(self) -> tuple[str, Callable[[Float[Tensor, "batch pos d_model"], HookPoint], Tensor]]:
        """The patch as a hook: `model.run_with_hooks(inputs, fwd_hooks=[patch.hook()])`."""
        return self.name, self.apply

    def apply(self, state: Float[Tensor, "batch pos d_model"], hook: HookPoint) -> Float[Tensor, "batch pos d_model"]:
        offset, n_pos = hook.ctx["offset"], state.shape[1]
        if (
            hook.ctx["n_more"] == float("inf")
            and not offset <= min(self.positions) <= max(self.positions) < offset + n_pos
        ):
            raise HookError(f"This step computes positions {offset} to {offset + n_pos - 1}, not {self.positions}.")
        if max(self.positions) >= offset + n_pos + hook.ctx["n_more"]:
            raise HookError(f"Position {max(self.positions)} is never computed: this run has {offset + n_pos}.")
        if self.value.shape[-1] != state.shape[-1] or self.value.shape[:-2] not in ((), (1,), state.shape[:1]):
            raise InputError(
                f"A patch of shape {tuple(self.value.shape)} does not fit states of shape {tuple(state.shape)}."
            )
        here = [n for n, position in enumerate(self.positions) if offset <= position < offset + n_pos]
        if not here:
            return state
        at = torch.tensor([self.positions[n] - offset for n in here], device=state.device)
        changed = state.clone()
        changed[:, at] = self.value[..., here, :].to(state)
        return changed
