"""Enrichment: against plain HF hooks on both engines, and the accounts of what it gains."""

import numpy as np
import pandas as pd
import pytest
import torch
from reference import chirps, hf_batch, hooked, tiny_hf
from torch.testing import assert_close

from lalm_lens import Enrichment, InformationScore, Logits, Run, enrich, from_hf, information_score, run_branches
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.datasets import Sample, read_folder, split
from lalm_lens.engine.branches import Branch
from lalm_lens.errors import DataError, InputError, PromptError
from lalm_lens.experiments import enrich as enrich_module
from lalm_lens.experiments.enrich import chosen_layer, enrichment
from lalm_lens.inputs import Inputs

GAP, N_PROBING, N_SEEDS, FACTORS = 3, 4, 3, (0.5, 2)


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    return read_folder(write_clips(tmp_path_factory.mktemp("clips"), "emotion", 10, seed=5))


@pytest.fixture(scope="module")
def run(tiny_lalm, samples):
    def enriched(engine: str = "auto", **how: object) -> Enrichment:
        how = {"n_probing": N_PROBING, "gap": GAP, "factors": FACTORS, "n_seeds": N_SEEDS, "progress": False, **how}
        return enrich(tiny_lalm, samples, attribute="emotion", engine=engine, **how)

    return enriched


@pytest.fixture(scope="module")
def enriched(run) -> Enrichment:
    return run()


# --- eq. 5 ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def hf_enriched(hf, batch: dict[str, torch.Tensor], layer: int, gap: int, factor: float) -> torch.Tensor:
    """Last logits, with plain hooks."""
    layers, seen = hf.model.language_model.layers, {}

    def take(module, args, out):
        seen["state"] = (out[0] if isinstance(out, tuple) else out)[:, -1].clone()

    def give(module, args, out):
        state = out[0] if isinstance(out, tuple) else out
        state[:, -1] += factor * seen["state"]

    with hooked(layers[layer].register_forward_hook(take), layers[layer + gap].register_forward_hook(give)):
        return hf(**batch, use_cache=False).logits[0, -1]


@pytest.mark.parametrize("engine", ["sweep", "hooks"])
def test_enrichment_is_that_of_plain_hf_hooks(engine):
    hf = tiny_hf(seed=7)
    batch = hf_batch(chirps([1.1]))
    run, cases = Run(Inputs.from_hf(batch)), [(0, 1, 0.5), (1, 2, -2.0), (0, 3, 4.0), (2, 1, 1.0)]
    branches = [Branch(run, (enrichment(layer, factor, gap),)) for layer, gap, factor in cases]
    outcome = run_branches(from_hf(hf), branches, Logits(), engine=engine)
    for (layer, gap, factor), ours in zip(cases, outcome.values, strict=True):
        assert_close(ours[0], hf_enriched(hf, batch, layer, gap, factor))
    assert (outcome.values - outcome.base).abs().amax(-1).min() > 1e-2


def test_both_engines_find_the_same(run, enriched):
    hooks = run(engine="hooks", n_seeds=1, n_together=3).to_frame()
    sweep = enriched.frame[enriched.frame.seed.isna() | (enriched.frame.seed == 0)].reset_index(drop=True)
    assert set(sweep.engine) == {"sweep"}
    assert set(hooks.engine) == {"hooks"}
    pd.testing.assert_frame_equal(sweep.drop(columns="engine"), hooks.drop(columns="engine"))


def test_factor_0_changes_nothing(enriched, tiny_lalm, samples):
    how = {"attribute": "emotion", "forms": ["P3"], "label_spaces": [False], "progress": False}
    frame = information_score(tiny_lalm, samples, **how).to_frame()
    plain = frame[(frame.place == "last") & (frame.layer == 7)].set_index("sample").predicted
    at_0 = enriched.frame[enriched.frame.factor == 0]
    assert len(at_0) == N_PROBING + (len(samples) - N_PROBING) * (1 + N_SEEDS)
    assert at_0.predicted.tolist() == plain.loc[at_0["sample"]].tolist()
    at_most = enriched.frame[enriched.frame.factor == 2]
    assert at_most.predicted.tolist() != plain.loc[at_most["sample"]].tolist()


# --- the protocol -------------------------------------------------------------------------------------------------


def test_the_layer_is_where_wrongly_answered_probing_clips_are_told_apart_best(enriched, tiny_lalm, samples):
    frame = enriched.to_frame()
    probing = set(frame[frame.split == "probing"]["sample"])
    how = {"attribute": "emotion", "forms": ["P3"], "label_spaces": [False], "progress": False}
    scores = information_score(tiny_lalm, [its for its in samples if its.name in probing], **how).to_frame()
    last = scores[scores.place == "last"].pivot(index="sample", columns="layer", values="is_right")
    of_wrong = last[~last[7]].mean()
    best = [layer for layer in range(8 - GAP) if of_wrong[layer] == of_wrong[: 8 - GAP].max()]
    chosen = frame[frame.arm == "chosen"]
    assert chosen.layer.unique().tolist() == best[:1]
    assert (chosen.gap == GAP).all()


