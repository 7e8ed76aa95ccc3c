"""Samples that are heard and seen, in prompts and experiments, and counterfactual pairs of them."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from omni import hf_states
from reference import chirps
from test_omni import photos, seeing  # noqa: F401
from torch.testing import assert_close

from lalm_lens.conflict import make_conflict
from lalm_lens.counterfactual import swap_audio
from lalm_lens.datasets import Sample, seen, unheard
from lalm_lens.errors import DataError, InputError, PromptError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.attention_knockout import attention_knockout
from lalm_lens.experiments.attention_share import attention_share
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.experiments.concepts import FirstToken
from lalm_lens.experiments.features import Spot, features
from lalm_lens.experiments.latent_understanding import latent_understanding
from lalm_lens.experiments.logit_lens import logit_lens
from lalm_lens.experiments.probe import probe
from lalm_lens.inputs import Inputs, Videos
from lalm_lens.runs import Run

HOW = {"attribute": "gender", "progress": False}


@pytest.fixture(scope="module")
def samples(seeing) -> list[Sample]:  # noqa: F811
    """An image, two images and a video, and a clip alone."""
    see = seeing[1].processor.see
    one, two, still = see(photos((40, 52))), see(photos((21, 30), (33, 64))), see(photos((40, 40)))
    video = Videos(still.patches.repeat(2, 1), torch.tensor([[2, *still.grid[0, 1:].tolist()]]), torch.tensor([1.0]))
    a, b, c = chirps([0.9, 1.3, 0.7])
    return [
        Sample("a", "male", a, images=one),
        Sample("b", "female", b, images=two, videos=video),
        Sample("c", "male", c),
    ]


def test_a_sample_is_asked_about_with_what_is_seen(seeing, samples):  # noqa: F811
    """The same prompt and inputs as made by hand, and HF's logits of them."""
    hf, ours = seeing
    question, processor = Question.about(ours, samples, "gender", "P3", True), ours.processor
    for sample in samples:
        run = question.run(sample)
        its = {"images": sample.images, "videos": sample.videos}
        n_frames = processor.n_frames(sample.waveform)
        prompt = processor.prompt(question.attribute, n_frames, answer=sample.label, **its)
        assert run.prompt == prompt
        assert isinstance(run.inputs, Inputs)
        n_seen = 0 if not sample.is_seen else sum(int(p.grid.prod(-1).sum()) // 4 for p in its.values() if p)
        assert int(prompt.is_region("image", "video").sum()) == n_seen
        with torch.no_grad():
            theirs = hf(**run.inputs.to_hf("feature_attention_mask"), use_cache=False).logits
            assert_close(ours(run.inputs), theirs)
    assert len({sample.digest for sample in samples}) == len(samples)
    assert replace(samples[0], images=None).digest != samples[0].digest


def test_the_lens_reads_a_batch_of_other_pictures_as_it_reads_each(seeing, samples):  # noqa: F811
    _, ours = seeing
    together = logit_lens(ours, samples, token_budget=10_000, **HOW).frame
    alone = [logit_lens(ours, [sample], token_budget=1, **HOW).frame for sample in samples]
    for sample, rows in zip(samples, alone, strict=True):
        its = together[together["sample"] == sample.name].reset_index(drop=True)
        labels = its.kind == "label"
        assert its.logit[labels].to_numpy() == pytest.approx(rows.logit[labels].to_numpy(), rel=1e-4, abs=1e-5)
    batch = ours.processor.inputs(
        [run.prompt for run in map(Question.about(ours, samples, "gender", "P3", True).run, samples)],
        [sample.waveform for sample in samples],
        **seen(samples),
    )
    assert batch.images.grid.shape == (3, 3)
    assert batch.videos.grid.shape == (1, 3)


def test_experiments_take_what_is_seen(seeing, samples):  # noqa: F811
    """Lens, shares and knockout at visual positions; what another picture changes is seen."""
    _, ours = seeing
    some = samples[:2]
    lens = latent_understanding(ours, some, rule=FirstToken(), places=("audio", "image"), top_k=5, **HOW)
    assert lens.frame.groupby("place").n_at.max().to_dict() == {
        "audio": lens.frame.query("place == 'audio'").n_at.max(),
        "image": sum(int(each) // 4 for each in some[1].images.grid.prod(-1)),
    }
    shares = attention_share(ours, some, **HOW).frame
    assert {"image", "video", "audio"} <= set(shares.region)
    cut = attention_knockout(ours, some, chains=[("image", "last"), ("audio", "last")], layers=("all",), **HOW)
    assert (cut.frame.p_before != cut.frame.p_after).all()
    other = replace(some[0], images=ours.processor.see([np.zeros((40, 52, 3), np.uint8)]))
    with torch.no_grad():
        question = Question.about(ours, some, "gender", "P3", True)
        assert not torch.equal(*(ours(question.run(each).inputs)[:, -1] for each in (some[0], other)))


def test_probes_read_each_modality(seeing, samples):  # noqa: F811
    """States of the pictures tell which was seen, whatever is heard."""
    _, ours = seeing
    first, second = (ours.processor.see(photos((40, 40))[:1]), ours.processor.see([np.zeros((40, 40, 3), np.uint8)]))
    clips = [
        Sample(f"{n}", label, clip, images=images)
        for n, clip in enumerate(chirps([0.5] * 4))
        for label, images in (("male", first), ("female", second))
    ]
    clips = [replace(clip, name=f"{clip.name} {clip.label}") for clip in clips]
    stacks = ("audio_encoder", "adapter", "vision_encoder", "vision_adapter", "decoder")
    probed = probe(ours, clips, places=("image", "audio"), stacks=stacks, n_folds=2, n_controls=0, **HOW)
    layers = probed.layers().set_index(["stack", "place", "layer"]).accuracy
    n_layers = ours.vision.n_layers
    assert layers["vision_encoder", "pictures"].to_dict() == dict.fromkeys(range(-1, n_layers), 1.0)
    assert (layers[["vision_adapter"]] == 1).all()
    assert (layers["decoder", "image"] == 1).all()
    assert (layers[["audio_encoder", "adapter"]] <= 0.5).all(), "the same clip was heard with both"
    assert [ax.get_title() for ax in probed.plot().axes][2:4] == ["vision encoder", "vision adapter"]


def test_what_is_read_of_pictures_are_hfs_states(seeing, samples, tiny_lalm):  # noqa: F811
    """The mean over patches of each block of the tower, and what every layer decodes to where a picture is."""
    hf, ours = seeing
    sample = samples[1]  # two images and a video
    run = Question.about(ours, [sample], "gender", "P3", True).run(sample)
    _, states = hf_states(hf, run.inputs.to_hf("feature_attention_mask"))
    read = features(ours, run, ["vision_encoder", "vision_adapter"], [])
    for layer in range(ours.vision.n_layers):
        theirs = states[f"vision.{layer}"].mean(0).numpy()
        assert read[Spot("vision_encoder", layer, "pictures")] == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    theirs = states["vision_adapter"].mean(0).numpy()
    assert read[Spot("vision_adapter", 0, "pictures")] == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for place in ("image", "video"):
        lens = logit_lens(ours, [sample], positions=place, top_k=2, **HOW).frame
        at, top = list(run.indices(place)), lens[lens.kind == "top"]
        for layer in range(ours.decoder_cfg.n_layers):
            with torch.no_grad():
                logits = hf.lm_head(hf.model.language_model.norm(states[f"text.{layer}"][0, at]))
            its = top[top.layer == layer].logit.to_numpy().reshape(len(at), 2)
            assert its == pytest.approx(logits.topk(2).values.numpy(), rel=1e-4, abs=1e-5)
    with pytest.raises(InputError, match="This qwen2_audio model hears and does not see: leave out vision_encoder"):
        features(tiny_lalm, Run(replace(run.inputs, images=None, videos=None)), ["vision_encoder"], [])


def test_a_silent_run_is_shared_among_the_same_pictures_alone(seeing, samples):  # noqa: F811
    """Two samples of one length and prompt, and two images: each has its own silent run."""
    _, ours = seeing
    dark = ours.processor.see([np.zeros((40, 52, 3), np.uint8)])
    both = [samples[0], replace(samples[0], name="dark", images=dark)]
    together = causal_trace(ours, both, **HOW).frame
    alone = causal_trace(ours, both[1:], **HOW).frame
    its = together[together["sample"] == "dark"]
    assert its.p_corrupted.iloc[0] == pytest.approx(alone.p_corrupted.iloc[0], rel=1e-5)
    assert its.p_corrupted.iloc[0] != together.p_corrupted.iloc[0]


def test_pictures_are_not_lost_in_silence(seeing, samples, tiny_lalm):  # noqa: F811
    with pytest.raises(DataError, match="its pictures would be lost"):
        make_conflict(samples, "gender")
    with pytest.raises(PromptError, match="This qwen2_audio model hears and does not see"):
        logit_lens(tiny_lalm, samples, **HOW)
    assert unheard(samples[0]).images is samples[0].images


def clips(labels: str) -> list[Sample]:
    return [Sample(f"{n}{each}", each, torch.full((n + 3,), 1.0 + n)) for n, each in enumerate(labels)]


def test_swapped_audio_is_as_far_as_any_way_to_swap_it():
    """Against all permutations."""
    its, rng = clips("xxyyz"), np.random.default_rng(0)
    far = {(a.name, b.name): rng.random() for a in its for b in its}

    def total(order) -> float:
        return sum(far[a.name, b.name] for a, b in zip(its, order, strict=True))

    allowed = [order for order in permutations(its) if all(a.label != b.label for a, b in zip(its, order, strict=True))]
    pairs = swap_audio(its, lambda sample, other: far[sample.name, other.name])
    by_name = {each.name: each for each in its}
    assert total([by_name[pair.heard_clip] for pair in pairs]) == pytest.approx(max(map(total, allowed)))
    for sample, pair in zip(its, pairs, strict=True):
        other = by_name[pair.heard_clip]
        assert (pair.seen_label, pair.label) == (sample.label, other.label)
        n = min(len(sample.waveform), len(other.waveform))
        assert len(pair.waveform) == len(sample.waveform)
        assert torch.equal(pair.waveform[:n], other.waveform[:n])
        assert not pair.waveform[n:].any()


def test_drawn_swaps_give_each_clip_once_and_depend_on_names_alone(samples):
    its = clips("xxxyyyzz")
    once = {pair.name for pair in swap_audio(its)}
    assert once == {pair.name for pair in swap_audio(its[::-1])}
    assert once != {pair.name for pair in swap_audio(its, seed=1)}
    assert sorted(pair.heard_clip for pair in swap_audio(its)) == [each.name for each in its]
    (pair, _) = swap_audio(samples[:2])
    assert (pair.images, pair.label) == (samples[0].images, "female")


def test_what_is_swapped_again_says_what_is_seen_and_heard():
    once = swap_audio(clips("xxyyz"))
    again = swap_audio(once, seed=3)
    heard = {each.heard_clip: each.label for each in once}
    for before, pair in zip(once, again, strict=True):
        assert pair.seen_label == before.seen_label != pair.label
        assert pair.label == heard[pair.heard_clip]


def test_what_disagrees_already_hears_another():
    """Its own clip is of another label than its picture, and would do."""
    its = swap_audio(clips("xxyyz"))
    for seed in range(20):
        assert not {pair.name for pair in swap_audio(its, seed=seed)} & {f"{each.name} | {each.name}" for each in its}


def test_what_cannot_be_swapped_is_refused(samples):
    with pytest.raises(DataError, match="more than half are of one"):
        swap_audio(samples)
    with pytest.raises(DataError, match=r"is nan\. Give finite ones"):
        swap_audio(clips("xy"), lambda sample, other: float("nan"))
    with pytest.raises(DataError, match="There is no clip to swap in a"):
        swap_audio([unheard(samples[0]), samples[1]])
