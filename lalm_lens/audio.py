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

from lalm_lens.audio_length import UNKNOWN, check_whole
from lalm_lens.errors import AudioError
from lalm_lens.shapes import typed

RATE_HZ = 16_000
LOUDEST = 100.0  # floating-point files may go beyond 1, but not by far
MIN_SAMPLES = 480  # 30 ms: less makes no audio token
BLOCK = 2**24  # samples read at once
EDGE = 160  # 10 ms: what is constant is heard as that where it is switched on, and where resampling rings
INAUDIBLE = 2**-16  # half a step of 16 bits

Waveform = Float[Tensor, " samples"]
Waveforms = Sequence[Float[Tensor, " _samples"]]  # each of its own length


@typed
def read_audio(path: str | Path, rate_hz: int = RATE_HZ) -> Waveform:
    """A wav, flac, ogg or mp3 file as one channel at `rate_hz`, in [-1, 1]; channels are averaged. Also read are aiff,
    au, caf, w64, rf64 and uncompressed NIST files.

    Raises `AudioError` if the file is missing, is not audio, is empty, breaks off (see `audio_length`) or
    holds NaN or infinity.
    """
    if not os.path.isfile(path):
        raise AudioError(f"There is no audio file {path}.")
    try:
        with Path(path).open("rb") as file:
            return decoded(file, str(path), rate_hz)
    except OSError as error:
        raise AudioError(f"{path} cannot be read ({error.strerror}).") from None


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
        with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
            kind, source_hz, n_frames, samples = sound.format, sound.samplerate, sound.frames, read_all(sound, name)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{name} is not readable audio ({error.error_string}). Give a wav, flac, ogg or mp3."
        ) from None
    check_whole(data, kind, len(samples), n_frames, name)
    check_samples(samples, name)
    mono = samples.mean(axis=1)
    return torch.from_numpy(mono if source_hz == rate_hz else soxr.resample(mono, source_hz, rate_hz))


def read_all(sound: soundfile.SoundFile, name: str) -> Float[np.ndarray, "samples channels"]:
    """Block by block: how many there are is not always told truly."""
    if sound.frames == UNKNOWN:
        raise AudioError(f"{name} does not say how long it is, as when written to a pipe. Save it as a wav.")
    if sound.seekable():
        sound.seek(0)  # as `soundfile.read` does: without it, an mp3 differs in the last bit
    blocks: list[np.ndarray] = [np.zeros((0, sound.channels), np.float32)]
    while len(block := sound.read(BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block)
    return np.concatenate(blocks)


def check_samples(samples: np.ndarray, name: str) -> None:
    """Refuse what a model would turn into numbers that mean nothing."""
    if samples.size == 0:
        raise AudioError(f"{name} holds no samples. Give a clip with sound in it.")
    if not np.isfinite(samples).all():
        raise AudioError(f"{name} holds NaN or infinity. Repair or leave out the clip.")
    if np.abs(samples).max() > LOUDEST:
        raise AudioError(f"{name} reaches {np.abs(samples).max():.2g}, and audio lies in [-1, 1]. Scale it.")


def check_sounding(waveform: Waveform, name: str) -> None:
    """Refuse digital silence: what stays within half a step of 16 bits of its mean, but for 10 ms at both ends."""
    inner = waveform[EDGE:-EDGE].double()
    if not len(inner) or (inner - inner.mean()).abs().max() < INAUDIBLE:
        raise AudioError(f"{name} is digital silence, so there is nothing to hear in it. Leave it out.")


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
