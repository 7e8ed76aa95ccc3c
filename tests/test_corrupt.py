"""What the corrupted run hears: as long as the clip, and the same again for the same seed and name."""

import math

import pytest
import torch
from reference import chirps
from torch.testing import assert_close

from lalm_lens.corrupt import OtherClip, Silence, WhiteNoise, silence
from lalm_lens.datasets import Sample
from lalm_lens.errors import AudioError, DataError

LABELS = ["dog", "cat", "dog", "pig", "cat", "dog"]
CLIPS = [
    Sample(f"{n}.wav", label, clip)
    for n, (label, clip) in enumerate(zip(LABELS, chirps([1.0, 0.5, 0.7, 1.3, 0.9, 1.1]), strict=True))
]


@pytest.mark.parametrize("corruption", [Silence(), WhiteNoise(snr_db=-3.0, seed=1), OtherClip(seed=2)], ids=str)
def test_a_corrupted_clip_is_as_long_and_does_not_depend_on_the_order(corruption):
    for clip in CLIPS:
        corrupted = corruption.of(clip, CLIPS)
        assert corrupted.waveform.shape == clip.waveform.shape
        assert corrupted.waveform.dtype == torch.float32
        assert not torch.equal(corrupted.waveform, clip.waveform)
        again = corruption.of(clip, CLIPS[::-1])
        assert again.name == corrupted.name
        assert torch.equal(again.waveform, corrupted.waveform)


def test_silence_is_nothing():
    assert not silence(CLIPS[0].waveform).any()
    assert not Silence().of(CLIPS[0], CLIPS).waveform.any()
    assert Silence().of(CLIPS[0], CLIPS).name == "silence"


@pytest.mark.parametrize("snr_db", [-20.0, 0.0, 7.5])
def test_white_noise_has_the_ratio_asked_for_and_no_colour(snr_db):
    clip = CLIPS[3]
    corrupted = WhiteNoise(snr_db, seed=3).of(clip, CLIPS)
    assert corrupted.name == f"white_noise {snr_db:g} dB"
    noise = (corrupted.waveform - clip.waveform).double()
    ratio = clip.waveform.double().square().mean() / noise.square().mean()
    assert 10 * math.log10(ratio) == pytest.approx(snr_db, abs=1e-3)
    assert abs(float((noise[1:] * noise[:-1]).mean() / noise.square().mean())) < 0.03  # n = 20,800: 4 s.e.
    assert float((noise.abs() < noise.std()).double().mean()) == pytest.approx(0.6827, abs=0.015)


def test_noise_is_another_for_another_seed_or_name():
    clip = CLIPS[0]
    noise = WhiteNoise(seed=0).of(clip, CLIPS).waveform - clip.waveform
    other_seed = WhiteNoise(seed=1).of(clip, CLIPS).waveform - clip.waveform
    twin = Sample("twin.wav", clip.label, clip.waveform)
    other_name = WhiteNoise(seed=0).of(twin, CLIPS).waveform - clip.waveform
    for other in (other_seed, other_name):
        assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.05


def test_the_other_clip_has_another_label_and_is_cut_or_followed_by_zeros():
    by_name = {clip.name: clip for clip in CLIPS}
    for clip in CLIPS:
        corrupted = OtherClip(seed=4).of(clip, CLIPS)
        kind, name = corrupted.name.split(" ")
        other = by_name[name]
        assert kind == "other_clip"
        assert other.label != clip.label
        n = min(len(clip.waveform), len(other.waveform))
        assert_close(corrupted.waveform[:n], other.waveform[:n], rtol=0, atol=0)
        assert not corrupted.waveform[n:].any()


def test_every_candidate_is_chosen_by_some_seed():
    chosen = {OtherClip(seed).of(CLIPS[1], CLIPS).name for seed in range(60)}
    assert chosen == {f"other_clip {n}.wav" for n in (0, 2, 3, 5)}


def test_a_candidate_more_changes_only_whom_it_is_chosen_for():
    more = [*CLIPS, Sample("new.wav", "hen", chirps([1.0], seed=9)[0])]
    for clip in CLIPS:
        before, after = (OtherClip().of(clip, clips).name for clips in (CLIPS, more))
        assert after in (before, "other_clip new.wav")


def test_what_cannot_be_corrupted_is_refused():
    dogs = [clip for clip in CLIPS if clip.label == "dog"]
    with pytest.raises(DataError, match=r"no other clip for 0\.wav: all clips are labelled 'dog'"):
        OtherClip().of(dogs[0], dogs)
    for snr_db in (math.nan, math.inf, -1000.0):
        with pytest.raises(AudioError, match="cannot be heard"):
            WhiteNoise(snr_db)
