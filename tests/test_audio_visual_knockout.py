"""Attention cut and looked at between what is heard, seen, asked and written, against HF under masks made by hand."""

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from omni import Thinker
from reference import hf_cut
from test_attention_knockout import closed
from test_audio_in_video import question, samples, seeing  # noqa: F401
from torch import Tensor
from torch.testing import assert_close

from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import Plan
from lalm_lens.experiments.attention_share import attention_share
from lalm_lens.experiments.cuts import cuts
from lalm_lens.experiments.knockout_generation import write
from lalm_lens.interventions import Knockout
from lalm_lens.loading import from_hf
from lalm_lens.nn.kv_cache import KeyValueCache
from lalm_lens.readouts import Logits
from lalm_lens.runs import Run

N_LAYERS, N_HEADS, N_NEW, WINDOW = 3, 4, 3, 30
PLACES = ("audio", "image", "video", "query", "generated")
PAIRS = [pair for pair in product(PLACES, PLACES) if pair != ("query", "query")]  # the first word sees itself alone


@pytest.fixture(scope="module")
def asked(seeing, samples):  # noqa: F811
    """A video with its own sound, and an image: HF, our model, a run, and where everything is."""
    hf, model = seeing
    hf.set_attn_implementation("eager")
    model.stop_tokens = ()
    run = question(model, samples[2:], "P3").run(samples[2])
    region = np.array([position.region for position in run.prompt.positions])
    where = {name: np.flatnonzero(region == name).tolist() for name in ("audio", "image", "video")}
    where["text"] = np.flatnonzero(~np.isin(region, ["audio", "image", "video"])).tolist()
    where["query"] = where["text"][:-1]
    where["generated"] = list(range(run.n_pos - 1, run.n_pos + N_NEW - 1))
    return hf, model, run, where


