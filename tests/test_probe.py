"""Probes: against scikit-learn's own cross-validation, planted signals, and a model in which the layer is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from reference import hf_states
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import Qwen2AudioForConditionalGeneration

from lalm_lens.assets import TINY_LALM, TINY_LALM_PLANTED
from lalm_lens.assets.clips import write_clips
from lalm_lens.conflict import make_conflict
from lalm_lens.counterfactual import swap_audio
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.features import Spot, features
from lalm_lens.experiments.probe import Probe, Probing, probe
from lalm_lens.loading import from_pretrained

pytestmark = pytest.mark.numbers

N_CLIPS, WIDTH, PLANTED = 60, 20, 2
LABELS = ["a", "b", "c"] * (N_CLIPS // 3)
HOW = {"attribute": "gender", "n_folds": 3, "n_controls": 3, "progress": False}


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N_CLIPS, WIDTH))


def planted(seed: int = 0, size: float = 4.0) -> np.ndarray:
    """Noise, and a direction of its own for each class."""
    directions = np.linalg.qr(np.random.default_rng(9).normal(size=(WIDTH, 3)))[0].T
    return noise(seed) + size * directions[["abc".index(label) for label in LABELS]]


def table(layers: list[np.ndarray], probing: Probing) -> Probe:
    """As of a model with these states."""
    clips = pd.DataFrame({"sample": [f"{n}.wav" for n in range(N_CLIPS)], "group": probing.groups})
    frames = [probing.of(states, LABELS).assign(layer=layer) for layer, states in enumerate(layers)]
    frame = pd.concat(frames).merge(clips, left_on="clip", right_index=True)
    about = {"model": "m", "attribute": "letter", "form": "P3", "C": probing.C, "stack": "decoder", "place": "last"}
    return Probe.concat([frame.assign(**about)])


# --- one set of states ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [1.0, 0.01])
@pytest.mark.parametrize("grouped", [False, True])
def test_accuracies_are_those_of_sklearns_cross_validation(C, grouped):
    states, groups = planted(size=1.0), [f"speaker {n // 4}" for n in range(N_CLIPS)]
    found = table([states], Probing(tuple(groups) if grouped else None, 4, C, n_controls=2, seed=3))
    splitter = StratifiedGroupKFold if grouped else StratifiedKFold
    how = {
        "cv": splitter(4, shuffle=True, random_state=3),
        "groups": groups if grouped else None,
        "scoring": "accuracy",
    }
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
    folds = found.folds()
    expected = cross_val_score(model, states, LABELS, **how)
    true = folds[folds.labels == "true"]
    assert true.accuracy.tolist() == pytest.approx(expected.tolist())
    assert true.n_test.sum() == N_CLIPS
    assert (true.n_train + true.n_test == N_CLIPS).all()
    assert folds.converged.all()
    for seed in (3, 4):
        rows = found.frame[found.frame.seed == seed].sort_values("sample", key=lambda its: its.str[:-4].astype(int))
        control = folds[folds.seed == seed].accuracy.tolist()
        assert rows.target.tolist() != LABELS
        assert sorted(rows.target) == sorted(LABELS)
        assert control == pytest.approx(cross_val_score(model, states, rows.target.tolist(), **how).tolist())


def test_a_planted_direction_is_found_where_it_is_and_not_before():
    layers = [noise(4), noise(1), planted(2)]
    found = table(layers, Probing(n_folds=3, n_controls=19))
    by_layer = found.layers()
    assert (by_layer.accuracy[PLANTED:] > 0.9).all()
    assert (by_layer.accuracy[:PLANTED] < 0.5).all()
    assert (by_layer.control < 0.45).all()
    assert (by_layer.selectivity_low[PLANTED:] > 0.4).all()
    assert (by_layer.selectivity_low[:PLANTED] < 0).all()
    assert (by_layer.p[PLANTED:] == 0.05).all(), "of 20 draws the true one alone is as accurate"
    assert (by_layer.p[:PLANTED] > 0.1).all()
    assert found.first_layer().first_layer.tolist() == [PLANTED]
    assert found.first_layer(above=0.9).first_layer.isna().all()


def test_a_probe_of_speakers_knows_no_stranger():
    """Each speaker has one label, and states tell who speaks: what looks like the label is gone between speakers."""
    speakers = np.arange(N_CLIPS) % 15  # whose labels are a, b, c, a, ...
    states = np.eye(15)[speakers] @ np.random.default_rng(0).normal(size=(15, WIDTH)) * 3 + noise(0)
    groups = tuple(f"speaker {n}" for n in speakers)
    assert table([states], Probing(n_controls=0)).layers().accuracy[0] > 0.9
    by_speaker = Probing(groups, n_controls=3)
    found = table([states], by_speaker)
    assert found.layers().accuracy[0] < 0.6
    for _, rows in found.frame.groupby("seed", dropna=False):
        assert (rows.groupby("group").fold.nunique() == 1).all()
        assert (rows.groupby("group").target.nunique() == 1).all(), "whole speakers change places"
    some = Probing(tuple(f"{n // 2}" for n in range(N_CLIPS)))  # two labels in each
    assert len(set(zip(some.groups, some.shuffled(np.array(LABELS), 0), strict=True))) > len(set(some.groups))


def test_intervals_draw_clips_or_groups_again():
    rng, groups = np.random.default_rng(0), tuple(f"{n // 6}" for n in range(N_CLIPS))
    for unit in (None, groups):
        found = table([planted(size=1.5)], Probing(unit, n_folds=3, n_controls=2))
        row = found.layers(n_resamples=2000).iloc[0]
        frame = found.frame.assign(n=found.frame["sample"].str[:-4].astype(int)).sort_values("n")
        right = frame[frame.labels == "true"].is_right.to_numpy()
        control = frame[frame.labels == "shuffled"].groupby("n").is_right.mean().to_numpy()
        parts = np.arange(N_CLIPS).reshape(-1, 1 if unit is None else 6)
        again = [parts[rng.integers(0, len(parts), len(parts))].ravel() for _ in range(2000)]
        assert row.accuracy == pytest.approx(right.mean())
        assert row.selectivity == pytest.approx(right.mean() - control.mean())
        expected = np.percentile([right[its].mean() for its in again], [2.5, 97.5])
        assert [row.low, row.high] == pytest.approx(expected.tolist(), abs=0.025)
        expected = np.percentile([right[its].mean() - control[its].mean() for its in again], [2.5, 97.5])
        assert [row.selectivity_low, row.selectivity_high] == pytest.approx(expected.tolist(), abs=0.03)


def test_a_fit_that_does_not_converge_is_told():
    found = table([planted()], Probing(max_iter=2, n_controls=0))
    assert not found.folds().converged.any()
    assert "; 5 fits did not converge" in repr(found)
    assert found.layers()[["control", "selectivity", "p"]].isna().all(axis=None)
    assert found.layers().low.notna().all()


@pytest.mark.parametrize(
    ("how", "labels", "says"),
    [
        ({}, ["a"] * N_CLIPS, "All 60 clips are 'a'"),
        ({}, [*"aaaa", *["b"] * 56], "as many clips of every class, and 'a' has 4"),
        ({"groups": ("x",) * 4 + ("y",) * 56}, LABELS, "as many groups of every class, and 'a' has 2"),
        ({"groups": ("x", "y")}, LABELS, "60 clips need as many groups; got 2"),
        ({"n_folds": 1}, LABELS, "n_folds of 2 or more"),
        ({"C": 0.0}, LABELS, "a C above 0"),
        ({}, LABELS[:59], "59 labels need as many states; got 60"),
    ],
)
def test_what_cannot_be_probed_is_refused(how, labels, says):
    with pytest.raises((DataError, InputError), match=says):
        Probing(**how).of(noise(0), labels)


def test_states_that_are_not_finite_are_refused():
    states = noise(0)
    states[[3, 8], 4] = np.nan
    with pytest.raises(InputError, match="2 of 60 clips have states that are not finite"):
        Probing().of(states, LABELS)


# --- a model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    return read_folder(write_clips(tmp_path_factory.mktemp("clips"), "gender", 8, seed=3))


@pytest.fixture(scope="module")
def probed(samples) -> Probe:
    return probe(from_pretrained(TINY_LALM_PLANTED), samples, stacks=["decoder"], **HOW)


def test_the_last_position_hears_in_the_one_block_that_looks(probed):
    """In the planted model that is block 4: before it, all clips have the same state there."""
    layers = probed.layers().set_index("layer")
    assert layers.index.tolist() == list(range(-1, 8))
    assert (layers.accuracy[:4] == layers.accuracy[-1]).all()
    assert layers.accuracy[-1] <= 0.5
    assert (layers.accuracy.loc[4:] == 1).all()
    assert probed.first_layer().first_layer.tolist() == [4]


def test_states_are_means_of_hfs(tiny_lalm, samples):
    """Of a clip of 1.6 s, whose states are the first 80 of the encoder's 1,500, or what this one has."""
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM, dtype=torch.float32).eval()
    run = Question.about(tiny_lalm, samples, "gender", "P3", True).run(samples[0])
    found = features(tiny_lalm, run, ("audio_encoder", "adapter", "decoder"), ("last", "audio", ("early", "late")))
    _, states = hf_states(hf, run.inputs.to_hf("feature_attention_mask"))
    region = np.array([position.region for position in run.prompt.positions])
    n_sound = (int(run.inputs.n_frames[0]) - 1) // 2 + 1
    places = {"last": [len(region) - 1], "audio": region == "audio", "early+late": np.isin(region, ("early", "late"))}
    for place, at in places.items():
        for layer in range(8):
            expected = states[f"decoder.{layer}"][0].numpy()[at].mean(0)
            np.testing.assert_allclose(found[Spot("decoder", layer, place)], expected, rtol=1e-4, atol=2e-5)
    for layer in range(2):
        expected = states[f"encoder.{layer}"][0].numpy()[:n_sound].mean(0)
        np.testing.assert_allclose(found[Spot("audio_encoder", layer, "clip")], expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(found[Spot("adapter", 0, "clip")], found[Spot("decoder", -1, "audio")], rtol=1e-5)
    assert len(found) == 3 * 9 + 3 + 1


def test_targets_may_be_others_than_what_is_asked(tiny_lalm, samples):
    """Here the first and the second half of the clips, which nothing tells apart."""
    halves = ["one"] * 4 + ["two"] * 4
    found = probe(tiny_lalm, samples, stacks=["adapter"], targets=halves, groups=list("abcdabcd"), **HOW)
    assert set(found.frame.predicted) <= {"one", "two"}
    rows = found.frame[found.frame.labels == "true"]
    assert rows.set_index("sample").target[[sample.name for sample in samples]].tolist() == halves
    assert rows.set_index("sample").group[[sample.name for sample in samples]].tolist() == list("abcdabcd")
    assert set(found.frame["stack"]) == {"adapter"}


def test_samples_in_which_one_clip_is_heard_stay_together(tiny_lalm, samples):
    again = swap_audio(samples)
    found = probe(tiny_lalm, [*samples, *again], stacks=["adapter"], **HOW).frame
    heard = {sample.name: sample.name for sample in samples} | {pair.name: pair.heard_clip for pair in again}
    assert (found.group == found["sample"].map(heard)).all()
    rows = found.groupby(["layer", "labels", "seed", "group"], dropna=False)
    assert (rows["sample"].nunique() == 2).all()
    assert (rows.fold.nunique() == 1).all()
    assert probe(tiny_lalm, samples, stacks=["adapter"], **HOW).frame.group.isna().all()


def test_the_table_and_its_picture(probed, tmp_path):
    path = probed.save(tmp_path / "probe.parquet")
    pd.testing.assert_frame_equal(Probe.load(path).to_frame(), probed.to_frame())
    assert repr(probed).startswith("Probe(tiny_lalm_planted, 8 clips, 2 classes, chance 0.500)")
    (ax,) = probed.plot().axes
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    layers = probed.layers()
    assert list(lines["labels"]) == layers.accuracy.tolist()
    assert list(lines["shuffled labels"]) == layers.control.tolist()
    mixed = Probe(pd.concat([probed.frame, probed.frame.assign(C=3.0)]))
    with pytest.raises(DataError, match="more than one C"):
        mixed.layers()


def test_speakers_stay_together(tiny_lalm, samples):
    told = [replace(sample, speaker=f"speaker {n // 2 % 2} {sample.label}") for n, sample in enumerate(samples)]
    how = HOW | {"stacks": ["adapter"], "n_folds": 2}
    found = probe(tiny_lalm, told, by_speaker=True, **how).frame
    expected = probe(tiny_lalm, told, groups=[str(sample.speaker) for sample in told], **how).frame
    pd.testing.assert_frame_equal(found, expected)
    assert found[found.labels == "true"].groupby("group").fold.nunique().tolist() == [1] * 4
    assert {its.speaker for its in make_conflict(told[:1], "gender")} == {told[0].speaker}
    with pytest.raises(DataError, match=r"Who speaks in .* is not known \(8 such clips\)"):
        probe(tiny_lalm, samples, by_speaker=True, **how)
    with pytest.raises(InputError, match="give that, or groups"):
        probe(tiny_lalm, told, by_speaker=True, groups=list("abcdabcd"), **how)
    with pytest.raises(DataError, match="2 folds need as many groups of every class, and 'male' has 1"):
        probe(tiny_lalm, [replace(sample, speaker=sample.label) for sample in samples], by_speaker=True, **how)


def test_what_a_model_cannot_be_probed_for_is_refused(tiny_lalm, samples):
    with pytest.raises(DataError, match="8 clips need as many targets; got 2"):
        probe(tiny_lalm, samples, targets=["a", "b"], **HOW)
    with pytest.raises(InputError, match="Nothing is probed"):
        probe(tiny_lalm, samples, stacks=[], **HOW)
    with pytest.raises(InputError, match="There is no place 'noise'"):
        probe(tiny_lalm, samples, places=["noise"], **HOW)
    with pytest.raises(DataError, match="and 'male' has 4"):
        probe(tiny_lalm, samples, **(HOW | {"n_folds": 5}))
