"""States of every layer as one vector for each clip: what probes are trained on, and twins are compared by."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from lalm_lens.errors import InputError
from lalm_lens.experiments.cuts import Place, place_name, positions
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import NamedHook
from lalm_lens.model import HookedLALM
from lalm_lens.results import EMBED_LAYER
from lalm_lens.runs import Run
from lalm_lens.seeing import SeeingLALM

Stack = Literal["audio_encoder", "adapter", "vision_encoder", "vision_adapter", "decoder"]


class Spot(NamedTuple):
    """Where a state is read: after which block of which part, from 0 on. Layer -1 is the merged embedding, and in the
    encoder the convolved sound before positions are added, or the embedded patches; an adapter has layer 0. `place` is
    that of the prompt, or "clip", or "pictures"."""

    stack: str
    layer: int
    place: str


Features = Mapping[Spot, Float[np.ndarray, " width"]]


@torch.no_grad()
def features(model: HookedLALM, run: Run, stacks: Sequence[Stack], places: Sequence[Place]) -> Features:
    """The decoder's states at each place, those of the encoders' blocks, and what the adapters make of them: each the
    mean over positions, of the encoders over those that hold sound, and patches. One forward.

    Raises `InputError` for a place that the prompt does not have, for a vision tower that the model does not have, and
    for states that are not finite.
    """
    found: dict[Spot, Float[np.ndarray, " width"]] = {}

    def reads(spots: Mapping[Spot, Callable[[Tensor], Tensor]]) -> Callable[[Tensor, HookPoint], None]:
        def read(state: Tensor, hook: HookPoint) -> None:
            for spot, mean in spots.items():
                found[spot] = mean(state).cpu().numpy()

        return read

    hooks: list[NamedHook] = [(name, reads(spots)) for name, spots in readers(model, run, stacks, places).items()]
    n_run = model.decoder_cfg.n_layers if "decoder" in stacks else 0
    model.run_with_hooks(run.inputs.to(model.device), fwd_hooks=hooks, stop_at_layer=n_run)
    if broken := [spot for spot, state in found.items() if not np.isfinite(state).all()]:
        raise InputError(
            f"States of the {broken[0].stack} are not finite from layer {broken[0].layer} on: load the model as "
            "bfloat16 or float32."
        )
    return found


def readers(
    model: HookedLALM, run: Run, stacks: Sequence[Stack], places: Sequence[Place]
) -> dict[str, dict[Spot, Callable[[Tensor], Tensor]]]:
    """By hook point, what is read there."""
    if not isinstance(model, SeeingLALM) and (eyes := [stack for stack in stacks if stack.startswith("vision")]):
        raise InputError(f"This {model.lalm_cfg.model_type} model hears and does not see: leave out {eyes[0]}.")
    found: dict[str, dict[Spot, Callable[[Tensor], Tensor]]] = {}
    if "audio_encoder" in stacks:
        names = layer_names("audio_encoder.", model.lalm_cfg.encoder.n_layers)
        found |= {name: {Spot("audio_encoder", layer, "clip"): over_perceived(model, run)} for layer, name in names}
    if "adapter" in stacks:
        found["hook_audio_embed"] = {Spot("adapter", 0, "clip"): lambda state: state.float().mean(0)}
    if isinstance(model, SeeingLALM) and "vision_encoder" in stacks:
        mean = over_perceived(model, run, "vision_encoder")
        names = layer_names("vision_encoder.", model.vision.n_layers)
        found |= {name: {Spot("vision_encoder", layer, "pictures"): mean} for layer, name in names}
    if "vision_adapter" in stacks:
        found["hook_vision_embed"] = {Spot("vision_adapter", 0, "pictures"): lambda state: state.float().mean(0)}
    if "decoder" in stacks:
        at = {place_name(place): over(positions(run, place)) for place in places}
        for layer, name in layer_names("", model.decoder_cfg.n_layers):
            found[name] = {Spot("decoder", layer, place): mean for place, mean in at.items()}
    return found


def layer_names(prefix: str, n_layers: int) -> list[tuple[int, str]]:
    blocks = [(layer, f"{prefix}blocks.{layer}.hook_resid_post") for layer in range(n_layers)]
    return [(EMBED_LAYER, f"{prefix}hook_embed"), *blocks]


def over(at: tuple[int, ...]) -> Callable[[Float[Tensor, "1 pos width"]], Float[Tensor, " width"]]:
    return lambda state: state[0, list(at)].float().mean(0)


def over_perceived(
    model: HookedLALM, run: Run, stack: Literal["audio_encoder", "vision_encoder"] = "audio_encoder"
) -> Callable[[Float[Tensor, "row pos width"]], Float[Tensor, " width"]]:
    """The mean over the states of an encoder that belong to the clip, in each of its windows, or to the pictures."""
    rows = model.perceived(run.inputs, stack) if isinstance(run.inputs, Inputs) else []
    lengths = [n_states for n_states, _, _ in rows]

    def mean(state: Float[Tensor, "row pos width"]) -> Float[Tensor, " width"]:
        return torch.cat([row[:n].float() for row, n in zip(state, lengths, strict=True)]).mean(0)

    return mean
