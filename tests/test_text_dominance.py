"""Text dominance: answers against plain HF, and every statistic against statsmodels, scikit-learn or a direct count."""

import csv
import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from reference import chirps
from sklearn.metrics import accuracy_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint, proportion_effectsize
from transformers import Qwen2AudioForConditionalGeneration

from lalm_lens.alme import read_alme
from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips
from lalm_lens.conflict import make_conflict
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.errors import AudioError, DataError, InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.attention_knockout import attention_knockout
from lalm_lens.experiments.audio_sensitivity import HEARD, AudioSensitivity, audio_sensitivity
from lalm_lens.experiments.lens import Words
from lalm_lens.experiments.text_dominance import TextDominance, answer_of, compare_dominance, text_dominance
from lalm_lens.interventions import Knockout
from lalm_lens.proportions import McNemar, change_interval, cohens_h, wilson

QUIET = {"progress": False}
ORDERS = ("audio_first", "text_first")


def test_wilson_intervals_are_those_of_statsmodels():
    for n in (1, 2, 7, 20):
        for hits in range(n + 1):
            np.testing.assert_allclose(wilson(hits, n), proportion_confint(hits, n, method="wilson"), atol=1e-12)
    assert np.isnan(wilson(0, 0)).all()


def test_mcnemar_is_that_of_statsmodels():
    for lost, won in product(range(0, 40, 3), range(0, 40, 7)):
        table, ours = [[5, lost], [won, 7]], McNemar(lost, won)
        assert ours.exact == pytest.approx(mcnemar(table, exact=True).pvalue)
        if lost != won:  # where statsmodels' correction would make the difference negative, and then square it
            theirs = mcnemar(table, exact=False, correction=True)
            assert (ours.statistic, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue))
    same = McNemar(4, 4)
    assert (same.statistic, same.p, same.exact) == (0, 1, 1)
    nothing = McNemar(0, 0)
    assert nothing.exact == 1
    assert np.isnan([nothing.statistic, nothing.p]).all()


def test_cohens_h_is_that_of_statsmodels():
    for before, after in product(np.linspace(0, 1, 9), repeat=2):
        assert cohens_h(before, after) == pytest.approx(proportion_effectsize(after, before))
    with pytest.raises(DataError, match=r"between 0 and 1; got 0\.5 and 1\.2"):
        cohens_h(0.5, 1.2)


# --- what a model answers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items(folders):
    samples = read_folder(folders["animal"])[:2]
    return make_conflict(samples, "animal", order=ORDERS, text_only="silence", seed=2)


@pytest.fixture(scope="module")
def answered(tiny_lalm, items):
    return text_dominance(tiny_lalm, items, **QUIET)


def test_answers_are_those_of_hf(tiny_lalm, items, answered):
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM, dtype=torch.float32).eval()
    question = Question.about(tiny_lalm, items, "animal", "P3", True)
    labels, tokens = np.array(question.labels), question.tokens
    assert answered.frame["sample"].tolist() == [item.name for item in items]
    follows = set()
    for item, row in zip(items, answered.frame.itertuples(), strict=True):
        with torch.no_grad():
            logits = hf(**question.run(item).inputs.to_hf("feature_attention_mask")).logits[0, -1]
        p = dict(zip(labels, logits.softmax(-1)[tokens].tolist(), strict=True))
        among = dict(zip(labels, logits[tokens].softmax(-1).tolist(), strict=True))
        chosen = labels[int(logits[tokens].argmax())]
        assert (row.answer, row.right) == (chosen, chosen == item.label)
        for side, label in (("audio", item.audio_label), ("text", item.text_label)):
            ours = getattr(row, f"p_{side}"), getattr(row, f"label_p_{side}")
            theirs = (p[label], among[label]) if label else (np.nan, np.nan)
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-7)
        sides = [side for side in ("audio", "text") if getattr(item, f"{side}_label") == chosen]
        assert row.follows == ("both" if len(sides) == 2 else sides[0] if sides else "other")
        follows.add(row.follows)
    assert follows >= {"audio", "both", "other"}  # other: to silence


