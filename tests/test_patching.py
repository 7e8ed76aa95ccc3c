"""Patched runs of causal tracing: against plain HF hooks, and by the identities that hold for any weights."""

import pytest
import torch
from reference import chirps, hf_batch, hf_embeds, hf_patched, hf_state
from torch.testing import assert_close

from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import Outcome, run_branches
from lalm_lens.experiments.cells import Cell, Grid, cells
from lalm_lens.experiments.recovery import Case, Recovery, recover
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import Recompute
from lalm_lens.metrics import Answer
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import Position, Prompt
from lalm_lens.readouts import Logits, Probabilities
from lalm_lens.runs import Run

SITES = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
RESID = [site for site in SITES if site.startswith("resid")]
SLIDING = {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2}
WINDOW = 6  # of every layer of the model with a light cone
MODELS = [{"seed": 1}, {"seed": 2, "n_kv_heads": 1}, {"seed": 3, **SLIDING}]
ENGINES = ["sweep", "hooks"]


@pytest.fixture(scope="module")
def batches() -> tuple[dict, dict]:
    """A clip and silence, in one prompt."""
    clip = chirps([1.3])[0]
    return hf_batch([clip]), hf_batch([torch.zeros_like(clip)])


@pytest.fixture(scope="module", params=MODELS, ids=str)
def models(request, pair):
    return pair(**request.param)


def runs_of(ours: HookedLALM, batches: tuple[dict, dict]) -> list[Run]:
    """A clean and a silent run, whose positions are audio or words."""
    runs = []
    for batch in batches:
        inputs = Inputs.from_hf(batch)
        audio, text = Position("", "audio"), Position("", "late")
        tokens = inputs.tokens[0].tolist()
        where = tuple(audio if token == ours.lalm_cfg.audio_token else text for token in tokens)
        runs.append(Run(inputs, Prompt(tuple(tokens), where)))
    return runs


@pytest.fixture(scope="module")
def example(models, batches):
    """A random model with one clean and one silent run of it."""
    return models[1], *runs_of(models[1], batches)


def patched(ours: HookedLALM, source: Run, base: Run, where: list[Cell], engine: str = "sweep") -> Outcome:
    return run_branches(ours, [Branch(base, (cell.patch(source),)) for cell in where], Logits(), engine=engine)


def everywhere(ours: HookedLALM, run: Run, site: str, *places: tuple[int, ...]) -> list[Cell]:
    """These positions in every layer, the embedding included where it is one of the site's."""
    first = -1 if site in RESID else 0
    return [Cell("token", site, layer, where) for layer in range(first, ours.cfg.n_layers) for where in places]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", SITES)
def test_every_site_matches_plain_hf_hooks(models, example, batches, site, direction):
    hf, (ours, *runs) = models[0], example
    order = slice(None) if direction == "denoise" else slice(None, None, -1)
    (source, base), (source_batch, base_batch) = runs[order], batches[order]
    audio, n_pos = runs[0].indices("audio"), runs[0].n_pos
    text = tuple(pos for pos in range(n_pos) if pos not in audio)
    where = everywhere(ours, base, site, text, audio, (3,), (n_pos - 9,), (n_pos - 4,), (n_pos - 1,))
    states = {layer: hf_state(hf, source_batch, layer, site) for layer in range(ours.cfg.n_layers)}
    states[-1] = hf_embeds(hf, source_batch)
    theirs = []
    for cell in where:
        at = torch.zeros(1, n_pos, dtype=torch.bool)
        at[0, list(cell.positions)] = True
        theirs.append(hf_patched(hf, base_batch, cell.layer, at, states[cell.layer], site)[0])
    for engine in ENGINES:
        found = patched(ours, source, base, where, engine)
        assert found.engine == engine
        for logits, expected in zip(found.values[:, 0], theirs, strict=True):
            assert_close(logits, expected, rtol=1e-5, atol=2e-5)  # logits up to 4: two sums in another order


