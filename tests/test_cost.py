"""What the sweep really computes: counted by torch, and against a light cone drawn in plain arrays."""

import gc
import weakref
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from engine_cases import branches, embedded, model_of, noise
from jaxtyping import Bool
from numpy import ndarray
from reference import tiny_hf
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lalm_lens.config import DecoderConfig
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.passing import Pass
from lalm_lens.engine.plan import Plan
from lalm_lens.inputs import Embedded
from lalm_lens.interventions import Knockout, Patch, Recompute, Scale
from lalm_lens.loading import from_hf
from lalm_lens.model import HookedLALM
from lalm_lens.readouts import Logits, LogProbs, Resid
from lalm_lens.runs import Run, Source

pytestmark = pytest.mark.numbers

N_LAYERS, N_BEFORE, N_AUDIO, N_AFTER = 8, 4, 40, 12
N_POS = N_BEFORE + N_AUDIO + N_AFTER
AUDIO, TEXT = range(N_BEFORE, N_BEFORE + N_AUDIO), range(N_BEFORE + N_AUDIO, N_POS)
WINDOWS = {
    "full attention": (None,) * N_LAYERS,
    "windows of 6": (6,) * N_LAYERS,
    "one open block": (1, 1, 1, 1, None, 1, 1, 1),
    "windows in turn": (9, None) * (N_LAYERS // 2),
}


def moderate(windows: tuple[int | None, ...]) -> HookedLALM:
    hf = tiny_hf(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=len(windows),
        num_attention_heads=6,
        use_sliding_window=True,
        sliding_window=min(window or N_POS for window in windows),
        layer_types=["sliding_attention" if window else "full_attention" for window in windows],
    )
    model = from_hf(hf)
    assert model.decoder_cfg.windows == windows
    return model


@pytest.fixture(scope="module", params=WINDOWS)
def model(request):
    return moderate(WINDOWS[request.param])


@pytest.fixture(scope="module")
def runs():
    """A run and another that differs from it from the audio on."""
    shared, is_token = noise(1, N_POS, 96), torch.ones(1, N_POS, dtype=torch.bool)
    other = torch.cat([shared[:, :N_BEFORE], noise(1, N_POS - N_BEFORE, 96, seed=1)], dim=1)
    return Run(Embedded(shared, is_token)), Run(Embedded(other, is_token))


# --- the light cone, drawn again -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Where:
    """One patch, as the light cone needs to know it."""

    site: str
    layer: int
    positions: tuple[int, ...]

    def at(self, layer: int, *sites: str) -> Bool[ndarray, " pos"]:
        here = np.zeros(N_POS, dtype=bool)
        if layer == self.layer and self.site in sites:
            here[list(self.positions)] = True
        return here


def sight(window: int | None) -> Bool[ndarray, "query_pos key_pos"]:
    back = np.arange(N_POS)[:, None] - np.arange(N_POS)
    return (back >= 0) & (back < (window or N_POS))


def cone(windows: tuple[int | None, ...], where: Where, last: int = -1) -> list[dict[str, ndarray]]:
    """For each block, the positions with new keys, and those with a new query, a new sum over values, a new output of
    attention, a new output of the MLP: no more than what a patch can change and the last position can feel."""
    feels = [np.arange(N_POS) == N_POS + last]
    for window in reversed(windows):
        feels.insert(0, sight(window)[feels[0]].any(0))
    needed, changed = [], np.zeros(N_POS, dtype=bool)
    for layer, window in enumerate(windows):
        changed = changed | where.at(layer, "resid_pre")
        keys = changed | where.at(layer, "k", "v")
        queries = (changed | sight(window)[:, keys].any(1) | where.at(layer, "q", "pattern")) & feels[layer + 1]
        given = [
            where.at(layer, *sites) & feels[layer + 1] for sites in (("z",), ("attn_out", "resid_mid"), ("mlp_out",))
        ]
        seen = sight(window)[queries].any(0)
        outputs = queries | given[0]
        neurons = outputs | given[1]
        needed.append({"keys": keys & seen, "queries": queries, "outputs": outputs, "neurons": neurons})
        changed = (neurons | given[2] | where.at(layer, "post", "resid_post")) & feels[layer + 1]
    return [*needed, {"read": changed & feels[-1]}]


def needed_flops(cfg: DecoderConfig, where: Where) -> int:
    d_heads, d_kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    *blocks, end = cone(cfg.windows, where)
    flops = 2 * end["read"].sum() * cfg.d_model * cfg.d_vocab
    for block, window in zip(blocks, cfg.windows, strict=True):
        n_pairs = sight(window)[block["queries"]].sum()
        flops += 2 * block["keys"].sum() * 2 * cfg.d_model * d_kv
        flops += 2 * (block["queries"].sum() + block["outputs"].sum()) * cfg.d_model * d_heads
        flops += 2 * block["neurons"].sum() * 3 * cfg.d_model * cfg.d_mlp
        flops += 2 * n_pairs * 2 * d_heads
    return int(flops)


def each(positions, site="resid_post"):
    """A patch for each layer and position."""
    return [Where(site, layer, (pos,)) for layer in range(N_LAYERS) for pos in positions]


def at_once(positions, size, site="resid_post"):
    """A patch for each layer and group of positions."""
    groups = [tuple(positions[start : start + size]) for start in range(0, len(positions), size)]
    return [Where(site, layer, group) for layer in range(N_LAYERS) for group in groups]


MAPS = {
    "every position": each(range(N_POS)),
    "every position of the text": each(TEXT),
    "audio, 8 positions at a time": at_once(AUDIO, 8),
    "the text at once": at_once(TEXT, N_AFTER),
    "everything at once": at_once(range(N_POS), N_POS),
    "every position before a block": each(range(1, N_POS, 3), "resid_pre"),
    "every output of attention": each(range(1, N_POS, 3), "attn_out"),
    "every z": each(range(1, N_POS, 3), "z"),
}


def planned(model, runs, wheres, readout=LogProbs(), **kwargs) -> Plan:  # noqa: B008  it is frozen
    base, clean = runs
    its = [Patch(where.site, where.layer, where.positions, Source(clean)) for where in wheres]
    return Plan(model, branches(base, *its), readout, engine="sweep", **kwargs)


SLOW = {"every output of attention", "every z", "audio, 8 positions at a time", "every position before a block"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.stress] * (name in SLOW)) for name in MAPS])
def test_no_more_is_computed_than_the_changes_need(model, runs, name):
    """Text before the audio is the same in both runs, so nothing at all is needed there."""
    plan = planned(model, runs, MAPS[name])
    with FlopCounterMode(display=False) as counter:
        plan.run()
    done, cfg = counter.get_total_flops(), model.decoder_cfg
    differing = [Where(its.site, its.layer, tuple(at for at in its.positions if at >= N_BEFORE)) for its in MAPS[name]]
    needed = sum(needed_flops(cfg, where) for where in differing if where.positions)
    print(f"{name}, windows {cfg.windows[:2]}: {done / needed:.3f} of what is needed, {plan.cost()}")
    assert plan.cost().flops == done
    assert done <= 1.15 * needed
    assert done >= needed


