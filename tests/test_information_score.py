"""Information scores and critical layers: against plain HF and numpy, on a model with a known answer, and published."""

import numpy as np
import pandas as pd
import pytest
import torch
from reference import hf_states
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from lalm_lens import (
    Attribute,
    InformationScore,
    Knockout,
    critical_layer,
    from_pretrained,
    information_score,
    resolution_correlation,
)
from lalm_lens.aggregates import interval, intervals
from lalm_lens.assets import TINY_LALM, TINY_LALM_PLANTED
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.errors import DataError, InputError, PromptError

FORMS = ("P1", "P2", "P3")
PLANTED_BLOCK = 4


@pytest.fixture(scope="module")
def scores(tiny_lalm, folders) -> InformationScore:
    return information_score(tiny_lalm, read_folder(folders["emotion"]), attribute="emotion", progress=False)


def made_up(rights: dict[str, np.ndarray], labels: tuple[str, ...] = ("a", "b"), **columns: object) -> InformationScore:
    """Scores of clips labelled in turn, right where it says so: [sample, layer] for each form."""
    frames = []
    for form, its in rights.items():
        for n, by_layer in enumerate(its):
            true, other = labels[n % len(labels)], labels[(n + 1) % len(labels)]
            frames.append(
                pd.DataFrame(
                    {
                        "form": form,
                        "sample": f"{n}.wav",
                        "label": true,
                        "layer": np.arange(len(by_layer)),
                        "predicted": np.where(by_layer, true, other),
                        "is_right": by_layer,
                        "right_at_end": bool(by_layer[-1]),
                    }
                )
            )
    about = {"model": "m", "attribute": "letter", "n_labels": len(labels), "label_space": False, "norm": True}
    frame = pd.concat(frames).assign(**about, knockout="none", place="last", probability=0.5, **columns)
    return InformationScore.concat([frame])


# --- eq. 2 ------------------------------------------------------------------------------------------------------

PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n{user}<|im_end|>\n<|im_start|>assistant\n{prefix}"
)


def test_predictions_match_plain_hf_from_the_wav_file_on(scores, folders):
    """Prompt, features, states, norm, head, labels and argmax again, with transformers and numpy alone."""
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM, dtype=torch.float32).eval()
    processor, attribute = AutoProcessor.from_pretrained(TINY_LALM), ATTRIBUTES["emotion"]
    asked = {"P1": "", "P2": attribute.question}
    asked["P3"] = f"{attribute.question} Possible options: {', '.join(attribute.labels)}."
    samples, frame = read_folder(folders["emotion"]), scores.to_frame()
    assert len(frame) == len(samples) * len(FORMS) * 2 * 2 * 8
    rights = []
    for sample in samples:
        for form in FORMS:
            text = PROMPT.format(user=asked[form], prefix=attribute.prefix)
            inputs = processor(text=text, audio=sample.waveform.numpy(), sampling_rate=16_000, return_tensors="pt")
            _, states = hf_states(hf, dict(inputs))
            for place, at in (("last", -1), ("penultimate", -2)):
                stack = torch.stack([states[f"decoder.{layer}"][0, at] for layer in range(8)])
                with torch.no_grad():
                    logits = hf.lm_head(hf.model.language_model.norm(stack)).double()
                for space in (False, True):
                    first = [
                        processor.tokenizer.encode(" " * space + label, add_special_tokens=False)[0]
                        for label in attribute.labels
                    ]
                    rows = frame[
                        (frame["sample"] == sample.name)
                        & (frame.form == form)
                        & (frame.place == place)
                        & (frame.label_space == space)
                    ].sort_values("layer")
                    predicted = np.array(attribute.labels)[logits.numpy()[:, first].argmax(-1)]
                    assert rows.predicted.tolist() == predicted.tolist()
                    assert rows.is_right.tolist() == (predicted == sample.label).tolist()
                    p = logits.softmax(-1)[:, first[attribute.labels.index(sample.label)]]
                    assert rows.probability.to_numpy() == pytest.approx(p.numpy(), abs=1e-5)
                    rights.append((form, place, space, predicted == sample.label))
    curves = scores.curves(n_resamples=20)
    for (form, place, space), rows in curves.groupby(["form", "place", "label_space"]):
        own = [right for *key, right in rights if key == [form, place, space]]
        assert rows.score.tolist() == pytest.approx(np.mean(own, axis=0).tolist())
        assert (rows.n == len(samples)).all()
    assert 0 < np.mean([right for *_, right in rights]) < 1


