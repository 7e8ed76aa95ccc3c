"""The sweep against one run with hooks for each branch: every site, every kind of change, every way to read."""

import pytest
import torch
from engine_cases import (
    MODELS,
    N_LAYERS,
    RESID,
    SITES,
    assert_same,
    branches,
    embedded,
    heard,
    kinds,
    model_of,
    noise,
    state,
)
from reference import tiny_hf
from torch.testing import assert_close

from lalm_lens.assets import TINY_LALM, TINY_LALM_PLANTED, TINY_LALM_RELAY
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.corrupt import silence
from lalm_lens.datasets import read_folder
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import Plan
from lalm_lens.interventions import BY_HEAD, Add, Knockout, Patch, Recompute, Scale, ScaleAttention
from lalm_lens.loading import from_hf, from_pretrained
from lalm_lens.nn.rope import RotaryScheme, Rotation
from lalm_lens.readouts import Logits, LogProbs, Probabilities, Resid, Score
from lalm_lens.runs import OWN, Run, Source


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return model_of(request.param)


@pytest.fixture(scope="module")
def runs():
    """The run that is branched off, another of its length, and a longer one."""
    return embedded(1), embedded(2), embedded(3, 23)


def moves(outcome) -> torch.Tensor:
    """How far each branch is from the run it belongs to."""
    return (outcome.values - outcome.base).abs().flatten(1).amax(1)


@torch.no_grad()
def cache_of(model, run, site):
    return model.run_with_cache(run.inputs, names_filter=lambda name: name.endswith(f"hook_{site}"))[1]


# --- one change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_every_kind_of_change_of_every_site(model, runs, site):
    base, clean, longer = runs
    cache = cache_of(model, clean, site)
    layers = {2, SITES.index(site) % N_LAYERS}
    its = [change for layer in layers for change in kinds(model, site, layer, base, clean, longer, cache)]
    outcome = assert_same(model, branches(base, *its))
    assert (moves(outcome) > 1e-2).any()  # in narrow windows, most of them cannot be seen


def test_every_position_of_every_layer(model, runs):
    base, clean, _ = runs
    its = [
        Patch("resid_post", layer, (pos,), Source(clean))
        for layer in range(N_LAYERS)
        for pos in range(layer, base.n_pos, 3)
    ]
    assert_same(model, branches(base, *its))


def test_knockouts(model, runs):
    base = runs[0]
    its = [
        Knockout((0,), (-1,), (3,)),
        Knockout((1, 3), (-1, -4, 9), range(5, 8), heads=(1,)),
        Knockout(range(N_LAYERS), (-1,), range(base.n_pos - 1)),  # nothing but itself is left
        Knockout((2,), range(5, base.n_pos), range(3, 5), heads=(3, 0)),
        Knockout((0, 3), (-1, -2), (-3,), heads=(2,)),
        Knockout((2,), (5,), (9, 12)),  # behind the query: nothing changes
        (Knockout((1, 2), (-1,), (4, -3)), Knockout((2,), (-1, -3), (-4,), heads=(0, 2))),
        (Knockout((2,), (-1,), (-3,), heads=(1,)), Knockout((2,), (-1,), (-2,), heads=(1,))),
    ]
    outcome = assert_same(model, branches(base, *its))
    assert moves(outcome)[5] == 0
    assert (moves(outcome) > 1e-2).any()


def test_scaled_attention(model, runs):
    base = runs[0]
    its = [
        ScaleAttention((0,), (-1,), (3,), factor=4.0),
        ScaleAttention((1, 3), (-1, -4, 9), range(5, 8), heads=(1,), factor=0.1),
        ScaleAttention(range(N_LAYERS), range(base.n_pos), range(2, 12), factor=3.0),
        ScaleAttention((2,), (5,), (9, 12), factor=5.0),  # behind the query: nothing changes
        ScaleAttention((2,), (-1,), (-2, -3), factor=1.0),
        (
            ScaleAttention((1, 2), (-1,), (-2, -3), factor=9.0),
            Knockout((2,), (-1, -3), (-4,), heads=(0, 2)),
            ScaleAttention((2,), (-1,), (-3,), heads=(3, 2), factor=0.2),
        ),
        (
            ScaleAttention((3,), (-1,), (-2,), factor=0.3),
            Scale("pattern", 3, (-1,), keys=(-3 + base.n_pos,), factor=2.0),
        ),
    ]
    outcome = assert_same(model, branches(base, *its))
    assert moves(outcome)[[3, 4]].tolist() == [0, 0]
    assert (moves(outcome) > 1e-2).any()


