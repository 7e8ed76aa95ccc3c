"""Runs in which states of another run stand: one hook, the patches of a layer batched.

This is the slow and plain way, which faster ones are compared with. Nothing in it depends on what the numbers are for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

from lalm_lens.errors import InputError
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import Site
from lalm_lens.model import HookedLALM
from lalm_lens.results import EMBED_LAYER

Read = Callable[[Float[Tensor, "batch at d_vocab"]], Float[Tensor, "batch score"]]


@dataclass(frozen=True)
class Run:
    """An unpatched run of one prompt: the states along the way, and what came out at the positions that are read."""

    cache: ActivationCache
    logits: Float[Tensor, "at d_vocab"]


@dataclass(frozen=True)
class Sweep:
    """What was read from every patched run, and from runs in which nothing was patched: a run of `nothing` is the same
    row of a batch of the same shape, so that a patch without effect differs from it by exactly nothing."""

    patched: Float[Tensor, "layer patch score"]
    nothing: Float[Tensor, "patch score"]


def patched_layers(site: Site, n_layers: int) -> range:
    """All blocks; for states of the residual stream the merged embedding too."""
    return range(EMBED_LAYER if site.startswith("resid") else 0, n_layers)


def hook_name(site: Site, layer: int) -> str:
    return "hook_embed" if layer == EMBED_LAYER else f"blocks.{layer}.hook_{site}"


@torch.no_grad()
def run(model: HookedLALM, inputs: Inputs, site: Site = "resid_post", n_read: int = 1) -> Run:
    """One prompt through encoder and decoder; the last `n_read` positions are read."""
    names = ["hook_embed", *(hook_name(site, layer) for layer in range(model.cfg.n_layers))]
    logits, cache = model.run_with_cache(
        inputs.to(model.W_E.device), names_filter=names, logits_at=slice(-n_read, None)
    )
    if not logits.isfinite().all():
        narrow = model.cfg.dtype == torch.float16
        advice = "Load the model as bfloat16 or float32." if narrow else "The weights of this checkpoint are broken."
        raise InputError(f"The logits are not finite in {model.cfg.dtype}. {advice}")
    return Run(cache, logits[0])


@torch.no_grad()
def sweep(
    model: HookedLALM,
    source: Run,
    base: Run,
    where: Bool[Tensor, "patch pos"],
    read: Read,
    site: Site = "resid_post",
    batch_size: int = 32,
) -> Sweep:
    """The base run again and again: in each layer, with the source's states at the positions of each patch.

    Layer by layer beside a batch of base runs, from which the patched runs branch off.
    """
    n_read, n_after = len(base.logits), base.cache["hook_embed"].shape[1] - where.shape[1]
    batches = batched(pad(where, (0, n_after)), batch_size).to(base.logits.device)
    resid = base.cache["hook_embed"].expand(batches.shape[1], -1, -1)
    patched = []
    for layer in patched_layers(site, model.cfg.n_layers):
        name, start = hook_name(site, layer), None if layer == EMBED_LAYER else layer
        # What is bit-equal in both runs is left alone: written into a batch of another shape it would be a change.
        differs = (source.cache[name] != base.cache[name]).any(-1)
        for batch in batches:
            logits = model.run_with_hooks(
                resid,
                start_at_layer=start,
                logits_at=slice(-n_read, None),
                fwd_hooks=[(name, restore(source.cache[name], batch & differs))],
            )
            patched.append(read(logits))
        resid = model(resid, start_at_layer=start, stop_at_layer=layer + 1)
    nothing = read(model(resid, start_at_layer=model.cfg.n_layers, logits_at=slice(-n_read, None)))
    n_patches, n_batches = len(where), len(batches)
    by_layer = torch.cat(patched).unflatten(0, (-1, n_batches * len(nothing)))
    return Sweep(by_layer[:, :n_patches], nothing.repeat(n_batches, 1)[:n_patches])


def batched(where: Bool[Tensor, "patch pos"], batch_size: int) -> Bool[Tensor, "chunk batch pos"]:
    """As few batches as possible, all of one size; the last is filled with patches of nothing."""
    n_batches = -(-len(where) // batch_size)
    size = -(-len(where) // n_batches)
    return pad(where, (0, 0, 0, n_batches * size - len(where))).unflatten(0, (n_batches, size))


def restore(
    states: Float[Tensor, "1 pos d_model"], where: Bool[Tensor, "batch pos"]
) -> Callable[[Float[Tensor, "batch pos d_model"], HookPoint], Float[Tensor, "batch pos d_model"]]:
    return lambda state, hook: torch.where(where[..., None], states, state)
