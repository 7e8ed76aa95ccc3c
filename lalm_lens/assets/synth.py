"""Speech-like and animal-like sounds from numpy alone: what the tiny model is trained and tested on.

Speech is a source-filter babble (after Klatt 1980, doi 10.1121/1.383940): a harmonic source through moving
formants, plus bands of noise. It has no words. Emotions scale pitch, rate and voice quality in the directions
of Murray and Arnott (1993, doi 10.1121/1.405558). The eight "languages" are **stand-ins**: each has the
rhythm class, vowel inventory, voice onset time and tone habits that its name suggests, exaggerated so that a
tiny model can tell them apart in 1.4 s, and nothing else of the language. A model trained on them knows no
language.

Everything is a pure function of a numpy `Generator`: float32, mono, 16 kHz, in [-1, 1].
Control tracks are drawn every 5 ms, a `tick`, and interpolated to samples.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
from jaxtyping import Float, Float32
from numpy.random import Generator

from lalm_lens.attributes import ATTRIBUTES, attribute_named

RATE_HZ = 16_000
TICK = 80  # samples in a control tick: 5 ms
TICKS_PER_S = RATE_HZ // TICK

# The first word of every seed: clips of one stream never share a speaker or an utterance with another's.
STREAMS = {"train": 0, "held_out": 1, "clips": 2}

Ticks = Float[np.ndarray, " tick"]
Samples = Float[np.ndarray, " samples"]
Track = Ticks | float | int  # over time, or constant


# --- what is said ----------------------------------------------------------------------------------------


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
NASAL_HZ = (260, 1250, 2300)
TRILL_HZ = (450, 1350, 2000)


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


# --- how it is articulated -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tracks:
    """The vocal tract over time; `articulate` writes into the arrays."""

    formants_hz: Float[np.ndarray, "tick 3"]
    voicing: Ticks  # amplitude of the harmonic source
    noise: Ticks  # amplitude of the noise band at noise_hz
    noise_hz: Ticks
    semitones: Ticks
    nasality: Ticks
    trill: Ticks


def rest(n_ticks: int) -> Tracks:
    formants_hz = np.tile(np.array(VOWELS["schwa"], float), (n_ticks, 1))
    voicing, noise, semitones, nasality, trill = np.zeros((5, n_ticks))
    return Tracks(formants_hz, voicing, noise, np.full(n_ticks, 3000.0), semitones, nasality, trill)


def hiss(tracks: Tracks, start: int, end: int, amplitude: float, centre_hz: float) -> None:
    tracks.noise[start:end] += amplitude
    tracks.noise_hz[start:end] = centre_hz


def hum(tracks: Tracks, start: int, end: int, amplitude: float, formants_hz: Sequence[int]) -> None:
    tracks.voicing[start:end] = amplitude
    tracks.formants_hz[start:end] = formants_hz


def stop(rng: Generator, tracks: Tracks, language: Language, syllable: Syllable) -> int:
    """Closure, burst, aspiration."""
    release = syllable.onset_end
    aspiration = int(language.aspiration_s * TICKS_PER_S * rng.uniform(0.8, 1.2))
    hiss(tracks, max(release - 2, 0), release + 1, 0.25, float(rng.choice([1000, 1800, 4000])))
    hiss(tracks, release, release + aspiration, 0.10, 1900.0)
    return min(release + aspiration, syllable.end)


def fricative(rng: Generator, tracks: Tracks, language: Language, syllable: Syllable) -> int:
    centre_hz = language.fricative_hz * rng.uniform(0.92, 1.08)
    hiss(tracks, syllable.start, syllable.onset_end, 0.16, centre_hz)
    return syllable.onset_end


def nasal(_rng: Generator, tracks: Tracks, _language: Language, syllable: Syllable) -> int:
    hum(tracks, syllable.start, syllable.onset_end, 0.25, NASAL_HZ)
    tracks.nasality[syllable.start : syllable.onset_end] = 1
    return syllable.onset_end


def trill(_rng: Generator, tracks: Tracks, _language: Language, syllable: Syllable) -> int:
    hum(tracks, syllable.start, syllable.onset_end, 0.55, TRILL_HZ)
    tracks.trill[syllable.start : syllable.onset_end] = 1
    return syllable.onset_end


# In the order of Language.onsets; each returns the tick where the vowel may start.
ONSETS = (stop, fricative, nasal, trill)


def articulate(rng: Generator, tracks: Tracks, language: Language, syllable: Syllable) -> None:
    weights = np.array(language.onsets)
    onset = ONSETS[rng.choice(4, p=weights / weights.sum())]
    start = onset(rng, tracks, language, syllable)
    length = syllable.end - syllable.start
    coda = int(0.28 * length) if rng.random() < language.coda else 0
    end = max(start + 3, syllable.end - coda)
    vowel(rng, tracks, language, syllable, start, end, voiceless=onset in (stop, fricative))
    if coda:
        close(rng, tracks, language, end, syllable.end)
    x = np.linspace(0, 1, max(length, 1))
    tracks.semitones[syllable.start : syllable.end] = language.melody(rng, syllable, x)[:length]


def vowel(
    rng: Generator, tracks: Tracks, language: Language, syllable: Syllable, start: int, end: int, voiceless: bool
) -> None:
    """The syllable's vowel in ticks [start, end), whispered where a close vowel follows a voiceless onset."""
    reduced = None if syllable.stressed else language.reduced
    name = reduced or str(rng.choice(language.vowels))
    if voiceless and name in ("i", "ih") and rng.random() < language.devoiced:
        hiss(tracks, start, end, 0.08, 3800.0)
        tracks.formants_hz[start:end] = VOWELS[name]
        return
    hum(tracks, start, end, 1.0 if syllable.stressed else 0.6, VOWELS[name])
    if rng.random() < language.nasal_vowel:
        tracks.nasality[start:end] = 1