def test_plain_clips_become_conflicts(tiny_lalm, folders):
    samples = read_folder(folders["gender"])[:2]
    table = text_dominance(tiny_lalm, samples, attribute="gender", **QUIET)
    pd.testing.assert_frame_equal(
        table.frame, text_dominance(tiny_lalm, make_conflict(samples, "gender"), attribute="gender", **QUIET).frame
    )
    assert repr(table).startswith("TextDominance(tiny_lalm, 2 audio_only, 2 text_only, 2 aligned, 2 conflict)")
    with pytest.raises(InputError, match="Name an attribute, or give items of make_conflict"):
        text_dominance(tiny_lalm, samples, **QUIET)
    with pytest.raises(InputError, match="The items ask for gender, not for animal"):
        text_dominance(tiny_lalm, make_conflict(samples, "gender"), attribute="animal", **QUIET)


@pytest.mark.numbers
def test_knockouts_are_those_of_attention_knockout(tiny_lalm, items, answered):
    conflict = [item for item in items if item.condition == "conflict"]
    every = tuple(range(tiny_lalm.decoder_cfg.n_layers))
    without = text_dominance(tiny_lalm, conflict, knockouts=[Knockout(every, (-1,), "audio")], **QUIET)
    theirs = attention_knockout(tiny_lalm, conflict, attribute="animal", layers=["all"], **QUIET)
    np.testing.assert_allclose(without.frame.p_audio, theirs.frame.p_after, rtol=1e-4)
    assert (without.frame.knockout == "last without audio, layers 0 to 7").all() or (
        without.frame.knockout == "-1 without audio, layers 0 to 7"
    ).all()
    first = [TextDominance(its.frame[its.frame.order == "audio_first"]) for its in (answered, without)]
    change = compare_dominance(*first, outcome="right")
    right = [its.frame[its.frame.condition == "conflict"].right.mean() for its in first]
    assert [change.before, change.after] == right
    assert change.n == 2


def test_an_answer_outside_of_the_labels_is_another(tiny_lalm, items):
    question = Question.about(tiny_lalm, items, "animal", "P3", True)

    def words(rank: int) -> Words:
        numbers = torch.arange(len(question.labels), dtype=torch.float32)
        return Words(torch.tensor(question.tokens), numbers, numbers - 20, (rank + len(numbers) - 1 - numbers).long())

    assert answer_of(question, words(0), "vocab") == question.labels[-1]
    assert answer_of(question, words(1), "vocab") is None
    assert answer_of(question, words(1), "labels") == question.labels[-1]


# --- counts -------------------------------------------------------------------------------------------------


def table_of(n: int, seed: int, **settings: str) -> TextDominance:
    """Answers drawn by chance to `n` clips in each condition, framing and order."""
    rng = np.random.default_rng(seed)
    clip = Sample("", "a", chirps([0.1])[0])
    attribute = "animal"
    samples = [replace(clip, name=f"{k}.wav", label="dog" if k % 2 else "cat") for k in range(n)]
    made = make_conflict(samples, attribute, framing=["statement", "option"], order=ORDERS)
    answers = rng.choice(["dog", "cat", "pig", "hen"], len(made))
    # half of the conflicting clips follow the text
    answers = [
        item.text_label if item.text_label and rng.random() < 0.5 else answer
        for item, answer in zip(made, answers, strict=True)
    ]
    rows = [
        {
            "model": "a model",
            "attribute": attribute,
            "sample": item.name,
            "label": item.label,
            "form": "P3",
            "question": "?",
            "labels": "dog, cat",
            "prefix": "It is",
            "label_space": True,
            **item.columns,
            "predict": "labels",
            "knockout": "none",
            "answer": answer,
            "right": answer == item.label,
            "follows": {
                (True, True): "both",
                (True, False): "audio",
                (False, True): "text",
                (False, False): "other",
            }[answer == item.audio_label, answer == item.text_label],
            **dict.fromkeys(("p_audio", "p_text", "label_p_audio", "label_p_text"), 0.5),
            **settings,
        }
        for item, answer in zip(made, answers, strict=True)
    ]
    return TextDominance.concat([pd.DataFrame(rows)])


