"""What a corrupted run hears in place of the clip."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lalm_lens.audio import Waveform
from lalm_lens.datasets import Sample
from lalm_lens.datasets.sample import Named
from lalm_lens.errors import AudioError, DataError
from lalm_lens.shapes import typed

MAX_SNR_DB = 100.0

N = TypeVar("N", bound=Named)


@dataclass(frozen=True)
class Corrupted:
    """As many samples as the clip has, so that the number of audio tokens stays, and what they are."""

    name: str
    waveform: Waveform
    transcript: str | None = None  # where it is known


@typed
def silence(waveform: Waveform) -> Waveform:
    """A zero waveform of the same length: as many audio tokens, no sound (arXiv 2603.13768, section 3.1)."""
    return torch.zeros_like(waveform)


@dataclass(frozen=True)
class Silence:
    """Nothing is heard: the paper's baseline."""

    def of(self, sample: Sample, samples: Sequence[Sample]) -> Corrupted:
        return Corrupted("silence", silence(sample.waveform))


@dataclass(frozen=True)
class WhiteNoise:
    """The clip under Gaussian white noise; `snr_db` is the clip's power over the noise's, in dB.

    The noise of a clip depends on `seed` and its name alone. The sum is not clipped to [-1, 1].
    """

    snr_db: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not abs(self.snr_db) <= MAX_SNR_DB:
            raise AudioError(f"A signal-to-noise ratio of {self.snr_db} dB cannot be heard: give -100 to 100 dB.")

    def of(self, sample: Sample, samples: Sequence[Sample]) -> Corrupted:
        rng = np.random.default_rng(number(self.seed, sample.name))
        noise = torch.from_numpy(rng.standard_normal(len(sample.waveform)))
        clip = sample.waveform.double()
        scale = (clip.square().mean() / noise.square().mean()).sqrt() * 10 ** (-self.snr_db / 20)
        return Corrupted(f"white_noise {self.snr_db:g} dB", (clip + scale * noise).float())


@dataclass(frozen=True)
class OtherClip:
    """Another of the samples, of a different label, cut or followed by zeros to the same length: a counterfactual.

    Which one depends on `seed`, the clip's name and the names there are, not on their order. It is one of `among`, by
    default of the samples of the experiment.
    """

    seed: int = 0
    among: tuple[Sample, ...] | None = field(default=None, repr=False, compare=False)

    def of(self, sample: Sample, samples: Sequence[Sample]) -> Corrupted:
        other = self.choose(sample, samples if self.among is None else self.among)
        n_samples = len(sample.waveform)
        said = other.transcript if len(other.waveform) <= n_samples else None  # a part of a clip says less
        return Corrupted(f"other_clip {other.name}", fitted(other.waveform, n_samples), said)

    def choose(self, sample: Named, others: Sequence[N]) -> N:
        """By names and labels alone. Raises `DataError` if there is no other label."""
        different = [other for other in others if other.label != sample.label]
        if not different:
            raise DataError(
                f"There is no other clip for {sample.name}: all clips are labelled {sample.label!r}. Add clips of a "
                "different label, or corrupt by silence."
            )
        return min(different, key=lambda other: number(self.seed, sample.name, other.name))


def fitted(waveform: Waveform, n_samples: int) -> Float[Tensor, " heard"]:
    """Cut, or followed by zeros."""
    heard = waveform[:n_samples]
    return pad(heard, (0, n_samples - len(heard)))


Corruption = Silence | WhiteNoise | OtherClip


def number(*key: int | str) -> int:
    """A random number that belongs to these words, on every machine."""
    return int.from_bytes(sha256("\n".join(map(str, key)).encode()).digest())