@pytest.mark.parametrize("site", ["q", "k", "v", "pattern", "post", "mlp_out", "resid_mid", "resid_post"])
def test_the_plan_knows_its_arithmetic(model, runs, site):
    base, clean = runs
    its = [Patch(site, layer, (pos, -3), Source(clean)) for layer in (0, 4, 7) for pos in (0, 9, 40)]
    knockouts = [Knockout((4,), (-1, -4), (30, 44), heads=(1,)), Knockout(range(N_LAYERS), (-2,), (50, 55))]
    for readout in (Logits((-1, -2, -7)), Resid(5, (-1, 20))):
        plan = Plan(model, branches(base, *its, *knockouts), readout, engine="sweep")
        with FlopCounterMode(display=False) as counter:
            plan.run()
        assert plan.cost().flops == counter.get_total_flops()


def test_one_forward_is_what_a_forward_takes(model, runs):
    """Torch counts the linear layers; what is behind them are the pairs of a query and a key that it sees."""
    cost, cfg = Plan(model, [Branch(runs[0])], engine="hooks").cost(), model.decoder_cfg
    with FlopCounterMode(display=False) as counter:
        model(runs[0].inputs, logits_at=-1)
    n_pairs = sum(int(sight(window).sum()) for window in cfg.windows)
    assert cost.forwards == 1
    assert cost.flops == counter.get_total_flops() + 4 * n_pairs * cfg.n_heads * cfg.d_head


# --- block forwards ------------------------------------------------------------------------------------------


