"""All of AudioLens at once, and the command that writes it down."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from desta_golden import model_of
from pandas.testing import assert_frame_equal
from reference import chirps

from lalm_lens import cli
from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES, Attribute
from lalm_lens.datasets import Sample, read_attributes, read_folder
from lalm_lens.errors import DataError, InputError, PromptError
from lalm_lens.experiments import audiolens as module
from lalm_lens.experiments.audiolens import AudioLens, audiolens, deafness
from lalm_lens.experiments.enrich import Enrichment, enrich
from lalm_lens.experiments.information_score import InformationScore, information_score
from lalm_lens.interventions import Knockout
from lalm_lens.tables import markdown

pytestmark = pytest.mark.numbers

QUIET: dict = {"progress": False}
HOW: dict = {"forms": ["P2", "P3"], "gap": 3, "factors": [2.0], "n_seeds": 1, "n_probing": 3, **QUIET}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """As folders of a study are: each attribute in one, with a capital."""
    folder = tmp_path_factory.mktemp("data")
    for attribute, n in (("gender", 6), ("animal", 9)):
        write_clips(folder / attribute.capitalize(), attribute, n, seed=5)
    return folder


@pytest.fixture(scope="module")
def found(tiny_lalm, data) -> AudioLens:
    return audiolens(tiny_lalm, read_attributes(data, list(ATTRIBUTES)), **HOW)


def test_it_is_the_experiments_one_by_one(found, tiny_lalm, data):
    samples = read_folder(data / "Gender")
    deaf = Knockout(range(8), (-1,), "audio")
    expected = [
        information_score(tiny_lalm, samples, attribute="gender", forms=["P2", "P3"], **QUIET).frame,
        information_score(tiny_lalm, samples, attribute="gender", forms=["P3"], knockouts=[deaf], **QUIET).frame,
    ]
    scores = found.scores.frame
    mine = scores[scores.attribute == "gender"].reset_index(drop=True)
    assert_frame_equal(mine, InformationScore.concat(expected).frame)
    how: dict = {"attribute": "gender", "gap": 3, "factors": [2.0], "n_seeds": 1, **QUIET}
    enriched = enrich(tiny_lalm, samples, n_probing=3, label_space=False, **how)
    assert_frame_equal(found.enriched[0].frame.reset_index(drop=True), enriched.frame)


def test_what_is_left_out_is_told(found):
    animal = found.scores.frame[found.scores.frame.attribute == "animal"]
    assert set(animal.label_space) == {True}
    (labels, enrichment) = found.left_out
    assert labels.startswith("scores of animal without the space before labels: The labels ['cat', 'cow', 'crow']")
    assert enrichment.startswith("enrichment of animal: All 3 probing clips are answered rightly")
    assert [its.frame.attribute.iloc[0] for its in found.enriched] == ["gender"]


def test_labels_that_can_never_be_told_apart_are_refused(tiny_lalm, data):
    alike = Attribute("own", "", ("male", "male "), "It is")
    with pytest.raises(PromptError, match="begin with the same token"):
        audiolens(tiny_lalm, {alike: read_folder(data / "Gender")}, **HOW)
    with pytest.raises(PromptError, match="begin with the same token"):
        audiolens(tiny_lalm, {"animal": read_folder(data / "Animal")}, label_spaces=[False], **HOW)
    with pytest.raises(DataError, match="at least one attribute"):
        audiolens(tiny_lalm, {})


def test_tables_are_those_of_the_paper(found):
    tables = found.tables(n_resamples=50)
    heard = tables["points"].query("knockout == 'none' and place == 'last'")
    for (space, left_out), row in tables["table_3"].groupby(["label_space", "without"]):
        points = heard[(heard.label_space == space) & (heard.attribute != left_out)]
        assert row.n.iloc[0] + row.n_dropped.iloc[0] == len(points)
    assert set(tables["table_3"].without) == {"", "gender", "animal"}
    assert len(tables["enrichment"]) == 2
    based = found.tables(layer_base=0, n_resamples=50)["table_2"]
    defined = tables["table_2"].critical_layer.notna()
    assert defined.any()
    assert (tables["table_2"].critical_layer - based.critical_layer)[defined].to_numpy() == pytest.approx(1)
    assert "left out: enrichment of animal" in repr(found)


def test_the_transcript_is_heard_too():
    assert [its.keys for its in deafness(model_of("desta2"))] == ["audio", "transcript"]


def command(monkeypatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lalm-lens", "audiolens", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


OPTIONS = ("--forms", "P3", "--gap", 3, "--factors", "2", "--n-seeds", 1, "--n-probing", 3)


def test_the_command_writes_tables_figures_and_a_page(monkeypatch, data, tmp_path, capsys):
    assert command(monkeypatch, TINY_LALM, data, *OPTIONS, "--out", tmp_path) == 0
    scores = InformationScore.load(tmp_path / "scores.parquet")
    assert set(scores.frame.attribute) == {"gender", "animal"}
    assert set(Enrichment.load(tmp_path / "enrichment.parquet").frame.attribute) == {"gender"}
    page = (tmp_path / "audiolens.md").read_text(encoding="utf-8")
    names = {path.name for path in tmp_path.glob("*.png")}
    views = ("forms", "outcomes", "places", "resolution")
    assert names == {f"{view}{end}.png" for view in views for end in ("", "_with_space")} | {"enrichment_gender.png"}
    assert all(f"({name})" in page for name in names)
    whole = pd.read_parquet(tmp_path / "tables" / "table_2.parquet")
    as_text = pd.read_csv(tmp_path / "tables" / "table_2.csv")
    assert_frame_equal(whole, as_text, check_dtype=False)
    assert (tmp_path / "tables" / "table_2.md").read_text(encoding="utf-8").rstrip() in page
    said = capsys.readouterr().out
    assert "Left out: scores of animal" in said
    assert "Left out: scores of animal" in page


def test_what_is_done_stays_when_the_rest_is_interrupted(monkeypatch, data, tmp_path):
    def interrupted(model, samples, **how):
        if any(asked.name == "animal" for asked in samples):
            raise KeyboardInterrupt
        return audiolens(model, samples, **how)

    monkeypatch.setattr(module, "audiolens", interrupted)
    assert command(monkeypatch, TINY_LALM, data, *OPTIONS, "--out", tmp_path) != 0
    assert set(InformationScore.load(tmp_path / "scores.parquet").frame.attribute) == {"gender"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["."], "neither metadata.jsonl nor a folder of an attribute"),
        (["one"], "holds the clips of one attribute. Say which: --attribute gender|"),
        (["one", "--attribute", "mood"], "There is no attribute 'mood'"),
        (["one", "--attribute", "gender", "--forms", "P4"], "--form is 'P4'"),
        (["one", "--attribute", "gender", "--factors", "a"], "--factors are numbers with commas between; got 'a'"),
        (["one", "--attribute", "gender", "--transcript", "hi"], "prompts of a qwen2_audio model hold no transcript"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(monkeypatch, data, tmp_path, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    Path("one").symlink_to(data / "Gender")
    assert command(monkeypatch, TINY_LALM, *args, "--out", "out") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("lalm-lens: ")
    assert says in told


def test_a_question_of_ones_own(monkeypatch, data, tmp_path):
    rows = [json.loads(line) for line in (data / "Gender" / "metadata.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} == {"male", "female"}
    own = ("--question", "Who speaks?", "--labels", "male,female", "--prefix", "The speaker is")
    assert command(monkeypatch, TINY_LALM, data / "Gender", *own, *OPTIONS, "--out", tmp_path) == 0
    assert set(InformationScore.load(tmp_path / "scores.parquet").frame.attribute) == {"own"}


def test_a_transcript_without_words_leaves_nothing_to_cut():
    """In a batch with one that has words, each clip scores as it does alone."""
    model = model_of("desta2")
    clips = [
        Sample(f"{n}.wav", label, clip, said)
        for n, (label, said, clip) in enumerate(
            zip(("male", "female"), (" oh yes", ""), chirps([1.6, 1.1]), strict=True)
        )
    ]
    how: dict = {"attribute": "gender", "forms": ["P3"], "knockouts": deafness(model), **QUIET}
    together = information_score(model, clips, **how).frame
    for clip in clips:
        alone = information_score(model, [clip], **how).frame
        mine = together[together["sample"] == clip.name].reset_index(drop=True)
        assert mine.predicted.tolist() == alone.predicted.tolist()
        assert mine.probability.to_numpy() == pytest.approx(alone.probability.to_numpy(), rel=1e-3)


def test_settings_that_cannot_work_are_refused_before_the_work(tiny_lalm, data):
    clips = {"gender": read_folder(data / "Gender")}
    for wrong, says in (
        ({"gap": 8}, "A gap is from 1 to 7"),
        ({"forms": ["P3", "P3"]}, "each once; got P3, P3"),
        ({"forms": []}, "got none"),
    ):
        with pytest.raises(InputError, match=says):
            audiolens(tiny_lalm, clips, **{**HOW, **wrong})
    for factors in ([float("nan")], [float("inf")]):
        with pytest.raises(InputError, match="Factors are finite"):
            enrich(tiny_lalm, clips["gender"], attribute="gender", factors=factors, n_probing=3, **QUIET)
    with pytest.raises(InputError, match="Logits of an enriched run are not finite"):
        enrich(tiny_lalm, clips["gender"], attribute="gender", factors=[1e38], n_probing=3, gap=3, **QUIET)


def test_the_picture_of_resolution_counts_layers_as_the_tables_do(found):
    def layers(**how) -> np.ndarray:
        figure = dict(found.figures(**how))["resolution_with_space"]
        offsets = [np.ma.filled(its.get_offsets()[:, 0], np.nan) for its in figure.axes[0].collections]
        return np.concatenate(offsets)

    one, zero, high = layers(), layers(layer_base=0), layers(alpha=2.0)
    np.testing.assert_allclose(one - zero, np.where(np.isnan(one), np.nan, 1))
    assert np.isfinite(one).any()
    assert not np.array_equal(one, high, equal_nan=True)


def test_numbers_of_a_page_have_three_decimals():
    table = pd.DataFrame({"a": [4.4981398275825795, float("nan")], "b": ["x | y", None], "n": [1, 2]})
    assert markdown(table).splitlines()[2:] == ["| 4.498 | x \\| y | 1   |", "| -     | -      | 2   |"]
    assert markdown(pd.DataFrame({"p": [5.8e-11, 0.0]})).splitlines()[2:] == ["| 5.8e-11 |", "| 0.000   |"]
