"""Clips as a page holds them: small sound files in its text, and their log-mel spectrograms."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile
from transformers import WhisperFeatureExtractor

from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.audio import RATE_HZ, Waveform
from lalm_lens.corrupt import WhiteNoise, fitted, silence
from lalm_lens.datasets import Clip, Sample, list_folder
from lalm_lens.datasets.folder import LISTS, attribute_folders, list_as
from lalm_lens.errors import DataError

ALL_BYTES = 800_000  # of all sounds of a page together; base64 makes 4 of 3
KBPS = (6.0, 256.0)  # what libsndfile's Opus makes of one channel at compression_level 1 and 0
MOST_KBPS = 32.0
N_BINS, N_FRAMES = 40, 240  # of a picture


@dataclass(frozen=True)
class Clips:
    """The clips of some folders, those of an attribute's folder apart; none is read before it is asked for."""

    listed: dict[str, list[Clip]]  # by attribute, or under "" those of any
    datasets: "dict[str, Clips]" = field(default_factory=dict)  # of a study, by their names

    @classmethod
    def of(cls, folders: Sequence[Path]) -> "Clips":
        """Folders with metadata.jsonl, or with a folder like that for each attribute, as `trace` and `audiolens` read
        them. Raises `DataError` for another, and for two clips of one name and label."""
        listed: dict[str, list[Clip]] = {}
        for folder in folders:
            for attribute, clips in lists_in(folder).items():
                listed.setdefault(attribute, []).extend(clips)
        for clips in listed.values():
            by_name: dict[tuple[str, str], Clip] = {}
            for clip in clips:
                if by_name.setdefault((clip.name, clip.label), clip).digest != clip.digest:
                    raise DataError(f"Two clips are named {clip.name} and labelled {clip.label}. Leave one out.")
        return cls(listed)

    def within(self, dataset: str) -> "Clips":
        """Those of a dataset, or all where it is not known."""
        return self.datasets.get(dataset, self)

    def find(self, attribute: str, name: str, label: str | None = None) -> Sample | None:
        """The clip of that name, and of that label if one is given; None if there is no such clip."""
        clips = [*self.listed.get(attribute, []), *self.listed.get("", [])]
        found = (clip for clip in clips if clip.name == name and label in (None, clip.label))
        clip = next(found, None)
        return None if clip is None else clip.read()

    def corrupted(self, sample: Sample, attribute: str, corruption: str, seed: int) -> Waveform | None:
        """What the corrupted run heard, as the table names it; None if that is a clip that is not there."""
        kind, _, which = corruption.partition(" ")
        if kind == "silence":
            return silence(sample.waveform)
        if kind == "white_noise":
            return WhiteNoise(float(which.removesuffix(" dB")), seed).of(sample, ()).waveform
        if kind != "other_clip":
            raise DataError(f"{sample.name} was corrupted by something that is not known, {corruption!r}.")
        other = self.find(attribute, which)
        return None if other is None else fitted(other.waveform, len(sample.waveform))


def lists_in(folder: Path) -> dict[str, list[Clip]]:
    """Clips by attribute, or under "" those of a folder with a list of its own."""
    if any((folder / name).is_file() for name in LISTS):
        return {"": list_folder(folder)}
    return {name: list_as(its, ATTRIBUTES[name]) for name, its in attribute_folders(folder, list(ATTRIBUTES)).items()}


@dataclass
class Sounds:
    """The sounds of a page, each of them once."""

    waveforms: list[np.ndarray] = field(default_factory=list)
    places: dict[bytes, int] = field(default_factory=dict)

    def add(self, waveform: Waveform) -> int:
        """Where in the list it is."""
        samples = np.clip(waveform.numpy(), -1, 1)
        place = self.places.setdefault(samples.tobytes(), len(self.waveforms))
        if place == len(self.waveforms):
            self.waveforms.append(samples)
        return place

    def uris(self) -> list[str]:
        """As sound files that a browser plays: to be listened to, not to be measured."""
        level = compression(sum(map(len, self.waveforms)) / RATE_HZ)
        return [f"data:audio/ogg;base64,{text(opus(samples, level))}" for samples in self.waveforms]


def compression(all_s: float) -> float:
    """libsndfile's level for Opus of 32 kbit/s, or less where so many seconds would be too large."""
    kbps = min(MOST_KBPS, ALL_BYTES * 8 / 1000 / max(all_s, 1.0) / 1.3)  # what is rich takes 1.3 times its rate
    return float(np.clip((KBPS[1] - kbps) / (KBPS[1] - KBPS[0]), 0, 1))


def opus(samples: np.ndarray, level: float) -> bytes:
    file = BytesIO()
    soundfile.write(file, samples, RATE_HZ, format="OGG", subtype="OPUS", compression_level=level)
    return file.getvalue()


def text(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def spectrogram(waveform: Waveform) -> dict[str, str]:
    """Whisper's log-mel spectrogram of the clip alone, at most 240 columns of 40 bins of 0 to 255, as plotly takes it:
    the largest is 255, and 0 is 80 dB below it."""
    extractor = WhisperFeatureExtractor(feature_size=2 * N_BINS)
    found = extractor(waveform.numpy(), sampling_rate=RATE_HZ, padding="do_not_pad", return_tensors="np")
    mel = found["input_features"][0]  # [bin, frame], (log10 + 4) / 4, and not more than 8 / 4 below the largest
    parts = np.array_split(np.arange(mel.shape[1]), min(N_FRAMES, mel.shape[1]))
    pooled = np.stack([mel[:, its].mean(1) for its in parts], axis=1).reshape(N_BINS, 2, -1).mean(1)
    levels = np.clip(255 * (1 + (pooled - pooled.max()) / 2), 0, 255).round().astype(np.uint8)
    return {"dtype": "u1", "shape": f"{levels.shape[0]}, {levels.shape[1]}", "bdata": text(levels.tobytes())}
