"""Suppressed or erased: every row against plain HF under a mask, verdicts on tables whose answer is known."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from reference import hf_cut, recorded
from statsmodels.stats.proportion import proportion_confint

from lalm_lens import cli
from lalm_lens.assets import TINY_LALM, TINY_LALM_ERASE, TINY_LALM_SUPPRESS
from lalm_lens.assets.clips import write_clips
from lalm_lens.conflict import make_conflict
from lalm_lens.datasets import read_folder
from lalm_lens.errors import DataError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.back_patch import BackPatch
from lalm_lens.experiments.back_patch_choice import BackPatchChoice
from lalm_lens.experiments.circuits import Circuits
from lalm_lens.experiments.pathways import Pathways
from lalm_lens.experiments.suppression import RUNS, Suppression, suppression
from lalm_lens.loading import from_pretrained

pytestmark = pytest.mark.numbers

QUIET = {"progress": False}


@pytest.mark.parametrize("order", ["audio_first", "text_first"])
def test_every_row_is_plain_hf_with_the_text_in_and_out_of_sight(random_pair, folders, order):
    hf, model = random_pair
    samples = read_folder(folders["animal"])[:2]
    found = suppression(model, samples, attribute="animal", order=order, seed=3, **QUIET).frame
    assert len(found) == 2 * 4 * 2 * 8
    blocks = {f"{n}": block for n, block in enumerate(hf.model.language_model.layers)}
    for sample in samples:
        alone, conflict = make_conflict([sample], "animal", conditions=["audio_only", "conflict"], order=order, seed=3)
        conflict = next(
            item
            for item in make_conflict(samples, "animal", conditions=["conflict"], order=order, seed=3)
            if item.audio_label == sample.label
        )
        question = Question.about(model, [conflict], "animal", "P3", True)
        labels = np.array(question.labels)
        ends = {}
        for kind, item in (("audio_only", alone), *((kind, conflict) for kind in RUNS[1:])):
            run = question.run(item)
            stated = [position.region == "statement" for position in run.prompt.positions]
            closed = torch.zeros(1, run.n_pos, run.n_pos, dtype=torch.bool)
            closed[0, -1, stated] = kind == "cut"
            if kind == "hidden":
                closed[0] = torch.tensor(stated)[None] & ~torch.tensor(stated)[:, None]
            batch = run.inputs.to_hf("feature_attention_mask")
            with recorded(blocks) as states, torch.no_grad():
                hf_cut(hf, batch, dict.fromkeys(range(8), closed))
                stack = torch.stack([states[f"{n}"][0] for n in range(8)])
                logits = hf.lm_head(hf.model.language_model.norm(stack))[..., question.tokens].double()
            options = [n for n, position in enumerate(run.prompt.positions) if position.region == "object"]
            for place, at in (("last", [-1]), ("object", options)):
                log_p = logits[:, at].log_softmax(-1).mean(1)
                if place == "last":
                    ends[kind] = log_p[-1]
                rows = found[(found.run == kind) & (found.place == place) & (found["clip"] == sample.name)]
                rows = rows.sort_values("layer")
                predicted = labels[log_p.argmax(-1).numpy()]
                assert rows.predicted.tolist() == predicted.tolist()
                says = np.select([predicted == conflict.audio_label, predicted == conflict.text_label], [0, 1], 2)
                assert rows.says.tolist() == np.array(["audio", "text", "other"])[says].tolist()
                for side in ("audio", "text"):
                    theirs = log_p[:, labels.tolist().index(getattr(conflict, f"{side}_label"))]
                    np.testing.assert_allclose(rows[f"log_p_{side}"], theirs, atol=2e-4)
        assert not torch.allclose(ends["conflict"], ends["cut"], atol=1e-3)  # what is out of sight was looked at


def table(rights: dict[str, np.ndarray], n_labels: int = 4, most: int = 1) -> Suppression:
    """Clips whose audio's label the last of two layers says, or the text's. Labels come equally often, or one of them
    `most` times as often as the others."""
    rows = [
        {"run": run, "sample": f"{n}", "layer": layer, "place": "last", "says": "audio" if right else "text"}
        for run, its in rights.items()
        for n, right in enumerate(its)
        for layer in (0, 1)
    ]
    frame = pd.DataFrame(rows).assign(model="m", attribute="a", form="P3", label_space=True, framing="statement")
    frame["clip"] = frame["sample"]
    labels = [*range(n_labels), *[0] * (most - 1)]
    frame["audio_label"] = [f"label {labels[int(name) % len(labels)]}" for name in frame["sample"]]
    frame["n_labels"] = n_labels
    frame.loc[frame.layer == 0, "says"] = "other"
    frame = frame.assign(strength="baseline", order="audio_first", cut_layers="all", log_p_audio=0.0, log_p_text=0.0)
    return Suppression.concat([frame])


def hits(n: int, of: int = 40) -> np.ndarray:
    return np.arange(of) < n


@pytest.mark.parametrize(
    ("n_right", "verdict"),
    [
        ((38, 2, 38, 38), "suppression"),
        ((38, 2, 36, 38), "suppression"),
        ((40, 32, 40, 40), "suppression"),
        ((38, 2, 2, 38), "erasure"),
        ((38, 2, 3, 38), "erasure"),
        ((38, 2, 2, 2), "in part"),  # what takes it is not this text
        ((38, 2, 20, 38), "in part"),
        ((38, 37, 38, 38), "no dominance"),
        ((38, 34, 38, 38), "undecided"),
    ],
)
def test_the_verdict_is_that_of_the_counts(n_right, verdict):
    its = table(dict(zip(RUNS, map(hits, n_right), strict=True))).verdict(n_resamples=500)
    assert its["verdict"] == verdict
    alone, conflict, cut, hidden = (n / 40 for n in n_right)
    assert [its[run] for run in RUNS] == pytest.approx([alone, conflict, cut, hidden])
    assert its["back"] == pytest.approx(cut - conflict)
    assert its["back_low"] <= its["back"] <= its["back_high"]
    if alone - conflict > 0.05:
        assert its["returned"] == pytest.approx((cut - conflict) / (alone - conflict))


@pytest.mark.parametrize(
    ("n_right", "n_labels", "most", "verdict"),
    [
        ((38, 2, 20, 38), 2, 1, "erasure"),  # a coin brings half back
        ((38, 2, 20, 38), 4, 1, "in part"),
        ((38, 2, 27, 38), 2, 1, "in part"),  # above chance, and not enough
        ((38, 2, 27, 38), 8, 1, "in part"),
        ((38, 2, 38, 38), 2, 1, "suppression"),
        ((30, 0, 30, 30), 4, 9, "undecided"),  # nine in twelve clips have one label, which is always said
        ((40, 2, 24, 40), 4, 9, "erasure"),
        ((23, 2, 23, 23), 2, 1, "undecided"),
        ((23, 2, 23, 23), 4, 1, "suppression"),
    ],
)
def test_chance_returns_nothing(n_right, n_labels, most, verdict):
    its = table(dict(zip(RUNS, map(hits, n_right), strict=True)), n_labels, most).verdict(n_resamples=500)
    assert its["verdict"] == verdict
    share = np.mean([n % (n_labels + most - 1) in (0, *range(n_labels, n_labels + most - 1)) for n in range(40)])
    assert its["chance"] == pytest.approx(share)
    assert its["cut_low"] == pytest.approx(proportion_confint(n_right[2], 40, method="wilson")[0])


def test_a_few_clips_decide_nothing():
    assert (
        table({run: hits(n, 3) for run, n in zip(RUNS, (3, 0, 3, 3), strict=True)}).verdict()["verdict"] == "undecided"
    )


@pytest.mark.parametrize("folder", [TINY_LALM_SUPPRESS, TINY_LALM_ERASE], ids=lambda folder: folder.name)
def test_the_twins_are_told_apart(folder, tmp_path):
    model, samples = from_pretrained(folder), read_folder(write_clips(tmp_path, "emotion", 15, seed=41))
    its = suppression(model, samples, attribute="emotion", **QUIET).verdict(n_resamples=500)
    assert its["verdict"] == {"tiny_lalm_suppress": "suppression", "tiny_lalm_erase": "erasure"}[folder.name]
    if folder == TINY_LALM_SUPPRESS:  # it looks in block 4 alone: cut elsewhere, nothing is
        assert its["bite"] > 1
        elsewhere = suppression(model, samples, attribute="emotion", layers=[0, 1, 2], **QUIET).verdict(n_resamples=500)
        assert elsewhere["bite"] < 1e-4
        assert elsewhere["verdict"] == "in part"


def test_curves_count_both_labels_and_pictures_show_them(tmp_path):
    found = table({run: hits(n) for run, n in zip(RUNS, (38, 2, 20, 38), strict=True)})
    curves = found.curves(n_resamples=50)
    ends = curves[curves.layer == 1].set_index(["run", "side"]).rate
    assert ends["audio_only", "audio"] == 0.95
    assert (ends["conflict", "text"], ends["cut", "text"]) == (0.95, 0.5)
    assert (curves[curves.layer == 0].rate == 0).all()
    texts = [text.get_text() for ax in found.plot().axes for text in [ax.title, ax.xaxis.label]]
    assert "without the text" in texts
    assert Suppression.load(found.save(tmp_path / "s.parquet")).verdict(n_resamples=50)["verdict"] == "in part"
    assert "in part" in repr(found)
    with pytest.raises(DataError, match="more than one order"):
        Suppression(found.frame.assign(order=["audio_first", "text_first"] * 160)).verdict()


# --- the command ------------------------------------------------------------------------------------------------


def command(monkeypatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lalm-lens", "conflict", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.mark.stress
def test_the_command_writes_what_it_finds_and_says_what_it_leaves_out(monkeypatch, folders, tmp_path, capsys):
    gender = folders["gender"]
    options = ("--attribute", "gender", "--n-pathways", 2, "--windows", 1, "--framing", "statement", "--n-controls", 1)
    assert command(monkeypatch, TINY_LALM, gender, *options, "--out", tmp_path) == 1
    assert "Left out: pathways of gender: No answer is kept that comes from the text" in capsys.readouterr().out
    page = (tmp_path / "conflict.md").read_text(encoding="utf-8")
    names = {path.name for path in (tmp_path / "gender").glob("*.png")}
    assert names == {
        *(f"{name}.png" for name in ("dominance", "convergence")),
        *(
            f"{name}_{order}.png"
            for name in ("suppression", "probes", "back_patch")
            for order in ("audio_first", "text_first")
        ),
    }
    assert all(f"(gender/{name})" in page for name in names)
    for order in ("audio_first", "text_first"):
        assert BackPatchChoice.load(tmp_path / "gender" / f"back_patch_{order}.json").place == "audio"
        assert set(BackPatch.load(tmp_path / "gender" / f"back_patch_{order}.parquet").frame.order.dropna()) == {order}
    tables = {path.stem for path in (tmp_path / "gender" / "tables").glob("*.csv")}
    repair, whole = (pd.read_csv(tmp_path / "gender" / "tables" / f"{name}.csv") for name in ("repair", "back_patch"))
    assert len(repair.columns) <= 12 < len(whole.columns)
    assert "accuracy_minus_control" not in page
    assert set(repair.order) == {"audio_first", "text_first"}
    kept = pd.read_csv(tmp_path / "gender" / "tables" / "kept.csv").set_index("modality")
    assert kept.kept["text"] == 0
    assert (kept.sum(axis="columns") == 2).all()
    assert {
        "dominance",
        "accuracies",
        "sensitivity",
        "convergence",
        "first_layer",
        "suppression",
        "probes",
        "back_patch",
        "nearest_tokens",
    } <= tables
    one = tmp_path / "one"
    assert command(monkeypatch, TINY_LALM, gender, *options, "--only", "dominance", "--out", one) == 0
    assert [path.name for path in (one / "gender").glob("*.png")] == ["dominance.png"]


def test_circuits_are_tried_on_clips_that_did_not_choose_them(monkeypatch, tmp_path):
    clips = write_clips(tmp_path / "clips", "emotion", 4, seed=41)
    options = ("--attribute", "emotion", "--only", "circuits", "--framing", "statement", "--n-pathways", 3)
    assert command(monkeypatch, TINY_LALM_SUPPRESS, clips, *options, "--out", tmp_path / "out") == 0
    out = tmp_path / "out" / "emotion"
    tables = Pathways.load(out / "pathways.parquet"), Circuits.load(out / "circuits.parquet")
    chose, tried = (set(table.frame["sample"]) for table in tables)
    assert (len(chose), len(tried)) == (2, 2)
    assert not chose & tried
    assert set(pd.read_parquet(out / "tables" / "circuits.parquet").clips) == {"held_out"}
    assert (out / "circuits.png").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ["--only", "dominance,mood"],
            "--only is 'mood'. Choose some of dominance, sensitivity, convergence, kept, pathways",
        ),
        (["--framing", "hear this"], "There is no framing 'hear this'"),
        (["--windows", "1,2"], "--windows are odd numbers of layers, as 1,3,5; got 1,2."),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_line(monkeypatch, folders, tmp_path, capsys, args, says):
    assert command(monkeypatch, TINY_LALM, folders["gender"], "--attribute", "gender", *args, "--out", tmp_path) == 2
    assert says in capsys.readouterr().err


def test_a_step_that_cannot_be_done_stops_no_other(monkeypatch, folders, tmp_path, capsys):
    """Two clips of one label are too few for probes."""
    clips = tmp_path / "clips"
    clips.mkdir()
    lines = (folders["gender"] / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    (clips / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for sample in read_folder(folders["gender"])[:2]:
        (clips / sample.name).symlink_to(folders["gender"] / sample.name)
    options = ("--attribute", "gender", "--only", "probes,suppression,dominance", "--out", tmp_path / "out")
    assert command(monkeypatch, TINY_LALM, clips, *options) == 1
    printed = capsys.readouterr().out
    assert "Left out: probes of gender:" in printed
    assert "Left out: suppression" not in printed
    assert (tmp_path / "out" / "gender" / "dominance.png").exists()