def batch_of(run: Run, new: list[int]) -> dict:
    """What HF takes, with an answer that has begun."""
    batch = run.inputs.to_hf("feature_attention_mask")
    tokens = torch.cat([batch["input_ids"], torch.tensor([new], dtype=torch.long)], 1)
    return batch | {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_audio_in_video": True}


def hf_log_p(hf, run: Run, new: list[int], pairs: list[tuple[list[int], list[int]]], layers=range(N_LAYERS)) -> Tensor:
    """Of the next token, in a run of the whole sequence whose attention is cut."""
    n_pos = run.n_pos + len(new)
    its = [([n for n in keys if n < n_pos], [n for n in queries if n < n_pos]) for keys, queries in pairs]
    return hf_cut(hf, batch_of(run, new), dict.fromkeys(layers, closed(n_pos, its)))[0][-1].log_softmax(-1)


@pytest.mark.parametrize("source", PLACES)
def test_every_pair_is_cut_at_the_prompt_and_at_each_token_as_in_hf(asked, source):
    """What is written with attention cut, and its log-probabilities; without the cut they are others."""
    hf, model, run, where = asked
    uncut = cache(lambda *new: hf_log_p(hf, run, [*new], []))
    for keys, queries in (pair for pair in PAIRS if pair[0] == source):
        (cut,) = cuts(model, run, [(keys, queries)], ["all"], "all", n_new=N_NEW - 1)
        ours, new, moved = write(model, run, cut, N_NEW), [], []
        for token, log_p in zip(ours.tokens[0].tolist(), ours.log_probs[0], strict=True):
            theirs = hf_log_p(hf, run, new, [(where[keys], where[queries])])
            assert (int(theirs.argmax()), keys, queries) == (token, keys, queries)
            assert_close(log_p, theirs.max(), rtol=1e-4, atol=1e-5)
            moved.append(float((theirs - uncut(*new)).abs().max()))
            new.append(token)
        if min(where[keys]) > max(where[queries]):
            assert max(moved) == 0, f"{queries} cannot see {keys} anyway"
        else:
            assert min(moved) > 1e-4, f"{keys} -> {queries} should bite at the prompt and at each token: {moved}"


@pytest.mark.parametrize("queries", ["generated", "audio", "video", "text"])
def test_shares_of_every_pair_are_those_of_hfs_patterns(asked, samples, queries):  # noqa: F811
    """Mean attention from each of them to each, the last position of the prompt counted as generated."""
    hf, model, run, where = asked
    how = {"max_new_tokens": N_NEW} if queries == "generated" else {"queries": queries}
    frame = attention_share(model, samples[2:], attribute="gender", progress=False, **how).frame
    new = model.generate(run.inputs, N_NEW).tokens[0, :-1].tolist() if queries == "generated" else []
    patterns = hf_cut(hf, batch_of(run, new), {})[1]
    region = [position.region for position in run.prompt.positions] + ["generated"] * len(new)
    for (layer, head, name), row in frame.set_index(["layer", "head", "region"]).iterrows():
        rows = patterns[layer][head, where[queries]].double()
        keys = [n for n, its in enumerate(region) if its == name]
        assert row.share == pytest.approx(float(rows[:, keys].sum(-1).mean()), abs=1e-5)
    assert set(frame.region) >= {"audio", "image", "video", "early", "object"}
    assert ("generated" in set(frame.region)) == (queries == "generated")

    merged = attention_share(model, samples[2:], attribute="gender", regions="merged", progress=False, **how).frame
    rows = torch.stack([patterns[layer][head, where[queries]] for layer in range(N_LAYERS) for head in range(N_HEADS)])
    names = [name if name in ("audio", "image", "video", "generated") else "query" for name in region]
    names[run.n_pos - 1] = "generated"  # where the first token is decided
    for name, its in merged.groupby("region", sort=False):
        keys = np.flatnonzero(np.array(names) == name)
        n_seen = torch.tensor([(keys <= query).sum() for query in where[queries][: rows.shape[1]]])
        share = rows[..., keys].double().sum(-1)
        assert_close(torch.tensor(its.share.to_numpy()), share.mean(-1).flatten(), rtol=1e-4, atol=1e-6)
        per_token = (share / n_seen)[:, n_seen > 0].mean(-1)
        assert_close(torch.tensor(its.per_token.to_numpy()), per_token, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert set(merged.region) == {"audio", "image", "video", "query", "generated"}


# --- every way to attend ------------------------------------------------------------------------------------------


def explicit(model, run: Run, knockout: Knockout) -> Tensor:
    return model.run_with_hooks(run.inputs, fwd_hooks=knockout.hooks(), logits_at=-1)[0, -1]


def by_head(model, run: Run, knockout: Knockout) -> Tensor:
    """Every head reads its own copy of the residual stream, and writes its own part."""
    model.set_use_split_qkv_input(True)
    model.set_use_attn_result(True)
    try:
        return explicit(model, run, knockout)
    finally:
        model.set_use_split_qkv_input(False)
        model.set_use_attn_result(False)


def remembered(model, run: Run, knockout: Knockout) -> Tensor:
    """One query, and keys from a cache."""
    inputs, kv_cache = run.inputs, KeyValueCache(n_more=1)
    begun = replace(inputs, tokens=inputs.tokens[:, :-1], attention_mask=inputs.attention_mask[:, :-1])
    with model.hooks(fwd_hooks=knockout.hooks()):
        model.advance(begun, kv_cache)
        return model.advance_by(inputs.tokens[:, -1], kv_cache)[0]


def padded(model, run: Run, knockout: Knockout) -> Tensor:
    """Behind padding, in a batch with a longer prompt."""
    n_pad, inputs = 7, run.inputs
    tokens = torch.full((2, run.n_pos + n_pad), 20)
    tokens[0, n_pad:] = inputs.tokens[0]
    is_token = torch.arange(run.n_pos + n_pad) >= torch.tensor([[n_pad], [0]])
    moved = {name: tuple(n + n_pad for n in getattr(knockout, name)) for name in ("queries", "keys")}
    hooks = replace(knockout, **moved).hooks()
    return model.run_with_hooks(replace(inputs, tokens=tokens, attention_mask=is_token), fwd_hooks=hooks)[0, -1]


def planned(engine: str):
    def way(model, run: Run, knockout: Knockout) -> Tensor:
        outcome = Plan(model, [Branch(run, (knockout,))], Logits(), engine=engine).run()
        assert outcome.engine == engine
        return outcome.values[0, 0]

    return way


WAYS = {
    "explicit scores": explicit,
    "by head": by_head,
    "one query and remembered keys": remembered,
    "behind padding": padded,
    "branches by hooks": planned("hooks"),
    "branches by the sweep, with shared keys": planned("sweep"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("opened", ["eager", "sdpa", "windows"])
def test_a_knockout_bites_however_attention_is_computed(asked, way, opened, monkeypatch):
    """In one layer, while the fused kernel goes on in the others; whatever kernel the model was opened with, and where
    layers have sliding windows."""
    hf, model, run, where = asked
    hf = hf if opened != "windows" else windowed()
    last, keys = run.n_pos - 1, where["audio"] + where["text"][-9:-1]
    back = torch.arange(run.n_pos)[:, None] - torch.arange(run.n_pos)
    masks = {layer: (back >= WINDOW)[None] for layer in (1, 2) if opened == "windows"}
    shut = masks | {1: masks.get(1, False) | closed(run.n_pos, [(keys, [last])])}
    expected, base = (hf_cut(hf, batch_of(run, []), its)[0][-1].log_softmax(-1) for its in (shut, masks))
    fused, n_fused = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv, **how: n_fused.append(0) or fused(*qkv, **how))
    hf.set_attn_implementation("sdpa" if opened == "sdpa" else "eager")
    try:
        ours = from_hf(hf, model.processor.hf)
    finally:
        hf.set_attn_implementation("eager")
    with torch.no_grad():
        logits = WAYS[way](ours, run, Knockout((1,), (last,), tuple(keys)))
    assert_close(logits.log_softmax(-1), expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2, "it bites"
    assert n_fused, "the fused kernel runs where nothing is cut"


@cache
def windowed() -> Thinker:
    hf = FAMILIES["qwen2_5_omni_thinker"].build(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    hf.set_attn_implementation("eager")
    return hf
