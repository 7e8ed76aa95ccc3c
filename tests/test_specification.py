"""The specification curve: against traces and scores made one at a time, and how often the model runs."""

import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from lalm_lens import (
    Branch,
    CausalTrace,
    OtherClip,
    Patch,
    Probabilities,
    Run,
    Silence,
    Source,
    Specification,
    causal_trace,
    cli,
    datasets,
    information_score,
    loading,
    run_branches,
    silence,
    specification_curve,
)
from lalm_lens.assets import TINY_LALM
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.datasets import read_folder
from lalm_lens.engine import plan
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.claims import CLAIMS
from lalm_lens.experiments.specification import CHOICES
from lalm_lens.nn.block import DecoderBlock

pytestmark = pytest.mark.numbers


@pytest.fixture(scope="module")
def samples(folders):
    return read_folder(folders["emotion"])[:2]


@pytest.fixture(scope="module")
def specified(tiny_lalm, samples) -> Specification:
    corruptions = (Silence(), OtherClip())
    return specification_curve(
        tiny_lalm, samples, attribute="emotion", corruptions=corruptions, n_resamples=20, progress=False
    )


def one(specified: Specification, claim: str, **choices: object) -> pd.Series:
    rows = specified.frame[specified.frame.claim == claim]
    for name, value in choices.items():
        rows = rows[rows[name] == value]
    assert len(rows) == 1
    return rows.iloc[0]


def test_every_combination_is_there_once(specified):
    frame = specified.frame
    assert not frame.duplicated(["claim", *CHOICES]).any()
    # corruptions x templates x label spaces x metrics x predicts x averages, and what counts layers or options twice
    n = frame.groupby("claim").size()
    assert n["early_recovery"] == n["last_is_highest"] == 2**6
    assert n["transition_depth"] == n["object_spike"] == 2**7
    assert n["deepest_dip"] == n["wrong_peak"] == 2**2
    assert n["critical_layer"] == 2**3
    decidable = {
        name for name, its in CLAIMS.items() if its.reads not in ("attributes", "factors", "knockout", "models")
    }
    assert set(n.index) == {*decidable, "critical_layer", "accuracy_percent"}


@pytest.mark.parametrize("average", ["mean", "ratio_of_means"])
def test_effects_are_those_of_the_trace(specified, traces, samples, average):
    """Of the default settings, that was made elsewhere."""
    usual = {"corruption": "silence", "metric": "probability", "predict": "labels", "label_space": True}
    its = {**usual, "average": average}
    frame = traces["emotion"].frame
    trace = CausalTrace(frame[frame["sample"].isin([sample.name for sample in samples])])
    text = trace.aggregate(n_resamples=10).query("kind == 'layer' and layer >= 0")[average].to_numpy()
    found = one(specified, "early_recovery", template="text", **its)
    assert found.effect == pytest.approx(text[:4].mean())
    assert found.n == trace.kept["sample"].nunique()
    tokens = CausalTrace(trace.frame[trace.frame.kind == "token"])
    for objects, by, key in (("all", "segment", "object"), ("correct", "is_correct", True)):
        words = tokens.aggregate([by, "layer"], n_resamples=10)
        largest = words[(words[by] == key) & (words.layer >= 0)][average].max()
        assert one(specified, "object_activity", template="text", object=objects, **its).effect == pytest.approx(
            largest
        )


def test_a_choice_that_reads_again_gives_what_a_trace_of_its_own_gives(specified, tiny_lalm, samples):
    n_compared = 0
    for space, predict in ((True, "vocab"), (False, "labels")):
        its = {"metric": "logit_difference", "predict": predict, "label_space": space}
        trace = causal_trace(
            tiny_lalm, samples, attribute="emotion", corruption=OtherClip(), kinds=("layer",), **its, progress=False
        )
        found = one(specified, "early_recovery", corruption="clip", template="text", average="mean", **its)
        if not len(trace.kept):
            assert found.reason == "no clip is kept"
            continue
        by_layer = trace.aggregate(n_resamples=10).query("layer >= 0")["mean"].to_numpy()
        assert (found.effect, found.n) == (pytest.approx(by_layer[:4].mean()), trace.kept["sample"].nunique())
        n_compared += 1
    assert n_compared


