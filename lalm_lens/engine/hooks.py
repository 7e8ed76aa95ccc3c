"""The plain executor: one run with hooks for each branch. Slow, obvious, and what the sweep is compared with."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from lalm_lens.engine.branches import Branch, source_name, value_of
from lalm_lens.inputs import Embedded, Inputs
from lalm_lens.interventions import Change, Edit, NamedHook, OnScores, Recompute, Valued, hook_name
from lalm_lens.readouts import Readout, Resid, n_blocks
from lalm_lens.runs import Source
from lalm_lens.transformer import HookedTransformer


@torch.no_grad()
def run_hooks(
    model: HookedTransformer, branches: Sequence[Branch], readout: Readout, done: Callable[[int], object]
) -> list[Tensor]:
    """What is read from each branch: [at, ...]. The branches are `indexed` and `resolved`."""
    values = []
    for branch in branches:
        values.append(run_branch(model, branch, readout))
        done(1)
    return values


def run_branch(model: HookedTransformer, branch: Branch, readout: Readout) -> Tensor:
    inputs = branch.run.inputs.to(model.device)
    hooks = hooks_of(branch)
    if isinstance(readout, Resid):
        return read_resid(model, inputs, hooks, readout)
    at = torch.tensor(readout.positions, device=model.device)
    return readout(model.run_with_hooks(inputs, fwd_hooks=hooks, logits_at=at))[0]


def read_resid(model: HookedTransformer, inputs: Inputs | Embedded, hooks: list[NamedHook], readout: Resid) -> Tensor:
    """All blocks run, because a change may be in one behind the state that is read."""
    kept: list[Tensor] = []
    last = n_blocks(readout, model.decoder_cfg.n_layers) - 1

    def keep(resid: Tensor, hook: HookPoint) -> None:
        kept.append(readout(resid[:, list(readout.positions)])[0])

    model.run_with_hooks(inputs, fwd_hooks=[*hooks, (hook_name("resid_post", last), keep)], logits_at=-1)
    return kept[0]


def hooks_of(branch: Branch) -> list[NamedHook]:
    """Those that take a state come last: it then has all the changes that are made there."""
    changes, takes = [], []
    for change in branch.changes:
        if isinstance(change, Valued) and isinstance(change.value, Source):
            take, use = from_itself(change, change.value)
            takes.append(take)
            changes.append(use)
        else:
            changes += hooks_of_change(change)
    return changes + takes


def hooks_of_change(change: Change | NamedHook) -> list[NamedHook]:
    if isinstance(change, tuple):
        return [change]
    if isinstance(change, OnScores):
        return change.hooks()
    return [] if isinstance(change, Recompute) else [change.hook()]


def from_itself(change: Valued, source: Source) -> tuple[NamedHook, NamedHook]:
    """Two hooks: one takes the state where the branch comes to it, one uses it further on."""
    taken: list[Tensor] = []

    def take(state: Tensor, hook: HookPoint) -> None:
        taken[:] = [value_of(state[0], change, source.at)]

    def use(state: Tensor, hook: HookPoint) -> Tensor:
        ready: Edit = replace(change, value=taken[0])
        return ready.apply(state, hook)

    return (source_name(source, change), take), (change.name, use)
