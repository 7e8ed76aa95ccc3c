"""Published rows beside tables whose verdict is known, and the arithmetic of Table III against scipy."""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, spearmanr

from lalm_lens import AttentionKnockout, CausalTrace, Enrichment, InformationScore, cli, resolution_correlation
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.errors import DataError
from lalm_lens.experiments.claim import Evidence, Finding
from lalm_lens.experiments.claims import CLAIMS, QUANTITIES
from lalm_lens.experiments.correlation import correlation, p_of, rank_correlation
from lalm_lens.experiments.evidence import Measured, evidence_for
from lalm_lens.reproduce import (
    CHECKPOINTS,
    NO_INTERVAL,
    Reproduction,
    correlations,
    evaluate_claims,
    judged,
    printed_p,
    published,
    reproduce,
)

DESTA2, QWEN2 = CHECKPOINTS["DeSTA2"].ids[0], CHECKPOINTS["Qwen2-Audio-Instruct"].ids[0]
FORMS, N_LAYERS, N_CLIPS = ("P1", "P2", "P3"), 32, 20


def scores(model: str, rights: dict[str, np.ndarray], **columns: object) -> InformationScore:
    """By attribute, whether each layer is right about each clip: [sample, layer], the same in all prompts."""
    frames = []
    for attribute, its in rights.items():
        labels = ATTRIBUTES[attribute].labels
        for form in FORMS:
            n, n_layers = its.shape
            about = {"attribute": attribute, "form": form, "n_labels": len(labels), "label": labels[0]}
            rows = {"sample": np.repeat(np.arange(n), n_layers).astype(str), "layer": np.tile(np.arange(n_layers), n)}
            rows |= {"is_right": its.ravel(), "right_at_end": np.repeat(its[:, -1], n_layers)}
            frames.append(pd.DataFrame(rows).assign(**about))
    about = {"model": model, "label_space": False, "norm": True, "knockout": "none", "place": "last"}
    return InformationScore.concat([pd.concat(frames).assign(predicted="", probability=0.5, **{**about, **columns})])


def right_from(layer: int, n_right: int, n_layers: int = N_LAYERS) -> np.ndarray:
    """The first `n_right` of the clips are answered rightly from a layer on."""
    return np.outer(np.arange(N_CLIPS) < n_right, np.arange(n_layers) >= layer)


