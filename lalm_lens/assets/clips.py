"""Labelled clips of synthetic speech and animals: what the tiny model is trained and tested on, and demos."""

import json
from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Float32
from numpy.random import Generator

from lalm_lens.assets.animals import animal
from lalm_lens.assets.speech import speech
from lalm_lens.attributes import ATTRIBUTES, attribute_named
from lalm_lens.audio import RATE_HZ

# The first word of every seed: clips of one stream never share a speaker or an utterance with another's.
STREAMS = {"train": 0, "held_out": 1, "clips": 2}
SPEECH = tuple(name for name in ATTRIBUTES if name != "animal")


def sound(rng: Generator, labels: dict[str, str], duration_s: float = 2.0) -> Float32[np.ndarray, " samples"]:
    """`animal` or `speech`, whichever the labels are of."""
    if "animal" in labels:
        return animal(rng, labels["animal"], duration_s)
    return speech(rng, labels["gender"], labels["language"], labels["emotion"], duration_s)


def write_clips(folder: Path, attribute: str, n: int, seed: int, duration_s: float = 1.6) -> Path:
    """Write `n` clips and a `metadata.jsonl` in audiofolder layout; the label is the attribute's, balanced.

    Files are 16-bit mono at 16 kHz, named like `male_000.wav`. No clip is one that the tiny model was trained
    or tested on, whatever the seed. Raises `PromptError` for an unknown attribute.
    """
    labels = attribute_named(attribute).labels
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(n):
        rng = np.random.default_rng([STREAMS["clips"], seed, list(ATTRIBUTES).index(attribute), index])
        label, count = labels[index % len(labels)], index // len(labels)
        row = {"file_name": f"{label}_{count:03d}.wav", "label": label}
        samples = sound(rng, labels_around(rng, attribute, label), duration_s)
        soundfile.write(folder / row["file_name"], samples, RATE_HZ, "PCM_16")
        rows.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder


def labels_around(rng: Generator, attribute: str, label: str) -> dict[str, str]:
    """The label, with the rest of what `sound` needs to know drawn at random."""
    drawn = {name: str(rng.choice(ATTRIBUTES[name].labels)) for name in SPEECH}
    return {attribute: label} if attribute == "animal" else drawn | {attribute: label}
