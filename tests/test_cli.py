"""The command line as a user has it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from lalm_lens import cli
from lalm_lens import verify as lalm_lens_verify
from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES, Attribute, Form
from lalm_lens.commands.options import CHOICES
from lalm_lens.corrupt import OtherClip
from lalm_lens.datasets import read_folder
from lalm_lens.engine.plan import Engine
from lalm_lens.experiments.causal_trace import Audio, causal_trace
from lalm_lens.experiments.recovery import Direction
from lalm_lens.interventions import BlockSite
from lalm_lens.loading import from_pretrained
from lalm_lens.metrics import Metric, Predict
from lalm_lens.results import CausalTrace, GridKind
from lalm_lens.transcripts import Side

pytestmark = pytest.mark.numbers

PNG = b"\x89PNG"
GOLDEN = Path(__file__).parent / "golden"


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
    for name in ("layers", "segments", *(f"tokens_{attribute}" for attribute in attributes)):
        assert (out / f"{name}.png").read_bytes().startswith(PNG)
        assert f"{name}.png" in (out / "trace.html").read_text(encoding="utf-8")
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
    for name in ATTRIBUTES:
        assert (tmp_path / f"known_{name}.png").read_bytes().startswith(PNG)
        assert f"known_{name}.png" in (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert len(list((tmp_path / "clips").rglob("*.wav"))) == 8
    assert "fusion_layer" in capsys.readouterr().out


def test_an_own_question_is_traced_as_asked(monkeypatch, folder, tmp_path):
    settings = {
        "--question": "Who is it?",
        "--labels": "male, female",
        "--prefix": "It is",
        "--form": "P2",
        "--site": "attn_out",
        "--metric": "logit_difference",
        "--predict": "vocab",
        "--direction": "noise",
        "--corrupt": "clip",
        "--seed": 3,
    }
    options = [part for pair in settings.items() for part in pair]
    code = lalm_lens(monkeypatch, "trace", TINY_LALM, folder, *options, "--no-label-space", "--out", tmp_path)
    assert code == 0
    frame = is_whole(tmp_path, ("own",), 2).frame
    columns = ["form", "site", "metric", "predict", "direction"]
    expected = [["P2", "attn_out", "logit_difference", "vocab", "noise"]]
    assert frame[columns].drop_duplicates().to_numpy().tolist() == expected
    assert set(frame.corruption) == {"other_clip male_000.wav", "other_clip female_000.wav"}
    assert frame[frame.text_index == -2].token.unique().tolist() == ["It"]
    own = Attribute("own", "Who is it?", ("male", "female"), "It is")
    same = causal_trace(
        from_pretrained(TINY_LALM),
        read_folder(folder),
        attribute=own,
        form="P2",
        site="attn_out",
        corruption=OtherClip(3),
        metric="logit_difference",
        predict="vocab",
        direction="noise",
        label_space=False,
        progress=False,
    )
    pd.testing.assert_frame_equal(same.to_frame(), frame)


def test_a_model_reads_the_transcripts_beside_the_labels(monkeypatch, tmp_path, capsys):
    rng, checkpoint = np.random.default_rng(0), GOLDEN / "desta2" / "checkpoint"
    soundfile.write(tmp_path / "a.wav", rng.normal(0, 0.1, 20_000), 16_000)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav", "label": "male", "transcript": " a test"}')
    parts = ("--part", f"whisper={checkpoint / 'whisper'}", "--part", f"llm={checkpoint / 'llama'}")
    args = ("trace", checkpoint, tmp_path, "--attribute", "gender", *parts, "--kinds", "token", "--out", tmp_path / "o")
    how = ("--transcript", "clean", "--transcript-is", "text")
    assert lalm_lens(monkeypatch, *args, *how) == 0
    frame = CausalTrace.load(tmp_path / "o" / "trace.parquet").frame
    assert frame[["transcript", "transcript_is"]].drop_duplicates().to_numpy().tolist() == [["clean", "text"]]
    rows = frame[(frame.region == "transcript") & (frame.layer == 0)]
    assert "".join(rows.token) == " a test"
    assert "Transcript: clean, counted as text" in (tmp_path / "o" / "trace.html").read_text(encoding="utf-8")
    assert lalm_lens(monkeypatch, *args, "--transcript", "fillr") == 2
    assert "did you mean filler?" in capsys.readouterr().err


def test_noise_has_the_ratio_that_was_asked_for(monkeypatch, folder, tmp_path):
    args = ("--attribute", "gender", "--corrupt", "noise", "--snr-db", -5, "--out", tmp_path)
    assert lalm_lens(monkeypatch, "trace", TINY_LALM, folder, *args) == 0
    assert set(CausalTrace.load(tmp_path / "trace.parquet").frame.corruption) == {"white_noise -5 dB"}


def test_long_clips_are_cut_on_demand(monkeypatch, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, duration_s in (("long", 3.0), ("short", 1.0)):
        soundfile.write(tmp_path / f"{name}.wav", rng.normal(0, 0.1, int(16_000 * duration_s)), 16_000)
    rows = [json.dumps({"file_name": f"{name}.wav", "label": "male"}) for name in ("long", "short")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    args = ("--attribute", "gender", "--cut", "--out", tmp_path / "out")
    assert lalm_lens(monkeypatch, "trace", TINY_LALM, tmp_path, *args) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "is cut" in line]
    assert lines == ["long.wav is cut from 3.00 s to 2.00 s, which is all the model hears."]
    assert CausalTrace.load(tmp_path / "out" / "trace.parquet").frame["sample"].nunique() == 2


@pytest.mark.parametrize(
    ("option", "type_"),
    {
        "form": Form,
        "site": BlockSite,
        "metric": Metric,
        "predict": Predict,
        "direction": Direction,
        "kinds": GridKind,
        "audio": Audio,
        "transcript_is": Side,
        "engine": Engine,
    }.items(),
)
def test_the_choices_are_those_of_the_library(option, type_):
    assert CHOICES[option] == get_args(type_)


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


def test_verify_ends_with_0_if_all_agrees_and_with_1_if_not(monkeypatch, folder, capsys):
    assert lalm_lens(monkeypatch, "verify", TINY_LALM, "--clip", folder / "male_000.wav") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == "what largest difference hf_difference rms hf_rms agrees".split()
    assert shown[-1].startswith("tiny_lalm agrees with transformers in torch.float32 (largest difference ")
    load_hf = lalm_lens_verify.load_hf

    def spoilt(*args: object):
        hf = load_hf(*args)
        hf.lm_head.weight.data[0] += 1
        return hf

    monkeypatch.setattr(lalm_lens_verify, "load_hf", spoilt)
    assert lalm_lens(monkeypatch, "verify", TINY_LALM) == 1
    assert "DIFFERS from transformers in torch.float32: first in logits, in 1 of 13" in capsys.readouterr().out


def test_info_needs_no_weights(monkeypatch, tmp_path, capsys):
    shutil.copy(TINY_LALM / "config.json", tmp_path / "config.json")
    assert lalm_lens(monkeypatch, "info", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "hears          2 s: 50 audio tokens, 25 a second" in shown
    assert "blocks.{0..7}.hook_resid_post  " in shown


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
    elif kind in TRACING:
        args = broken_tracing(kind, args, folder, wrong)
    positional = [args.pop("model"), args.pop("clips")]
    return ["trace", *positional, *(part for pair in args.items() for part in pair if part is not None)]


def broken_tracing(kind: str, args: dict[str, object], folder: Path, wrong: Path) -> dict[str, object]:
    """The wrong inputs of prompts, corruptions and tracing; an option without a value has None."""
    own: dict[str, object] = {"--question": "Who?", "--labels": "male,female", "--prefix": "Answer:"}
    one_label = {name: value for name, value in args.items() if name != "--label"} | {"clips": wrong.parent / "one"}
    asked = {name: value for name, value in args.items() if name != "--attribute"} | own
    if kind == "clips of one label":
        write_clips(wrong.parent / "one", "gender", 2, seed=3)
        row = '{"file_name": "male_000.wav", "label": "male"}'
        (wrong.parent / "one" / "metadata.jsonl").write_text(row)
    if kind == "too long and not cut":
        soundfile.write(wrong, np.random.default_rng(0).normal(0, 0.1, 16_000 * 3), 16_000)
    return {
        "label collision": asked | {"--labels": "male,xa,xb"},
        "equal labels": asked | {"--labels": "male,female,male"},
        "one option": asked | {"--labels": "male"},
        "no options": asked | {"--labels": ""},
        "an empty option": asked | {"--labels": "male,,female"},
        "empty question": asked | {"--question": " "},
        "empty prefix": asked | {"--prefix": ""},
        "question without prefix": {name: value for name, value in asked.items() if name != "--prefix"},
        "nothing asked": {name: value for name, value in args.items() if name != "--attribute"},
        "asked twice": args | own,
        "unknown form": args | {"--form": "P9"},
        "unknown site": args | {"--site": "resid"},
        "unknown metric": args | {"--metric": "accuracy"},
        "unknown predict": args | {"--predict": "all"},
        "unknown direction": args | {"--direction": "up"},
        "unknown corruption": args | {"--corrupt": "hiss"},
        "clips of one label": one_label | {"--corrupt": "clip"},
        "snr without noise": args | {"--snr-db": "3"},
        "transcript of another side": args | {"--transcript-is": "both"},
        "transcript that nobody reads": args | {"--transcript": "clean"},
        "snr that is no number": args | {"--corrupt": "noise", "--snr-db": "nan"},
        "too long and not cut": args | {"clips": wrong},
    }[kind]


TRACING = {
    "label collision": "['xa', 'xb'] begin with the same token",
    "equal labels": "'male' is given 2 times",
    "one option": "two labels or more",
    "no options": "two labels or more",
    "an empty option": "Leave out empty labels",
    "empty question": "Write one, or use P1",
    "empty prefix": "Give at least one word",
    "question without prefix": "--labels and --prefix",
    "nothing asked": "--attribute gender|language|emotion|animal",
    "asked twice": "in place of --attribute",
    "unknown form": "Choose one of P1, P2, P3",
    "unknown site": "attn_out, mlp_out",
    "unknown metric": "label_probability, label_score",
    "unknown predict": "labels, vocab",
    "unknown direction": "denoise, noise",
    "unknown corruption": "silence, noise, clip",
    "clips of one label": "Add clips of a different label",
    "snr without noise": "--snr-db is for --corrupt noise",
    "snr that is no number": "cannot be heard",
    "transcript of another side": "--transcript-is is 'both'. Choose one of audio, text",
    "transcript that nobody reads": "a qwen2_audio model hold no transcript",
    "too long and not cut": "3.00 s",
}
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
    **TRACING,
}


def refusal(monkeypatch, capfd, *args: object) -> str:
    """The one line in which a command ends that a user got wrong."""
    capfd.readouterr()
    code = lalm_lens(monkeypatch, *args)
    out, err = capfd.readouterr()
    bars = ("clip/s", "Loading weights", "tensor/s")
    errors = [line for line in err.splitlines() if line and not any(bar in line for bar in bars)]
    assert code == 2
    assert not out
    assert len(errors) == 1, errors
    assert errors[0].startswith("lalm-lens: ")
    return errors[0]


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_input_ends_in_one_line(monkeypatch, folder, tmp_path, capfd, kind):
    args = broken(kind, folder, tmp_path)
    assert WRONG[kind] in refusal(monkeypatch, capfd, *args, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


TONE = np.sin(np.arange(16_000) / 20)
WRONG_CLIPS = {
    "NaN or infinity": lambda path: soundfile.write(path, TONE * np.nan, 16_000, "FLOAT"),
    "clip.wav of 29 ms is too short": lambda path: soundfile.write(path, TONE[:464], 16_000),
    "is digital silence": lambda path: soundfile.write(path, 0 * TONE, 16_000),
    "is not readable audio": lambda path: path.write_bytes(b"RIFF" + bytes(40)),
    "There is no audio file": lambda path: None,
}
GOOD_ROW = '{"file_name": "clip.wav", "label": "male"}'
WRONG_METADATA = {
    "line 2 is not JSON": GOOD_ROW + "\n{file_name: clip.wav}",
    "needs the keys file_name and label": '{"file_name": "clip.wav"}',
    "file_name and label must be text": '{"file_name": "clip.wav", "label": 3}',
    "needs the keys file_name and label, got: [1, 2]": "[1, 2]",
    "must be a path inside the folder": '{"file_name": "../clip.wav", "label": "male"}',
    "no clip is listed": "",
    "is not UTF-8 text": b"\xff\xfe",
}


@pytest.mark.parametrize("message", WRONG_CLIPS | WRONG_METADATA)
def test_a_wrong_folder_of_clips_ends_in_one_line(monkeypatch, tmp_path, capfd, message):
    (tmp_path / "clips").mkdir()
    WRONG_CLIPS.get(message, lambda path: soundfile.write(path, TONE, 16_000))(tmp_path / "clips" / "clip.wav")
    metadata = WRONG_METADATA.get(message, GOOD_ROW)
    (tmp_path / "clips" / "metadata.jsonl").write_bytes(metadata if isinstance(metadata, bytes) else metadata.encode())
    args = ("trace", TINY_LALM, tmp_path / "clips", "--attribute", "gender", "--out", tmp_path / "out")
    assert message in refusal(monkeypatch, capfd, *args)
    assert not (tmp_path / "out").exists()


def test_audio_of_any_depth_and_number_of_channels_is_traced(monkeypatch, tmp_path):
    rows = []
    for subtype, n_channels in (("PCM_U8", 1), ("PCM_24", 6), ("ULAW", 2)):
        soundfile.write(tmp_path / f"{subtype}.wav", np.stack([0.5 * TONE] * n_channels, 1), 8_000, subtype)
        rows.append(json.dumps({"file_name": f"{subtype}.wav", "label": "male"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    args = ("trace", TINY_LALM, tmp_path, "--attribute", "gender", "--out", tmp_path / "out")
    assert lalm_lens(monkeypatch, *args) == 0
    is_whole(tmp_path / "out", ("gender",), 3)


def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text((model / name).read_text().replace(old, new, 1))


def with_tensors(**changed: torch.Tensor | None) -> Callable[[Path], object]:
    def rewrite(model: Path) -> None:
        tensors = load_file(model / "model.safetensors") | {name.replace("__", "."): t for name, t in changed.items()}
        save_file({name: t.clone() for name, t in tensors.items() if t is not None}, model / "model.safetensors")

    return rewrite


def cut(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


INDEX = '{"weight_map": {"lm_head.weight": "model-2-of-2.safetensors"}}'
WRONG_CHECKPOINTS = {
    "not a whole safetensors file": cut,
    "a pickle can run code": lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
    "1 unknown: extra.weight": with_tensors(extra__weight=torch.zeros(3)),
    "1 missing: audio_tower.conv1.bias": with_tensors(audio_tower__conv1__bias=None),
    "audio_tower.conv1.bias is (3,), expected (96,)": with_tensors(audio_tower__conv1__bias=torch.zeros(3)),
    "audio_tower.conv1.bias in model.safetensors is I8: quantised": with_tensors(
        audio_tower__conv1__bias=torch.zeros(96, dtype=torch.int8)
    ),
    "does not know: softcap": edit("config.json", "{", '{"softcap": 30.0,'),
    "config.json is not JSON": edit("config.json", "{", ""),
    "has no config.json": lambda model: (model / "config.json").unlink(),
    "names no model_type": edit("config.json", '"model_type": "qwen2_audio",', ""),
    "names model-2-of-2.safetensors, which is not": lambda model: (model / "model.safetensors.index.json").write_text(
        INDEX
    ),
    "cannot be read (JSONDecodeError": edit("tokenizer.json", "{", ""),
    "cannot be read (Exception: data did not match": edit("tokenizer.json", '"BPE"', '"Nope"'),
    "cannot be read (KeyError": lambda model: (model / "tokenizer.json").write_text("{}"),
    "cannot be read (OSError": lambda model: (model / "processor_config.json").unlink(),
    "chat template cannot be used": lambda model: (model / "chat_template.jinja").write_text("{% if %}"),
    "belongs to another model: it makes 80 mel bins": edit(
        "processor_config.json", '"feature_size": 128', '"feature_size": 80'
    ),
    "came without tokenizer": lambda model: (model / "tokenizer_config.json").unlink(),
}


@pytest.mark.parametrize("message", WRONG_CHECKPOINTS)
def test_a_wrong_checkpoint_ends_in_one_line(monkeypatch, folder, tmp_path, capfd, message):
    shutil.copytree(TINY_LALM, tmp_path / "model")
    WRONG_CHECKPOINTS[message](tmp_path / "model")
    args = ("trace", tmp_path / "model", folder, "--attribute", "gender", "--out", tmp_path / "out")
    assert message in refusal(monkeypatch, capfd, *args)
    assert not (tmp_path / "out").exists()


CONFIG = TINY_LALM / "config.json"
WRONG_USAGE = {
    "No such option: --foo. See lalm-lens info --help.": ("info", TINY_LALM, "--foo"),
    "Missing argument 'clips'. See lalm-lens trace --help.": ("trace", TINY_LALM),
    "Missing option '--out'": ("trace", TINY_LALM, "clip.wav", "--attribute", "gender"),
    "No such command 'listen'. See lalm-lens --help.": ("listen",),
    "'float8' is not one of": ("verify", TINY_LALM, "--dtype", "float8"),
    "unexpected extra argument(s) (there)": ("info", TINY_LALM, "there"),
    "greater than or equal to 2": ("demo", "--clips", 1),
    f"There is no model at {CONFIG}": ("info", CONFIG),
    "tests has no config.json": ("verify", Path(__file__).parent),
    "There is no audio file nowhere.wav": ("verify", TINY_LALM, "--clip", "nowhere.wav"),
    f"Nothing can be written to {CONFIG}": ("demo", "--out", CONFIG),
}


@pytest.mark.parametrize("message", WRONG_USAGE)
def test_a_wrong_command_line_ends_in_one_line(monkeypatch, capfd, message):
    assert message in refusal(monkeypatch, capfd, *WRONG_USAGE[message])


def test_no_arguments_show_the_help(monkeypatch, capsys):
    assert lalm_lens(monkeypatch) == 2
    out, err = capsys.readouterr()
    assert "Look inside large audio language models" in out
    assert not err


def test_an_output_folder_that_cannot_be_written_is_refused_first(monkeypatch, folder, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    args = ("trace", TINY_LALM, folder, "--attribute", "gender", "--out", tmp_path / "file" / "out")
    assert lalm_lens(monkeypatch, *args) == 2
    assert "Nothing can be written" in capsys.readouterr().err


def test_help_of_every_command_says_how_to_use_it():
    for command, option in (
        ((), "trace"),
        (("trace",), "--attribute"),
        (("demo",), "--clips"),
        (("verify",), "--clip"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "lalm_lens", *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert option in done.stdout
        assert "Examples" in done.stdout
        assert "lalm-lens trace" in done.stdout
