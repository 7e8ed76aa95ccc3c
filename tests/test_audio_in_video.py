"""Videos that are heard: their sound in turn with their frames, against transformers' own processor and Thinker."""

from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch
from families import FAMILIES
from omni import AUDIO, AUDIO_BOS, AUDIO_EOS, N_PIXELS, VIDEO, Thinker, extractor, hf_positions, interleaved
from omni import Video as Grid
from reference import chirps, n_audio_tokens
from test_omni import photos
from torch.testing import assert_close

from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.counterfactual import swap_audio
from lalm_lens.datasets import Sample, seen, unheard
from lalm_lens.errors import InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.experiments.logit_lens import logit_lens
from lalm_lens.inputs import HeardVideo, Videos
from lalm_lens.loading import from_hf
from lalm_lens.pieces import Statement
from lalm_lens.positions import positions_of
from lalm_lens.prompts.interleave import in_turn
from lalm_lens.seeing import SeeingLALM

GENDER = ATTRIBUTES["gender"]
HOW = {"attribute": "gender", "progress": False}
MARKS = {AUDIO_BOS: "<|audio_bos|>", AUDIO_EOS: "<|audio_eos|>", AUDIO: "<|AUDIO|>", VIDEO: "<|VIDEO|>"}


def heard(grid: tuple[int, int, int], seconds: float, seed: int = 0) -> HeardVideo:
    patches = torch.randn(int(np.prod(grid)), N_PIXELS, generator=torch.Generator().manual_seed(seed))
    return HeardVideo(patches, torch.tensor([grid]), torch.tensor([seconds], dtype=torch.float64))


@pytest.fixture(scope="module")
def seeing() -> tuple[Thinker, SeeingLALM]:
    """It hears 4 s, two chunks."""
    family = FAMILIES["qwen2_5_omni_thinker"]
    hf, theirs = family.build(), family.processor()
    model = from_hf(hf, type(theirs)(theirs.image_processor, extractor(), theirs.tokenizer, theirs.chat_template))
    assert isinstance(model, SeeingLALM)
    return hf, model


@pytest.fixture(scope="module")
def samples(seeing) -> list[Sample]:
    """Sound that goes on behind the video, the other way round, and an image before."""
    a, b, c = chirps([2.5, 0.9, 1.4])
    images = seeing[1].processor.see(photos((16, 24)))
    return [
        Sample("a", "male", a, videos=heard((3, 4, 4), 0.5)),
        Sample("b", "female", b, videos=heard((4, 4, 4), 1.0, 1)),
        Sample("c", "male", c, videos=heard((2, 4, 6), 0.7, 2), images=images),
    ]


def question(model, samples: list[Sample], form: str = "P2") -> Question:
    return Question.about(model, samples, GENDER, form, True)


@pytest.mark.parametrize("seconds", [0.4, 1 / 3, 2 / 9, 0.7, 1.0, 3.0, 13.0])
def test_sound_and_frames_are_in_turn_as_in_hf(seconds):
    """A frame may last a part of a chunk of 2 s, or several of them."""
    for n_frames in (1, 2, 5, 41):
        for n_audio in (1, 49, 50, 51, 151):
            theirs = interleaved(Grid(n_frames, 4, 6, seconds), n_audio)[1:-1]
            ours = in_turn(heard((n_frames, 4, 6), seconds), n_frames * 6, n_audio)
            assert [(VIDEO, AUDIO)[which] for which in ours] == theirs


