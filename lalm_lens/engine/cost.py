"""What branches cost, in multiplications and additions of matrices, counted before they run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lalm_lens.engine.attention import View
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.reach import Step
from lalm_lens.engine.sweep import Planned, Sweep
from lalm_lens.interventions import Edit
from lalm_lens.nn.block import DecoderBlock
from lalm_lens.readouts import Readout, Resid
from lalm_lens.runs import Run
from lalm_lens.transformer import HookedTransformer


@dataclass(frozen=True)
class Cost:
    """`forwards` is how many forwards of the decoder the branches are worth, by their matrix arithmetic; `flops` is
    that arithmetic, a multiplication and an addition counted as two. `n_skipped` branches need none: their changes
    reach nothing that is read. `n_heard` runs of encoder and adapter come on top."""

    n_branches: int
    n_skipped: int
    forwards: float
    flops: int
    n_heard: int = 0

    def __str__(self) -> str:
        skipped = f", {self.n_skipped} of which reach nothing" if self.n_skipped else ""
        heard = f" and {self.n_heard} of the audio encoder" if self.n_heard else ""
        return f"{self.n_branches} branches{skipped}: worth {self.forwards:.1f} forwards{heard}"


class Prices(NamedTuple):
    """Multiplications in a block: of a new key and value, of a query with its output and MLP, of a pair of a query and
    a key."""

    key: int
    query: int
    pair: int

    @classmethod
    def in_block(cls, block: DecoderBlock) -> "Prices":
        attn = block.attn
        mlp = sum(module.weight.numel() for module in block.mlp.modules() if isinstance(module, nn.Linear))
        return cls(
            attn.k_proj.weight.numel() + attn.v_proj.weight.numel(),
            attn.q_proj.weight.numel() + attn.o_proj.weight.numel() + mlp,
            2 * attn.n_heads * attn.d_head,
        )

    def of(self, n_keys: int, n_queries: int, n_pairs: int) -> int:
        """Floating-point operations: an addition for each multiplication."""
        return 2 * (n_keys * self.key + n_queries * self.query + n_pairs * self.pair)


def cost_of(model: HookedTransformer, branches: Sequence[Branch], readout: Readout, sweep: Sweep | None) -> Cost:
    n_heard = sum(any(isinstance(change, Edit) and change.is_perceived for change in its.changes) for its in branches)
    whole = {run: forward_flops(model, run, readout) for run in dict.fromkeys(branch.run for branch in branches)}
    if sweep is None:
        flops = sum(whole[branch.run] for branch in branches)
        return Cost(len(branches), 0, float(len(branches)), flops, n_heard)
    prices = [Prices.in_block(block) for block in model.each_block]
    flops_of = {planned.number: sweep_flops(sweep, planned, prices) for planned in sweep.planned}
    return Cost(
        len(branches),
        sum(planned.reach.is_void for planned in sweep.planned),
        float(sum(flops / whole[branches[number].run] for number, flops in flops_of.items())),
        sum(flops_of.values()),
        n_heard,
    )


def sweep_flops(sweep: Sweep, planned: Planned, prices: Sequence[Prices]) -> int:
    if planned.reach.is_void:
        return 0
    return read_flops(sweep.model, sweep.readout) + sum(
        step_flops(prices[layer], step, sweep.view_of(planned, layer) if step.out else None)
        for layer, step in planned.reach.steps.items()
    )


def step_flops(prices: Prices, step: Step, view: View | None) -> int:
    n_keys, n_queries = step.own.bit_count(), step.out.bit_count()
    return prices.of(n_keys, n_queries, 0 if view is None else n_queries * view.n_keys)


def read_flops(model: HookedTransformer, readout: Readout) -> int:
    cfg = model.decoder_cfg
    return 0 if isinstance(readout, Resid) else 2 * len(readout.positions) * cfg.d_model * cfg.d_vocab


def forward_flops(model: HookedTransformer, run: Run, readout: Readout) -> int:
    """Of the decoder on one run, every position of it, with the logits that are read."""
    n_pos, windows = run.n_pos - run.n_pad, model.decoder_cfg.windows
    pairs = [sum(min(pos + 1, window or n_pos) for pos in range(n_pos)) for window in windows]
    prices = (Prices.in_block(block) for block in model.each_block)
    return read_flops(model, readout) + sum(
        each.of(n_pos, n_pos, n_pairs) for each, n_pairs in zip(prices, pairs, strict=True)
    )
