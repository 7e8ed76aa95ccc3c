"""`lalm-lens av`: figures and tables of a folder of clips with pictures, on a tiny random model."""

import json
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pandas as pd
import PIL.Image
import pytest
import soundfile
import torch
from families import FAMILIES
from matplotlib.figure import Figure
from reference import chirps
from test_omni import photos

from lalm_lens import caption_fidelity, cli, from_pretrained, knockout_generation, read_audio_visual
from lalm_lens.assets import TINY_LALM_AV
from lalm_lens.assets.audio_visual.clips import write_av_clips
from lalm_lens.commands.av import drawn, independent, read_pairs
from lalm_lens.counterfactual import Swapped
from lalm_lens.errors import DataError
from lalm_lens.experiments.attention_share import AttentionShare
from lalm_lens.experiments.caption_fidelity import CaptionFidelity
from lalm_lens.experiments.logit_lens import LogitLens

pytestmark = pytest.mark.numbers

PNG = b"\x89PNG"
LABELS = ("dog", "cat")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("omni")
    FAMILIES["qwen2_5_omni_thinker"].save(folder)
    return folder


def clips(folder: Path, n: int, is_film: bool = False, is_false: bool = False) -> Path:
    """Clips, an image or two frames for each, and a list. Half of the pictures may be false."""
    folder.mkdir()
    rows = []
    for index, clip in enumerate(chirps([0.5] * n)):
        soundfile.write(folder / f"{index}.wav", clip.numpy(), 16_000)
        for frame, photo in enumerate(photos((24, 24), (24, 24))):
            PIL.Image.blend(photo, PIL.Image.new("RGB", (24, 24)), index / n).save(folder / f"{index}_{frame}.png")
        files = [f"{index}_{frame}.png" for frame in range(2)]
        its = {"frames": files, "fps": 2} if is_film else {"image": files[0]}
        its |= {"seen_label": LABELS[index < n // 2]} if is_false else {}
        rows.append({"file_name": f"{index}.wav", "label": LABELS[index % 2], **its})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def av(monkeypatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lalm-lens", "av", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_a_figure_says_of_which_pairs_it_is():
    figures = {half: Figure() for half in ("counterfactual", "factual")}
    for figure in figures.values():
        figure.suptitle("shares")
    named = drawn("shares", figures)
    assert {name: its.get_suptitle() for name, its in named.items()} == {
        "shares_counterfactual": "shares\ncounterfactual pairs: another is seen than is heard",
        "shares_factual": "shares\nfactual pairs: the same is heard and seen",
    }


def test_a_folder_becomes_a_page(monkeypatch, checkpoint, tmp_path, capsys):
    """A judge of one's own says how true a text is."""
    (tmp_path / "my_judge.py").write_text("def judge(text, sample):\n    return 0.25, len(text) % 2\n")
    monkeypatch.chdir(tmp_path)
    data, out = clips(tmp_path / "data", 4, is_false=True), tmp_path / "out"
    how = ("--attribute", "animal", "--max-new-tokens", 1, "--judge", "my_judge:judge", "--n-controls", 0)
    assert av(monkeypatch, checkpoint, data, *how, "--out", out) == 0
    page = (out / "av.md").read_text(encoding="utf-8")
    figures = {path.name for path in (out / "animal").glob("*.png")}
    halves = ("latent_heard", "latent_seen", "shares", "shares_per_token", "knockout", "pairs", "token_shift")
    names = {"probe_heard", "probe_seen", "lens_audio", "lens_image"}
    names |= {f"{name}_{half}" for name in halves for half in ("counterfactual", "factual")}
    assert figures == {f"{name}.png" for name in names}
    for name in figures:
        assert (out / "animal" / name).read_bytes().startswith(PNG)
        assert f"(animal/{name})" in page
    tables = out / "animal" / "tables"
    stems = {path.stem for path in tables.glob("*.csv")}
    assert stems >= {"shares", "latent_heard", "probe_seen", "knockout_factual", "said_factual", "pairs", "token_shift"}
    assert {path.stem for path in tables.glob("*.parquet")} == {path.stem for path in tables.glob("*.md")} == stems
    lens = pd.read_parquet(tables / "lens_image.parquet")
    states = LogitLens.load(out / "animal" / "lens_image.parquet").top()
    for layer, rows in lens.groupby("layer"):
        counted = Counter(states[states.layer == layer].word)
        assert rows.states.tolist() == sorted(counted.values(), reverse=True)[:3]
        assert all(counted[row.word] == row.states for row in rows.itertuples())
    found = CaptionFidelity.load(out / "animal" / "knockout.parquet").frame
    assert (found.audio_before == 0.25).all()
    assert found.groupby(found.label != found.seen_label)["sample"].nunique().to_dict() == {False: 2, True: 2}
    for name in ("shares", "latent_heard", "latent_seen", "pairs", "token_shift"):
        table = pd.read_parquet(tables / f"{name}.parquet")
        assert table.groupby("half").n.unique().map(list).to_dict() == {"counterfactual": [2], "factual": [2]}
    shares = AttentionShare.load(out / "animal" / "shares.parquet")
    false = AttentionShare(shares.frame[shares.frame.label != shares.frame.seen_label]).means()
    shown = pd.read_parquet(tables / "shares.parquet")
    shown = shown[shown.half == "counterfactual"].drop(columns="half")
    pd.testing.assert_frame_equal(shown.reset_index(drop=True), false, check_dtype=False)
    said = pd.read_csv(tables / "said_counterfactual.csv")
    assert said["cut in all layers"].unique().tolist() == [
        "nothing",
        "audio -> generated",
        "image -> generated",
        "query -> generated",
    ]
    printed = capsys.readouterr().out
    assert "Where the model looks while it writes" in printed


def test_counterfactuals_of_heard_videos_are_made_where_none_are_listed(monkeypatch, checkpoint, tmp_path, capsys):
    data, out = clips(tmp_path / "data", 2, is_film=True), tmp_path / "out"
    how = ("--attribute", "animal", "--only", "shares,probes_heard,probes_seen", "--max-new-tokens", 1, "--out", out)
    assert av(monkeypatch, checkpoint, data, *how) == 1
    printed = capsys.readouterr().out
    for its in ("heard", "seen"):
        assert f"Left out: probes_{its} of animal: Probes need two of each label, and " in printed
    shares = pd.read_parquet(out / "animal" / "tables" / "shares.parquet")
    assert set(shares.region) == {"query", "video", "audio", "generated"}
    assert set(shares.n) == {2}
    assert not (out / "animal" / "probe_heard.png").exists()


def test_counterfactuals_are_those_of_ones_own_distance(checkpoint, tmp_path):
    """Each picture with the sound that is furthest from it; beside counterfactuals that are listed there are none."""
    model, data = from_pretrained(checkpoint), clips(tmp_path / "data", 4)

    def distance(seen, heard):
        return float((int(heard.name[0]) - int(seen.name[0])) % 4 == 3)

    made = [its for its in read_pairs(model, data, distance=distance) if its.seen_label != its.label]
    assert [its.heard_clip for its in made] == ["3.wav", "0.wav", "1.wav", "2.wav"]


def test_a_distance_beside_listed_counterfactuals_is_refused(monkeypatch, checkpoint, tmp_path, capfd):
    (tmp_path / "far.py").write_text("def far(seen, heard):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    how = ("--attribute", "animal", "--distance", "far:far", "--only", "lens", "--out", tmp_path / "out")
    assert av(monkeypatch, checkpoint, clips(tmp_path / "data", 2, is_false=True), *how) == 2
    assert "lists counterfactuals, so none are made: leave out --distance" in capfd.readouterr().err


def pair(name: str, heard: str, seen: str) -> Swapped:
    return Swapped(name=name, label=heard, waveform=torch.zeros(0), seen_label=seen, heard_clip=name)


def test_what_is_seen_of_probed_pairs_says_nothing_of_what_is_heard():
    """As many agree as by chance: of each label that is heard, all that are seen are as frequent."""
    cells = list(product("abc", "abc"))
    conflicts = [pair(f"{one}{two}{n}", one, two) for one, two in cells if one != two for n in range(4)]
    agreeing = [pair(f"{label}{n}", label, label) for label in "abc" for n in range(9)]
    found = independent([*agreeing, *conflicts], seed=0)
    assert len(found) == 9 * 4
    assert [its for its in found if its.label != its.seen_label] == conflicts
    assert independent([*agreeing, *conflicts], seed=1) != found
    with pytest.raises(DataError, match="Nothing that is seen is of another label"):
        independent(agreeing, seed=0)
    with pytest.raises(DataError, match="Among 24 conflicts, 12 pairs that agree"):
        independent([*agreeing[:11], *conflicts], seed=0)


def test_cuts_of_what_is_not_seen_anyway_change_nothing_in_bfloat16(checkpoint, tmp_path):
    """Not by rounding either: before and after go the same way."""
    model = from_pretrained(checkpoint, dtype=torch.bfloat16)
    samples = read_audio_visual(clips(tmp_path / "data", 4), model.processor)
    how = {"chains": [("generated", "audio"), ("audio", "image")], "max_new_tokens": 10, "progress": False}
    found = knockout_generation(model, samples, attribute="animal", **how).frame
    assert len(found) == 8
    assert found.text_before.tolist() == found.text_after.tolist()
    assert found.log_p_before.tolist() == found.log_p_after.tolist()
    captions = caption_fidelity(model, samples, judge=lambda *_: (0, 0), **how).frame
    assert captions.text_before.tolist() == captions.text_after.tolist()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--attribute", "animal", "--judge", "json:nothing"), "--judge names a function as module:NAME"),
        (("--attribute", "animal", "--distance", "json:dumps2"), "--distance names a function as module:NAME"),
        (("--attribute", "animal", "--window", 2), "--window is odd"),
        (("--attribute", "animal", "--only", "sights"), "--only is 'sights'"),
        ((), "Say what is asked"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(monkeypatch, checkpoint, tmp_path, capfd, args, says):
    data = clips(tmp_path / "data", 2)
    assert av(monkeypatch, checkpoint, data, "--out", tmp_path / "out", *args) == 2
    assert says in capfd.readouterr().err


def test_images_beside_videos_are_refused(monkeypatch, checkpoint, tmp_path, capfd):
    data, film = clips(tmp_path / "data", 2), clips(tmp_path / "data" / "film", 1, is_film=True)
    row = json.loads((film / "metadata.jsonl").read_text())
    row |= {"file_name": "film/0.wav", "frames": [f"film/{name}" for name in row["frames"]]}
    with (data / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert av(monkeypatch, checkpoint, data, "--attribute", "animal", "--out", tmp_path / "out") == 2
    assert "have an image and others frames" in capfd.readouterr().err


@pytest.mark.stress
def test_the_planted_picture_is_what_keeps_the_sound_from_being_said(monkeypatch, tmp_path):
    """In the tiny trained model pictures win over sounds, by way of the last position."""
    data, out = write_av_clips(tmp_path / "data", 6, seed=3), tmp_path / "out"
    how = ("--attribute", "animal", "--only", "knockout", "--max-new-tokens", 1, "--window", 1)
    assert av(monkeypatch, TINY_LALM_AV, data, *how, "--out", out) == 0
    said = pd.read_csv(out / "animal" / "tables" / "said_counterfactual.csv")
    rate = said.set_index(["cut in all layers", "side"]).rate
    assert (rate["nothing", "audio"], rate["nothing", "video"]) == (0, 1)
    assert (rate["image -> generated", "audio"], rate["image -> generated", "video"]) == (1, 0)