def test_rates_are_counted():
    table = table_of(40, seed=1)
    found = table.tdr().set_index(["framing", "order"])
    assert len(found) == 4
    for (framing, order), row in found.iterrows():
        rows = [its for its in table.frame.to_dict("records") if its["framing"] == framing]
        alone = {its["clip"]: its["right"] for its in rows if its["condition"] == "text_only"}
        mine = [its for its in rows if its["condition"] == "conflict" and its["order"] == order]
        n = {name: sum(its["follows"] == name for its in mine) for name in ("text", "audio", "other")}
        assert {name: row[f"n_{name}"] for name in n} == n
        assert sum(n.values()) == row.n == 40
        assert min(n.values()) > 0
        clear = n["text"] + n["audio"]
        assert row.tdr == n["text"] / clear
        assert (row.tdr_low, row.tdr_high) == pytest.approx(proportion_confint(n["text"], clear, method="wilson"))
        for name in n:
            low, high = proportion_confint(n[name], 40, method="wilson")
            assert (row[f"{name}_rate"], row[f"{name}_rate_low"]) == pytest.approx((n[name] / 40, low))
            assert row[f"{name}_rate_high"] == pytest.approx(high)
        valid = [its["follows"] for its in mine if alone[its["clip"]] and its["follows"] != "other"]
        assert 0 < len(valid) < clear
        assert row.n_validated == len(valid)
        assert row.tdr_text_validated == pytest.approx(valid.count("text") / len(valid))
    by_label = table.tdr([*("framing", "strength", "order"), "audio_label"])
    assert by_label.n.sum() == 160
    accuracies = table.accuracies()
    for row in accuracies.itertuples():
        rows = table.frame[table.frame.condition == row.condition]
        rows = rows if row.condition == "audio_only" else rows[rows.framing == row.framing]
        rows = rows if row.condition in ("audio_only", "text_only") else rows[rows.order == row.order]
        assert row.accuracy == pytest.approx(accuracy_score(rows.label, rows.answer))
        assert row.n == len(rows) == 40
    assert len(accuracies) == 1 + 2 + 4 + 4


def test_a_table_that_is_mixed_or_repeated_has_no_rates():
    table = table_of(4, seed=1)
    with pytest.raises(DataError, match="more than one framing: statement; option"):
        table.tdr(["attribute"])
    two = TextDominance.concat([table.frame, table_of(4, 2, form="P2").frame])
    with pytest.raises(DataError, match="more than one form: P3; P2"):
        two.tdr()
    assert len(two.tdr(["form", "framing", "strength", "order"])) == 8
    with pytest.raises(DataError, match=r"items, as .* are in the table twice"):
        TextDominance.concat([table.frame, table.frame]).tdr()
    with pytest.raises(DataError, match="more than one order: audio_first; text_first"):
        table.accuracies(["condition", "framing"])
    with pytest.raises(DataError, match=r"not by \['nothing'\]"):
        table.tdr(["nothing"])
    with pytest.raises(DataError, match="No item is in conflict"):
        TextDominance(table.frame[table.frame.condition == "aligned"]).tdr()


def test_without_a_text_alone_nothing_is_validated():
    table = table_of(4, seed=1)
    bare = TextDominance(table.frame[table.frame.condition == "conflict"]).tdr()
    assert bare.tdr_text_validated.isna().all()
    assert (bare.n_validated == 0).all()


@pytest.mark.parametrize("outcome", ["text", "right"])
def test_before_and_after_are_compared_pair_by_pair(outcome):
    before, after = (
        TextDominance(its.frame[(its.frame.framing == framing) & (its.frame.order == "audio_first")])
        for its, framing in ((table_of(60, 3), "statement"), (table_of(60, 4), "option"))
    )
    found = compare_dominance(before, after, outcome=outcome)
    rows = [its.frame[its.frame.condition == "conflict"].sort_values("clip") for its in (before, after)]
    hits = np.array([its.follows == "text" if outcome == "text" else its.right for its in rows])
    clear = np.array([its.follows.isin(["text", "audio"]) if outcome == "text" else its.right >= 0 for its in rows])
    shares = hits.sum(1) / clear.sum(1)
    assert (found.before, found.after) == pytest.approx(tuple(shares))
    assert found.difference == pytest.approx(shares[1] - shares[0])
    assert found.h == pytest.approx(proportion_effectsize(shares[1], shares[0]))
    both = clear.all(0)
    lost, won = ((hits[0] > hits[1]) & both).sum(), ((hits[0] < hits[1]) & both).sum()
    assert (found.mcnemar.lost, found.mcnemar.won) == (lost, won)
    assert (found.n, found.n_unclear) == (both.sum(), 60 - both.sum())
    assert found.n_unclear > 0 or outcome == "right"
    drawn = np.random.default_rng(9).integers(0, 60, (4000, 60))
    resampled = hits[:, drawn].sum(-1) / clear[:, drawn].sum(-1)
    theirs = np.percentile(resampled[1] - resampled[0], [2.5, 97.5])
    np.testing.assert_allclose((found.low, found.high), theirs, atol=0.03)
    assert (found.n_clear_before, found.n_clear_after) == tuple(clear.sum(1))
    assert ("TDR" if outcome == "text" else "accuracy") in repr(found)


