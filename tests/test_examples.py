"""The examples run, and say what they are there to show."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from test_report import Page

from lalm_lens import cli, study
from lalm_lens.assets import TINY_LALM, TINY_LALM_AV
from lalm_lens.assets.audio_visual.clips import write_av_clips
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.datasets import list_folder
from lalm_lens.study import Study

pytestmark = pytest.mark.numbers

EXAMPLES = Path(__file__).parent.parent / "examples"
SLOW = {"transformer_lens_hears.py"}
SAYS = {
    "trace_one_clip.py": "CausalTrace(",
    "transformer_lens_hears.py": "silence, one state of the clean run: (' hen.',)",
}

# What the tiny models cannot do: one reads no transcript, and its tokens without a space are letters; in most blocks of
# the other a position looks at itself alone.
UNLIKE_TINY = {
    "audiolens.toml": ("keys='transcript'", "their first token cannot tell them apart"),
    "audio_visual.toml": ("no key to look at",),
}


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_every_study_can_be_read(path):
    its = Study.read(path)
    assert its.experiments
    assert {name for dataset in its.datasets for name in dataset.attributes} <= set(its.attributes)


def videos(folder: Path) -> None:
    """Clips with one frame each."""
    path = write_av_clips(folder, 9, duration_s=0.5) / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    shown = [{**row, "frames": [row["image"]], "fps": 1, "image": None, "seen_label": None} for row in rows]
    path.write_text("\n".join(map(json.dumps, shown)))


def not_measured(name: str, folder: Path, monkeypatch, capsys) -> list[str]:
    """What a dry run of a study says it could not measure, the tiny model in place of all of its models."""
    clips = {
        name: list_folder(write_clips(folder / "clips" / name, name, 2, seed=5, duration_s=0.5)) for name in ATTRIBUTES
    }
    monkeypatch.setattr(study, "rows_of_sakura", lambda attribute, root: clips[attribute.name])
    videos(folder / "videos")
    path = Path(shutil.copy(EXAMPLES / name, folder))
    for model in Study.read(path).models:
        (folder / model.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / model.path).symlink_to(TINY_LALM_AV if "Omni" in model.path else TINY_LALM)
    monkeypatch.setattr(sys, "argv", ["lalm-lens", "run", str(path), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "0 of them finished" in said
    assert "Still to do: about" in said
    assert ", 00:0" in said  # seconds that were measured
    return [line for line in said.splitlines() if "not measured: " in line]


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.toml") if path.stem != "tiny"))
def test_every_study_of_a_paper_can_be_counted_and_measured(name, tmp_path, monkeypatch, capsys):
    left = not_measured(name, tmp_path, monkeypatch, capsys)
    assert [line for line in left if not any(words in line for words in UNLIKE_TINY.get(name, ()))] == []


def test_a_study_goes_from_nothing_to_its_report(tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").mkdir()
    (tmp_path / "lalm_lens").symlink_to(EXAMPLES.parent / "lalm_lens")
    path = tmp_path / "examples" / "tiny.toml"
    path.write_text((EXAMPLES / "tiny.toml").read_text().replace("made = 10", "made = 2").replace('"P2", ', ""))
    monkeypatch.setattr(sys, "argv", ["lalm-lens", "run", str(path), "--report"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    report = tmp_path / "examples" / "tiny" / "report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(report)
    page = Page(report)
    cards = page.data["cards"]
    assert {card["title"] for card in cards} == {"tiny_lalm: gender, P3", "tiny_lalm: animal, P3"}
    assert all({"clean", "corrupted", "mel"} <= set(card) for card in cards)
    assert all({"token", "audio_window"} <= {its["kind"] for its in card["maps"]} for card in cards)
    assert any(its["words"] for card in cards for its in card["maps"])
    assert len({(card["title"], card["sample"]) for card in cards}) == len(cards)
    assert [its.get("heard") for its in page.data["curves"]] == ["silence", "other clip"] * 2 + [None] * 2


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.stress] * (name in SLOW)) for name in SAYS])
def test_an_example_says_what_it_shows(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out
