"""Patched runs: against plain HF hooks, and by the identities that hold for any weights."""

from typing import get_args

import pytest
import torch
from reference import chirps, hf_batch, hf_embeds, hf_patched, hf_state
from torch.testing import assert_close
from transformer_lens import ActivationCache

from lalm_lens.experiments.patching import Run, Site, Sweep, batched, run, sweep
from lalm_lens.experiments.recovery import Recovery, recover
from lalm_lens.inputs import Inputs
from lalm_lens.metrics import Answer

SITES = get_args(Site)
RESID = [site for site in SITES if site.startswith("resid")]
SLIDING = {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2}
WINDOW = 6  # of every layer of the model with a light cone
MODELS = [{"seed": 1}, {"seed": 2, "n_kv_heads": 1}, {"seed": 3, **SLIDING}]


def last(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1].double()


def everything(n_pos: int) -> torch.Tensor:
    return torch.ones(1, n_pos, dtype=torch.bool)


@pytest.fixture(scope="module")
def batches() -> tuple[dict, dict]:
    """A clip and silence, in one prompt."""
    clip = chirps([1.3])[0]
    return hf_batch([clip]), hf_batch([torch.zeros_like(clip)])


@pytest.fixture(scope="module", params=MODELS, ids=str)
def models(request, pair):
    return pair(**request.param)


@pytest.fixture(scope="module")
def example(models, batches):
    """A random model with one clean and one silent run of it, for each site."""
    ours = models[1]
    inputs = [Inputs.from_hf(batch) for batch in batches]
    is_audio = (inputs[0].tokens == ours.lalm_cfg.audio_token)[0]
    return ours, {site: tuple(run(ours, each, site) for each in inputs) for site in SITES}, is_audio


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", SITES)
def test_every_site_matches_plain_hf_hooks(models, example, batches, site, direction):
    hf, (ours, runs, is_audio) = models[0], example
    order = slice(None) if direction == "denoise" else slice(None, None, -1)
    (source, base), (source_batch, base_batch) = runs[site][order], batches[order]
    one_hot = torch.eye(len(is_audio), dtype=torch.bool)
    where = torch.cat([~is_audio[None], is_audio[None], one_hot[[3, -9, -4, -1]]])
    patched = sweep(ours, source, base, where, last, site, batch_size=4).patched
    n_layers = ours.cfg.n_layers
    layers = range(-1 if site in RESID else 0, n_layers)
    assert len(patched) == len(layers)
    for layer, logits in zip(layers, patched, strict=True):
        states = hf_embeds(hf, source_batch) if layer < 0 else hf_state(hf, source_batch, layer, site)
        theirs = torch.cat([hf_patched(hf, base_batch, layer, its[None], states, site) for its in where])
        assert_close(logits, theirs.double(), rtol=1e-5, atol=2e-5)  # logits up to 4: two sums in another order