def test_without_the_template_the_question_alone_is_patched(specified, tiny_lalm, samples):
    """By branches that are written out."""
    processor, attribute, rates = tiny_lalm.processor, ATTRIBUTES["emotion"], []
    for sample in samples:
        prompt = processor.prompt(attribute, processor.n_frames(sample.waveform), answer=sample.label)
        clean, corrupted = (
            Run(processor.inputs([prompt], [heard]), prompt) for heard in (sample.waveform, silence(sample.waveform))
        )
        first = next(n for n, position in enumerate(prompt.positions) if position.region == "early")
        where = [n for n, position in enumerate(prompt.positions) if n >= first and position.region != "template"]
        token = processor.label_tokens(attribute.labels)[sample.label]
        branches = [Branch(corrupted, (Patch("resid_post", n, tuple(where), Source(clean)),)) for n in range(4)]
        outcome = run_branches(tiny_lalm, [*branches, Branch(clean, ())], Probabilities(tokens=(token,)))
        *patched, whole = outcome.values[:, 0, 0].double().tolist()
        nothing = float(outcome.base[0, 0, 0])
        rates.append(np.mean((np.array(patched) - nothing) / (whole - nothing)))
    usual = {"metric": "probability", "predict": "labels", "average": "mean", "label_space": True}
    found = one(specified, "early_recovery", template="no text", corruption="silence", **usual)
    assert found.n == len(samples)
    assert found.effect == pytest.approx(np.mean(rates), abs=1e-5)
    other = one(specified, "early_recovery", template="text", corruption="silence", **usual)
    assert abs(other.effect - found.effect) > 1e-4  # the states of the template matter


def test_scores_are_those_of_each_lens(specified, tiny_lalm, samples):
    for norm in (True, False):
        scores = information_score(tiny_lalm, samples, attribute="emotion", norm=norm, progress=False)
        table = scores.table(n_resamples=10).query("place == 'last'").set_index("label_space")
        for space in (True, False):
            found = one(specified, "accuracy_percent", norm=norm, label_space=space)
            assert found.effect == pytest.approx(100 * table.loc[space, "accuracy"])
            assert pd.isna(found.holds)
            layers = [one(specified, "critical_layer", norm=norm, label_space=space, layer_base=n) for n in (0, 1)]
            theirs = table.loc[space, "critical_layer"]
            assert layers[1].effect == pytest.approx(theirs, nan_ok=True)
            assert layers[1].effect - layers[0].effect == pytest.approx(
                1 if np.isfinite(theirs) else np.nan, nan_ok=True
            )