def test_clips_are_split_by_what_the_last_layer_says_at_the_last_position(scores):
    frame = scores.to_frame()
    ends = frame[(frame.layer == 7) & (frame.place == "last")].set_index(["form", "label_space", "sample"]).is_right
    assert 0 < ends.mean() < 1
    keys = pd.MultiIndex.from_frame(frame[["form", "label_space", "sample"]])
    assert frame.right_at_end.tolist() == ends.loc[keys].tolist()
    curves = scores.curves(by_outcome=True, n_resamples=20)
    at_end = curves[(curves.layer == 7) & (curves.place == "last")]
    assert (at_end.score == at_end.right_at_end.astype(float)).all()
    n = at_end.groupby(["form", "label_space"]).n.sum()
    assert (n == frame["sample"].nunique()).all()


# --- eq. 3 and 4 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "n_labels"), [(0.2, 2), (0.2, 8), (0.5, 5)])
def test_the_critical_layer_is_the_papers_weighted_mean(alpha, n_labels):
    scores = np.random.default_rng(n_labels).random((3, 12))
    for curve, found in zip(scores, critical_layer(scores, n_labels, alpha=alpha), strict=True):
        s = [max(0.0, score - (1 + alpha) / n_labels) for score in curve]
        expected = sum(weight * layer for layer, weight in enumerate(s, 1)) / sum(s)
        assert found == pytest.approx(expected)
        from_0 = critical_layer(curve, n_labels, alpha=alpha, layer_base=0)
        assert float(from_0) == pytest.approx(expected - 1)


def test_the_critical_layer_of_chance_is_not_a_number():
    at_threshold = np.array([[0.15, 0.1, 0.15], [0.15, 0.1, 0.16]])
    assert np.isnan(critical_layer(at_threshold, 8)[0])
    assert critical_layer(at_threshold, 8)[1] == pytest.approx(3)
    assert critical_layer(np.array([0.9]), 2) == 1


def test_the_table_averages_prompts_without_what_is_undefined():
    chance = np.tile([[True], [False]], (4, 3))
    late = np.array([[False, True, True]] * 8)
    late[0, 1] = False
    table = made_up({"P1": chance, "P3": late}).table(n_resamples=50).iloc[0]
    weights = np.array([0, 7 / 8 - 0.6, 1 - 0.6])
    expected = (weights * [1, 2, 3]).sum() / weights.sum()
    assert table.critical_layer == pytest.approx(expected)
    assert table.accuracy == pytest.approx((0.5 + 1) / 2)
    assert (table.n, table.n_defined, table.forms) == (8, 1, "P1, P3")
    points = made_up({"P1": chance, "P3": late}).points(n_resamples=50, layer_base=0).set_index("form")
    assert np.isnan(points.critical_layer["P1"])
    assert points.critical_layer["P3"] == pytest.approx(expected - 1)
    assert points.accuracy.to_dict() == {"P1": 0.5, "P3": 1.0}
    assert (points.accuracy_low["P1"], points.accuracy_high["P3"]) < (0.5, 1.0 + 1e-9)


# --- intervals ------------------------------------------------------------------------------------------------------


def test_intervals_of_means_are_those_of_each_mean():
    values = np.random.default_rng(0).random((40, 3))
    low, high = intervals(values, lambda means: means, 300, seed=7)
    for n in range(3):
        assert (low[n], high[n]) == pytest.approx(interval(values[:, n], 300, seed=7))
    one = intervals(values[:1], lambda means: means[..., 0], 300, seed=7)
    assert np.isnan(one).all()


