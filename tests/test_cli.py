"""The command line as a user has it."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from lalm_lens import cli
from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips
from lalm_lens.results import CausalTrace

PNG = b"\x89PNG"


def lalm_lens(monkeypatch, *args: object) -> int:
    """Run the command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["lalm-lens", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), "gender", 2, seed=3)


def is_whole(out: Path, attributes: tuple[str, ...], n_clips: int) -> CausalTrace:
    trace = CausalTrace.load(out / "trace.parquet")
    assert tuple(trace.frame.attribute.unique()) == attributes
    assert trace.frame.groupby("attribute")["sample"].nunique().eq(n_clips).all()
    for name in ("layers", *(f"tokens_{attribute}" for attribute in attributes)):
        assert (out / f"{name}.png").read_bytes().startswith(PNG)
        assert f"{name}.png" in (out / "report.html").read_text(encoding="utf-8")
    return trace


def test_one_clip_is_traced(monkeypatch, folder, tmp_path, capsys):
    clip = folder / "male_000.wav"
    code = lalm_lens(
        monkeypatch, "trace", TINY_LALM, clip, "--label", "male", "--attribute", "gender", "--out", tmp_path / "new"
    )
    assert code == 0
    trace = is_whole(tmp_path / "new", ("gender",), 1)
    assert trace.frame["sample"].unique().tolist() == ["male_000.wav"]
    assert str(tmp_path / "new" / "trace.parquet") in capsys.readouterr().out


def test_a_folder_is_traced(monkeypatch, folder, tmp_path):
    assert lalm_lens(monkeypatch, "trace", TINY_LALM, folder, "--attribute", "gender", "--out", tmp_path) == 0
    trace = is_whole(tmp_path, ("gender",), 2)
    assert sorted(trace.frame["sample"].unique()) == ["female_000.wav", "male_000.wav"]


def test_the_demo_traces_all_four_attributes(monkeypatch, tmp_path, capsys):
    assert lalm_lens(monkeypatch, "demo", "--out", tmp_path, "--clips", 2) == 0
    is_whole(tmp_path, ("gender", "language", "emotion", "animal"), 2)
    assert len(list((tmp_path / "clips").rglob("*.wav"))) == 8
    assert "fusion_layer" in capsys.readouterr().out


def test_the_dtype_is_that_of_the_weights(monkeypatch, folder, tmp_path):
    p_clean = []
    for dtype in ("float32", "bfloat16"):
        args = ("--attribute", "gender", "--out", tmp_path / dtype, "--dtype", dtype)
        assert lalm_lens(monkeypatch, "trace", TINY_LALM, folder, *args) == 0
        p_clean.append(CausalTrace.load(tmp_path / dtype / "trace.parquet").frame.p_clean.iloc[0])
    assert 0 < abs(p_clean[0] - p_clean[1]) < 0.05


def test_without_matplotlib_nothing_is_begun(monkeypatch, folder, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "lalm_lens.plots", raising=False)
    monkeypatch.delattr("lalm_lens.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert lalm_lens(monkeypatch, "trace", TINY_LALM, folder, "--attribute", "gender", "--out", tmp_path / "o") == 2
    assert "pip install 'lalm_lens[plots]'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def broken(kind: str, folder: Path, tmp_path: Path) -> list[object]:
    """The command line for one wrong input."""
    clip = folder / "male_000.wav"
    args: dict[str, object] = {"model": TINY_LALM, "clips": clip, "--label": "male", "--attribute": "gender"}
    wrong = tmp_path / "wrong.wav"
    if kind == "no such file":
        args["clips"] = tmp_path / "nowhere.wav"
    elif kind == "empty":
        soundfile.write(wrong, np.zeros(0), 16_000)
        args["clips"] = wrong
    elif kind == "non-finite":
        soundfile.write(wrong, np.full(16_000, np.inf), 16_000, "FLOAT")
        args["clips"] = wrong
    elif kind == "not audio":
        wrong.write_text("hello")
        args["clips"] = wrong
    elif kind == "too long":
        soundfile.write(wrong, np.zeros(16_000 * 40), 16_000)
        args["clips"] = wrong
    elif kind == "unknown label":
        args["--label"] = "purple"
    elif kind == "no label":
        del args["--label"]
    elif kind == "label for a folder":
        args["clips"] = folder
    elif kind == "unknown attribute":
        args["--attribute"] = "colour"
    elif kind == "no such model":
        args["model"] = tmp_path / "no_model"
    elif kind == "wrong model type":
        shutil.copytree(TINY_LALM, tmp_path / "model")
        path = tmp_path / "model" / "config.json"
        path.write_text(path.read_text().replace('"model_type": "qwen2_audio"', '"model_type": "bert"'))
        args["model"] = tmp_path / "model"
    elif kind == "folder without metadata":
        del args["--label"]
        args["clips"] = TINY_LALM
    elif kind == "clip listed twice":
        del args["--label"]
        args["clips"] = tmp_path / "clips"
        shutil.copytree(folder, args["clips"])
        rows = (folder / "metadata.jsonl").read_text()
        (tmp_path / "clips" / "metadata.jsonl").write_text(rows + rows)
    elif kind == "no such device":
        args["--device"] = "abacus"
    positional = [args.pop("model"), args.pop("clips")]
    return ["trace", *positional, *(part for pair in args.items() for part in pair)]


WRONG = {
    "no such file": "There is nothing at",
    "empty": "holds no samples",
    "non-finite": "NaN or infinity",
    "not audio": "not readable audio",
    "too long": "this model hears 2.0 s",
    "unknown label": "male, female",
    "no label": "--label",
    "label for a folder": "metadata.jsonl",
    "unknown attribute": "gender, language, emotion, animal",
    "no such model": "config.json",
    "wrong model type": "no conversion for model type 'bert'",
    "folder without metadata": "metadata.jsonl",
    "clip listed twice": "is listed 2 times",
    "no such device": "abacus",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_input_ends_in_one_line(monkeypatch, folder, tmp_path, capfd, kind):
    args = broken(kind, folder, tmp_path)
    capfd.readouterr()
    code = lalm_lens(monkeypatch, *args, "--out", tmp_path / "out")
    errors = [line for line in capfd.readouterr().err.splitlines() if "clip/s" not in line and "Loading" not in line]
    assert code == 2
    assert len(errors) == 1, errors
    assert errors[0].startswith("lalm-lens: ")
    assert WRONG[kind] in errors[0]
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_refused_first(monkeypatch, folder, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    args = ("trace", TINY_LALM, folder, "--attribute", "gender", "--out", tmp_path / "file" / "out")
    assert lalm_lens(monkeypatch, *args) == 2
    assert "Nothing can be written" in capsys.readouterr().err


def test_help_of_every_command_says_how_to_use_it():
    for command, option in (((), "trace"), (("trace",), "--attribute"), (("demo",), "--clips")):
        done = subprocess.run(
            [sys.executable, "-m", "lalm_lens", *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert option in done.stdout
        assert "Examples" in done.stdout
        assert "lalm-lens trace" in done.stdout
