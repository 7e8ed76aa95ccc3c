"""Sound files in, 16 kHz mono waveforms out."""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import soundfile
import soxr
import torch
from jaxtyping import Float
from torch import Tensor

from lalm_lens.errors import AudioError
from lalm_lens.shapes import typed

RATE_HZ = 16_000
LOUDEST = 100.0  # floating-point files may go beyond 1, but not by far
MIN_SAMPLES = 480  # 30 ms: less makes no audio token

Waveform = Float[Tensor, " samples"]
Waveforms = Sequence[Float[Tensor, " _samples"]]  # each of its own length


@typed
def read_audio(path: str | Path, rate_hz: int = RATE_HZ) -> Waveform:
    """A wav, flac, ogg or mp3 file as one channel at `rate_hz`, in [-1, 1]; channels are averaged.

    Raises `AudioError` if the file is missing, is not audio, is empty or holds NaN or infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"There is no audio file {path}.")
    with path.open("rb") as file:
        return decoded(file, str(path), rate_hz)


@typed
def decode_audio(data: bytes, name: str, rate_hz: int = RATE_HZ) -> Waveform:
    """What `read_audio` makes of a file, of its content."""
    with TemporaryFile() as file:
        file.write(data)
        file.flush()
        return decoded(file, name, rate_hz)


def decoded(file: IO[bytes], name: str, rate_hz: int) -> Waveform:
    """Of a real file: of any other libsndfile reads by calling back, where Ctrl-C is lost, and some sound with it."""
    file.seek(0)
    data = file.read()
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    try:
        samples, source_hz = soundfile.read(file.fileno(), dtype="float32", always_2d=True, closefd=False)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{name} is not readable audio ({error.error_string}). Give a wav, flac, ogg or mp3."
        ) from None
    check_whole(data, name)
    check_samples(samples, name)
    mono = samples.mean(axis=1)
    return torch.from_numpy(mono if source_hz == rate_hz else soxr.resample(mono, source_hz, rate_hz))


def check_whole(data: bytes, name: str) -> None:
    """Refuse a wav that ends before its header says: libsndfile reads what there is and says nothing."""
    declared = int.from_bytes(data[4:8], "little")
    is_wav = data[:4] == b"RIFF" and data[8:12] == b"WAVE"
    streamed = declared >= 0x7FFFF000  # written to a pipe, where nobody knew the length
    if is_wav and not streamed and declared + 8 > len(data) + 1:  # a last odd byte may go without its pad
        raise AudioError(f"{name} ends after {len(data)} of {declared + 8} bytes. Copy it again.")


def check_samples(samples: np.ndarray, name: str) -> None:
    """Refuse what a model would turn into numbers that mean nothing."""
    if samples.size == 0:
        raise AudioError(f"{name} holds no samples. Give a clip with sound in it.")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name} holds NaN or infinity. Repair or leave out the clip.")
    if np.abs(samples).max() > LOUDEST:
        raise AudioError(f"{name} reaches {np.abs(samples).max():.2g}, and audio lies in [-1, 1]. Scale it.")


def check_audible(waveform: Waveform, n_samples: int, name: str) -> None:
    """Refuse a clip that a model cannot hear, or not to its end; it hears `n_samples` at 16 kHz."""
    if not isinstance(waveform, Tensor) or waveform.ndim != 1 or not waveform.is_floating_point():
        raise AudioError(
            f"{name} is a tensor of floating-point samples of one channel, at 16 kHz; got {described(waveform)}."
        )
    check_samples(waveform.numpy(), name)
    duration_s = len(waveform) / RATE_HZ
    if len(waveform) < MIN_SAMPLES:
        raise AudioError(f"{name} of {1000 * duration_s:.0f} ms is too short: a model hears 30 ms or more.")
    if len(waveform) > n_samples:
        raise AudioError(
            f"{name} of {duration_s:.2f} s ({len(waveform)} samples) is too long: this model hears "
            f"{n_samples / RATE_HZ:.1f} s ({n_samples} samples). Cut it."
        )


def described(waveform: object) -> str:
    if isinstance(waveform, Tensor):
        return f"one of shape {tuple(waveform.shape)} and {waveform.dtype}"
    return f"a {type(waveform).__name__}"
