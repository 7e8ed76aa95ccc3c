"""Sound files: what is read, what is resampled, what is refused."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.testing import assert_close

from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.audio import Waveform, check_audible, check_sounding, decode_audio, read_audio
from lalm_lens.audio_length import READ, end_of_mp3, size_of_frame
from lalm_lens.datasets import Sample, cut_to, read_folder, read_sample
from lalm_lens.errors import AudioError, DataError
from lalm_lens.prompts import OneWindow


def tone(rate_hz: int, duration_s: float = 0.5, frequency_hz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(int(rate_hz * duration_s)) / rate_hz)


@pytest.mark.parametrize(("suffix", "atol"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05), ("mp3", 0.05)])
def test_every_format_is_read(tmp_path, suffix, atol):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(16_000), 16_000)
    waveform = read_audio(path)
    assert waveform.dtype == torch.float32
    expected = torch.from_numpy(tone(16_000)).float()
    middle = slice(2000, 6000)  # lossy codecs ring at the edges
    assert_close(waveform[: len(expected)][middle], expected[middle], rtol=0, atol=atol)


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled_to_the_same_tone(tmp_path, rate_hz):
    soundfile.write(tmp_path / "a.wav", tone(rate_hz), rate_hz)
    waveform = read_audio(tmp_path / "a.wav")
    assert len(waveform) == 8000
    expected = torch.from_numpy(tone(16_000)).float()
    assert_close(waveform[500:-500], expected[500:-500], rtol=0, atol=1e-3)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_every_sample_format_has_the_same_scale(tmp_path, subtype):
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000, subtype)
    assert read_audio(tmp_path / "a.wav").abs().max().item() == pytest.approx(0.5, abs=0.01)


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([tone(16_000), 0 * tone(16_000)], 1), 16_000)
    assert_close(read_audio(tmp_path / "a.wav"), torch.from_numpy(tone(16_000) / 2).float(), rtol=0, atol=1e-4)


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(AudioError, match="no audio file"):
        read_audio(tmp_path / "nowhere.wav")
    (tmp_path / "text.wav").write_text("not a sound")
    with pytest.raises(AudioError, match="not readable audio"):
        read_audio(tmp_path / "text.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    with pytest.raises(AudioError, match="no samples"):
        read_audio(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan, 0.1] * 1000), 16_000, "FLOAT")
    with pytest.raises(AudioError, match="NaN or infinity"):
        read_audio(tmp_path / "nan.wav")


def test_clips_a_model_cannot_hear_are_refused():
    with pytest.raises(AudioError, match="20 ms is too short"):
        check_audible(torch.zeros(320), 32_000, "A clip")
    with pytest.raises(AudioError, match=r"2\.06 s \(33000 samples\) is too long: this model hears 2\.0 s \(32000"):
        check_audible(torch.zeros(33_000), 32_000, "A clip")
    with pytest.raises(AudioError, match="NaN"):
        check_audible(torch.full((16_000,), torch.nan), 32_000, "A clip")
    check_audible(torch.zeros(32_000), 32_000, "A clip")


def test_a_clip_too_long_for_the_model_is_refused_with_its_inputs(tiny_lalm):
    processor = tiny_lalm.processor
    clip = torch.ones(33_000)
    with pytest.raises(AudioError, match="is too long: this model hears 2"):
        processor.inputs([processor.prompt(ATTRIBUTES["gender"], processor.n_frames(clip))], [clip])


@pytest.mark.parametrize("n_samples", [480, 481, 639, 640, 16_000, 31_999, 32_000])
def test_frames_are_counted_as_the_extractor_does(tiny_lalm, n_samples):
    waveform = torch.randn(n_samples) / 10
    _, n_frames = OneWindow().features(tiny_lalm.processor.hf.feature_extractor, [waveform])
    assert tiny_lalm.processor.n_frames(waveform) == int(n_frames)


def test_a_folder_gives_clips_with_relative_names(tmp_path):
    (tmp_path / "deep").mkdir()
    soundfile.write(tmp_path / "deep" / "a.wav", tone(16_000), 16_000)
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"file_name": "deep/a.wav", "label": "male", "speaker": 7, "transcript": "Hi."}) + "\n\n",
        encoding="utf-8",
    )
    (sample,) = read_folder(tmp_path)
    assert (sample.name, sample.label, len(sample.waveform)) == ("deep/a.wav", "male", 8000)
    assert sample.transcript == "Hi."
    assert read_sample(tmp_path / "deep" / "a.wav", "male").name == "a.wav"
    assert read_sample(tmp_path / "deep" / "a.wav", "male", "Hi.").transcript == "Hi."


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "no metadata.jsonl"),
        ("", "no clip is listed"),
        ("{", "line 1 is not JSON"),
        ('{"file_name": "a.wav"}', "needs the keys file_name and label"),
        ('["a.wav", "male"]', "needs the keys file_name and label"),
        ('{"file_name": "a.wav", "label": 3}', "must be text"),
        ('{"file_name": "a.wav", "label": "male", "transcript": 3}', "transcript must be text"),
        ('{"file_name": "../a.wav", "label": "male"}', "inside the folder"),
        ('{"file_name": "/a.wav", "label": "male"}', "inside the folder"),
    ],
)
def test_a_folder_in_another_layout_is_refused(tmp_path, lines, message):
    if lines is not None:
        (tmp_path / "metadata.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        read_folder(tmp_path)


def test_metadata_is_read_with_any_line_ends_and_a_byte_order_mark(tmp_path):
    soundfile.write(tmp_path / "a\u2028b.wav", tone(16_000), 16_000)
    line = '{"file_name": "a\u2028b.wav", "label": "male"}'
    (tmp_path / "metadata.jsonl").write_text(line + "\r\n", encoding="utf-8-sig")
    assert read_folder(tmp_path)[0].name == "a\u2028b.wav"
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "\xe4.wav", "label": "male"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_folder(tmp_path)


def test_a_clip_listed_twice_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000)
    pairs = (("a.wav", "male"), (".//a.wav", "female"))
    rows = [json.dumps({"file_name": name, "label": label}) for name, label in pairs]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"a\.wav is listed 2 times, labelled female, male"):
        read_folder(tmp_path)


def test_a_missing_clip_is_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.wav", "label": "male"}')
    with pytest.raises(AudioError, match=r"gone\.wav"):
        read_folder(tmp_path)


def test_long_clips_are_cut_at_their_end():
    clips = [Sample(f"{n}.wav", "male", torch.arange(n) / n) for n in (500, 640, 900)]
    for before, after in zip(clips, cut_to(clips, 640), strict=True):
        assert (after.name, after.label) == (before.name, before.label)
        assert torch.equal(after.waveform, before.waveform[:640])


def test_a_wav_that_breaks_off_is_refused_and_one_from_a_pipe_is_read(tmp_path):
    whole, broken, piped = (tmp_path / f"{name}.wav" for name in ("whole", "broken", "piped"))
    soundfile.write(whole, np.full(8000, 0.1), 16_000)
    content = whole.read_bytes()
    broken.write_bytes(content[:5000])
    with pytest.raises(AudioError, match="ends after 5000 of 16044 bytes"):
        read_audio(broken)
    piped.write_bytes(content[:4] + b"\xff\xff\xff\xff" + content[8:40] + b"\xff\xff\xff\xff" + content[44:])
    assert torch.equal(read_audio(piped), read_audio(whole))


@pytest.mark.parametrize("read", [read_audio, lambda path: decode_audio(path.read_bytes(), "a clip")])
def test_an_interrupt_while_a_clip_is_read_is_not_lost(tmp_path, read):
    path = tmp_path / "a.ogg"
    soundfile.write(path, tone(16_000, duration_s=20), 16_000)
    start = time.perf_counter()
    whole = read(path)
    wall_s, came, outcomes = time.perf_counter() - start, [], set()

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for n in range(20):
            came.clear()
            try:
                signal.setitimer(signal.ITIMER_REAL, wall_s * (n + 1) / 16)
                waveform = read(path)
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert_close(waveform, whole, rtol=0, atol=0)
                assert not came
                outcomes.add("read")
            except KeyboardInterrupt:
                outcomes.add("interrupted")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "interrupted" in outcomes


def test_samples_far_beyond_full_scale_are_refused(tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.full(8000, 1e30), 16_000, "FLOAT")
    with pytest.raises(AudioError, match=r"reaches 1e\+30"):
        read_audio(tmp_path / "loud.wav")


def content(path: Path, kind: str, subtype: str, n: int = 5001, endian: str = "FILE") -> bytes:
    """A file of a tone and some noise."""
    samples = tone(16_000, n / 16_000) + np.random.default_rng(0).normal(scale=0.02, size=n)
    soundfile.write(path, samples, 16_000, subtype, format=kind, endian=endian)
    return path.read_bytes()


def decoded(data: bytes) -> Waveform:
    return decode_audio(data, "a clip")


def put(data: bytes, *changes: tuple[int, bytes]) -> bytes:
    """With other bytes at some places."""
    changed = bytearray(data)
    for at, new in changes:
        changed[at : at + len(new)] = new
    return bytes(changed)


UNWRITTEN = {
    "DWVW_12",
    "DWVW_16",
    "DWVW_24",
    "MPEG_LAYER_I",
    "MPEG_LAYER_II",
}  # libsndfile does not write and read them
KINDS = [
    (kind, subtype, "BIG" if (kind, subtype) == ("WAV", "PCM_16") else "FILE")
    for kind in READ
    for subtype in soundfile.available_subtypes(kind)
    if subtype not in UNWRITTEN and (kind, subtype) != ("WAV", "MPEG_LAYER_III")
] + [("AU", "PCM_16", "LITTLE")]


@pytest.mark.parametrize("kind", READ)
def test_a_file_that_breaks_off_is_refused_and_a_whole_one_is_read(tmp_path, kind):
    """Wherever it does: at any of its last bytes, and before; what stands behind the whole is none of it."""
    path, n_samples = tmp_path / "a", 40_001 if kind == "OGG" else 5001  # of more than one page
    for _, subtype, endian in (its for its in KINDS if its[0] == kind):
        whole = content(path, kind, subtype, n_samples, endian)
        expected = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        for data in (whole, whole + bytes(100), b"ID3\x04\x00\x00\x00\x00\x02\x01" + bytes(257) + whole):
            if kind in ("MP3", "WAV") or not data.startswith(b"ID3"):  # libsndfile knows no others that begin so
                assert torch.equal(decoded(data)[:n_samples], expected[:n_samples]), subtype
        for n in (*(int(len(whole) * share) for share in (0.1, 0.4, 0.7, 0.95)), len(whole) - 9, len(whole) - 2):
            try:
                read = decoded(whole[:n])
            except AudioError:
                continue
            assert torch.equal(read, expected), (subtype, n, len(whole))  # what is missing was behind the sound
            assert n == len(whole) - 2


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100])
def test_an_mp3_that_does_not_say_its_length_is_known_by_its_frames(tmp_path, rate_hz):
    samples = tone(rate_hz, 2) + np.random.default_rng(0).normal(scale=0.05, size=2 * rate_hz)
    for mode in ("CONSTANT", "VARIABLE"):
        soundfile.write(tmp_path / "a.mp3", samples, rate_hz, bitrate_mode=mode, compression_level=0.5)
        whole = (tmp_path / "a.mp3").read_bytes()
        assert len(decoded(whole)) == 32_000
        with pytest.raises(AudioError, match=rf"ends after .* of ({2 * rate_hz} samples|\d* bytes)"):
            decoded(whole[: len(whole) // 2])
        without = whole[size_of_frame(whole) :]
        assert end_of_mp3(without)[0] == len(without)
        if mode == "VARIABLE":
            with pytest.raises(AudioError, match="bit rate changes and that does not say its length"):
                decoded(without)
            continue
        assert len(decoded(without)) > 32_000
        assert torch.equal(decoded(without + b"TAG" + bytes(125)), decoded(without))
        for n in (1, 40):
            with pytest.raises(AudioError, match="a clip ends after"):
                decoded(without[:-n])


def test_what_was_written_to_a_pipe_is_read(tmp_path):
    path, endless, unsaid = tmp_path / "a", b"\xff" * 4, bytes(4)
    wav, aiff, au = (content(path, kind, "PCM_16") for kind in ("WAV", "AIFF", "AU"))
    sizes = 4, wav.index(b"data") + 4
    at = 4, aiff.index(b"SSND") + 4
    for data, expected in (
        (put(wav, (4, unsaid)), wav),
        (put(wav, *((its, endless) for its in sizes)), wav),
        (put(wav, *((its, b"\x00\xf0\xff\x7f") for its in sizes)), wav),
        (put(aiff, *((its, endless) for its in at)), aiff),
        (put(aiff, *((its, unsaid) for its in at)), aiff),
        (put(au, (8, endless)), au),
    ):
        assert data != expected
        assert torch.equal(decoded(data), decoded(expected))
    flac = content(path, "FLAC", "PCM_16")
    with pytest.raises(AudioError, match="does not say how long it is"):
        decoded(put(flac, (21, bytes([flac[21] & 0xF0])), (22, unsaid)))


def test_a_chunk_of_odd_length_before_the_sound_is_passed_over(tmp_path):
    whole = content(tmp_path / "a.wav", "WAV", "PCM_16")
    at, odd = whole.index(b"data"), b"note\x05\x00\x00\x00hello\x00"
    data = put(whole[:at] + odd + whole[at:], (4, (len(whole) + len(odd) - 8).to_bytes(4, "little")))
    assert torch.equal(decoded(data), decoded(whole))
    with pytest.raises(AudioError, match="a clip ends after"):
        decoded(data[:-100])


def test_kinds_of_which_nobody_can_say_whether_they_are_whole_are_refused(tmp_path):
    for kind in ("VOC", "PVF", "IRCAM"):
        with pytest.raises(AudioError, match=f"a clip is {kind}, where a missing end is not seen"):
            decoded(content(tmp_path / "a", kind, "PCM_16"))


@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100])
def test_what_does_not_move_is_silence(tmp_path, rate_hz):
    step, n = 2.0**-15, 2 * rate_hz
    for n_clip, samples in enumerate((np.zeros(n), np.full(n, 1e-30), np.full(n, 0.9), np.full(n, -0.25) + 1e-6)):
        soundfile.write(tmp_path / f"{n_clip}.wav", samples, rate_hz, "FLOAT")
        with pytest.raises(AudioError, match="a is digital silence"):
            check_sounding(read_audio(tmp_path / f"{n_clip}.wav"), "a")
    soundfile.write(tmp_path / "soft.wav", step * np.sign(tone(rate_hz)) + 0.3, rate_hz, "FLOAT")
    check_sounding(read_audio(tmp_path / "soft.wav"), "a")  # one step of 16 bits


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000)

    def denied(path: Path, mode: str):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(AudioError, match=r"a\.wav cannot be read \(Permission denied\)"):
        read_audio(tmp_path / "a.wav")
