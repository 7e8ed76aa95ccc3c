"""What docs/audio_visual.md says runs, on the tiny model that sees."""

import json
import re
from pathlib import Path

import PIL.Image
import pytest
import torch

from lalm_lens import Sample, from_pretrained, read_audio_visual
from lalm_lens.assets import TINY_LALM_AV
from lalm_lens.assets.audio_visual.clips import write_av_clips
from lalm_lens.experiments.knockout_generation import first_named

pytestmark = pytest.mark.numbers

PAGE = Path(__file__).parent.parent / "docs" / "audio_visual.md"
NEEDED = ("photos", "captions", "cosine", "names_sound", "names_picture")  # that the page says are one's own
LESS = {"n=72": "n=12", "stacks=stacks": "stacks=stacks, n_folds=2, n_controls=0"}


def named(text: str, label: str) -> float:
    return float(first_named(text, [label]) is not None)


def test_the_snippets_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in NEEDED)
    model, folder = from_pretrained(TINY_LALM_AV), write_av_clips(Path("clips"), n=18)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    read = [its for its in read_audio_visual(folder, model.processor) if its.label in ("cat", "cow")]
    own = {
        "photos": {row["file_name"]: PIL.Image.open(folder / row["image"]) for row in rows},
        "captions": {row["file_name"]: torch.randn(4) for row in rows},
        "cosine": lambda a, b: float(torch.cosine_similarity(a, b, dim=0)),
        "names_sound": named,
        "names_picture": named,
    }
    names: dict = {**own, "model": model, "samples": [Sample(its.name, its.label, its.waveform) for its in read]}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for block in blocks:
        for much, little in LESS.items():
            block = block.replace(much, little)
        exec(block, names)
        names |= {name: names[name][:2] for name in ("samples", "pairs")}  # few, and of two labels
    assert len(blocks) == 5
    assert all(page.count(much) == 1 for much in LESS)
    assert {path.name for path in tmp_path.glob("*.png")} == {"shift.png", "heard.png", "captions.png", "cut.png"}
    assert len(names["captions"].frame) == 2 * 2 * 7
    assert len(names["shift"].frame["sample"].unique()) == 2