@pytest.mark.parametrize("site", RESID)
def test_a_branch_takes_what_it_has_come_to(model, runs, site):
    base, clean, _ = runs
    patch = Patch("resid_pre", 0, (7, 15), Source(clean))
    its = [
        (Add("resid_post", 2, (-1,), Source(OWN, layer=1, site=site)),),
        (patch, Add("resid_post", 3, (-1, 15), Source(OWN, layer=1, positions=(15, 7), site=site), factor=0.3)),
        (patch, Add("resid_mid", 2, (16,), Source(OWN, layer=0, positions=(7,), site=site), factor=-2.0)),
        (patch, Patch("resid_pre", 2, (3, 17), Source(OWN, layer=1, positions=(7, 15), site=site))),
        (patch, Add("mlp_out", 3, (17,), Source(OWN, layer=2, positions=(15,), site=site))),
        (patch, Patch("attn_out", 2, (17,), Source(OWN, layer=1, positions=(16,), site=site))),
        (
            patch,
            Add("resid_post", 1, (15, 7), Source(OWN, layer=0, site=site)),
            Add("resid_post", 2, (-1, 15), Source(OWN, layer=1, positions=(7, 15), site=site)),
        ),
    ]
    outcome = assert_same(model, branches(base, *its))
    assert moves(outcome)[0] > 1e-2


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("site", RESID)
def test_a_branch_may_take_what_comes_after_all_that_is_read(model, runs, site, layer):
    base, clean, _ = runs
    patch = Patch("resid_pre", 0, (13, 16), Source(clean))
    taken = [Patch("resid_pre", 3, (2, 4), Source(OWN, layer=layer, positions=(13, 16), site=site))]
    taken += [Patch("mlp_out", layer + 1, (4,), Source(OWN, layer=layer, positions=(16,), site=site))]
    for readout in (Logits((4,)), Resid(3, (6, 4))):
        outcome = assert_same(model, branches(base, *((patch, its) for its in taken)), readout)
        assert (moves(outcome) > 1e-2).all()


def test_what_a_branch_takes_has_all_the_changes_made_there(runs):
    """Also those that come later in its list."""
    base, clean, _ = runs
    enrichment = Add("resid_post", 3, (-1,), Source(OWN, layer=1))
    patch = Patch("resid_post", 1, (-1,), Source(clean))
    outcome = assert_same(model_of("grouped"), branches(base, (enrichment, patch), (patch, enrichment)))
    assert_close(outcome.values[0], outcome.values[1])


# --- several changes ----------------------------------------------------------------------------------------


def test_several_changes_at_several_layers(model, runs):
    base, clean, _ = runs
    restore = Patch("resid_post", 2, range(17), Source(base))
    value = state(model, "resid_post", 1, base.n_pos)
    its = [
        (Patch("z", 0, (5,), Source(clean), heads=(1,)), Patch("mlp_out", 2, (9,), Source(clean))),
        (Patch("resid_pre", 1, (6,), Source(clean)), restore),  # what went past position 17 alone counts
        (Patch("resid_pre", 1, (6,), Source(clean)), restore, Patch("resid_pre", 3, (8,), Source(clean))),
        (
            Patch("resid_post", 0, (16,), value),
            Patch("resid_mid", 1, (16,), Source(base)),
            Scale("q", 3, (-1,), factor=2.0),
        ),
        (
            Scale("resid_post", 1, (15,), factor=0.0),
            Add("resid_post", 1, (15,), value),
            Scale("resid_post", 1, (15,), factor=0.5),
        ),
        (
            Add("resid_post", 1, (15,), value),
            Scale("resid_post", 1, (15,), factor=0.5),
            Scale("resid_post", 1, (15,), factor=0.0),
        ),
        (
            Patch("resid_post", 1, (15,), value),
            Scale("resid_pre", 2, (15,), factor=0.5),
            Add("resid_post", 1, (15, 4), Source(clean)),
        ),
        (
            Patch("k", 1, (12,), Source(clean), heads=(0,)),
            Patch("v", 1, (14,), Source(clean)),
            Knockout((1,), (-1,), (13,)),
        ),
        (
            Patch("pattern", 2, (-1,), state(model, "pattern", 1, base.n_pos)),
            Patch("resid_pre", 2, (6,), Source(clean)),
        ),
        (
            Patch("pattern", 2, (5,), state(model, "pattern", 1, base.n_pos)),
            Patch("resid_pre", 1, (14,), Source(clean)),
        ),
        (
            Patch("v", 2, (13, 2), Source(clean)),
            Patch("pattern", 2, (-1, 3), Source(clean), heads=(2,)),
            Knockout((2,), (-1,), (13,), heads=(1, 2)),
        ),
        (Patch("resid_pre", 0, (5,), value), Patch("resid_pre", 0, (5,), Source(base)), Recompute("post", 3, (-1,))),
        (Patch("mlp_out", 3, (2,), Source(clean)), Patch("attn_out", 3, (-1,), Source(clean))),
    ]
    outcome = assert_same(model, branches(base, *its))
    assert (moves(outcome) > 1e-2).sum() > 5


