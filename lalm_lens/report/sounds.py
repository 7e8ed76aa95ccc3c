"""Clips as a page holds them: small sound files in its text, and their log-mel spectrograms."""

from base64 import b64encode
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
import soundfile
from transformers import WhisperFeatureExtractor

from lalm_lens.audio import RATE_HZ, Waveform

ALL_BYTES = 800_000  # of all sounds of a page together; base64 makes 4 of 3
KBPS = (6.0, 256.0)  # what libsndfile's Opus makes of one channel at compression_level 1 and 0
MOST_KBPS = 32.0
N_BINS, N_FRAMES = 40, 240  # of a picture


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