def traced(model: str, text: np.ndarray, attribute: str = "animal", objects: float = 0.0) -> CausalTrace:
    """Recovery by layer, of all text and of the last position; the option tokens recover `objects` in the middle."""
    rows, middle = [], range(len(text) // 3 + 1, 2 * len(text) // 3)
    for sample in range(4):
        for layer, rate in enumerate(text):
            cells = {"none": rate, "early": 0.01, "object": objects * (layer in middle), "late": 0.02, "last": rate}
            for n, (segment, recovery) in enumerate(cells.items()):
                kind = "layer" if segment == "none" else "token"
                rows.append({"sample": f"{sample}", "layer": layer, "kind": kind, "segment": segment})
                rows[-1] |= {"recovery": recovery + 0.001 * sample, "position": n}
    about = {
        "model": model,
        "attribute": attribute,
        "label": "dog",
        "form": "P3",
        "question": "?",
        "labels": "dog, cat",
    }
    about |= {"prefix": "is", "label_space": True, "corruption": "silence", "metric": "probability", "status": "kept"}
    about |= {"predict": "labels", "direction": "denoise", "site": "resid_post", "m_clean": 1.0, "m_corrupted": 0.0}
    flags = {
        "clean_right": True,
        "corrupted_right": False,
        "has_gap": True,
        "is_correct": False,
        "voice_activity": None,
    }
    return CausalTrace.concat([pd.DataFrame(rows).assign(**about, **flags)])


def row(found: Reproduction, quantity: str, attribute: str, model: str = "DeSTA2") -> pd.Series:
    frame = found.frame
    its = frame[(frame.quantity == quantity) & (frame.attribute == attribute) & (frame.model == model)]
    assert len(its) == 1
    return its.iloc[0]


# --- what was published -------------------------------------------------------------------------------------------


def test_every_published_row_names_a_measure_and_a_model():
    table = published()
    assert set(table.model) == set(CHECKPOINTS)
    assert set(table.predicate) - {""} == set(CLAIMS)
    assert set(table.quantity) - {""} == set(QUANTITIES)
    assert set(table.attribute.str.split("+").explode()) == set(ATTRIBUTES)
    assert ((table.predicate == "") == (table.value != "")).all()
    assert (table.quantity == "critical_layer").sum() == (table.quantity == "accuracy_percent").sum() == 12


def test_printed_accuracies_are_of_1500_answers():
    percent = published().query("quantity == 'accuracy_percent'").value.astype(float)
    assert np.allclose(percent * 15, (percent * 15).round(), atol=0.08)


def test_p_is_scipys():
    rng = np.random.default_rng(0)
    for n in (3, 9, 12):
        a, b = rng.normal(size=(2, 1, n))
        theirs = pearsonr(a[0], b[0])
        assert correlation(a, b)[0] == pytest.approx(theirs.statistic)
        assert p_of(correlation(a, b), n)[0] == pytest.approx(theirs.pvalue)
    a[0, :4] = np.nan
    assert correlation(a, b)[0] == pytest.approx(pearsonr(a[0, 4:], b[0, 4:]).statistic)
    assert rank_correlation(b)[0] == pytest.approx(spearmanr(np.arange(12), b[0]).statistic)
    assert np.isnan(correlation(np.ones((1, 5)), b[:, :5])[0])


def test_printed_p_belongs_to_printed_r_and_no_other():
    rows = list(correlations())
    assert [int(n["value"]) for _, _, n in rows] == [12, 12, 9, 12, 9]
    for r, p, n in rows:
        found = printed_p(r, p, n)
        assert found["verdict"] == "consistent"
        x = np.arange(int(n["value"]), dtype=float)
        y = np.random.default_rng(1).normal(size=len(x))
        x, y = x - x.mean(), y - y.mean()
        y -= x * (x @ y) / (x @ x)
        at = float(r["value"])
        mixed = at * x / np.linalg.norm(x) + np.sqrt(1 - at**2) * y / np.linalg.norm(y)  # correlates as printed
        assert found["measured"] == pytest.approx(pearsonr(x, mixed).pvalue)
        assert printed_p(r, p, {"value": str(len(x) - 1)})["verdict"] == "inconsistent"


# --- AudioLens ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_desta2(tmp_path_factory) -> tuple[InformationScore, Reproduction]:
    rights = {"gender": right_from(15, 17), "emotion": right_from(25, 7)}
    rights["language"] = np.concatenate([right_from(18, 14)[:14], right_from(24, 20)[14:]])
    table = scores(DESTA2, {**rights, "animal": right_from(0, 1)})
    table.save((folder := tmp_path_factory.mktemp("scored")) / "deep" / "scores.parquet")
    table.save(folder / "again.parquet")  # the same table twice is the same table
    return table, reproduce([folder], n_resamples=100)


@pytest.mark.parametrize(
    ("quantity", "attribute", "verdict"),
    [
        ("critical_layer", "language", "agrees"),  # 26.21, and 26.23
        ("critical_layer", "gender", "differs"),  # 24 in every resample, and 23.90
        ("accuracy_percent", "gender", "agrees"),  # 85
        ("accuracy_percent", "language", "differs"),  # 100 in every resample, and 91.53
        ("accuracy_percent", "emotion", "agrees"),  # 35, and 33.53
        ("accuracy_percent", "animal", "differs"),  # 5, at most 15, and 18.67
        ("critical_layer", "animal", "not measured"),  # no layer is above the threshold
        ("rise_with_depth", "gender", "agrees"),
        ("deepest_dip", "gender", "differs"),
        ("last_over_penultimate", "gender", "not measured"),
        ("early_recovery", "gender", None),  # claimed of others
    ],
)
def test_verdicts_about_scores(of_desta2, quantity, attribute, verdict):
    _, found = of_desta2
    if verdict is None:
        assert not len(found.frame.query("quantity == @quantity and attribute == @attribute and model == 'DeSTA2'"))
    else:
        assert row(found, quantity, attribute).verdict == verdict


def test_an_undefined_critical_layer_is_said(of_desta2):
    its = row(of_desta2[1], "critical_layer", "animal")
    assert (its.note, its.n) == ("undefined on these clips", N_CLIPS)
    assert np.isnan(its.measured)


def test_numbers_are_those_of_table_ii(of_desta2):
    table, found = of_desta2
    whole = table.table(n_resamples=100).set_index("attribute")
    its = row(found, "accuracy_percent", "emotion")
    of_emotion = whole.loc["emotion"]
    ours = [its.measured, its.low, its.high]
    assert np.allclose(ours, 100 * of_emotion[["accuracy", "accuracy_low", "accuracy_high"]].astype(float))
    its = row(found, "critical_layer", "language")
    theirs = whole.loc["language"][["critical_layer", "critical_low", "critical_high"]].astype(float)
    assert np.allclose([its.measured, its.low, its.high], theirs)


def test_table_iii_is_that_of_resolution_correlation(of_desta2):
    table, found = of_desta2
    theirs = resolution_correlation(table.points(n_resamples=10)).iloc[0]
    together = "+".join(ATTRIBUTES)
    assert row(found, "pearson_r", together).measured == pytest.approx(theirs.r)
    assert row(found, "pearson_p", together).measured == pytest.approx(theirs.p)
    assert (theirs.n, row(found, "n_points", together).measured) == (9, 9)
    assert row(found, "n_points", together).verdict == "differs"  # 12 were published


def test_the_number_of_the_first_layer_is_an_argument(of_desta2, tmp_path):
    of_desta2[0].save(tmp_path / "scores.parquet")
    found = reproduce([tmp_path], layer_base=0, n_resamples=10)
    moved = row(of_desta2[1], "critical_layer", "gender").measured - row(found, "critical_layer", "gender").measured
    assert moved == pytest.approx(1)


def test_what_is_missing_names_the_checkpoint(of_desta2):
    found = of_desta2[1]
    assert row(found, "early_recovery", "animal", "Qwen2-Audio-Instruct").note == f"needs lalm-lens trace {QWEN2}"
    assert QWEN2 in set(found.needed().checkpoint)
    assert row(found, "last_is_highest", "animal").note == "there is no table of it (causal trace)"


def test_enrichment_gains_what_its_summary_says(tmp_path):
    rows = []
    for arm, at in {"chosen": (6, 7, 6), "random": (6, 5, 3)}.items():
        for factor, n_right in zip((0.0, 1.0, 2.0), at, strict=True):
            for n in range(40):
                rows.append({"arm": arm, "factor": factor, "sample": str(n), "is_right": n < n_right, "layer": 9})
                rows[-1] |= {"seed": None if arm == "chosen" else 0}
    about = {"model": DESTA2, "attribute": "animal", "form": "P3", "label_space": False, "gap": 5, "predicted": ""}
    table = Enrichment.concat([pd.DataFrame(rows).assign(**about, label="dog", engine="sweep", split="test")])
    table.save(tmp_path / "enrichment.parquet")
    found = reproduce([tmp_path], n_resamples=200)
    gained = row(found, "best_gain_percent", "animal")
    probing = table.frame[table.frame.arm == "chosen"].assign(split="probing")
    theirs = Enrichment.concat([table.frame, probing]).summary(n_resamples=200).iloc[0]
    assert np.allclose([gained.measured, gained.low, gained.high], 100 * theirs[["gain", "low", "high"]].astype(float))
    assert (gained.verdict, gained.published) == ("agrees", "16.3")  # 7 of 6
    assert row(found, "share_above_random", "animal").measured == 1
    assert row(found, "interior_optimum", "animal").verdict == "agrees"


def test_a_run_without_the_audio_is_told_apart(tmp_path):
    told = "-1 without {}, layers 0 to {}"
    whole, deaf = right_from(8, 20), right_from(8, 5)
    scores(DESTA2, {"gender": whole}).save(tmp_path / "whole.parquet")
    scores(DESTA2, {"gender": deaf}, knockout=told.format("audio", 31)).save(tmp_path / "deaf.parquet")
    for quantity in ("drop_without_audio", "accuracy_without_audio"):
        assert row(reproduce([tmp_path], n_resamples=10), quantity, "gender").measured == pytest.approx(0.75)
    scores(DESTA2, {"gender": deaf}, knockout=told.format("audio", 15)).save(tmp_path / "deaf.parquet")
    assert row(reproduce([tmp_path], n_resamples=10), "drop_without_audio", "gender").verdict == "not measured"


# --- causal tracing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "objects", "verdict"), [(20, 0.2, "agrees"), (2, 0.0, "differs")])
def test_verdicts_about_traces(first, objects, verdict, tmp_path):
    traced(QWEN2, (np.arange(N_LAYERS) >= first) * 1.0, objects=objects).save(tmp_path / "trace.parquet")
    found = reproduce([tmp_path], n_resamples=50)
    for quantity in ("early_recovery", "transition_depth", "object_spike"):
        its = row(found, quantity, "animal", "Qwen2-Audio-Instruct")
        assert (its.verdict, its.n, its.label_space, its.measured_on) == (verdict, 4, True, QWEN2)


def test_traces_in_other_settings_are_not_compared(tmp_path):
    trace = traced(QWEN2, np.linspace(0, 1, N_LAYERS))
    CausalTrace(trace.frame.assign(metric="logit_difference")).save(tmp_path / "trace.parquet")
    its = row(reproduce([tmp_path], n_resamples=10), "early_recovery", "animal", "Qwen2-Audio-Instruct")
    assert its.verdict == "not measured"
    assert "metric probability is not in the table, only logit_difference" in its.note
    CausalTrace(trace.frame.assign(status="clean_wrong")).save(tmp_path / "trace.parquet")
    its = row(reproduce([tmp_path], n_resamples=10), "early_recovery", "animal", "Qwen2-Audio-Instruct")
    assert "none of 4 clips is kept" in its.note


def test_voxtral_is_compared_with_both_families(tmp_path):
    voxtral = CHECKPOINTS["Voxtral"].ids[0]
    steps = {voxtral: (30, 5), QWEN2: (32, 24), DESTA2: (32, 16)}
    for n, (model, (n_layers, first)) in enumerate(steps.items()):
        traced(model, (np.arange(n_layers) >= first) * 1.0, "gender").save(tmp_path / str(n) / "trace.parquet")
        its = row(reproduce([tmp_path], n_resamples=10), "earlier_than_others", "gender", "Voxtral")
        assert its.verdict == ("not measured" if n < 2 else "agrees")
    assert its.measured == pytest.approx(16 / 32 - 5 / 30)


@pytest.mark.numbers
def test_claims_read_what_the_table_averages(traces, tmp_path):
    trace = traces["animal"]
    trace.save(tmp_path / "trace.parquet")
    found = evaluate_claims([tmp_path], n_resamples=10).frame.set_index("quantity").measured
    by_layer = trace.aggregate(n_resamples=10).query("kind == 'layer' and layer >= 0")["mean"].to_numpy()
    assert found["early_recovery"] == pytest.approx(by_layer[:4].mean())
    assert found["gradual_rise"] == pytest.approx(spearmanr(np.arange(8), by_layer).statistic)
    tokens = CausalTrace(trace.frame[trace.frame.kind == "token"]).aggregate(["segment", "layer"], n_resamples=10)
    grid = tokens[tokens.layer >= 0].pivot(index="segment", columns="layer", values="mean")
    assert found["object_activity"] == pytest.approx(grid.loc["object"].max())
    later = grid[[5, 6, 7]]
    assert (
        found["last_is_highest"]
        == (later.loc["last"] > later.drop(index=["last", "none"], errors="ignore").max()).mean()
    )


# --- measures on curves that are known ----------------------------------------------------------------------------

RISING, PEAK = np.arange(8) / 8, np.array([0, 0, 0.2, 0.6, 1, 0.8, 0.4, 0.1])


@pytest.mark.parametrize(
    ("name", "group", "measured"),
    [
        ("early_recovery", RISING, 1.5 / 8),
        ("transition_depth", RISING, 5 / 8),  # the fifth layer
        ("transition_depth", RISING / 2, np.nan),
        ("gradual_rise", RISING, 1),
        ("stable_after_15", RISING, 3 / 7),
        ("first_layers_off_chance", np.stack([RISING, RISING]), 0.5 - 0.5 / 8),
        ("lowest_over_chance", np.stack([RISING + 0.25, PEAK + 0.5]), 0.5),
        ("rise_with_depth", np.stack([RISING, -RISING]), 0),
        ("deepest_dip", np.stack([PEAK, [0.5, 0.6, 0.3, 0.4, 0.9, 0.9, 0.9, 0.9]]), 0.3),
        ("late_drop", np.stack([PEAK, RISING]), 0.45),
        ("middle_over_ends", PEAK[None], PEAK[2:7].mean() - 0.1),
        ("agreement_of_forms", np.stack([RISING, 2 * RISING, -RISING]), -1),
        ("agreement_of_forms", RISING[None], np.nan),
        ("right_rise", -RISING, -1),
        ("wrong_peak", PEAK / 2, 0),
        ("last_over_penultimate", np.stack([RISING, PEAK / 2]), 0),
        ("drop_without_audio", np.stack([RISING, RISING - 0.25]), 0.25),
        ("drop_without_audio", np.stack([RISING, RISING - [9, 9, 9, 9, 0.25, 0.25, 0.5, 1]]), 0.5),  # the last four
        ("accuracy_without_audio", np.array([0.9, 0.4]), 0.5),
        ("object_spike", np.stack([RISING * 0, PEAK, PEAK / 2, RISING]), 0.5),
        ("object_activity", np.stack([RISING, PEAK / 4, RISING, RISING]), 0.25),
        ("last_is_highest", np.stack([RISING * 0, RISING * 0, RISING, RISING]), 0),
    ],
)
def test_measures(name, group, measured):
    about = Evidence((np.stack([group, group]).astype(float),), n_labels=(2,))
    found = about.find(CLAIMS[name].measure, n_resamples=10)
    assert found.measured == pytest.approx(measured, nan_ok=True)
    assert (found.low, found.high) == pytest.approx((measured, measured), nan_ok=True)  # the clips are alike
    assert found.n == 2


@pytest.mark.parametrize(("value", "verdict"), [("60.0", "agrees"), ("59.9", "differs"), ("60", "agrees")])
def test_a_printed_number_agrees_within_its_rounding(value, verdict):
    of_them = QUANTITIES["accuracy_percent"]
    assert judged(of_them, value, Finding(60.2, 60.04, 60.3, 9))["verdict"] == verdict
    assert judged(of_them, "60.2", Finding(60.2, np.nan, np.nan, 1))["note"] == NO_INTERVAL


def test_one_clip_judges_no_claim(tmp_path):
    scores("tiny", {"gender": right_from(3, 9)[:1]}).save(tmp_path / "scores.parquet")
    found = evaluate_claims([tmp_path], n_resamples=10).frame
    assert set(found.verdict) == {"not measured"}
    assert NO_INTERVAL in set(found.note)


def test_scores_are_read_behind_the_final_norm_or_before_it():
    both = [scores("tiny", {"gender": right_from(3, n)}, norm=norm).frame for norm, n in ((True, 9), (False, 2))]
    frames = {InformationScore: pd.concat(both)}
    for norm, n_right in ((True, 9), (False, 2)):
        about = evidence_for("scores", Measured("tiny", frames, norm), "gender", False, None, {})
        assert about.groups[0][:, 0, -1].sum() == n_right


def test_a_peak_of_the_wrong_is_above_any_one_answer():
    about = Evidence((np.stack([PEAK, PEAK]),), n_labels=(4,), constant=0.7)
    assert about.find(CLAIMS["wrong_peak"].measure, n_resamples=10).measured == pytest.approx(0.3)
    frame = scores("tiny", {"animal": right_from(3, 2)}).frame.astype({"sample": int})
    labels = ATTRIBUTES["animal"].labels
    frame["label"] = np.where(frame["sample"] < 14, labels[0], labels[1])  # 18 clips are wrong, 12 of the first label
    frame = frame.astype({"sample": str})
    found = evidence_for("wrong", Measured("tiny", {InformationScore: frame}), "animal", False, None, {})
    assert (found.n, found.constant) == (18, pytest.approx(12 / 18))


def test_weights_make_a_ratio_of_means():
    values, gaps = np.random.default_rng(0).normal(size=(5, 8)), np.array([1, 2, 3, 4, 5.0])
    found = Evidence((values,), (gaps,)).find(CLAIMS["early_recovery"].measure, n_resamples=10)
    assert found.measured == pytest.approx(((values * gaps[:, None]).mean(0) / gaps.mean())[:4].mean())


# --- whose tables -------------------------------------------------------------------------------------------------


def test_a_small_model_is_no_large_one(of_desta2, tmp_path):
    scores("tiny", {"gender": right_from(3, 9, n_layers=8)}).save(tmp_path / "scores.parquet")
    untouched = reproduce([tmp_path], n_resamples=10)
    assert set(untouched.frame.verdict) == {"not measured", "consistent"}
    with pytest.raises(DataError, match="tiny cannot be DeSTA2: it has 8 layers"):
        reproduce([tmp_path], named={"tiny": "DeSTA2"})
    claims = evaluate_claims([tmp_path], n_resamples=10).frame
    assert set(claims.measured_on) == {"tiny"}
    assert set(claims.verdict) <= {"holds", "does not hold", "not measured"}
    assert claims.model.isna().all()


def test_a_named_model_is_compared(tmp_path):
    scores("here", {"gender": right_from(15, 17)}).save(tmp_path / "scores.parquet")
    its = row(reproduce([tmp_path], named={"here": "DeSTA2"}, n_resamples=50), "accuracy_percent", "gender")
    assert (its.measured_on, its.verdict) == ("here", "agrees")


def test_what_cannot_be_told_is_refused(tmp_path):
    with pytest.raises(DataError, match="No result table lies under"):
        reproduce([tmp_path])
    with pytest.raises(DataError, match="is no folder"):
        reproduce([tmp_path / "nowhere"])
    scores("here", {"gender": right_from(3, 9)}).save(tmp_path / "scores.parquet")
    with pytest.raises(DataError, match="No table is of there, only of here"):
        reproduce([tmp_path], named={"there": "DeSTA2"})
    with pytest.raises(DataError, match="Neither paper has a model GPT"):
        reproduce([tmp_path], named={"here": "GPT"})
    scores(DESTA2, {"gender": right_from(3, 9)}).save(tmp_path / "other.parquet")
    with pytest.raises(DataError, match="are both DeSTA2"):
        reproduce([tmp_path], named={"here": "DeSTA2"})
    Path(tmp_path / "broken.parquet").write_text("no table")
    with pytest.raises(DataError, match="is not a Parquet file"):
        reproduce([tmp_path])


def test_a_knockout_alone_does_not_say_how_deep_a_model_is(tmp_path):
    columns = {name: pd.Series(dtype=kind) for name, kind in AttentionKnockout.COLUMNS.items()}
    frame = pd.DataFrame(columns).reindex(range(2)).fillna({"model": "here", "attribute": "gender"})
    filled = {name: 0 for name, kind in AttentionKnockout.COLUMNS.items() if kind in ("int64", "bool")}
    AttentionKnockout.concat([frame.fillna(filled)]).save(tmp_path / "knocked.parquet")
    with pytest.raises(DataError, match="do not say how many layers"):
        reproduce([tmp_path], named={"here": "DeSTA2"})


# --- on the command line, and on the page -------------------------------------------------------------------------


def run(monkeypatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lalm-lens", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_command_compares_and_writes(monkeypatch, tmp_path, capsys):
    traced("here", (np.arange(N_LAYERS) >= 20) * 1.0).save(tmp_path / "trace.parquet")
    named = ("--as", "here=Qwen2-Audio-Instruct", "--resamples", 10)
    assert run(monkeypatch, "reproduce", tmp_path, *named, "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert re.search(r"Qwen2-Audio-Instruct +here +animal .* early_recovery .* agrees", told)
    assert f"needs lalm-lens audiolens {DESTA2}" in told
    saved = Reproduction.load(tmp_path / "out" / "reproduction.parquet")
    assert len(pd.read_csv(tmp_path / "out" / "reproduction.csv")) == len(saved.frame)
    lines = (tmp_path / "out" / "reproduction.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(saved.frame) + 2
    assert run(monkeypatch, "reproduce", tmp_path, "--claims", "--resamples", 10) == 0
    assert "holds" in capsys.readouterr().out


def test_the_command_says_what_is_wrong_in_one_line(monkeypatch, tmp_path, capsys):
    traced("tiny", np.arange(8) / 7).save(tmp_path / "trace.parquet")
    for args, message in (
        (("--as", "tiny=DeSTA2"), "it has 8 layers"),
        (("--as", "tiny"), "--as names each model once"),
        (("--as", "tiny=DeSTA2", "--claims"), "leave out --as"),
    ):
        assert run(monkeypatch, "reproduce", tmp_path, *args) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1


def test_the_page_has_every_claim():
    page = (Path(__file__).parent.parent / "docs" / "reproduce.md").read_text(encoding="utf-8")
    for name, claim in CLAIMS.items():
        assert f"| `{name}` {claim.condition} |" in page