def test_the_order_of_changes_counts(runs):
    base, _, _ = runs
    scale, add = Scale("resid_post", 1, (15,), factor=0.0), Add("resid_post", 1, (15,), noise(1, 64))
    outcome = assert_same(model_of("grouped"), branches(base, (scale, add), (add, scale)))
    assert (outcome.values[0] - outcome.values[1]).abs().max() > 1e-2


@pytest.mark.parametrize("site", ["resid_pre", "mlp_out", "v"])
def test_a_pattern_may_look_ahead_at_what_has_changed(model, runs, site):
    """Nothing that is read can see the change by itself: it is behind it."""
    base, clean, _ = runs
    ahead = state(model, "pattern", 1, base.n_pos)
    its = branches(
        base,
        *(Patch(site, layer, (14,), Source(clean)) for layer in (0, 1)),
        *((Patch(site, layer, (14,), Source(clean)), Patch("pattern", 2, (5,), ahead)) for layer in (0, 1)),
        Patch("pattern", 2, (5,), ahead),
    )
    outcome = assert_same(model, its, Logits((5,)))
    assert outcome.n_skipped == 2
    assert (outcome.values[2:4] - outcome.values[4]).abs().max() > 1e-3


def test_runs_of_several_lengths_in_one_sweep(model):
    its = []
    for seed, n_pos in ((1, 18), (5, 12), (6, 31)):
        base, clean = embedded(seed, n_pos), embedded(seed + 10, n_pos)
        its += branches(
            base,
            Patch("resid_post", 1, (-3,), Source(clean)),
            Patch("z", 2, (-1,), Source(clean), heads=(0, 3)),
            Add("resid_pre", 1, (-2, 5), Source(embedded(1, 18), positions=(-1, 6))),
            Knockout((2,), (-1,), (-2, -3), heads=(1,)),
            Patch("pattern", 1, (-4,), Source(clean)),
            (Patch("k", 0, (-6, 3), Source(clean)), Add("resid_post", 3, (-1,), Source(OWN, layer=0))),
        )
    assert_same(model, its[::2] + its[1::2])
    assert_same(model, its, token_budget=13)


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "readout",
    [
        Logits(),
        Logits((0, -1, 7), tokens=(3, 250, 0)),
        LogProbs(),
        LogProbs((-1, -2), tokens=(11, 12)),
        Probabilities((5, 9)),
        Score(lambda logits: logits[:, -1, 3] - logits[:, 0, 4], (-5, -1)),
        Score(lambda logits: logits.double().logsumexp(-1), (2, 3)),
        *(Resid(layer, (-1, 4, -6)) for layer in (0, 1, 2, 3)),
        Resid(2),
    ],
    ids=lambda readout: f"{type(readout).__name__}{getattr(readout, 'layer', '')}{readout.positions}",
)
@pytest.mark.parametrize("name", ["grouped", "windows in turn"])
def test_every_way_to_read(name, runs, readout):
    model, (base, clean, _) = model_of(name), runs
    its = [
        Patch(site, layer, (pos,), Source(clean))
        for site, pos in (("resid_post", 9), ("k", 4), ("mlp_out", -1))
        for layer in (0, 2, 3)
    ]
    its += [(Patch("resid_pre", 0, (6,), Source(clean)), Add("resid_post", 2, (-1, 9), Source(OWN, layer=0)))]
    values = assert_same(model, branches(base, *its), readout).values
    assert values.dtype == (torch.float64 if isinstance(readout, Score) and values.ndim == 2 else torch.float32)