def test_a_layer_is_chosen_by_wrong_answers_the_first_of_equals_and_with_one_to_enrich(tiny_lalm, samples, monkeypatch):
    """Layers 1 and 3 tell the wrongly answered clips apart best, but for 6, whose target would be no layer."""
    wrong = np.array([[0, 1, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 1, 0], [0, 1, 0, 1, 0, 0, 1, 0]], dtype=bool)
    right = np.array([[0, 0, 1, 0, 1, 1, 1, 1]] * 5, dtype=bool)
    frame = pd.DataFrame(
        {"sample": n, "layer": layer, "is_right": its, "right_at_end": row[-1], "place": "last"}
        for n, row in enumerate([*wrong, *right])
        for layer, its in enumerate(row)
    )
    other = frame.assign(place="penultimate", is_right=frame.layer == 0)
    scores = InformationScore(pd.concat([frame, other]))
    monkeypatch.setattr(enrich_module, "information_score", lambda *args, **how: scores)
    layer = chosen_layer(tiny_lalm, samples, ATTRIBUTES["emotion"], "P3", False, 3, None, False)
    assert layer == 1
    assert chosen_layer(tiny_lalm, samples, ATTRIBUTES["emotion"], "P3", False, 1, None, False) == 6


def test_random_layers_are_drawn_for_every_clip_and_seed(run, enriched):
    drawn = enriched.frame[enriched.frame.arm == "random"]
    assert set(drawn.split) == {"test"}
    by_clip = drawn.groupby(["seed", "sample"]).layer
    assert (by_clip.nunique() == 1).all()  # the same for every factor
    assert set(drawn.layer) <= set(range(8 - GAP))
    assert drawn.layer.nunique() > 2
    layers = by_clip.first().unstack("sample")
    assert layers.shape == (N_SEEDS, 6)
    assert not layers.duplicated().any()
    many = [np.random.default_rng([0, n]).integers(0, 8 - GAP, 6).tolist() for n in range(N_SEEDS)]
    test = enriched.frame[(enriched.frame.split == "test")].drop_duplicates("sample")["sample"]
    assert layers[test].to_numpy().tolist() == many
    other = run(seed=1).frame
    assert set(other[other.split == "probing"]["sample"]) != set(
        enriched.frame[enriched.frame.split == "probing"]["sample"]
    )


@pytest.mark.parametrize("seed", [0, 3])
def test_a_split_is_disjoint_and_in_the_proportions_of_the_labels(seed):
    labels = ["dog"] * 68 + ["cat"] * 68 + ["pig"] * 40 + ["hen"] * 24
    samples = [Sample(f"{n}.wav", label, torch.ones(10)) for n, label in enumerate(labels)]
    probing, test = split(samples, 50, seed)
    assert (len(probing), len(test)) == (50, 150)
    assert {its.name for its in probing} | {its.name for its in test} == {its.name for its in samples}
    of_label = pd.Series([its.label for its in probing]).value_counts()
    assert (of_label - pd.Series({"dog": 17, "cat": 17, "pig": 10, "hen": 6})).abs().max() <= 1
    assert [its.name for its in split(samples, 50, seed)[0]] == [its.name for its in probing]
    assert [its.name for its in split(samples, 50, seed + 1)[0]] != [its.name for its in probing]


# --- the accounts -------------------------------------------------------------------------------------------------


def made_up(rights: dict[tuple[str, str, int | None, float], list[bool]]) -> Enrichment:
    """Rows of clips by split, arm, seed and factor."""
    about = {"model": "m", "attribute": "emotion", "form": "P3", "label_space": False, "engine": "sweep", "label": "a"}
    frames = [
        pd.DataFrame({"sample": [f"{of}{n}.wav" for n in range(len(its))], "is_right": its}).assign(
            split=of, arm=arm, seed=seed, factor=factor, layer=2, gap=5, predicted="a", **about
        )
        for (of, arm, seed, factor), its in rights.items()
    ]
    return Enrichment.concat(frames)


@pytest.fixture(scope="module")
def account() -> Enrichment:
    return made_up(
        {
            ("probing", "chosen", None, 0.0): [True, False, False],
            ("probing", "chosen", None, 1.0): [True, True, False],
            ("probing", "chosen", None, 2.0): [True, True, False],
            ("test", "chosen", None, 0.0): [True, True, False, False, False],
            ("test", "chosen", None, 1.0): [True, True, True, False, False],
            ("test", "chosen", None, 2.0): [True, True, True, True, False],
            ("test", "random", 0, 0.0): [True, True, False, False, False],
            ("test", "random", 1, 0.0): [True, True, False, False, False],
            ("test", "random", 0, 1.0): [True, False, False, False, False],
            ("test", "random", 1, 1.0): [True, True, True, False, False],
            ("test", "random", 0, 2.0): [False] * 5,
            ("test", "random", 1, 2.0): [True] * 5,
        }
    )


