"""Speech-like sound: a source-filter babble (after Klatt 1980, doi 10.1121/1.383940) without words.

A harmonic source goes through moving formants, with bands of noise for consonants and breath. Emotions scale pitch,
rate and voice quality in the directions of Murray and Arnott (1993, doi 10.1121/1.405558). A model trained on it
knows no language.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Float32
from numpy.random import Generator

from lalm_lens.assets.languages import LANGUAGES, VOWELS, Language, Syllable, syllables
from lalm_lens.assets.signal import TICKS_PER_S, Samples, Ticks, harmonics, noise_band, recorded, smooth, ticks

NASAL_HZ = (260, 1250, 2300)
TRILL_HZ = (450, 1350, 2000)


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