@pytest.mark.parametrize("order", ["audio_first", "text_first"])
@pytest.mark.parametrize("n", range(3))
def test_the_prompt_of_a_heard_video_is_hfs(seeing, samples, n, order):
    """Tokens, positions in time, height and width, logits, and which position is what."""
    hf, ours = seeing
    sample = replace(samples[n], statement=Statement("Listen.", order=order))
    run = question(ours, [sample]).run(sample)
    video, n_audio = sample.videos, n_audio_tokens(-(-len(sample.waveform) // 160))
    mixed = interleaved(Grid(*video.grid[0].tolist(), video.seconds.item()), n_audio)
    said = {"audio_first": ["", f"Listen. {GENDER.question}"], "text_first": ["Listen.\n", GENDER.question]}[order]
    before, behind = ({"type": "text", "text": text} for text in said)
    images = [] if sample.images is None else [{"type": "image"}]
    turn = [{"role": "user", "content": [*images, before, {"type": "video"}, behind]}]
    theirs = FAMILIES["qwen2_5_omni_thinker"].processor()
    text = theirs.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) + GENDER.prefix
    text = text.replace("<|VIDEO|>", "".join(MARKS[token] for token in mixed)).replace("<|IMAGE|>", "<|IMAGE|>" * 6)
    assert list(run.prompt.tokens) == theirs.tokenizer(text)["input_ids"]

    batch = run.inputs.to_hf("feature_attention_mask")
    assert torch.equal(positions_of(run.inputs, ours.lalm_cfg), hf_positions(hf, batch, is_heard=True)[0])
    with torch.no_grad():
        assert_close(ours(run.inputs), hf(**batch, use_audio_in_video=True, use_cache=False).logits)

    region = [position.region for position in run.prompt.positions]
    sizes = [(name, sum(1 for _ in same)) for name, same in groupby(region)]
    inner = [(("video", "audio")[which == AUDIO], sum(1 for _ in same)) for which, same in groupby(mixed[1:-1])]
    begin = region.index("video_tag")
    names = [name for name, _ in sizes]
    at = names.index("video_tag")
    assert sizes[at : at + len(inner) + 4] == [
        ("video_tag", 1),
        ("audio_tag", 1),
        *inner,
        ("audio_tag", 1),
        ("video_tag", 1),
    ]
    assert ("statement" in region[:begin]) == (order == "text_first")
    assert names[:at].count("image") == len(images)


def test_a_batch_of_heard_videos_answers_as_each_alone(seeing, samples):
    """Silent videos, heard ones and none at all, left-padded."""
    _, ours = seeing
    silent = replace(samples[1], name="silent", videos=Videos(**vars(samples[1].videos)))
    its = [*samples, silent, unheard(replace(samples[0], name="unheard")), Sample("plain", "male", samples[2].waveform)]
    runs = [question(ours, its).run(sample) for sample in its]
    heard_ones = [sample.waveform for sample in its if sample.is_heard]
    inputs = ours.processor.inputs([run.prompt for run in runs], heard_ones, **seen(its))
    with torch.no_grad():
        together = ours(inputs, logits_at=-1)
        for row, run in enumerate(runs):
            assert_close(together[row], ours(run.inputs, logits_at=-1)[0])
    assert (together[1] - together[3]).abs().max() > 1e-3, "in turn, or one after the other"
    assert samples[1].digest != silent.digest
    alone = [position.region for position in runs[4].prompt.positions]
    assert [name for name, _ in groupby(alone)][:4] == ["text_before", "video_tag", "video", "video_tag"]
    assert "audio" not in alone


def test_another_sound_in_a_video_is_a_counterfactual(seeing, samples):
    """What is seen stays where it was, and the sound is another."""
    _, ours = seeing
    for sample, pair in zip(samples[:2], swap_audio(samples[:2]), strict=True):
        own, other = (question(ours, samples).run(each) for each in (sample, pair))
        assert own.prompt.tokens == other.prompt.tokens
        assert (pair.seen_label, pair.videos) == (sample.label, sample.videos)
        with torch.no_grad():
            assert (ours(own.inputs) - ours(other.inputs))[:, -1].abs().max() > 1e-4


def test_experiments_read_a_heard_video(seeing, samples):
    """The lens at frames and sound of one stretch, and a trace whose states of all positions bring all of it back."""
    _, ours = seeing
    for place in ("audio", "video"):
        lens = logit_lens(ours, samples[:1], positions=place, **HOW).frame
        run = question(ours, samples, "P3").run(samples[0])
        assert set(lens.position) == set(run.indices(place))
    trace = causal_trace(ours, samples[:1], kinds=["layer", "audio_layer"], **HOW).frame
    first = trace[(trace.kind == "audio_layer") & (trace.layer == -1)]
    assert first.recovery.to_numpy() == pytest.approx(1, abs=1e-3)


def test_a_clip_is_the_sound_of_one_video(samples):
    two = torch.cat([samples[0].videos.grid] * 2)
    with pytest.raises(InputError, match="A clip is the sound of one video, and here are 2"):
        HeardVideo(samples[0].videos.patches.repeat(2, 1), two, torch.ones(2))