def test_the_gain_is_relative_and_of_the_test_clips(account):
    summary = account.summary(n_resamples=200, seed=4).set_index("picked_on")
    assert summary.factor.to_dict() == {"test": 2.0, "probing": 1.0}  # the smaller of two that are equally good
    assert summary.accuracy_0.tolist() == [0.4, 0.4]
    assert summary.accuracy.to_dict() == {"test": 0.8, "probing": 0.6}
    assert summary.gain.to_dict() == pytest.approx({"test": 1.0, "probing": 0.5})
    assert summary.random.to_dict() == pytest.approx({"test": 0.5, "probing": 0.4})
    assert summary.random_sd.to_dict() == pytest.approx({"test": 0.5**0.5, "probing": np.std([0.2, 0.6], ddof=1)})
    assert (summary.n == 5).all()
    assert (summary.layer == 2).all()


def test_the_gains_interval_is_that_of_clips_drawn_again():
    rng = np.random.default_rng(0)
    rights = rng.random((2, 80)) < np.array([[0.5], [0.7]])
    one = made_up(
        {("probing", "chosen", None, factor): [False, factor == 1.0] for factor in (0.0, 1.0)}
        | {("test", "chosen", None, float(n)): its.tolist() for n, its in enumerate(rights)}
        | {("test", "random", 0, float(n)): its.tolist() for n, its in enumerate(rights)}
    )
    row = one.summary(n_resamples=300, seed=4).iloc[0]
    ordered = rights[:, sorted(range(80), key=lambda n: f"test{n}.wav")]
    rng, gains = np.random.default_rng(4), []
    for _ in range(300):
        before, after = ordered[:, rng.integers(0, 80, 80)].mean(1)
        gains.append((after - before) / before)
    assert row.gain == pytest.approx((rights[1].mean() - rights[0].mean()) / rights[0].mean())
    assert [row.low, row.high] == pytest.approx(np.percentile(gains, [2.5, 97.5]).tolist())


def test_what_was_never_right_has_no_relative_gain():
    none = made_up(
        {(of, "chosen", None, factor): [bool(factor), False] for of in ("probing", "test") for factor in (0.0, 1.0)}
    )
    row = none.summary(n_resamples=20).iloc[0]
    assert row.accuracy == 0.5
    assert np.isnan(row.gain)


def test_the_picture_shows_chosen_and_random_layers(account):
    (ax,) = account.plot().axes
    chosen, drawn = ax.lines[0], ax.containers[0].lines[0]
    assert chosen.get_xdata().tolist() == drawn.get_xdata().tolist() == [0, 1, 2]
    assert chosen.get_ydata().tolist() == pytest.approx([0.4, 0.6, 0.8])
    assert drawn.get_ydata().tolist() == pytest.approx([0.4, 0.4, 0.5])
    bars = [segment[:, 1] for segment in ax.containers[0].lines[2][0].get_segments()]
    assert [(high - low) / 2 for low, high in bars] == pytest.approx([0, np.std([0.2, 0.6], ddof=1), 0.5**0.5])
    assert ax.get_title() == "m: emotion, P3, layer 2 added to layer 7\n(n = 5 test clips)"


def test_an_enrichment_is_printed_saved_and_loaded(enriched, tmp_path):
    assert repr(enriched).startswith("Enrichment(tiny_lalm, 4 probing and 6 test clips)")
    path = enriched.save(tmp_path / "enriched.parquet")
    pd.testing.assert_frame_equal(Enrichment.load(path).to_frame(), enriched.to_frame())


def test_what_cannot_be_enriched_is_refused(run, tiny_lalm, samples):
    how = {"attribute": "emotion", "n_probing": 1, "gap": GAP, "progress": False}
    with pytest.raises(DataError, match="listed 2 times"):
        enrich(tiny_lalm, [*samples, samples[0]], **how)
    with pytest.raises(PromptError, match="not an option of emotion"):
        enrich(tiny_lalm, [*samples, Sample("a.wav", "purple", samples[0].waveform)], **how)
    with pytest.raises(InputError, match="from 1 to 7"):
        run(gap=8)
    with pytest.raises(InputError, match="n_together is 1 or more"):
        run(n_together=0)
    with pytest.raises(DataError, match="10 clips cannot be split into 10"):
        run(n_probing=10)
    with pytest.raises(DataError, match="4 probing clips are answered rightly"):
        run(label_space=True)