def close(rng: Generator, tracks: Tracks, language: Language, start: int, end: int) -> None:
    """The closing consonant: a fricative or a nasal."""
    if rng.random() < 0.5:
        return hiss(tracks, start, end, 0.14, language.fricative_hz)
    hum(tracks, start, end, 0.25, NASAL_HZ)
    tracks.nasality[start:end] = 1


def smooth(track: Ticks, width: int) -> Ticks:
    window = np.hanning(width + 2)[1:-1]
    padded = np.pad(track, width, mode="edge")
    return np.convolve(padded, window / window.sum(), mode="same")[width:-width]


def coarticulated(tracks: Tracks) -> Tracks:
    """Tongue, lips and larynx move in 15 to 35 ms, not at once."""
    return replace(
        tracks,
        formants_hz=np.stack([smooth(formant_hz, 7) for formant_hz in tracks.formants_hz.T], axis=1),
        voicing=smooth(tracks.voicing, 5),
        noise=smooth(tracks.noise, 3),
        semitones=smooth(tracks.semitones, 5),
        nasality=smooth(tracks.nasality, 5),
    )


# --- who speaks, and how they feel -----------------------------------------------------------------------


@dataclass(frozen=True)
class Voice:
    """The range a gender's speakers are drawn from; each pair is mean and standard deviation."""

    f0_hz: tuple[float, float]
    f0_limits_hz: tuple[float, float]
    formant_scale: tuple[float, float]
    tilt_db: float  # an octave


VOICES = {
    "male": Voice((112.0, 16.0), (78.0, 150.0), (1.0, 0.035), -7.0),
    "female": Voice((205.0, 22.0), (160.0, 265.0), (1.17, 0.035), -9.0),
}


@dataclass(frozen=True)
class Speaker:
    f0_hz: float
    formant_scale: float
    tilt_db: float
    bandwidth: float


def draw_speaker(rng: Generator, gender: str) -> Speaker:
    voice = VOICES[gender]
    mean_scale, scale_sd = voice.formant_scale
    return Speaker(
        f0_hz=float(np.clip(rng.normal(*voice.f0_hz), *voice.f0_limits_hz)),
        formant_scale=float(np.clip(rng.normal(mean_scale, scale_sd), mean_scale - 0.08, mean_scale + 0.08)),
        tilt_db=rng.normal(voice.tilt_db, 1.0),
        bandwidth=rng.uniform(0.8, 1.3),
    )


@dataclass(frozen=True)
class Emotion:
    """Factors on f0, its range and the syllable rate; the rest adds to the speaker's voice."""

    f0: float
    f0_range: float
    rate: float
    tilt_db: float
    breath: float
    jitter: float
    gain_db: float
    slope_semitones: float
    tremor_hz: float = 0.0
    tremor: float = 0.0
    creak: float = 0.0


