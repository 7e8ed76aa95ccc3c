"""What is said: stand-ins for eight languages, as rhythm, segments and pitch. None of them has a word.

Each has the rhythm class, vowel inventory, voice onset time and tone habits that its name suggests, exaggerated so
that a tiny model can tell them apart in 1.4 s, and nothing else of the language.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from lalm_lens.assets.signal import TICKS_PER_S, Ticks


@dataclass(frozen=True)
class Syllable:
    """One syllable in time: onset in [start, onset_end), vowel and coda in [onset_end, end), all in ticks."""

    index: int
    start: int
    onset_end: int
    end: int
    stressed: bool
    final: bool


Melody = Callable[[Generator, Syllable, Ticks], Ticks]  # semitones over a syllable, whose time runs 0..1


def stress_melody(_rng: Generator, syllable: Syllable, x: Ticks) -> Ticks:
    return (3.0 if syllable.stressed else -1.0) * np.sin(np.pi * x)


def step_melody(_rng: Generator, syllable: Syllable, x: Ticks) -> Ticks:
    return np.full_like(x, 2.0 if syllable.index % 4 < 2 else -2.0)


def flat_melody(_rng: Generator, _syllable: Syllable, x: Ticks) -> Ticks:
    return 0.3 * np.sin(np.pi * x)


def final_rise_melody(_rng: Generator, syllable: Syllable, x: Ticks) -> Ticks:
    return (5.0 if syllable.final else 0.8) * x


def arch_melody(_rng: Generator, syllable: Syllable, x: Ticks) -> Ticks:
    return (4.0 if syllable.index % 3 == 1 else 0.0) * np.sin(np.pi * x)


def tone_melody(rng: Generator, _syllable: Syllable, x: Ticks) -> Ticks:
    """Level, rising, dipping or falling: the four tones of Mandarin."""
    return (4.0 + 0 * x, 6 * x - 2, -2 - 4 * np.sin(np.pi * x), 4 - 8 * x)[rng.integers(4)]


def accent_melody(_rng: Generator, syllable: Syllable, x: Ticks) -> Ticks:
    return np.full_like(x, 2.5 if syllable.index % 4 in (1, 2) else -2.0)


def alternating_melody(_rng: Generator, syllable: Syllable, x: Ticks) -> Ticks:
    return np.full_like(x, 2.5 if syllable.index % 2 else -2.0)


# F1, F2, F3 in Hz of an adult male, near Peterson and Barney (1952)
VOWELS = {
    "i": (280, 2250, 2900),
    "I": (390, 1950, 2550),
    "e": (400, 2000, 2600),
    "E": (550, 1800, 2500),
    "ae": (690, 1700, 2400),
    "a": (750, 1250, 2500),
    "O": (570, 850, 2450),
    "o": (430, 800, 2400),
    "u": (310, 750, 2300),
    "y": (280, 1900, 2200),
    "oe": (400, 1600, 2250),
    "schwa": (500, 1450, 2450),
    "er": (480, 1300, 1650),
    "ih": (320, 1450, 2350),
    "uh": (620, 1180, 2450),
}


@dataclass(frozen=True)
class Language:
    """A stand-in for a language: habits of rhythm, segments and pitch. Probabilities are per syllable."""

    vowels: tuple[str, ...]
    rate_hz: float  # syllables a second, before the emotion's factor
    onsets: tuple[float, float, float, float]  # weights of stop, fricative, nasal, trill
    fricative_hz: float
    aspiration_s: float  # voice onset time of a stop
    coda: float  # probability of a closing consonant
    melody: Melody
    contrast: float = 1.0  # length of a stressed syllable over an unstressed one
    reduced: str | None = None  # the vowel of every unstressed syllable
    long_onset: float = 0.0  # probability of a geminate
    devoiced: float = 0.0  # probability that a close vowel after a voiceless onset is whispered
    nasal_vowel: float = 0.0
    final_stretch: float = 1.0


LANGUAGES = {
    "English": Language(
        ("I", "ae", "uh", "er", "u", "O"), 4.6, (0.35, 0.30, 0.30, 0.0), 5200.0, 0.035, 0.55, stress_melody,
        contrast=2.4, reduced="er",
    ),
    "German": Language(
        ("i", "a", "u", "y", "oe", "E"), 4.6, (0.30, 0.50, 0.20, 0.0), 2600.0, 0.030, 0.75, step_melody,
        contrast=2.0, reduced="schwa",
    ),
    "Spanish": Language(
        ("i", "e", "a", "o", "u"), 7.2, (0.30, 0.15, 0.20, 0.35), 6000.0, 0.004, 0.15, flat_melody,
    ),
    "French": Language(
        ("i", "y", "e", "oe", "O", "a"), 6.2, (0.35, 0.30, 0.35, 0.0), 4200.0, 0.008, 0.05, final_rise_melody,
        nasal_vowel=0.3, final_stretch=1.5,
    ),
    "Italian": Language(
        ("i", "e", "a", "o", "E"), 5.4, (0.60, 0.10, 0.30, 0.0), 5600.0, 0.004, 0.0, arch_melody,
        contrast=1.7, long_onset=0.45, final_stretch=1.5,
    ),
    "Chinese": Language(
        ("i", "a", "u", "y", "schwa"), 4.0, (0.40, 0.45, 0.15, 0.0), 3400.0, 0.050, 0.25, tone_melody,
    ),
    "Japanese": Language(
        ("a", "i", "ih", "e", "o"), 8.2, (0.50, 0.20, 0.30, 0.0), 4600.0, 0.012, 0.02, accent_melody,
        devoiced=0.5,
    ),
    "Korean": Language(
        ("a", "uh", "o", "u", "ih", "i"), 6.2, (0.60, 0.15, 0.25, 0.0), 6200.0, 0.065, 0.35,
        alternating_melody,
    ),
}  # fmt: skip


def syllables(rng: Generator, language: Language, rate: float, n_ticks: int) -> Iterator[Syllable]:
    """Fill `n_ticks` with syllables; `rate` is the emotion's factor on the language's."""
    rate_hz = language.rate_hz * rate * rng.uniform(0.92, 1.08)
    mean_length, start, index = TICKS_PER_S / rate_hz, int(rng.integers(0, 8)), 0
    while start < n_ticks - 8:
        stressed = index % 2 == 0 or language.contrast == 1.0
        share = 2 * (language.contrast if stressed else 1.0) / (1 + language.contrast)
        final = start + 1.6 * share * mean_length > n_ticks - 4
        stretch = language.final_stretch if final else 1.0
        length = max(10, int(share * stretch * mean_length * rng.uniform(0.93, 1.07)))
        onset = int(length * (0.5 if rng.random() < language.long_onset else 0.3))
        end = min(start + length, n_ticks)
        yield Syllable(index, start, min(start + onset, n_ticks), end, stressed, final)
        start, index = end + int(rng.integers(0, 3)), index + 1