def test_values_are_in_the_order_of_the_branches_whatever_the_order_of_the_sweep(runs):
    base, clean, _ = runs
    its = [Patch("resid_post", layer, (pos,), Source(clean)) for pos in (16, 3, 9) for layer in (2, 0, 3, 1)]
    forward = assert_same(model_of("grouped"), branches(base, *its)).values
    backward = assert_same(model_of("grouped"), branches(base, *its[::-1])).values
    assert_close(forward, backward.flip(0))


def test_small_pieces_of_attention_and_of_unembedding_change_nothing(runs):
    model, (base, clean, _) = model_of("windows in turn"), runs
    its = branches(base, *(Patch("resid_post", layer, (pos,), Source(clean)) for layer in (0, 1) for pos in range(18)))
    plan = Plan(model, its, Logits((-1, -3)), engine="sweep")
    whole = plan.run().values
    plan.sweep.max_scores = plan.sweep.max_logits = 1
    assert_close(plan.run().values, whole)
    plan.sweep.max_scores, plan.sweep.max_logits = 4 * 18 * 17 * 3, 3 * 2 * 260
    assert_close(plan.run().values, whole)


# --- padding, audio, encoder --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grouped", "windows", "windows in turn"])
def test_a_row_of_a_padded_batch(name):
    model = model_of(name)
    base, clean = heard((0.5, 0.25), row=1), heard((0.5, 0.25), row=1, seed=5)
    longer, plain = heard((0.5, 0.25)), heard((0.25,), seed=9)
    assert base.n_pad == 6
    n = base.n_pos
    its = [
        Patch("resid_post", 1, (n - 3,), Source(clean)),
        Patch("resid_post", 0, (2, 9, n - 1), noise(3, 64)),  # the first is padding: nothing sees it
        Patch("z", 1, (3, n - 2), noise(1, 2, 4, 16)),
        Patch("q", 2, (4, -1), Source(longer), heads=(2,)),
        Patch("post", 2, (-1, 1), noise(2, 3), neurons=(5, 1, 90)),
        Add("attn_out", 2, (-4, 1), Source(plain, positions=(3, -1)), factor=2.0),
        Scale("resid_mid", 0, (0, 10), factor=0.0),
        Patch("resid_pre", 1, (1, 3), Source(clean)),
        Knockout((1, 2), (-1, -2), (2, n - 3, n - 4), heads=(1, 3)),
        (Patch("k", 0, (8,), Source(clean)), Add("resid_post", 2, (2, -1), Source(OWN, layer=0, positions=(10, 12)))),
    ]
    outcome = assert_same(model, branches(base, *its))
    assert moves(outcome)[7] == 0
    assert (moves(outcome) > 1e-2).sum() > 4
    assert_same(model, branches(base, *its), Resid(2, (-1, 8)))


@pytest.mark.parametrize("site", [*SITES, "adapter_in", "adapter_out"])
def test_changes_of_encoder_and_adapter(site):
    model, base, clean = model_of("grouped"), heard((0.3, 0.4)), heard((0.3, 0.4), seed=5)
    n_ctx = model.lalm_cfg.encoder.n_ctx
    where = {} if site.startswith("adapter") else {"stack": "audio_encoder"}
    layers = (0,) if site.startswith("adapter") else (0, 1)
    part = (
        {"heads": (1, 3)} if site in ("q", "k", "v", "z", "pattern") else {"neurons": (4, 40)} if site == "post" else {}
    )
    its = []
    for layer in layers:
        its += [
            Patch(site, layer, range(2, 6), Source(clean), **where),
            Patch(site, layer, (1, 2), Source(clean, positions=(3, 0)), **where),
            Scale(site, layer, (0, 5), factor=0.4, **part, **where),
            Add(site, layer, (3,), Source(clean, layer=layers[-1]), factor=0.5, **where),
            (Patch(site, layer, range(2, 6), Source(clean), **where), Scale("resid_post", 1, (-3,), factor=0.0)),
            (Patch("resid_post", 2, range(10), Source(base)), Patch(site, layer, range(6), Source(clean), **where)),
        ]
    if not site.startswith("adapter"):
        its.append(Add(site, 1, (4, 2), state(model, site, 2, n_ctx, stack="audio_encoder"), **where))
    outcome = assert_same(model, branches(base, *its))
    assert (moves(outcome) > 1e-4).any()
    assert outcome.cost.n_heard == len(its)
    assert_same(model, branches(heard((0.5, 0.3), row=1), *its[:1]))