EMOTIONS = {
    "angry": Emotion(1.15, 1.6, 1.15, 4.0, 0.02, 0.020, 8.0, -2.0),
    "disgust": Emotion(0.85, 0.8, 0.70, -1.0, 0.05, 0.080, -2.0, -5.0, creak=0.5),
    "fear": Emotion(1.35, 0.6, 1.20, -2.0, 0.14, 0.010, -7.0, 2.0, tremor_hz=8.5, tremor=0.05),
    "happy": Emotion(1.25, 2.2, 1.05, 1.0, 0.02, 0.005, 2.0, 5.0),
    "sad": Emotion(0.88, 0.4, 0.65, -6.0, 0.10, 0.005, -9.0, -4.0),
}


def pitch_hz(rng: Generator, semitones: Ticks, speaker: Speaker, emotion: Emotion) -> Ticks:
    x = np.linspace(0, 1, len(semitones))
    declination = emotion.slope_semitones * (x - 0.5) - 1.5 * x
    f0_hz = speaker.f0_hz * emotion.f0 * 2 ** ((semitones * emotion.f0_range + declination) / 12)
    jitter = 1 + emotion.jitter * smooth(rng.standard_normal(len(x)), 2)
    return np.clip(f0_hz * jitter, 60, 600)


def shaken(tracks: Tracks, emotion: Emotion, t_s: Ticks, phase: float) -> Ticks:
    """The voicing after the trill's, the creak's and the tremor's amplitude modulation."""
    trilled = tracks.voicing * (1 - 0.7 * tracks.trill * (np.sin(2 * np.pi * 27 * t_s) > 0))
    creaking = trilled * (1 - emotion.creak * (np.sin(2 * np.pi * 32 * t_s) > 0.2))
    return creaking * (1 + 4 * emotion.tremor * np.sin(2 * np.pi * emotion.tremor_hz * t_s + phase))


# --- sound -----------------------------------------------------------------------------------------------


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


def speech(
    rng: Generator, gender: str, language: str, emotion: str, duration_s: float = 2.0
) -> Float32[np.ndarray, " samples"]:
    """A new speaker babbling in the language's stand-in. `duration_s` is rounded to 5 ms."""
    speaker, feeling, tongue = draw_speaker(rng, gender), EMOTIONS[emotion], LANGUAGES[language]
    t_s = ticks(duration_s)
    tracks = rest(len(t_s))
    for syllable in syllables(rng, tongue, feeling.rate, len(t_s)):
        articulate(rng, tracks, tongue, syllable)
    return recorded(rng, voice(rng, coarticulated(tracks), speaker, feeling, t_s), feeling.gain_db)


def voice(rng: Generator, tracks: Tracks, speaker: Speaker, emotion: Emotion, t_s: Ticks) -> Samples:
    """Tracks to sound: harmonics, the consonants' noise and breath."""
    phase = rng.uniform(0, 2 * np.pi)
    tremor = 1 + emotion.tremor * np.sin(2 * np.pi * emotion.tremor_hz * t_s + phase)
    f0_hz = pitch_hz(rng, tracks.semitones, speaker, emotion) * tremor
    voicing = shaken(tracks, emotion, t_s, phase)
    upper_hz = np.broadcast_to([3500.0, 4500.0], (len(t_s), 2))
    formants_hz = np.concatenate([tracks.formants_hz, upper_hz], axis=1) * speaker.formant_scale
    tilt_db, widths_hz = speaker.tilt_db + emotion.tilt_db, formant_widths_hz(tracks, speaker)
    tone = harmonics(f0_hz, voicing, formants_hz, widths_hz, tilt_db)
    consonants = noise_band(rng, tracks.noise_hz, 700 + 0.15 * tracks.noise_hz, tracks.noise)
    breath = noise_band(rng, 2500.0, 2000.0, emotion.breath * voicing)
    return tone + 9 * consonants + 3 * breath


def formant_widths_hz(tracks: Tracks, speaker: Speaker) -> Float[np.ndarray, "tick 5"]:
    """A nasal cavity damps the lower formants."""
    damping = 1 + tracks.nasality[:, None] * np.array([2.5, 1, 0, 0, 0])
    return damping * np.array([70, 95, 140, 220, 300]) * speaker.bandwidth


def ticks(duration_s: float) -> Ticks:
    """The time of every tick, in seconds."""
    return np.arange(round(duration_s * TICKS_PER_S)) / TICKS_PER_S


# --- animals ---------------------------------------------------------------------------------------------


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


# --- labelled clips --------------------------------------------------------------------------------------

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
