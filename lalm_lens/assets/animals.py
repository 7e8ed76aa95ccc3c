"""Animal-like calls: an envelope, a pitch and formants each, some with noise."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32
from numpy.random import Generator

from lalm_lens.assets.signal import Samples, Ticks, Track, harmonics, noise_band, recorded, smooth, ticks


def progress(t_s: Ticks, start_s: float, length_s: float) -> Ticks:
    return np.clip((t_s - start_s) / length_s, 0, 1)


def burst(t_s: Ticks, start_s: float, length_s: float, attack: float, power: float = 1.0) -> Ticks:
    """An envelope that rises for the share `attack` of its length, then falls as (1 - x) ** power."""
    x = (t_s - start_s) / length_s
    inside = (x >= 0) & (x < 1)
    return np.where(inside, np.minimum(x / attack, 1) * np.clip((1 - x) / (1 - attack), 0, 1) ** power, 0)


def bursts(t_s: Ticks, starts_s: Samples, length_s: float, attack: float, power: float = 1.0) -> Ticks:
    return np.max([burst(t_s, float(start_s), length_s, attack, power) for start_s in starts_s], axis=0)


def repeats(rng: Generator, first_s: float, period_s: tuple[float, float], before_s: float) -> Samples:
    """Start times with a period drawn anew each time; the first one is always there."""
    starts_s = first_s + np.concatenate([[0], np.cumsum(rng.uniform(*period_s, size=40))])
    return starts_s[: max(1, int((starts_s < before_s).sum()))]


def call(
    f0_hz: Ticks, envelope: Ticks, formants_hz: Sequence[Track], widths_hz: Sequence[Track], tilt_db: float
) -> Samples:
    """`harmonics` with formants that may be constant."""
    centres, widths = (
        np.stack([np.broadcast_to(np.asarray(track, float), f0_hz.shape) for track in tracks], axis=1)
        for tracks in (formants_hz, widths_hz)
    )
    return harmonics(f0_hz, envelope, centres, widths, tilt_db)


def dog(rng: Generator, t_s: Ticks, size: float) -> Samples:
    """Two to four short noisy barks, each rising and falling fast."""
    starts_s = rng.uniform(0, 0.25) + rng.uniform(0.25, 0.42) * np.arange(rng.integers(2, 5))
    barks = bursts(t_s, starts_s, rng.uniform(0.12, 0.2), 0.2)
    f0_hz = rng.uniform(330, 620) * (1 + 0.45 * barks)
    tone = call(f0_hz, barks, (700 * size, 1300 * size, 2600 * size), (200, 250, 400), -5.0)
    return tone + 6 * noise_band(rng, 1200 * size, 900.0, 0.5 * barks)


def cat(rng: Generator, t_s: Ticks, size: float) -> Samples:
    """One long meow: pitch arches while the mouth opens and closes."""
    start_s, length_s = rng.uniform(0, 0.3), rng.uniform(0.7, 1.2)
    x = progress(t_s, start_s, length_s)
    f0_hz = rng.uniform(480, 700) * (1 + 0.45 * np.sin(np.pi * x)) * (1 - 0.15 * x)
    formants_hz = (size * (500 + 700 * np.sin(np.pi * x)), size * (2600 - 1400 * x), size * 3600)
    return call(f0_hz, burst(t_s, start_s, length_s, 0.25, 0.6), formants_hz, (150, 200, 300), -6.0)


def pig(rng: Generator, t_s: Ticks, size: float) -> Samples:
    """A train of low noisy grunts."""
    length_s = rng.uniform(0.12, 0.22)
    starts_s = repeats(rng, rng.uniform(0, 0.2), (length_s + 0.08, length_s + 0.22), t_s[-1] - 0.1)
    grunts = bursts(t_s, starts_s, length_s, 0.3)
    f0_hz = rng.uniform(55, 95) * (1 + 0.25 * grunts + 0.12 * smooth(rng.standard_normal(len(t_s)), 3))
    tone = call(f0_hz, grunts, (420 * size, 1050 * size, 1900 * size), (180, 300, 400), -4.0)
    return tone + 5 * noise_band(rng, 750 * size, 450.0, 0.8 * grunts)


def cow(rng: Generator, t_s: Ticks, size: float) -> Samples:
    """One long low moo whose formants open slowly."""
    start_s, length_s = rng.uniform(0, 0.2), rng.uniform(1.1, 1.6)
    x = progress(t_s, start_s, length_s)
    f0_hz = rng.uniform(110, 175) * (1 + 0.25 * np.sin(np.pi * x) - 0.1 * x)
    formants_hz = (size * (280 + 280 * x), size * (650 + 350 * x), size * 2100)
    return call(f0_hz, burst(t_s, start_s, length_s, 0.2, 0.5), formants_hz, (90, 120, 300), -9.0)


def frog(rng: Generator, t_s: Ticks, size: float) -> Samples:
    """Croaks: one narrow band, pulsed at 28 to 48 Hz."""
    length_s, centre_hz = rng.uniform(0.25, 0.5), rng.uniform(900, 1700)
    starts_s = repeats(rng, rng.uniform(0, 0.3), (length_s + 0.15, length_s + 0.4), t_s[-1] - 0.15)
    pulses = np.sin(2 * np.pi * rng.uniform(28, 48) * t_s) > 0.2
    f0_hz = np.full_like(t_s, centre_hz / rng.integers(2, 4))
    croaks = pulses * bursts(t_s, starts_s, length_s, 0.5, 0.7)
    return call(f0_hz, croaks, (centre_hz, 2.1 * centre_hz), (90, 250), 0.0)


def hen(rng: Generator, t_s: Ticks, size: float) -> Samples:
    """Quick clucks, then one long 'bawk' that rises."""
    starts_s = repeats(rng, rng.uniform(0, 0.15), (0.15, 0.24), t_s[-1] - 0.35)
    clucks = bursts(t_s, starts_s, rng.uniform(0.05, 0.08), 0.25)
    bawk = burst(t_s, float(starts_s[-1]) + 0.2, 0.32, 0.4)
    f0_hz = rng.uniform(380, 560) * np.where(bawk > 0, 1.1 + 0.7 * bawk, 1 - 0.15 * clucks)
    return call(f0_hz, np.maximum(clucks, bawk), (1100 * size, 1900 * size, 3300 * size), (160, 220, 300), -3.0)


ROOSTER_NOTES = ((0, 0.18, 1.0, 0), (0.24, 0.14, 1.25, 0), (0.42, 0.35, 1.55, 0.05), (0.82, 1.0, 1.75, 0.45))


def rooster(rng: Generator, t_s: Ticks, size: float) -> Samples:
    """Cock-a-doodle-doo: notes of (start, length, pitch, fall), the last one long, high and falling."""
    first_s, base_hz = rng.uniform(0, 0.15), rng.uniform(520, 720)
    unit_s = (t_s[-1] - first_s - 0.05) / 1.9
    envelope, f0_hz = np.zeros_like(t_s), np.full_like(t_s, base_hz)
    for start, length, height, fall in ROOSTER_NOTES:
        note = burst(t_s, first_s + start * unit_s, length * unit_s, 0.12, 0.4)
        x = progress(t_s, first_s + start * unit_s, length * unit_s)
        f0_hz = np.where(note > 0, base_hz * height * (1 + 0.08 * np.sin(np.pi * x) - fall * x**2), f0_hz)
        envelope = np.maximum(envelope, note)
    return call(f0_hz, envelope, (1150 * size, 2300 * size, 3800 * size), (250, 350, 500), -1.0)


def sheep(rng: Generator, t_s: Ticks, size: float) -> Samples:
    """One long baa with a strong tremor of 6 to 9 Hz."""
    start_s, length_s = rng.uniform(0, 0.3), rng.uniform(0.8, 1.3)
    tremor = np.sin(2 * np.pi * rng.uniform(6, 9) * t_s)
    f0_hz = rng.uniform(230, 380) * (1 + 0.07 * tremor) * (1 - 0.1 * progress(t_s, start_s, length_s))
    envelope = burst(t_s, start_s, length_s, 0.1, 0.5) * (1 + 0.6 * tremor)
    return call(f0_hz, envelope, (720 * size, 1650 * size, 2600 * size), (140, 180, 260), -5.0)


def crow(rng: Generator, t_s: Ticks, size: float) -> Samples:
    """Harsh broad-band caws."""
    length_s = rng.uniform(0.26, 0.42)
    starts_s = repeats(rng, rng.uniform(0, 0.2), (length_s + 0.12, length_s + 0.35), t_s[-1] - 0.2)
    caws = bursts(t_s, starts_s, length_s, 0.12, 0.6)
    f0_hz = rng.uniform(420, 560) * (1 + 0.12 * caws) * (1 + 0.09 * smooth(rng.standard_normal(len(t_s)), 1))
    tone = call(f0_hz, caws, (1250 * size, 1850 * size, 3000 * size), (350, 400, 600), -1.0)
    return tone + 5 * noise_band(rng, 1700 * size, 900.0, 0.9 * caws)


ANIMALS = {f.__name__: f for f in (dog, cat, pig, cow, frog, hen, rooster, sheep, crow)}


def animal(rng: Generator, name: str, duration_s: float = 2.0) -> Float32[np.ndarray, " samples"]:
    """A new animal's call. `duration_s` is rounded to 5 ms."""
    samples = ANIMALS[name](rng, ticks(duration_s), rng.uniform(0.88, 1.14))
    return recorded(rng, samples, rng.uniform(-5, 5))