@contextmanager
def counted(model):
    """Calls of every linear of the blocks, and rows through each block's MLP; without hooks, which a sweep refuses."""
    calls, n_rows = Counter(), Counter()

    def watch(module: nn.Linear, key: tuple[int, str]) -> None:
        honest = module.forward

        def forward(x):
            calls.update([key])
            if key[1] == "mlp.gate_proj":
                n_rows.update({key[0]: x.shape[:-1].numel()})
            return honest(x)

        module.forward = forward

    linears = {
        (layer, name): module
        for layer, block in enumerate(model.each_block)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    for key, module in linears.items():
        watch(module, key)
    try:
        yield calls, n_rows
    finally:
        for module in linears.values():
            del module.forward


@pytest.mark.parametrize("name", ["every position", "audio, 8 positions at a time", "every z"])
def test_each_block_computes_the_positions_of_the_light_cone_and_reads_its_weights_once(model, runs, name):
    plan = planned(model, runs, MAPS[name], token_budget=10**9)
    with counted(model) as (calls, n_rows):
        plan.run()
    cones = [cone(model.decoder_cfg.windows, where)[:-1] for where in MAPS[name] if min(where.positions) >= N_BEFORE]
    assert [n_rows[layer] for layer in range(N_LAYERS)] == [
        sum(int(its[layer]["neurons"].sum()) for its in cones) for layer in range(N_LAYERS)
    ]
    assert calls == dict.fromkeys(calls, 1)
    assert len(calls) == 7 * sum(n > 0 for n in n_rows.values())


def test_weights_are_read_once_for_each_budget_of_tokens(model, runs):
    plan = planned(model, runs, MAPS["every position"], token_budget=60)
    batches = batches_of(plan)
    with counted(model) as (calls, n_rows):
        plan.run()
    assert len(batches) > 1
    assert max(calls.values()) == len(batches)
    assert max(n_rows.values()) <= 60 * len(batches)


def batches_of(plan: Plan) -> list[list]:
    waiting, batches = plan.sweep.in_order(), []
    while waiting:
        batches.append(plan.sweep.within(waiting, plan.token_budget))
        waiting = waiting[len(batches[-1]) :]
    return batches


# --- skipping ------------------------------------------------------------------------------------------------


def test_what_both_runs_share_is_skipped_and_counted(model, runs):
    wheres = each(range(N_BEFORE))
    plan = planned(model, runs, wheres)
    with counted(model) as (calls, _):
        outcome = plan.run()
    assert not calls
    assert outcome.n_skipped == plan.cost().n_skipped == len(wheres)
    assert (plan.cost().flops, plan.cost().forwards) == (0, 0)
    assert torch.equal(outcome.values, outcome.base)
    assert f"{len(wheres)} of which reach nothing" in repr(plan)


def test_clean_into_clean_is_skipped(model, runs):
    """Also where another change makes a run look at its patterns."""
    base, clean = runs
    sites = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "post")
    its = branches(clean, *(Patch(site, layer, (-1, 20), Source(clean)) for site in sites for layer in (0, 4, 7)))
    outcome = Plan(model, [*its, Branch(base, (Patch("pattern", 2, (-1,), Source(clean)),))], engine="sweep").run()
    assert outcome.n_skipped >= len(its)
    assert torch.equal(outcome.values[:-1], outcome.base[:-1])


def test_outside_of_the_light_cone_nothing_at_all_changes(model, runs):
    wheres = each(range(N_POS))
    outcome = planned(model, runs, wheres).run()
    reached = torch.tensor([
        bool(cone(model.decoder_cfg.windows, where)[-1]["read"].any()) and where.positions[0] >= N_BEFORE
        for where in wheres
    ])  # fmt: skip
    changed = (outcome.values != outcome.base).flatten(1).any(1)
    assert torch.equal(changed, reached)
    assert outcome.n_skipped == int((~reached).sum())


def test_a_change_of_nothing_is_not_computed_and_a_recomputation_is(model, runs):
    base, _ = runs
    nothing = [Scale("z", 4, (-1,), factor=1.0), Knockout((4,), (9,), (12,))]
    its = branches(base, *nothing, Recompute("resid_pre", 1, (-1,)), Recompute("resid_pre", 1, range(N_POS)))
    plan = Plan(model, its, engine="sweep")
    outcome = plan.run()
    assert outcome.n_skipped == len(nothing)
    assert [planned.reach.is_void for planned in plan.sweep.planned] == [True] * len(nothing) + [False] * 2
    assert_close(outcome.values, outcome.base)