def test_encoder_states_may_come_from_any_of_its_positions():
    """There are more of them than positions in the prompt."""
    model, base, clean = model_of("grouped"), heard((0.3,)), heard((0.3,), seed=5)
    patch = Patch("resid_post", 0, (3,), Source(clean, positions=(70,)), stack="audio_encoder")
    assert base.n_pos < 70
    assert moves(assert_same(model, branches(base, patch))) > 1e-4


# --- models as they are shipped ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[TINY_LALM, TINY_LALM_PLANTED, TINY_LALM_RELAY], ids=lambda folder: folder.name)
def shipped(request, folders):
    """A trained model, a prompt about a clip, and about silence."""
    model = from_pretrained(request.param)
    waveform = read_folder(folders["animal"])[0].waveform
    prompt = model.processor.prompt(ATTRIBUTES["animal"], model.processor.n_frames(waveform))
    return model, *(Run(model.processor.inputs([prompt], [its]), prompt) for its in (waveform, silence(waveform)))


def test_regions_of_a_real_prompt(shipped):
    model, clean, silent = shipped
    its = [
        Patch(site, layer, region, Source(clean))
        for layer, site in ((0, "resid_post"), (3, "attn_out"), (4, "resid_post"), (7, "resid_mid"))
        for region in ("text_before", "audio", "object", "last")
    ]
    its += [Knockout((layer,), "last", "audio") for layer in (3, 4)] if model.decoder_cfg.windows[3] is None else []
    its += [
        (Patch("resid_pre", 0, "audio", Source(clean)), Patch("resid_post", 3, "object", Source(silent))),
        (Patch("resid_pre", 0, "audio", Source(clean)), Add("resid_post", 6, "last", Source(OWN, layer=5), factor=0.3)),
        Patch("resid_post", 1, range(10, 40), Source(clean), stack="audio_encoder"),
    ]
    outcome = assert_same(model, branches(silent, *its))
    assert (moves(outcome) > 1e-2).any()
    assert moves(outcome)[0] == 0  # the text before the audio has heard nothing


@pytest.mark.parametrize("site", SITES)
def test_sites_of_a_trained_model(shipped, site):
    model, clean, silent = shipped
    some = {"heads": (1,)} if site in BY_HEAD else {}
    its = [Patch(site, layer, (pos,), Source(clean), **some) for layer, pos in ((1, -9), (3, -1), (6, -1), (4, 50))]
    assert_same(model, branches(silent, *its))


# --- positions of another kind -------------------------------------------------------------------------------


class Streams(RotaryScheme):
    """Three streams of positions, each turning its own pairs, and a scale that grows with the position."""

    def __init__(self, d_head: int, n_pos: int = 64) -> None:
        super().__init__()
        steps = torch.tensor([[1, 1, 1], [0, 1, 2], [2, 0, 1]])  # of time, height and width, from position to position
        self.register_buffer("streams", steps[torch.arange(n_pos) % 3].cumsum(0).float(), persistent=False)
        self.register_buffer("pair", torch.arange(d_head // 2), persistent=False)

    def forward(self, positions, dtype, n_tokens=()):
        stream = self.streams[positions][..., self.pair % 3]
        angle = stream / 100.0 ** (self.pair / len(self.pair))
        angle = torch.cat([angle, angle], dim=-1)[:, :, None]
        scale = (positions[..., None, None] + 2).float().log() / 3
        return Rotation((angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype))


def test_positions_may_be_turned_in_any_way(runs):
    base, clean, longer = runs
    model = from_hf(tiny_hf(7))
    plain = model(base.inputs)
    model.rotary = Streams(model.decoder_cfg.d_head)
    assert (model(base.inputs) - plain).abs().max() > 0.1
    for site in ("resid_post", "k", "pattern"):
        with torch.no_grad():
            _, cache = model.run_with_cache(
                clean.inputs, names_filter=lambda name, site=site: name.endswith(f"hook_{site}")
            )
        assert_same(model, branches(base, *kinds(model, site, 1, base, clean, longer, cache)))
    padded = heard((0.5, 0.25), row=1)
    assert_same(model, branches(padded, Scale("resid_post", 1, (-3,), factor=0.0), Knockout((1,), (-1,), (-4,))))


# --- which engine ran, other types of numbers ------------------------------------------------------------------


def test_branches_without_a_change_are_their_run(runs):
    outcome = assert_same(model_of("grouped"), [Branch(runs[0])])
    assert torch.equal(outcome.values, outcome.base)
    assert outcome.n_skipped == 1