@pytest.mark.parametrize("site", RESID)
def test_all_positions_patched_at_any_layer_give_the_clean_run(example, site):
    ours, clean, silent = example
    found = patched(ours, clean, silent, everywhere(ours, silent, site, tuple(range(clean.n_pos))))
    theirs = patched(ours, clean, clean, everywhere(ours, clean, site, (0,))).base
    assert_close(found.values, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("site", SITES)
def test_what_both_runs_share_brings_nothing_back(example, site, engine):
    """Text before the audio; every word's embedding. Exactly nothing."""
    ours, clean, silent = example
    audio = clean.indices("audio")
    before = tuple(range(audio[0]))
    words = (*before, *range(audio[-1] + 1, clean.n_pos))
    where = everywhere(ours, silent, site, *((pos,) for pos in before), before)
    where += [Cell("layer", site, -1, words)] * (site in RESID)
    found = patched(ours, clean, silent, where, engine)
    assert torch.equal(found.values, found.base)
    assert found.n_skipped == (len(where) if engine == "sweep" else 0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("site", SITES)
def test_clean_into_clean_changes_nothing(example, site, engine):
    ours, clean, _ = example
    audio = clean.indices("audio")
    found = patched(ours, clean, clean, everywhere(ours, clean, site, audio, (clean.n_pos - 1,)), engine)
    assert torch.equal(found.values, found.base)


def most_changed(ours: HookedLALM, clean: Run, silent: Run) -> Answer:
    """The token whose probability differs most, so that recovery rates are well defined."""
    logits = [ours(run.inputs, logits_at=-1)[0, 0].softmax(-1) for run in (clean, silent)]
    return Answer((int((logits[0] - logits[1]).abs().argmax()),))


def recovered(example, answer: Answer | None = None, **settings: object) -> Recovery:
    ours, clean, silent = example
    answer = answer or most_changed(*example)
    return recover(ours, [Case(clean, silent, answer, cells(ours, Grid(), clean))], **settings)[0]


@pytest.fixture(scope="module")
def recovery(example) -> Recovery:
    return recovered(example)


def rates(recovery: Recovery, layer: int) -> list[tuple[str, int, float]]:
    """Kind, last patched position and recovery rate of the patches of one layer."""
    rows = zip(recovery.cells, recovery.rate.tolist(), strict=True)
    return [(cell.kind, cell.positions[-1], rate) for cell, rate in rows if cell.layer == layer]


def test_the_last_block_counts_at_the_last_position_only(example, recovery):
    ours, clean, _ = example
    final = rates(recovery, ours.cfg.n_layers - 1)
    with_last = [rate for _, pos, rate in final if pos == clean.n_pos - 1]
    without = [rate for _, pos, rate in final if pos < clean.n_pos - 1]
    assert len(with_last) == 2  # all text, and the last token alone
    assert max(abs(rate - 1) for rate in with_last) < 1e-4
    assert len(without) > 5
    assert set(without) == {0.0}


def test_embeddings_of_text_bring_back_nothing_and_of_audio_everything(recovery):
    for kind, _, rate in rates(recovery, -1):
        assert abs(rate - 1) < 1e-4 if kind == "audio_layer" else rate == 0


def test_recovery_is_not_clipped(example):
    """Random weights know no [0, 1]."""
    found = torch.cat([recovered(example, Answer((n,))).rate for n in range(20, 24)])
    assert found.min() < -0.05 or found.max() > 1.05


def test_neither_the_budget_nor_the_engine_changes_the_numbers(example):
    settings = ({"token_budget": 1}, {"token_budget": 10**6}, {"engine": "hooks"})
    few, many, plain = (recovered(example, Answer((17,)), **its).p_patched.log() for its in settings)
    assert_close(few, many, rtol=0, atol=1e-5)
    assert_close(plain, many, rtol=0, atol=1e-5)


def test_examples_together_are_as_each_alone(example):
    ours, clean, silent = example
    where = cells(ours, Grid(), clean)
    answers = (Answer((17,)), Answer((30,), (31, 32)))
    together = recover(ours, [Case(clean, silent, answer, where) for answer in answers], metric="log_probability")
    for answer, found in zip(answers, together, strict=True):
        alone = recovered(example, answer, metric="log_probability")
        assert_close(found.rate, alone.rate, rtol=1e-4, atol=1e-4)
        assert (found.m_clean, found.m_corrupted) == (alone.m_clean, alone.m_corrupted)


def test_the_noise_is_what_computing_it_again_does(example):
    ours, clean, silent = example
    found, answer = recovered(example), most_changed(*example)
    again = Branch(silent, (Recompute("resid_pre", 0, (clean.indices("audio")[-1] + 1,)),))
    p = run_branches(ours, [again], Probabilities(tokens=answer.tokens)).values.item()
    assert found.noise == pytest.approx(abs(p - found.p_corrupted) / abs(found.p_clean - found.p_corrupted), abs=2e-6)
    assert found.noise < 1e-4
    assert recovered(example, engine="hooks").noise == 0


def test_a_noising_trace_takes_away_what_a_denoising_one_brings_back(example):
    """The clean run with the silent run's last state is the silent run; roles and formula are swapped together."""
    ours, clean, silent = example
    answer = most_changed(*example)
    there, back = (recovered(example, answer, direction=direction) for direction in ("denoise", "noise"))
    swapped = recovered((ours, silent, clean), answer, direction="denoise")
    assert torch.equal(back.rate, swapped.rate)
    assert (back.p_clean, back.p_corrupted) == (there.p_clean, there.p_corrupted)
    assert not torch.allclose(there.rate, back.rate)
    assert rates(back, ours.cfg.n_layers - 1)[-1][2] == pytest.approx(1, abs=1e-4)


def test_outside_the_light_cone_of_a_sliding_window_is_exactly_nothing(pair, batches):
    """With a window in every layer, a word hears the audio only by relays, and is heard only by relays."""
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 4}
    ours = pair(seed=4, **window)[1]
    clean, silent = runs_of(ours, batches)
    a, end, n_layers = clean.indices("audio")[-1], clean.n_pos - 1, ours.cfg.n_layers
    found = recovered((ours, clean, silent))
    n_inside = 0
    for layer in range(n_layers):
        for kind, pos, rate in rates(found, layer):
            if kind == "token":
                inside = pos <= a + (layer + 1) * (WINDOW - 1) and end - pos <= (n_layers - 1 - layer) * (WINDOW - 1)
                assert (rate != 0) == inside, (layer, pos, rate)
                n_inside += inside
    assert n_inside > 5