def pairs_of(**counts: int) -> tuple[np.ndarray, np.ndarray]:
    """Which clips follow the text, and which are clear: t, a and o for text, audio and other, before and after."""
    said = np.array([list(its) for its, n in counts.items() for _ in range(n)])
    return said == "t", said != "o"


def test_an_interval_of_few_clear_answers_is_newcombes():
    """That of shares without a common clip by statsmodels, that of pairs as Newcombe writes it, with phi."""
    low, high = change_interval(*pairs_of(to=2, ao=1, ot=1, oa=4, oo=9))
    assert (-high, -low) == pytest.approx(confint_proportions_2indep(2, 3, 1, 5, method="newcomb"))
    e, f, g, h = 9, 1, 5, 4  # text in both, before alone, after alone, neither
    low, high = change_interval(*pairs_of(tt=e, ta=f, at=g, aa=h, oo=3))
    (l1, u1), (l2, u2) = (proportion_confint(k, 19, method="wilson") for k in (e + f, e + g))
    p, q = (e + f) / 19, (e + g) / 19
    phi = (e * h - f * g) / ((e + f) * (g + h) * (e + g) * (f + h)) ** 0.5
    below = ((q - l2) ** 2 - 2 * phi * (q - l2) * (u1 - p) + (u1 - p) ** 2) ** 0.5
    above = ((u2 - q) ** 2 - 2 * phi * (u2 - q) * (p - l1) + (p - l1) ** 2) ** 0.5
    assert (low, high) == pytest.approx((q - p - below, q - p + above))
    low, high = change_interval(*pairs_of(ta=3, oo=20))
    assert -1 <= low < -0.5 < high < 0


def test_few_clear_answers_have_an_interval_and_none_has_not():
    table = table_of(12, seed=1)
    rows = table.frame[(table.frame.framing == "option") & (table.frame.order == "text_first")]
    rows = rows[rows.condition == "conflict"].reset_index(drop=True)
    one, none = (TextDominance(rows.assign(follows=["text"] * n + ["other"] * (12 - n))) for n in (1, 0))
    few = compare_dominance(TextDominance(rows.assign(follows=["audio"] + ["other"] * 11)), one)
    assert (few.difference, few.n_clear_before, few.n_clear_after) == (1, 1, 1)
    assert -1 < few.low < few.difference <= few.high
    lost = compare_dominance(one, none)
    assert (lost.n_clear_before, lost.n_clear_after) == (1, 0)
    assert np.isnan([lost.after, lost.difference, lost.low, lost.high, lost.h]).all()
    assert "1 and 0 answers" in repr(lost)


def test_what_is_not_paired_is_not_compared():
    table = table_of(6, seed=1)
    one = TextDominance(table.frame[(table.frame.framing == "option") & (table.frame.order == "text_first")])
    assert compare_dominance(one, one).difference == 0
    with pytest.raises(DataError, match="The table after has 24 items in the condition conflict, 18 of them twice"):
        compare_dominance(one, table)
    with pytest.raises(
        DataError, match="Only 5 clips are in both tables with the same labels, of 5 before and 6 after"
    ):
        compare_dominance(TextDominance(one.frame[one.frame["clip"] != "3.wav"]), one)
    with pytest.raises(DataError, match="has 0 items in the condition text_only"):
        compare_dominance(one, one, condition="text_only")


def test_a_table_is_saved_and_drawn(tmp_path):
    table = TextDominance.concat([table_of(12, seed=1).frame, table_of(12, seed=2, attribute="other").frame])
    pd.testing.assert_frame_equal(TextDominance.load(table.save(tmp_path / "table.parquet")).frame, table.frame)
    figure = table.plot()
    assert len(figure.axes) == 4
    left, right = figure.axes[:2]
    assert [label.get_text() for label in left.get_yticklabels()] == [
        f"{framing}, {order}" for framing in ("statement", "option") for order in ("audio first", "text first")
    ]
    rates = table.tdr().query("attribute == 'animal'")
    widths = [[bar.get_width() for bar in container] for container in right.containers]
    np.testing.assert_allclose(widths, rates[["audio_rate", "text_rate", "other_rate"]].to_numpy().T)
    drawn = np.concatenate([container.lines[0].get_xdata() for container in left.containers])
    np.testing.assert_allclose(sorted(drawn), sorted(rates.tdr))
    assert "0." in repr(table)