@pytest.mark.parametrize("site", RESID)
def test_all_positions_patched_at_any_layer_give_the_clean_run(example, site):
    ours, runs, is_audio = example
    clean, corrupted = runs[site]
    patched = sweep(ours, clean, corrupted, everything(len(is_audio)), last, site).patched
    assert_close(patched[:, 0], last(clean.logits[None]).expand(len(patched), -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("site", SITES)
def test_what_both_runs_share_brings_nothing_back(example, site, batch_size):
    """Text before the audio; every word's embedding. Exactly nothing, in a batch of any size."""
    ours, runs, is_audio = example
    before = torch.eye(len(is_audio), dtype=torch.bool)[: int(is_audio.nonzero().min())]
    where = torch.cat([before, before.any(0, keepdim=True), ~is_audio[None]])
    done = sweep(ours, *runs[site], where, last, site, batch_size)
    assert torch.equal(done.patched[:, :-1], done.nothing[:-1].expand(len(done.patched), -1, -1))
    if site in RESID:
        assert torch.equal(done.patched[0, -1], done.nothing[-1])


@pytest.mark.parametrize("site", SITES)
def test_a_state_that_is_bit_equal_in_both_runs_is_left_alone(example, site):
    """In a batch of another shape it may come out otherwise; here the difference is made large enough to see."""
    ours, runs, is_audio = example
    clean, corrupted = runs[site]
    last_one = torch.eye(len(is_audio), dtype=torch.bool)[[-1]]
    moved = {name: state + last_one[0, :, None] for name, state in corrupted.cache.items() if name != "hook_embed"}

    def with_moved(each: Run) -> Run:
        return Run(ActivationCache({**moved, "hook_embed": each.cache["hook_embed"]}, ours), each.logits)

    same = sweep(ours, with_moved(clean), with_moved(corrupted), last_one, last, site)
    assert torch.equal(same.patched, same.nothing.expand_as(same.patched))
    other = sweep(ours, with_moved(clean), corrupted, last_one, last, site)
    assert not torch.isclose(other.patched[-1], other.nothing).all()


@pytest.mark.parametrize("site", SITES)
def test_clean_into_clean_changes_nothing(example, site):
    ours, runs, is_audio = example
    clean = runs[site][0]
    done = sweep(ours, clean, clean, torch.stack([is_audio, ~is_audio]), last, site)
    assert torch.equal(done.patched, done.nothing.expand_as(done.patched))
    assert_close(done.nothing, last(clean.logits[None]).expand(2, -1), rtol=1e-5, atol=1e-5)


def most_changed(clean, corrupted) -> Answer:
    """The token whose probability differs most, so that recovery rates are well defined."""
    return Answer((int((clean.logits.softmax(-1) - corrupted.logits.softmax(-1)).abs().argmax()),))


@pytest.fixture(scope="module")
def recovery(example) -> Recovery:
    ours, runs, is_audio = example
    return recover(ours, *runs["resid_post"], is_audio, most_changed(*runs["resid_post"]), batch_size=7)


def rates(recovery: Recovery, layer: int) -> list[tuple[str, int, float]]:
    """Kind, last patched position and recovery rate of the patches of one layer."""
    rows = zip(recovery.patches, recovery.rate.tolist(), strict=True)
    return [(patch.kind, int(patch.where.nonzero().max()), rate) for patch, rate in rows if patch.layer == layer]


def test_the_last_block_counts_at_the_last_position_only(example, recovery):
    ours, _, is_audio = example
    final = rates(recovery, ours.cfg.n_layers - 1)
    with_last = [rate for _, pos, rate in final if pos == len(is_audio) - 1]
    without = [rate for _, pos, rate in final if pos < len(is_audio) - 1]
    assert len(with_last) == 2  # all text, and the last token alone
    assert max(abs(rate - 1) for rate in with_last) < 1e-4
    assert len(without) > 5
    assert set(without) == {0.0}


def test_embeddings_of_text_bring_back_nothing_and_of_audio_everything(recovery):
    for kind, _, rate in rates(recovery, -1):
        assert abs(rate - 1) < 1e-4 if kind == "audio_layer" else rate == 0


def test_recovery_is_not_clipped(example):
    """Random weights know no [0, 1]."""
    ours, runs, is_audio = example
    found = torch.cat([recover(ours, *runs["resid_post"], is_audio, Answer((n,))).rate for n in range(20, 24)])
    assert found.min() < -0.05 or found.max() > 1.05


def test_the_batch_size_does_not_change_the_numbers(example):
    ours, runs, is_audio = example
    few, many = (
        recover(ours, *runs["resid_post"], is_audio, Answer((17,)), batch_size=size).p_patched for size in (1, 50)
    )
    assert_close(few.log(), many.log(), rtol=0, atol=1e-5)


def test_the_noise_is_what_batching_alone_does(example):
    ours, runs, is_audio = example
    clean, corrupted = runs["resid_post"]
    answer = most_changed(clean, corrupted)
    found = recover(ours, clean, corrupted, is_audio, answer, batch_size=50)
    resid = corrupted.cache["hook_embed"].expand(len(rates(found, 0)), -1, -1)
    with torch.no_grad():
        together = ours(resid, logits_at=-1)[:, 0].double().softmax(-1)[:, answer.tokens[0]]
    gap = abs(found.p_clean - found.p_corrupted)
    assert found.noise == pytest.approx(float((together - found.p_corrupted).abs().max()) / gap, abs=1e-12)
    assert 0 < found.noise < 1e-4


def test_the_largest_noise_of_a_batch_counts_and_is_taken_out_row_by_row(example, monkeypatch):
    ours, runs, is_audio = example
    clean, corrupted = runs["resid_post"]
    answer = most_changed(clean, corrupted)
    plain = recover(ours, clean, corrupted, is_audio, answer)
    shift = torch.linspace(-0.03, 0.02, len(rates(plain, 0)), dtype=torch.float64)[:, None]

    def shifted(*args: object) -> Sweep:
        done = sweep(*args)
        return Sweep(done.patched + shift, done.nothing + shift)

    monkeypatch.setattr("lalm_lens.experiments.recovery.sweep", shifted)
    found = recover(ours, clean, corrupted, is_audio, answer)
    assert found.noise == pytest.approx(0.03 / abs(found.p_clean - found.p_corrupted), rel=1e-3)
    assert_close(found.rate, plain.rate, rtol=0, atol=1e-9)


def test_a_noising_trace_takes_away_what_a_denoising_one_brings_back(example):
    """The clean run with the silent run's last state is the silent run; roles and formula are swapped together."""
    ours, runs, is_audio = example
    answer = most_changed(*runs["resid_post"])
    there, back = (
        recover(ours, *runs["resid_post"], is_audio, answer, direction=direction) for direction in ("denoise", "noise")
    )
    swapped = recover(ours, *runs["resid_post"][::-1], is_audio, answer, direction="denoise")
    assert torch.equal(back.rate, swapped.rate)
    assert (back.p_clean, back.p_corrupted) == (there.p_clean, there.p_corrupted)
    assert not torch.allclose(there.rate, back.rate)
    assert rates(back, ours.cfg.n_layers - 1)[-1][2] == pytest.approx(1, abs=1e-4)


def test_outside_the_light_cone_of_a_sliding_window_is_exactly_nothing(pair, batches):
    """With a window in every layer, a word hears the audio only by relays, and is heard only by relays."""
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 4}
    ours = pair(seed=4, **window)[1]
    clean, silent = (run(ours, Inputs.from_hf(batch)) for batch in batches)
    is_audio = (Inputs.from_hf(batches[0]).tokens == ours.lalm_cfg.audio_token)[0]
    a, end, n_layers = int(is_audio.nonzero().max()), len(is_audio) - 1, ours.cfg.n_layers
    found = recover(ours, clean, silent, is_audio, most_changed(clean, silent), batch_size=5)
    n_inside = 0
    for layer in range(n_layers):
        for kind, pos, rate in rates(found, layer):
            if kind == "token":
                inside = pos <= a + (layer + 1) * (WINDOW - 1) and end - pos <= (n_layers - 1 - layer) * (WINDOW - 1)
                assert (rate != 0) == inside, (layer, pos, rate)
                n_inside += inside
    assert n_inside > 5


def test_batches_are_few_and_of_one_size():
    where = torch.eye(30, dtype=torch.bool)
    assert [tuple(batched(where, size).shape[:2]) for size in (1, 7, 29, 30, 99)] == [
        (30, 1),
        (5, 6),
        (2, 15),
        (1, 30),
        (1, 30),
    ]
    uneven = batched(where, 16).flatten(0, 1)
    assert torch.equal(batched(where[:29], 16).flatten(0, 1)[:29], where[:29])
    assert not batched(where[:29], 16).flatten(0, 1)[29:].any()
    assert torch.equal(uneven, where)
