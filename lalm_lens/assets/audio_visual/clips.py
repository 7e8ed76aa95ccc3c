"""Clips of animals with a picture each, of the same animal or of another: what the tiny audio-visual model is shown."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from lalm_lens.assets.audio_visual.pictures import picture
from lalm_lens.assets.clips import STREAMS, write_clips
from lalm_lens.attributes import ATTRIBUTES

ANIMAL = ATTRIBUTES["animal"]
PICTURES = len(ATTRIBUTES)  # in a seed, where sounds have the number of their attribute


def sight(stream: str, seed: int, index: int, label: str) -> UInt8[np.ndarray, "row column 3"]:
    """The picture of that number, in a stream of its own (`STREAMS`)."""
    return picture(np.random.default_rng([STREAMS[stream], seed, PICTURES, index]), label)


def other_label(stream: str, seed: int, index: int, label: str) -> str:
    """Any label but this one."""
    rng = np.random.default_rng([STREAMS[stream], seed, PICTURES, index, 1])
    return str(rng.choice([other for other in ANIMAL.labels if other != label]))


def write_av_clips(folder: Path, n: int = 18, seed: int = 0, duration_s: float = 1.6) -> Path:
    """Write `n` clips of animals in audiofolder layout, as `write_clips` does, and a picture for each.

    Every second clip is a conflict: its picture is of another animal. In `metadata.jsonl`, `label` is what is heard,
    `image` the picture's file beside the clip (`dog_000.png`, 64 x 64 pixels), and `seen_label` what is seen there. No
    clip and no picture is one that the tiny model was trained or tested on, whatever the seed.
    """
    write_clips(folder, "animal", n, seed, duration_s)
    path = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for index, row in enumerate(rows):
        heard = row["label"]
        seen = other_label("clips", seed, index, heard) if index % 2 else heard
        row |= {"image": Path(row["file_name"]).with_suffix(".png").name, "seen_label": seen}
        PIL.Image.fromarray(sight("clips", seed, index, seen)).save(folder / row["image"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
