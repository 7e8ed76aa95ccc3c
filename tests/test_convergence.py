"""Convergence of twins: planted content, cosines by scikit-learn, states by a cache, and a model with a known layer."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from lalm_lens.assets import TINY_LALM_PLANTED
from lalm_lens.assets.clips import write_clips
from lalm_lens.conflict import make_conflict
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.convergence import Convergence, compared, convergence
from lalm_lens.experiments.nearest_tokens import NearestTokens, nearest_tokens
from lalm_lens.loading import from_pretrained
from lalm_lens.similarity import debiased_cka, modality_gap

N, WIDTH, PLANTED = 40, 30, 2
LABELS = ["a", "b", "c", "d"] * (N // 4)
HOW = {"attribute": "gender", "n_permutations": 99, "progress": False}


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, WIDTH))


def table(layers: list[tuple[np.ndarray, np.ndarray]]) -> Convergence:
    items = pd.DataFrame({"sample": [f"{n}.wav" for n in range(N)], "label": LABELS})
    about = {"model": "m", "attribute": "letter", "form": "P3", "framing": "statement", "text_only": "no_audio"}
    frames = [
        pd.concat([items, compared(*both, LABELS, n_permutations=99)], axis="columns").assign(layer=layer, **about)
        for layer, both in enumerate(layers)
    ]
    return Convergence.concat([frame.assign(place="last") for frame in frames])


# --- made-up states ---------------------------------------------------------------------------------------------


def test_what_is_shared_is_found_where_it_is_and_not_before():
    """Both modalities point the same way in all layers, which raw cosines take for likeness."""
    same = 20 * np.ones(WIDTH) / WIDTH**0.5
    meaning = np.eye(WIDTH)[["abcd".index(label) for label in LABELS]] * 4
    layers = [(same + noise(n), same + noise(10 + n)) for n in range(PLANTED)]
    layers += [(same + meaning + noise(n), same + meaning + noise(10 + n)) for n in range(PLANTED, 4)]
    found = table(layers)
    rows = found.layers()
    assert (rows.cosine > 0.8).all()
    assert (rows.mismatched > 0.8).all()
    assert (rows.cka[:PLANTED].abs() < 0.1).all()
    assert (rows.cka_p[:PLANTED] > 0.05).all()
    assert (rows.cka[PLANTED:] > 0.3).all()
    assert (rows.cka_p[PLANTED:] == 0.01).all(), "of 100 pairings the true one alone"
    assert (rows.centred_above_low[PLANTED:] > 0.2).all()
    assert (rows.centred_above_low[:PLANTED] < 0).all()
    for statistic in ("cka", "above", "centred_above"):
        assert found.first_layer(statistic) == PLANTED
    assert found.first_layer("cka", 0.2) == PLANTED
    assert found.first_layer("cka", 0.99) is None
    assert found.first_layer("relative_gap", 0.0) == 0


def test_rows_are_cosines_gap_and_cka_of_the_items():
    audio, text = noise(0) + 1, noise(1) + noise(0)
    rows = compared(audio, text, LABELS, n_permutations=9)
    for name, a, t in (("", audio, text), ("centred_", audio - audio.mean(0), text - text.mean(0))):
        every = cosine_similarity(a, t)
        others = [np.mean([every[i, j] for j in range(N) if LABELS[i] != LABELS[j]]) for i in range(N)]
        assert rows[f"{name}cosine"].tolist() == pytest.approx(every.diagonal().tolist())
        assert rows[f"{name}mismatched"].tolist() == pytest.approx(others)
    assert rows.cka.nunique() == 1
    assert rows.cka[0] == pytest.approx(debiased_cka(audio, text))
    assert (rows.gap[0], rows.spread[0]) == (modality_gap(audio, text).gap, modality_gap(audio, text).spread)
    found = table([(audio, text)]).layers(n_resamples=2000)
    drawn = np.random.default_rng(5).integers(0, N, (2000, N))
    above = (rows.cosine - rows.mismatched).to_numpy()
    assert found.above[0] == pytest.approx(above.mean())
    expected = np.percentile(above[drawn].mean(1), [2.5, 97.5])
    assert [found.above_low[0], found.above_high[0]] == pytest.approx(expected.tolist(), abs=0.01)
    assert found.relative_gap[0] == pytest.approx(rows.gap[0] / rows.spread[0])


def test_where_one_modality_has_one_state_nothing_is_aligned():
    rows = compared(noise(0), np.ones((N, WIDTH)), LABELS)
    assert rows[["cka", "cka_p", "cka_null_95", "centred_cosine", "centred_mismatched"]].isna().all(axis=None)
    assert rows[["cosine", "mismatched", "gap", "spread"]].notna().all(axis=None)
    with pytest.raises(InputError, match="one of another label"):
        compared(noise(0), noise(1), ["a"] * N)


def test_where_one_text_alone_differs_there_is_no_cka():
    """Of 4 clips of one label and 1 of another, texts are two points, and one has a single item."""
    labels = ["a"] * 4 + ["b"]
    text = noise(1)[[0, 0, 0, 0, 1]]
    rows = compared(noise(0)[:5], text, labels, n_permutations=9)
    assert rows[["cka", "cka_p", "cka_null_95"]].isna().all(axis=None)
    assert rows[["cosine", "centred_cosine", "centred_mismatched", "gap"]].notna().all(axis=None)
    three = compared(noise(0)[:5], noise(1)[[0, 0, 0, 1, 1]], ["a"] * 3 + ["b"] * 2, n_permutations=9)
    assert three.notna().all(axis=None)
    with pytest.raises(InputError, match="or one alone differs"):
        debiased_cka(noise(0)[:5], text)


# --- models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    return read_folder(write_clips(tmp_path_factory.mktemp("clips"), "gender", 6, seed=3))


@pytest.fixture(scope="module")
def converged(tiny_lalm, samples) -> Convergence:
    return convergence(tiny_lalm, samples, places=["last", "early"], **HOW)


def test_states_are_those_of_the_two_prompts(tiny_lalm, samples, converged):
    items = make_conflict(samples, "gender", conditions=("audio_only", "text_only"), text_only_states="audio")
    question = Question.about(tiny_lalm, items, "gender", "P3", True)
    states: dict[str, list] = {"audio_only": [], "text_only": []}
    for item in items:
        run = question.run(item)
        assert run.has("audio") == (item.condition == "audio_only")
        assert run.has("statement") == (item.condition == "text_only")
        with torch.no_grad():
            _, cache = tiny_lalm.run_with_cache(run.inputs, names_filter=lambda name: name.endswith("hook_resid_post"))
        layers = [cache["resid_post", layer][0] for layer in (3, 7)]
        states[item.condition].append([[its[-1], its[list(run.region("early"))].mean(0)] for its in layers])
    audio, text = (np.array([[[*map(np.asarray, at)] for at in its] for its in states[name]]) for name in states)
    for n, layer in enumerate((3, 7)):
        for m, place in enumerate(("last", "early")):
            rows = converged.frame[(converged.frame.layer == layer) & (converged.frame.place == place)]
            assert rows["sample"].tolist() == [sample.name for sample in samples]
            expected = compared(audio[:, n, m], text[:, n, m], [sample.label for sample in samples], n_permutations=99)
            for name in expected:
                assert rows[name].tolist() == pytest.approx(expected[name].tolist(), rel=2e-3, abs=1e-4), name
    with pytest.raises(DataError, match="places last, early: name one"):
        converged.first_layer()


def test_twins_are_all_the_same_until_the_layer_that_looks(samples):
    planted = convergence(from_pretrained(TINY_LALM_PLANTED), samples, **HOW)
    layers = planted.layers().set_index("layer")
    assert layers.index.tolist() == list(range(-1, 8))
    assert layers.cosine.loc[:3].tolist() == pytest.approx([1] * 5)
    assert layers.cka.loc[:3].isna().all()
    assert layers.cka.loc[4:].notna().all()
    assert (layers.cosine.loc[4:] < 0.99).all()
    assert planted.first_layer("cosine_low", 0.999) == -1
    assert planted.first_layer("relative_gap", 0.0) == 4


def test_the_table_and_its_picture(converged, tmp_path):
    path = converged.save(tmp_path / "converged.parquet")
    pd.testing.assert_frame_equal(Convergence.load(path).to_frame(), converged.to_frame())
    assert repr(converged).startswith("Convergence(tiny_lalm, 6 items, gender)")
    axes, layers = converged.plot().axes, converged.layers()
    assert len(axes) == 8
    early = layers[layers.place == "early"]
    assert list(axes[4].lines[0].get_ydata()) == early.cosine.tolist()
    np.testing.assert_array_equal(axes[6].lines[1].get_ydata(), early.cka_null_95)
    with pytest.raises(DataError, match="no statistic 'warmth'"):
        converged.first_layer("warmth", 1.0, "last")
    with pytest.raises(DataError, match="Give a threshold"):
        converged.first_layer("gap", place="last")
    with pytest.raises(DataError, match="more than one framing"):
        Convergence(pd.concat([converged.frame, converged.frame.assign(framing="option")])).layers()


def test_a_split_of_all_but_one_is_compared_by_cosines_alone(tiny_lalm, samples):
    male, female = ([its for its in samples if its.label == label] for label in ("male", "female"))
    some = [*male, replace(male[0], name="again.wav"), female[0]]
    rows = convergence(tiny_lalm, some, **HOW).layers(n_resamples=20)
    assert rows.cka.isna().all()
    assert rows.above.notna().all()


def test_too_few_twins_are_refused(tiny_lalm, samples):
    with pytest.raises(DataError, match="4 clips or more, of two labels"):
        convergence(tiny_lalm, samples[:3], **HOW)
    with pytest.raises(DataError, match="4 clips or more, of two labels"):
        convergence(tiny_lalm, [its for its in samples * 2 if its.label == "male"][:3], **HOW)


# --- nearest tokens ---------------------------------------------------------------------------------------------


def test_nearest_tokens_are_those_of_all_cosines_and_logits(tiny_lalm, samples, tmp_path):
    found = nearest_tokens(tiny_lalm, samples[:2], attribute="gender", top_k=20, progress=False)
    question = Question.about(tiny_lalm, samples, "gender", "P3", True)
    run = question.run(samples[1])
    at = list(run.region("audio"))
    with torch.no_grad():
        _, cache = tiny_lalm.run_with_cache(run.inputs)
        for layer in (-1, 2, 7):
            state = (cache["hook_embed"] if layer < 0 else cache["resid_post", layer])[0, at]
            log_p = tiny_lalm.unembed(tiny_lalm.ln_final(state[None]))[0].log_softmax(-1)
            every = {"cosine": torch.tensor(cosine_similarity(state, tiny_lalm.W_E)), "lens": log_p}
            for measure, scores in every.items():
                rows = found.frame[(found.frame["sample"] == samples[1].name) & (found.frame.layer == layer)]
                rows = rows[rows.measure == measure]
                best = scores.topk(20)
                assert rows.token_id.tolist() == best.indices.flatten().tolist()
                assert rows.score.tolist() == pytest.approx(best.values.flatten().tolist(), rel=1e-4, abs=1e-5)
                assert rows.position.unique().tolist() == at
    labels = dict(zip(question.tokens, question.labels, strict=True))
    frame = found.frame
    assert frame.option.isna().tolist() == [token not in labels for token in frame.token_id]
    assert (frame.is_label == (frame.token_id.map(labels) == frame.label)).all()
    assert frame.is_label.any()
    said = frame[(frame.measure == "lens") & (frame.layer == 7)].groupby("sample").is_label.any().mean()
    rows = found.layers(n_resamples=50).set_index(["measure", "layer"])
    assert rows.label["lens", 7] == said
    assert repr(found).startswith("NearestTokens(tiny_lalm, 2 clips, the nearest 20)")
    path = found.save(tmp_path / "nearest.parquet")
    pd.testing.assert_frame_equal(NearestTokens.load(path).to_frame(), found.to_frame())
    with pytest.raises(InputError, match="Name a measure"):
        nearest_tokens(tiny_lalm, samples, attribute="gender", measures=[])
