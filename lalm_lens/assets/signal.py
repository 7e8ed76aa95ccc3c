"""Sound from control tracks: harmonics through resonances, bands of noise, and the microphone.

Tracks are drawn every 5 ms, a `tick`, and interpolated to samples. Everything is a pure function of a numpy
`Generator`; sound is float32, mono, 16 kHz, in [-1, 1].
"""

import numpy as np
from jaxtyping import Float, Float32
from numpy.random import Generator

from lalm_lens.audio import RATE_HZ

TICK = 80  # samples in a control tick: 5 ms
TICKS_PER_S = RATE_HZ // TICK
Ticks = Float[np.ndarray, " tick"]
Samples = Float[np.ndarray, " samples"]
Track = Ticks | float | int  # over time, or constant


def ticks(duration_s: float) -> Ticks:
    """The time of every tick, in seconds."""
    return np.arange(round(duration_s * TICKS_PER_S)) / TICKS_PER_S


def smooth(track: Ticks, width: int) -> Ticks:
    window = np.hanning(width + 2)[1:-1]
    padded = np.pad(track, width, mode="edge")
    return np.convolve(padded, window / window.sum(), mode="same")[width:-width]


def ramp(track: Ticks) -> Samples:
    """Ticks to samples by straight lines."""
    step = np.diff(track, append=track[-1])
    return (track[:, None] + step[:, None] * (np.arange(TICK) / TICK)).reshape(-1)


def resonance(
    f_hz: Float[np.ndarray, "tick harmonic"],
    centres_hz: Float[np.ndarray, "tick formant"],
    widths_hz: Float[np.ndarray, "tick formant"],
) -> Float[np.ndarray, "tick harmonic"]:
    """|H| of a cascade of two-pole resonators."""
    gain = np.ones_like(f_hz)
    for centre, width in zip(centres_hz.T[..., None], widths_hz.T[..., None], strict=True):
        gain *= centre**2 / np.sqrt((f_hz**2 - centre**2) ** 2 + (f_hz * width) ** 2)
    return gain


def harmonics(
    f0_hz: Ticks,
    amplitude: Ticks,
    formants_hz: Float[np.ndarray, "tick formant"],
    widths_hz: Float[np.ndarray, "tick formant"],
    tilt_db: float,
) -> Samples:
    """A harmonic source of spectral tilt `tilt_db` an octave, through the formants, at unit power."""
    n_harmonics = int(np.clip(7000 / f0_hz.min(), 1, 90))
    k = np.arange(1, n_harmonics + 1)
    f_hz = f0_hz[:, None] * k
    # 6.02 dB is a factor of two, and an octave is too, so the tilt is a power of k.
    source = (f_hz < 7000) * amplitude[:, None] * k ** (tilt_db / 6.02)
    gain = source * resonance(f_hz, formants_hz, widths_hz)
    phase = 2 * np.pi * np.cumsum(ramp(f0_hz)) / RATE_HZ
    twice_cos, before, now = 2 * np.cos(phase), np.zeros_like(phase), np.sin(phase)
    total = np.zeros_like(phase)
    for gain_k in gain.T:
        total += ramp(gain_k) * now
        before, now = now, twice_cos * now - before  # sin((k + 1) p) = 2 cos(p) sin(k p) - sin((k - 1) p)
    return unit_power(total)


def noise_band(rng: Generator, centre_hz: Track, width_hz: Track, amplitude: Ticks) -> Samples:
    """Noise in a moving Gaussian band: 10 ms windows, overlapped by half."""
    n_ticks, window = len(amplitude), np.hanning(2 * TICK + 1)[:-1]
    spectrum = np.fft.rfft(rng.standard_normal((n_ticks, 2 * TICK)) * window)
    f_hz = np.fft.rfftfreq(2 * TICK, 1 / RATE_HZ)
    centre, width = (np.broadcast_to(x, (n_ticks,))[:, None] for x in (centre_hz, width_hz))
    band = np.exp(-0.5 * ((f_hz - centre) / width) ** 2)
    grains = np.fft.irfft(spectrum * band * amplitude[:, None], n=2 * TICK)
    first, second = grains[:, :TICK], grains[:, TICK:]
    return (first + np.roll(second, 1, axis=0)).reshape(-1)


def unit_power(samples: Samples) -> Samples:
    return samples / (np.sqrt(np.square(samples).mean()) + 1e-9)


def recorded(rng: Generator, samples: Samples, gain_db: float) -> Float32[np.ndarray, " samples"]:
    """At a microphone: about -24 dBFS plus `gain_db`, with a little level change and a noise floor."""
    level = 0.06 * 10 ** ((gain_db + rng.uniform(-1.5, 1.5)) / 20)
    floor = 10 ** (rng.uniform(-75, -55) / 20) * rng.standard_normal(len(samples))
    return np.clip(unit_power(samples) * level + floor, -1, 1).astype(np.float32)