def test_a_critical_layers_interval_is_that_of_clips_drawn_again():
    rng = np.random.default_rng(1)
    rights = rng.random((60, 6)) < np.linspace(0.4, 0.95, 6)
    point = made_up({"P2": rights}).points(n_resamples=400, seed=3).iloc[0]
    rights = rights[sorted(range(60), key=lambda n: f"{n}.wav")]
    rng = np.random.default_rng(3)
    drawn = [rights[rng.integers(0, 60, 60)].mean(0) for _ in range(400)]
    layers = [float(critical_layer(scores, 2)) for scores in drawn]
    assert [point.critical_low, point.critical_high] == pytest.approx(np.percentile(layers, [2.5, 97.5]).tolist())
    assert point.critical_low < point.critical_layer < point.critical_high
    accuracy = np.percentile([scores[-1] for scores in drawn], [2.5, 97.5])
    assert [point.accuracy_low, point.accuracy_high] == pytest.approx(accuracy.tolist())


def test_labels_that_have_changed_places_score_as_chance(scores):
    n, labels = 500, tuple("abcde")
    rights = np.random.default_rng(0).random((n, 4)) < [0.2, 0.5, 0.9, 1.0]
    whole = made_up({"P3": rights}, labels)
    shuffled = whole.shuffled(seed=1)
    curve = shuffled.curves(n_resamples=400)
    assert ((curve.low < 0.2) & (curve.high > 0.2)).all()
    assert curve.high.max() < 0.3
    assert sorted(shuffled.frame.drop_duplicates("sample").label) == sorted(labels * (n // 5))
    columns = ["sample", "layer", "predicted"]
    pd.testing.assert_frame_equal(*(its.frame[columns].sort_values(columns[:2]) for its in (whole, shuffled)))
    ends = shuffled.frame[shuffled.frame.layer == 3]
    assert (ends.is_right == ends.right_at_end).all()
    assert (shuffled.frame.is_right == (shuffled.frame.predicted == shuffled.frame.label)).all()


# --- known answers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted_scores(tmp_path_factory):
    """A clip of each of five emotions; the last position can see the audio in block 4 alone."""
    model = from_pretrained(TINY_LALM_PLANTED)
    clips = read_folder(write_clips(tmp_path_factory.mktemp("clips"), "emotion", 5, seed=5))

    def score(*knocked_out: int, forms: tuple[str, ...] = ("P3",)) -> InformationScore:
        knockouts = [Knockout(knocked_out, (-1,), "audio")] if knocked_out else []
        how = {"label_spaces": (True,), "knockouts": knockouts, "progress": False}
        return information_score(model, clips, attribute="emotion", forms=forms, **how)

    return score


def at_last(scores: InformationScore) -> pd.Series:
    curves = scores.curves(n_resamples=20)
    return curves[curves.place == "last"].set_index(["form", "layer"]).score


def test_planted_information_steps_up_at_the_planted_layer(planted_scores):
    scores = planted_scores(forms=FORMS)
    for form in FORMS:
        curve = at_last(scores)[form]
        before, after = curve[curve.index < PLANTED_BLOCK], curve[curve.index >= PLANTED_BLOCK]
        assert before.tolist() == [0.2] * PLANTED_BLOCK  # one of five, the same for all clips
        assert (after > 0.9).all()
    points = scores.points(n_resamples=20)
    layers = points[points.place == "last"].critical_layer
    assert ((layers > PLANTED_BLOCK + 1) & (layers <= 8)).all()


def test_planted_knockout_of_the_planted_layer_alone_leaves_chance(planted_scores):
    whole = at_last(planted_scores())
    for layer in range(8):
        curve = at_last(planted_scores(layer))
        if layer == PLANTED_BLOCK:
            assert curve.tolist() == [0.2] * 8
        else:
            assert curve.tolist() == whole.tolist()


# --- Table III ----------------------------------------------------------------------------------------------------

TABLE_III = [  # arXiv 2506.05140: r and p as printed; 4 attributes x 3 prompts, without gender 3 x 3
    ("DeSTA2", 12, -0.748, "5.19e-3"),
    ("Qwen", 12, -0.413, "1.83e-1"),
    ("Qwen without gender", 9, -0.924, "3.68e-4"),
    ("Qwen2", 12, -0.490, "1.06e-1"),
    ("Qwen2 without gender", 9, -0.879, "1.82e-3"),
]


def points_with(r: float, n: int) -> pd.DataFrame:
    """Points whose correlation is exactly r."""
    x, y = np.random.default_rng(n).standard_normal((2, n))
    x = (x - x.mean()) / np.linalg.norm(x - x.mean())
    y = y - y.mean() - ((y - y.mean()) @ x) * x
    y = r * x + (1 - r**2) ** 0.5 * y / np.linalg.norm(y)
    return pd.DataFrame({"attribute": [f"a{k // 3}" for k in range(n)], "critical_layer": 25 + x, "accuracy": 0.7 + y})


@pytest.mark.parametrize(("name", "n", "r", "p"), TABLE_III, ids=[row[0] for row in TABLE_III])
def test_published_p_values_are_those_of_the_published_correlations(name, n, r, p):
    found = [resolution_correlation(points_with(r + error, n)).iloc[0] for error in (-5e-4, 0, 5e-4)]
    assert [row.r for row in found] == pytest.approx([r - 5e-4, r, r + 5e-4], abs=1e-12)
    assert (found[1].n, found[1].n_dropped) == (n, 0)
    half = 0.5 * 10.0 ** (int(p.partition("e")[2]) - 2)  # of the last printed digit
    low, high = sorted((found[0].p, found[2].p))
    assert low - half < float(p) < high + half


def test_a_correlation_drops_what_is_undefined_and_tells_how_much():
    points = points_with(-0.6, 12)
    points.loc[[1, 7], "critical_layer"] = np.nan
    found = resolution_correlation(points, without=["a0", "a3"]).set_index("without")
    for left_out, n in (("", 10), ("a0", 8), ("a3", 7)):
        rows = points[points.attribute != left_out].dropna()
        row = found.loc[left_out]
        assert row.n == n == len(rows)
        assert row.n_dropped == 12 - 3 * bool(left_out) - n
        assert row.r == pytest.approx(np.corrcoef(rows.accuracy, rows.critical_layer)[0, 1])
    few = resolution_correlation(points[:3]).iloc[0]
    assert few.n == 2
    assert np.isnan(few.r)
    assert np.isnan(few.p)
    level = resolution_correlation(points.assign(accuracy=1.0)).iloc[0]
    assert np.isnan(level.r)
    with pytest.raises(DataError, match="no points of a9, only of a0"):
        resolution_correlation(points, without=["a9"])


def test_points_of_a_table_are_correlated_by_place_and_label_space(scores):
    found = resolution_correlation(scores.points(n_resamples=20))
    assert found[["label_space", "place"]].to_numpy().tolist() == [
        [False, "last"],
        [True, "last"],
        [False, "penultimate"],
        [True, "penultimate"],
    ]
    assert (found.n + found.n_dropped == 3).all()


# --- the table ----------------------------------------------------------------------------------------------------


def test_of_equal_logits_the_first_label_is_predicted(folders):
    level = from_pretrained(TINY_LALM)
    level.unembed.linear.weight.data.zero_()
    found = information_score(level, read_folder(folders["emotion"]), attribute="emotion", forms=["P2"], progress=False)
    assert set(found.frame.predicted) == {"angry"}
    assert (found.frame.is_right == (found.frame.label == "angry")).all()


def test_an_answer_of_one_word_has_no_penultimate(tiny_lalm, folders):
    own = ATTRIBUTES["emotion"]
    short = Attribute("mood", own.question, own.labels, "Emotion:")
    found = information_score(tiny_lalm, read_folder(folders["emotion"]), attribute=short, forms=["P2"], progress=False)
    assert set(found.frame.place) == {"last"}


def test_both_ways_to_score_a_label_are_printed(scores):
    printed = repr(scores)
    assert printed.startswith("InformationScore(tiny_lalm, 4 clips)")
    assert all(name in printed for name in ("label_space", "critical_layer", "accuracy_low", "n_defined"))
    assert printed.index("False") < printed.index("True")


def test_scores_are_saved_and_loaded(scores, tmp_path):
    path = scores.save(tmp_path / "scores.parquet")
    pd.testing.assert_frame_equal(InformationScore.load(path).to_frame(), scores.to_frame())


def test_what_cannot_be_scored_is_refused(tiny_lalm, folders, scores):
    samples = read_folder(folders["emotion"])

    def score(clips=samples, **how):
        information_score(tiny_lalm, clips, **{"attribute": "emotion", "progress": False, **how})

    with pytest.raises(PromptError, match=r"begin with the same token 'c'.*score them with the space"):
        score(read_folder(folders["animal"]), attribute="animal")
    with pytest.raises(PromptError, match="not an option of emotion"):
        score([Sample("a.wav", "purple", samples[0].waveform)])
    with pytest.raises(PromptError, match="two labels or more"):
        score(attribute=Attribute("x", "?", ("angry",), "It is"))
    with pytest.raises(InputError, match="Nothing is scored"):
        score(forms=())
    with pytest.raises(DataError, match="nothing to trace"):
        score([])
    frame = scores.to_frame()
    gone = frame[(frame["sample"] != samples[0].name) | (frame.form != "P2")]
    with pytest.raises(DataError, match="missing in one of the prompts"):
        InformationScore(gone).table()
    with pytest.raises(DataError, match="in the table twice"):
        InformationScore(pd.concat([frame, frame])).points()


# --- pictures -----------------------------------------------------------------------------------------------------


def test_pictures_show_the_curves_of_the_first_label_space(scores, planted_scores):
    curves = scores.curves()
    ours = curves[~curves.label_space & (curves.place == "last")]
    (ax,) = scores.plot("forms").axes
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert list(lines) == ["P1", "P2", "P3", "chance"]
    for form in FORMS:
        assert list(lines[form]) == pytest.approx(ours[ours.form == form].score.tolist())
    assert list(lines["chance"]) == [0.2, 0.2]
    assert ax.get_title() == "emotion\n(n = 4)"
    title = scores.plot("forms").get_suptitle()
    assert title == "tiny_lalm: P1, P2, P3, first tokens of labels without the space before them"
    outcomes = scores.plot("outcomes")
    (ax,) = outcomes.axes
    ends = scores.frame[~scores.frame.label_space & (scores.frame.form == "P3")].drop_duplicates("sample")
    n_wrong = (~ends.right_at_end).sum()
    assert f"{n_wrong} wrong at the end" in ax.get_title()
    assert {line.get_label() for line in ax.lines} >= {"wrong at the end", "chance"}
    assert "tiny_lalm: P3, " in outcomes.get_suptitle()
    both = InformationScore.concat([planted_scores().frame, planted_scores(4).frame])
    (ax,) = both.plot("places").axes
    lines = {line.get_label().replace("\n", " "): list(line.get_ydata()) for line in ax.lines}
    assert list(lines) == ["last", "penultimate", "last, -1 without audio, layers 4", "chance"]
    assert lines["last"] == pytest.approx(at_last(planted_scores()).tolist())
    assert lines["last, -1 without audio, layers 4"] == pytest.approx([0.2] * 8)
    planted = planted_scores().frame  # all are right at the end, so that a panel has one line
    mixed = pd.concat([scores.frame, planted.assign(attribute="other", model="tiny_lalm", label_space=False)])
    legend = InformationScore.concat([mixed]).plot("outcomes").axes[1].get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert names[-1] == "chance"
    assert {"wrong at the end", "right at the end"} <= set(names)
    with pytest.raises(DataError, match="more than one model: tiny_lalm; other"):
        InformationScore.concat([scores.frame, scores.frame.assign(model="other")]).plot()
    with pytest.raises(DataError, match="nothing to show as forms"):
        planted_scores(4).plot("forms")
