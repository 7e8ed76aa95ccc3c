"""Ways to compute the same causal map, each with the same signature.

    rival(clean, corrupt, patches, token) -> log-probability of the token at the last position, for each patch

Every rival also does the two base runs, which give the clean states and the corrupted answer; with no patches it does
those alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.hf import HF, Change, Clever, LastLogits, PlainHooks, Rival, log_probabilities
from benchmarks.peers import Bridge, NNsight, Pyvene
from benchmarks.task import Embed, Patches
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import Engine, run_branches
from lalm_lens.inputs import Embedded
from lalm_lens.interventions import Patch
from lalm_lens.loading import from_hf
from lalm_lens.readouts import LogProbs
from lalm_lens.runs import Run, Source


def ours_plain(hf: HF) -> Rival:
    """Hooks on our model, from the block that is patched on, with the last position alone unembedded."""
    model = from_hf(hf)
    names = [f"blocks.{layer}.hook_resid_{at}" for layer in range(model.cfg.n_layers) for at in ("pre", "post")]

    def run(clean: Embed, corrupt: Embed, patches: Patches, token: int) -> Float[Tensor, " patch"]:
        cleans, corrupts = (
            model.run_with_cache(embed, names_filter=names, logits_at=-1)[1] for embed in (clean, corrupt)
        )

        def last_logits(layer: int, at: int) -> Float[Tensor, " d_vocab"]:
            name = f"blocks.{layer}.hook_resid_post"
            change = Change(layer, at, cleans[name][:, at])
            return model.run_with_hooks(
                corrupts["resid_pre", layer],
                start_at_layer=layer,
                logits_at=-1,
                fwd_hooks=[(name, lambda resid, hook: change.put(resid))],
            )[0, -1]

        return log_probabilities(token, (last_logits(*patch) for patch in patches))

    return run


def ours(engine: Engine) -> Callable[[HF], Rival]:
    """The map by one of our two engines."""

    def build(hf: HF) -> Rival:
        model = from_hf(hf)

        def run(clean: Embed, corrupt: Embed, patches: Patches, token: int) -> Float[Tensor, " patch"]:
            everything = torch.ones(clean.shape[:2], dtype=torch.bool, device=clean.device)
            source, base = (Run(Embedded(embed, everything)) for embed in (clean, corrupt))
            branches = [Branch(base, (Patch("resid_post", layer, (at,), Source(source)),)) for layer, at in patches]
            # With no patches the two runs alone: a patch that nothing reads makes them, and costs nothing.
            idle = Branch(base, (Patch("resid_post", model.cfg.n_layers - 1, (0,), Source(source)),))
            readout = LogProbs(tokens=(token,))
            return run_branches(model, branches or [idle], readout, engine=engine).values[: len(patches), 0, 0]

        return run

    return build


class Entry(NamedTuple):
    title: str
    build: Callable[[HF], Rival]
    whole: bool = False  # fast enough to be timed on the whole map


RIVALS = {
    "bridge": Entry("TransformerLens bridge", Bridge),
    "nnsight": Entry("nnsight", NNsight),
    "pyvene": Entry("pyvene", Pyvene),
    "hooks": Entry("plain hooks on HF", PlainHooks),
    "hooks-again": Entry("plain hooks on HF, again", PlainHooks),
    "last-logits": Entry("plain hooks on HF, last logits only", LastLogits),
    "clever": Entry("HF with cached prefix, batched, last logits only", Clever, whole=True),
    "ours-plain": Entry("lalm_lens, run_with_hooks from the patched block on", ours_plain),
    "ours-hooks": Entry("lalm_lens, hooks executor", ours("hooks")),
    "ours-sweep": Entry("lalm_lens, sweep", ours("sweep"), whole=True),
}