def counted(monkeypatch, act: Callable[[], object]) -> Counter:
    """How often blocks run as a whole, and how often a batch of branches goes through them."""
    seen: Counter = Counter()
    forward, through = DecoderBlock.forward, plan.go_through

    def count_forward(self, *args, **kwargs):
        seen["blocks"] += 1
        return forward(self, *args, **kwargs)

    def count_through(*args, **kwargs):
        seen["batches"] += 1
        return through(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(DecoderBlock, "forward", count_forward)
        patched.setattr(plan, "go_through", count_through)
        act()
    return seen


def test_choices_that_read_again_do_not_run_again(monkeypatch, tiny_lalm, samples):
    def run(**choices: object) -> Counter:
        how = {"attribute": "emotion", "corruptions": (Silence(),), "norms": (True,), "form": "P1", "n_resamples": 10}
        return counted(
            monkeypatch, lambda: specification_curve(tiny_lalm, samples[:1], **how, **choices, progress=False)
        )

    least = {"metrics": ("probability",), "label_spaces": (True,), "predicts": ("labels",), "averages": ("mean",)}
    least |= {"objects": ("all",), "layer_bases": (0,), "templates": ("text",)}
    once, often = run(**least), run()
    assert once == often
    assert once["blocks"] > 0
    assert once["batches"] > 0


def test_what_cannot_be_chosen_is_a_reason(tiny_lalm, folders):
    """Without their spaces two animals begin alike; and one clip has no other."""
    clip = read_folder(folders["animal"])[:1]
    corruptions = (Silence(), OtherClip())
    found = specification_curve(
        tiny_lalm, clip, attribute="animal", corruptions=corruptions, form="P1", n_resamples=10, progress=False
    )
    reasons = found.frame.groupby("label_space").reason.unique()
    assert all("begin with the same token" in reason or "There is no other clip" in reason for reason in reasons[False])
    assert found.frame[~found.frame.label_space].effect.isna().all()
    assert found.frame[found.frame.corruption == "clip"].reason.notna().all()
    assert found.frame[found.frame.label_space & (found.frame.corruption != "clip")].effect.notna().any()
    assert found.frame.effect.notna().eq(found.frame.reason.isna()).all()
    with pytest.raises(DataError, match="no effect of late_drop2"):
        found.plot(["late_drop2"])


def test_a_curve_is_drawn_and_counted(specified, tmp_path):
    loaded = Specification.load(specified.save(tmp_path / "specification.parquet"))
    survival = loaded.survival().set_index("claim")
    assert loaded.overview().holds.tolist() == survival.holds.tolist()
    rows = loaded.frame[loaded.frame.claim == "transition_depth"]
    assert survival.loc["transition_depth", "holds"] == (rows.effect >= 0.55).sum()
    assert survival.loc["transition_depth", "specifications"] == 128
    assert pd.isna(survival.loc["critical_layer", "holds"])
    of_traces, of_scores = loaded.plot(["last_is_highest", "last_over_penultimate", "critical_layer"]).subfigs
    assert len(of_scores.axes) == 4
    curve, matrix = of_traces.axes
    dots = curve.collections[-1].get_offsets()[:, 1]
    assert (np.diff(dots) >= 0).all()
    assert len(dots) == survival.loc["last_is_highest", "measured"]
    marks = sum(len(its.get_offsets()) for its in matrix.collections if hasattr(its, "get_sizes"))
    assert marks == 6 * len(dots)  # one value of each of six choices


def test_the_command_writes_table_and_picture(monkeypatch, tiny_lalm, folders, tmp_path, capsys):
    args = ("spec", TINY_LALM, folders["gender"], "--attribute", "gender", "--out", tmp_path, "--form", "P1")
    monkeypatch.setattr(loading, "from_pretrained", lambda *_, **__: tiny_lalm)
    monkeypatch.setattr(datasets, "read_folder", lambda folder: read_folder(folder)[:2])
    plot = Specification.plot
    monkeypatch.setattr(Specification, "plot", lambda self: plot(self, ["accuracy_percent"]))  # the whole takes seconds
    monkeypatch.setattr(sys, "argv", ["lalm-lens", *map(str, args), "--resamples", "10"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    told, saved = capsys.readouterr().out, Specification.load(tmp_path / "specification.parquet")
    assert f"Specification({tiny_lalm.cfg.model_name}, gender)" in told
    assert set(saved.frame.corruption.dropna()) == {"silence", "noise", "clip"}
    assert (tmp_path / "specification.png").read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(tmp_path / "specification.csv")) == len(saved.frame)


def test_what_cannot_be_specified_is_refused(tiny_lalm, samples):
    with pytest.raises(InputError, match="at least one of metrics"):
        specification_curve(tiny_lalm, samples, attribute="emotion", metrics=())
    with pytest.raises(InputError, match="leave out the metric label_score"):
        specification_curve(tiny_lalm, samples, attribute="emotion", metrics=("label_score",))