# --- memory --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A plan of many branches of every kind on a small model, and what hooks find."""
    model, base, clean = model_of("windows in turn"), embedded(1), embedded(2)
    its = [Patch("resid_post", layer, (pos,), Source(clean)) for layer in range(4) for pos in range(18)]
    its += [Patch("v", layer, (pos, 3), Source(clean)) for layer in range(4) for pos in range(4, 18)]
    its += [Knockout((layer,), (-1, -2), (pos,)) for layer in range(4) for pos in (14, 15)]
    its += [Patch("pattern", layer, (-1,), Source(clean)) for layer in range(4)]
    expected = Plan(model, branches(base, *its), engine="hooks").run().values

    def make(token_budget: int | None = None) -> Plan:
        return Plan(model, branches(base, *its), engine="sweep", token_budget=token_budget)

    return make, expected


@pytest.mark.parametrize("token_budget", [None, 1, 7, 60, 600, 10**9])
def test_any_budget_gives_the_same_numbers(small, token_budget):
    make, expected = small
    plan = make(token_budget)
    for batch in batches_of(plan):
        assert len(batch) == 1 or plan.sweep.tokens(batch) <= plan.token_budget
    assert_close(plan.run().values, expected)


def out_of_memory(what: str, monkeypatch, error, at_most: int):
    """Let memory run out where more than so many tokens go through a block together."""
    honest = getattr(Pass, what)

    def narrow(self, *args):
        if self.sweep.tokens(self.members) > at_most:
            raise error
        return honest(self, *args)

    monkeypatch.setattr(Pass, what, narrow)


ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.mark.parametrize("where", ["values", "through"], ids=["before a batch", "within a batch"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), ON_CPU], ids=["cuda", "cpu"])
def test_where_memory_runs_out_the_budget_halves(small, monkeypatch, where, error):
    make, expected = small
    out_of_memory(where, monkeypatch, error, at_most=40)
    plan = make(10**9)
    assert_close(plan.run().values, expected)
    assert 20 <= plan.token_budget <= 40


def test_a_branch_that_has_no_room_at_all_raises(small, monkeypatch):
    make, _ = small
    out_of_memory("values", monkeypatch, torch.OutOfMemoryError("CUDA out of memory."), at_most=10)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        make().run()


def test_memory_that_never_suffices_raises(monkeypatch):
    """Two branches of one row each, in two blocks: no budget can part them."""
    model, base, clean = model_of("windows"), embedded(1), embedded(2)
    out_of_memory("values", monkeypatch, torch.OutOfMemoryError("CUDA out of memory."), at_most=0)
    plan = Plan(model, branches(base, *(Patch("resid_post", layer, (-1,), Source(clean)) for layer in (2, 3, 3, 2))))
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        plan.run()


def test_another_error_is_raised_as_it_is(small, monkeypatch):
    make, _ = small
    out_of_memory("through", monkeypatch, RuntimeError("an index is out of range"), at_most=1)
    plan = make()
    with pytest.raises(RuntimeError, match="out of range"):
        plan.run()
    assert plan.token_budget == make().token_budget


class Live(TorchDispatchMode):
    """How many bytes the tensors hold that are made while it is on, and the most they ever held."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.see(x.untyped_storage())
        return out

    def see(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def shared(plan: Plan):
    """The tensors that were there before: of the runs and the changes."""
    for base in plan.sweep.bases.values():
        yield from (*base.resid, *base.k, *base.v, *base.states.values(), base.value)
    yield from (change.value for branch in plan.branches for change in branch.changes)


def peak_bytes(plan: Plan) -> int:
    gc.collect()
    live = Live()
    for x in (*plan.model.parameters(), *shared(plan)):
        live.known.add(x.untyped_storage()._cdata)
    with live:
        plan.run()
    return live.most


@pytest.mark.stress
def test_memory_follows_the_budget(runs):
    """A token holds its state, normed and not, two or three of its queries, keys, values and sums, and its neurons with
    their gates; beside them are the scores of one piece of attention, softmax and mask, and what is read."""
    model = moderate(WINDOWS["full attention"])
    cfg, peaks = model.decoder_cfg, {}
    for token_budget in (100, 400, 1600):
        plan = planned(model, runs, MAPS["every position"], token_budget=token_budget)
        plan.sweep.max_scores = 2**14
        plan.cost()  # which draws the masks
        by_token = 4 * (4 * cfg.d_model + 3 * cfg.d_mlp)
        values = 4 * len(plan.branches) * cfg.d_vocab * 3
        peaks[token_budget] = peak_bytes(plan)
        bound = token_budget * by_token + 3 * 4 * plan.sweep.max_scores + values
        print(f"{token_budget} tokens: {peaks[token_budget] / 1e6:.2f} MB of {bound / 1e6:.2f} MB")
        assert peaks[token_budget] <= bound
    assert peaks[1600] > 1.5 * peaks[100]  # what is counted is what grows