@pytest.mark.numbers
def test_the_snippets_of_the_page_run(tmp_path, monkeypatch):
    page = Path(__file__).parent.parent / "docs" / "conflict.md"
    monkeypatch.chdir(tmp_path)
    write_clips(tmp_path / "clips" / "gender", "gender", 2, seed=3)
    names: dict = {"folder": TINY_LALM}
    first, second, third = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(first, names)
    assert (tmp_path / "gender.png").is_file()
    assert set(names["table"].tdr().framing) == {"statement", "transcript"}
    exec(second, names)
    exec(third, names)
    assert names["found"].verdict()["verdict"] == "undecided"  # of two clips
    assert (tmp_path / "suppression.png").is_file()


# --- audio sensitivity --------------------------------------------------------------------------------------


def test_audio_sensitivity_hears_the_clip_silence_and_another(tiny_lalm, folders):
    samples = read_folder(folders["animal"])
    table = audio_sensitivity(tiny_lalm, samples, attribute="animal", seed=5, **QUIET)
    label_of = {sample.name: sample.label for sample in samples}
    for name, rows in table.frame.groupby("heard"):
        assert len(rows) == len(samples)
        clips = dict(zip(rows["sample"], rows.heard_clip, strict=True))
        if name == "original":
            assert all(clip == sample for sample, clip in clips.items())
        elif name == "silence":
            assert set(clips.values()) == {"silence"}
            assert rows.answer.nunique() == 1 or len({len(sample.waveform) for sample in samples}) > 1
        else:
            assert all(label_of[clip] != label_of[sample] for sample, clip in clips.items())
    (row,) = table.summary().itertuples()
    accuracy = {name: accuracy_score(its.label, its.answer) for name, its in table.frame.groupby("heard")}
    assert {name: getattr(row, f"a_{name}") for name in HEARD} == pytest.approx(accuracy)
    expected = accuracy["original"] - (accuracy["silence"] + accuracy["mismatched"]) / 2
    assert row.sensitivity == pytest.approx(expected)
    assert row.sensitivity > 0.5
    low, high = proportion_confint(round(accuracy["original"] * 4), 4, method="wilson")
    assert (row.a_original_low, row.a_original_high) == pytest.approx((low, high))
    assert "AudioSensitivity(tiny_lalm, 4 clips)" in repr(table)
    with pytest.raises(DataError, match="There is no clip to replace in"):
        audio_sensitivity(tiny_lalm, make_conflict(samples, "animal"), attribute="animal", **QUIET)


def test_the_interval_of_sensitivity_draws_clips_with_their_three_runs():
    rng = np.random.default_rng(0)
    right = rng.random((50, 3)) < [0.8, 0.3, 0.2]
    settings = {"model": "m", "attribute": "a", "form": "P3", "label_space": True, "predict": "labels", "seed": 0}
    rows = [
        {**settings, "sample": f"{n}", "heard": name, "right": bool(right[n, k])}
        for n in range(50)
        for k, name in enumerate(HEARD)
    ]
    frame = pd.DataFrame(rows)
    columns = {**dict.fromkeys(AudioSensitivity.COLUMNS), **frame}
    table = AudioSensitivity(pd.DataFrame({name: columns[name] for name in AudioSensitivity.COLUMNS}))
    (row,) = table.summary(n_resamples=4000).itertuples()
    drawn = right[rng.integers(0, 50, (4000, 50))].mean(1)
    theirs = drawn[:, 0] - drawn[:, 1:].mean(1)
    assert row.sensitivity == pytest.approx(right[:, 0].mean() - right[:, 1:].mean())
    np.testing.assert_allclose((row.low, row.high), np.percentile(theirs, [2.5, 97.5]), atol=0.02)
    with pytest.raises(DataError, match="Some clips lack one of their three runs"):
        AudioSensitivity(table.frame[1:]).summary()


# --- files like ALME's --------------------------------------------------------------------------------------

STIMULUS = {
    "stimulus_id": "one",
    "audio_path": "one.wav",
    "language": "EN",
    "ref_text": "She has two cats.",
    "conflict_text": "She has nine cats.",
    "question": {
        "question_text": "How many cats has she?",
        "choices": ["nine", "two"],
        "correct_answer": "two",
        "flip_type": "number_swap",
    },
}


