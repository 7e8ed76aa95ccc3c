"""The clips that the tiny model is trained and measured on, and their features."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int
from numpy.random import Generator
from tqdm import tqdm

from lalm_lens.assets.checkpoint import feature_extractor
from lalm_lens.assets.clips import SPEECH, STREAMS, sound
from lalm_lens.assets.recipe import Recipe
from lalm_lens.attributes import ATTRIBUTES, Attribute
from lalm_lens.audio import RATE_HZ

ANIMAL = ("animal",)


@dataclass(frozen=True)
class Clips:
    """Log-mel features of training clips, half precision to fit in memory, with what is true of each."""

    mel: Float16[np.ndarray, "clip mel frames"]
    n_frames: Int[np.ndarray, " clip"]
    labels: tuple[dict[str, str], ...]

    def about(self, attribute: Attribute) -> list[int]:
        return [clip for clip, labels in enumerate(self.labels) if attribute.name in labels]


def labels_at(index: int, attributes: Sequence[str]) -> dict[str, str]:
    """Count through all combinations of labels, the first attribute fastest."""
    labels = {}
    for name in attributes:
        index, label = divmod(index, len(ATTRIBUTES[name].labels))
        labels[name] = ATTRIBUTES[name].labels[label]
    return labels


@dataclass(frozen=True)
class Sound:
    """One clip to be made: everything its samples depend on."""

    stream: str  # of clips.STREAMS
    seed: int
    attributes: tuple[str, ...]
    index: int
    durations_s: tuple[float, ...]

    @property
    def labels(self) -> dict[str, str]:
        return labels_at(self.index, self.attributes)

    def samples(self) -> Float32[np.ndarray, " samples"]:
        rng = np.random.default_rng([STREAMS[self.stream], self.seed, len(self.attributes), self.index])
        return sound(rng, self.labels, float(rng.choice(self.durations_s)))


def sounds(recipe: Recipe, stream: str, n_speech: int, n_animal: int) -> list[Sound]:
    return [
        Sound(stream, recipe.seed, attributes, index, recipe.durations_s)
        for attributes, n in ((SPEECH, n_speech), (ANIMAL, n_animal))
        for index in range(n)
    ]


def heard(clip: Sound) -> tuple[Float16[np.ndarray, "mel frames"], int]:
    """Features and the number of frames that are not padding."""
    # return_attention_mask in the call: the constructor's alone gives one value a sample, not one a frame.
    features = feature_extractor()(
        clip.samples(), sampling_rate=RATE_HZ, return_attention_mask=True, return_tensors="np"
    )
    return features["input_features"][0].astype(np.float16), int(features["attention_mask"].sum())


def make_clips(recipe: Recipe) -> Clips:
    """The training clips, made by `recipe.n_processes` processes, or by this one if that is 1."""
    wanted = sounds(recipe, "train", recipe.n_speech, recipe.n_animal)
    if recipe.n_processes == 1:
        return collect(wanted, map(heard, wanted))
    # spawn: a process forked from one that runs torch's threads can hang
    with get_context("spawn").Pool(recipe.n_processes, torch.set_num_threads, (1,)) as pool:
        return collect(wanted, pool.imap(heard, wanted, chunksize=32))


def collect(clips: Sequence[Sound], features: Iterable[tuple[Float16[np.ndarray, "mel frames"], int]]) -> Clips:
    mel, n_frames = zip(*tqdm(features, "clips", len(clips), mininterval=10), strict=True)
    return Clips(np.stack(mel), np.array(n_frames), tuple(clip.labels for clip in clips))


def augment(rng: Generator, mel: Float[np.ndarray, "mel frames"]) -> Float[np.ndarray, "mel frames"]:
    """Shift by up to 80 ms, change the level, and blank out one band and one moment."""
    mel = np.roll(mel, rng.integers(-8, 9), axis=1) + rng.uniform(-0.06, 0.06)
    band, moment = rng.integers(0, 120), rng.integers(0, 180)
    mel[band : band + rng.integers(0, 10)] = mel.mean()
    mel[:, moment : moment + rng.integers(0, 16)] = mel.mean()
    return mel
