"""What single components of the decoder do for an answer: attribution patching, exact patches, and circuits of them.

Two runs of as many positions differ in what is heard or read; m is the logit of the clean run's answer above that of a
rival. The first-order effect of putting a component's clean output into the corrupted run is

    (a_clean - a_corrupted) . dm/da     at the corrupted run                (arXiv 2310.10348)

and with `ig_steps` its gradient is the mean over as many runs whose merged embeddings lie between the two, from the
corrupted ones on (arXiv 2403.17806). TransformerLens' `attribution_patch` has the same numbers for `ig_steps=1`, by
`model.bind`; there it unembeds every position, and refuses more steps.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from lalm_lens.engine.branches import Branch
from lalm_lens.errors import InputError
from lalm_lens.inputs import Embedded, Inputs
from lalm_lens.interventions import Patch, Site, hook_name
from lalm_lens.model import HookedLALM
from lalm_lens.runs import Positions, Run, Source
from lalm_lens.shapes import at_least_float32, typed

EVERYWHERE = "all"  # the region of a node that is all positions
SITES: Mapping[str, Site] = {"head": "z", "mlp": "mlp_out", "resid": "resid_post"}
EMBED = "hook_embed"


class Node(NamedTuple):
    """An output of the decoder: of a head (`z`), of an MLP, or the residual stream after a block (`resid`); at the
    positions of a region, or at all."""

    component: str
    layer: int
    head: int | None = None
    region: str = EVERYWHERE

    def positions(self, run: Run) -> Positions:
        return range(run.n_pos) if self.region == EVERYWHERE else self.region

    def patch(self, run: Run, source: Run) -> Patch:
        """Its output in another run, put into this one."""
        heads = None if self.head is None else (self.head,)
        return Patch(SITES[self.component], self.layer, self.positions(run), Source(source), heads=heads)


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two runs of the same regions, and the tokens whose logits are compared at the last position."""

    clean: Run
    corrupted: Run
    answer: int
    rival: int

    def __post_init__(self) -> None:
        regions = [regions_of(run) for run in (self.clean, self.corrupted)]
        if regions[0] != regions[1] or self.clean.n_pad != self.corrupted.n_pad:
            lengths = [len(its) for its in regions]
            raise InputError(
                "The positions of two runs stand for each other where their regions are the same; these have "
                f"{lengths[0]} and {lengths[1]} positions. Give clips of one length, and texts of as many tokens."
            )

    def metric(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
        """The answer's logit minus the rival's."""
        wide = at_least_float32(logits)
        return wide[..., self.answer] - wide[..., self.rival]


def regions_of(run: Run) -> list[str]:
    if run.prompt is None:
        raise InputError("Which positions are which region? Give the runs their prompts: Run(inputs, prompt).")
    return [position.region for position in run.prompt.positions]


@typed
def attribution(
    model: HookedLALM, contrast: Contrast, *, ig_steps: int = 1, resid: bool = True
) -> dict[str, Float[Tensor, "pos *head"]]:
    """The attributed effect of every output, by hook point and position: of `hook_embed`, which is the whole input,
    of every head's `z` and every MLP; and of the residual stream after each block, if it is asked for.

    That of `hook_embed` summed over positions tends to m(clean) - m(corrupted) as `ig_steps` grows. One forward and
    backward for every step, and two forwards. Raises `InputError` for less than one step.
    """
    if ig_steps < 1:
        raise InputError(f"ig_steps is 1 or more; got {ig_steps}.")
    sites = ["z", "mlp_out", *(["resid_post"] if resid else [])]
    layers = range(model.decoder_cfg.n_layers)
    names = [EMBED, *(hook_name(site, layer) for layer in layers for site in sites)]
    clean, corrupted = (embedded(model, run) for run in (contrast.clean, contrast.corrupted))
    with torch.no_grad():
        ends = [model.run_with_cache(its, names_filter=names, logits_at=-1)[1] for its in (clean, corrupted)]
    found: dict[str, Tensor] = {}
    for step in range(ig_steps):
        between = replace(clean, embed=torch.lerp(corrupted.embed, clean.embed, step / ig_steps))
        for name, gradient in gradients(model, between, contrast, names).items():
            found[name] = found.get(name, 0) + at_least_float32(gradient) / ig_steps
    return {name: ((ends[0][name] - ends[1][name]) * found[name]).sum(-1)[0].cpu() for name in names}


def embedded(model: HookedLALM, run: Run) -> Embedded:
    inputs = run.inputs.to(model.device)
    with torch.no_grad():
        return model.embed_inputs(inputs) if isinstance(inputs, Inputs) else inputs


def gradients(model: HookedLALM, inputs: Embedded, contrast: Contrast, names: Sequence[str]) -> dict[str, Tensor]:
    """Of the metric, by the states at these hook points. No weight gets a gradient."""
    states: dict[str, Tensor] = {}

    def keep(state: Tensor, hook: HookPoint) -> None:
        assert hook.name is not None
        states[hook.name] = state

    with torch.enable_grad():
        start = replace(inputs, embed=inputs.embed.detach().requires_grad_())
        logits = model.run_with_hooks(start, fwd_hooks=[(name, keep) for name in names], logits_at=-1)
        found = torch.autograd.grad(contrast.metric(logits[0, -1]), [states[name] for name in names])
    return dict(zip(names, found, strict=True))


# --- circuits ---------------------------------------------------------------------------------------------------


@typed
def node_scores(
    scores: Mapping[str, Float[Tensor, "pos *head"]], run: Run, nodes: Sequence[Node]
) -> Float[Tensor, " node"]:
    """What is attributed to each node: the sum over its positions."""
    return torch.stack([score_of(scores, run, node) for node in nodes])


def score_of(scores: Mapping[str, Tensor], run: Run, node: Node) -> Float[Tensor, ""]:
    its = scores[hook_name(SITES[node.component], node.layer)]
    its = its if node.head is None else its[:, node.head]
    return its[list(run.indices(node.positions(run)))].sum()


def nodes_of(model: HookedLALM, components: Iterable[str], regions: Sequence[str]) -> list[Node]:
    """Every node of these kinds, in each of the regions."""
    cfg = model.decoder_cfg
    heads = {"head": range(cfg.n_heads), "mlp": (None,), "resid": (None,)}
    return [
        Node(component, layer, head, region)
        for component in components
        for layer in range(cfg.n_layers)
        for head in heads[component]
        for region in regions
    ]


def only(contrast: Contrast, circuit: Iterable[Node], every: Sequence[Node]) -> Branch:
    """The clean run in which all other nodes have the output that they have in the corrupted run. What enters the first
    block stays the clean run's."""
    kept = set(circuit)
    outside = sorted(
        (node for node in every if node not in kept), key=lambda its: (its.layer, its.region, its.component)
    )
    patches = []
    for (layer, region, component), its in groupby(outside, lambda node: (node.layer, node.region, node.component)):
        heads = tuple(node.head for node in its if node.head is not None)
        patch = Node(component, layer, None, region).patch(contrast.clean, contrast.corrupted)
        patches.append(replace(patch, heads=heads) if heads else patch)
    return Branch(contrast.clean, tuple(patches))