@pytest.fixture
def alme(tmp_path):
    for name in ("one.wav", "two.wav"):
        soundfile.write(tmp_path / name, chirps([0.4])[0].numpy(), 16_000)

    def write(*stimuli: dict, name: str = "stimuli.jsonl"):
        path = tmp_path / name
        if name.endswith(".csv"):
            flat = [{**its, **{f"question.{key}": value for key, value in its["question"].items()}} for its in stimuli]
            for its in flat:
                del its["question"]
                its["question.choices"] = json.dumps(its["question.choices"])
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(flat[0]))
                writer.writeheader()
                writer.writerows(flat)
        else:
            path.write_text("\n".join(map(json.dumps, stimuli)) + "\n", encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("name", ["stimuli.jsonl", "stimuli.csv"])
def test_stimuli_are_read(tiny_lalm, alme, tmp_path, name):
    other = {**STIMULUS, "stimulus_id": "two", "audio_path": "two.wav"}
    items = read_alme(alme(STIMULUS, other, name=name), tmp_path)
    assert [item.source.name for item in items] == ["one"] * 4 + ["two"] * 4
    said = {item.condition: (item.label, item.text_label, str(item.statement)) for item in items[:4]}
    true, false = (f'Transcript of the audio: "She has {number} cats."' for number in ("two", "nine"))
    assert said == {
        "audio_only": ("two", None, "None"),
        "text_only": ("two", "two", true),
        "aligned": ("two", "two", true),
        "conflict": ("two", "nine", false),
    }
    assert {piece.text for piece in items[3].statement.pieces if piece.label == "nine"} == {" nine"}
    assert items[0].attribute.name == "number_swap"
    assert items[0].attribute.labels == ("nine", "two")
    table = text_dominance(tiny_lalm, items[:4], label_space=False, **QUIET)
    assert table.frame.question.unique().tolist() == ["How many cats has she? Possible options: nine, two."]
    assert len(read_alme(alme(STIMULUS, other, name=name), tmp_path, n=1, conditions=["conflict"])) == 1


def test_other_names_of_fields_and_three_choices(alme, tmp_path):
    question = {**STIMULUS["question"], "choices": ["six", "nine", "two"]}
    its = {**STIMULUS, "question": question}
    (first,) = read_alme(alme(its), tmp_path, conditions=["conflict"])
    assert first.text_label == "six"
    its = {
        "gold": "two",
        "said": "nine",
        **{key: value for key, value in its.items() if key != "stimulus_id"},
        "id": "x",
    }
    fields = {"answer": "gold", "stated": "said", "name": "id"}
    (item,) = read_alme(alme(its), tmp_path, fields=fields, prefix="She has", conditions=["conflict"])
    assert (item.text_label, item.source.name, item.attribute.prefix) == ("nine", "x", "She has")


def test_what_is_no_stimulus_is_refused(alme, tmp_path):
    def read(changes: dict | None = None, asked: dict | None = None, **how):
        question = {**STIMULUS["question"], **(asked or {})}
        return read_alme(alme({**STIMULUS, "question": question, **(changes or {})}), tmp_path, **how)

    with pytest.raises(DataError, match=r"line 1 has no 'gold', but stimulus_id, .*fields=\{'answer': \.\.\.\}"):
        read(fields={"answer": "gold"})
    with pytest.raises(DataError, match="There is no field 'anser' to be called otherwise"):
        read(fields={"anser": "gold"})
    with pytest.raises(DataError, match="'ref_text' must be text, got 3"):
        read({"ref_text": 3})
    with pytest.raises(DataError, match="choices are a list of two texts or more"):
        read(asked={"choices": ["two"]})
    with pytest.raises(DataError, match="choices are a JSON list"):
        read(asked={"choices": "two, nine"})
    with pytest.raises(DataError, match="'ten' is none of the choices nine, two"):
        read(asked={"correct_answer": "ten"})
    with pytest.raises(DataError, match="must differ, or nothing is in conflict"):
        read({"conflict_text": STIMULUS["ref_text"]})
    with pytest.raises(DataError, match="a path inside the folder of the audio"):
        read({"audio_path": "../one.wav"})
    with pytest.raises(AudioError, match="There is no audio file"):
        read({"audio_path": "three.wav"})
    with pytest.raises(DataError, match="line 2: one is there twice"):
        read_alme(alme(STIMULUS, STIMULUS), tmp_path)
    for text, message in (("[]", "is no JSON object"), ("{", "is not JSON"), ("", "holds no stimulus")):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(DataError, match=message):
            read_alme(tmp_path / "a.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"Stimuli are in a \.jsonl or \.csv file"):
        read_alme(tmp_path / "none.jsonl", tmp_path)
