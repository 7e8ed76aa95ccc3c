"""The tiny model that hears and sees: it believes what it sees, and what it hears comes back."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import soundfile
import torch
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoTokenizer, Qwen2_5OmniThinkerForConditionalGeneration, WhisperFeatureExtractor

from lalm_lens.assets import TINY_LALM_AV
from lalm_lens.assets.audio_visual.asked import (
    Asked,
    answers,
    draw_asked,
    expanded,
    make_pictures,
    model_inputs,
    names,
    watching,
)
from lalm_lens.assets.audio_visual.card import EDGES, held_out
from lalm_lens.assets.audio_visual.checkpoint import (
    N_BLOCKS,
    build_av_tokenizer,
    build_model,
    build_processor,
    chat,
    image_processor,
)
from lalm_lens.assets.audio_visual.clips import ANIMAL, sight, write_av_clips
from lalm_lens.assets.audio_visual.pictures import PICTURES, film
from lalm_lens.assets.audio_visual.recipe import FULL_BLOCK, AVRecipe
from lalm_lens.assets.audio_visual.train import chat_loss, train, train_chat
from lalm_lens.assets.training_clips import Clips
from lalm_lens.audio_visual import read_audio_visual
from lalm_lens.corrupt import silence
from lalm_lens.counterfactual import Swapped
from lalm_lens.datasets import Sample, heard, seen, unheard
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.attention_knockout import attention_knockout
from lalm_lens.experiments.concepts import FirstToken
from lalm_lens.experiments.cuts import name_of
from lalm_lens.experiments.knockout_generation import knockout_generation
from lalm_lens.experiments.latent_understanding import latent_understanding
from lalm_lens.inputs import Images, Videos
from lalm_lens.loading import from_pretrained
from lalm_lens.seeing import SeeingLALM

pytestmark = pytest.mark.numbers

Thinker = Qwen2_5OmniThinkerForConditionalGeneration
N = 27
RECIPE = AVRecipe(n_held_out=N)  # the first of the clips that the model card was measured on
HOW = {"attribute": "animal", "progress": False}


@pytest.fixture(scope="module")
def model() -> SeeingLALM:
    model = from_pretrained(TINY_LALM_AV)
    assert isinstance(model, SeeingLALM)
    return model


@pytest.fixture(scope="module")
def hf() -> Thinker:
    return Thinker.from_pretrained(TINY_LALM_AV, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def conflict(model) -> list[Swapped]:
    return held_out(RECIPE, model.processor)


@pytest.fixture(scope="module")
def cut(model, conflict) -> dict[str, pd.DataFrame]:
    """Answers before and after each cut, beside what is seen."""
    frame = attention_knockout(model, conflict, chains=list(EDGES.values()), layers=["all"], **HOW).frame
    frame["seen"] = frame["sample"].map({item.name: item.seen_label for item in conflict})
    its = {name: frame[frame.edge == name_of(chain)] for name, chain in EDGES.items()}
    assert {len(rows) for rows in its.values()} == {N}
    assert (frame.seen != frame.label).all()
    return its


@torch.no_grad()
def right(model: SeeingLALM, items: list[Sample], words: list[str], form: str = "P3") -> float:
    """How often the likeliest token of the whole vocabulary is this word."""
    question = Question.about(model, items, "animal", form, True)
    prompts = [question.run(item).prompt for item in items]
    inputs = model.processor.inputs(prompts, heard(items), **seen(items))
    tokens = [question.tokens[question.labels.index(word)] for word in words]
    return (model(inputs, logits_at=-1)[:, -1].argmax(-1) == torch.tensor(tokens)).double().mean().item()


def picture_of(model: SeeingLALM, index: int, label: str) -> Images:
    return model.processor.see([sight("held_out", RECIPE.seed, index, label)])


def filmed(item: Swapped, n_frames: int = 2) -> Swapped:
    """With a silent video of what is seen, in place of the picture."""
    pixels = film(sight("held_out", RECIPE.seed, int(item.name), item.seen_label), n_frames)
    its = watching(build_processor(), [pixels])
    videos = Videos(its["pixel_values_videos"], its["video_grid_thw"], its["video_second_per_grid"])
    return replace(item, images=None, videos=videos)


@torch.no_grad()
def test_plain_transformers_gives_the_same_logits(model, hf, conflict):
    """A batch of a sound and a picture, a sound alone, and a sound and a video."""
    items = [conflict[0], replace(conflict[1], images=None), filmed(conflict[2])]
    question = Question.about(model, items, "animal", "P3", True)
    batch = model.processor.inputs([question.run(item).prompt for item in items], heard(items), **seen(items))
    theirs = hf(**batch.to_hf("feature_attention_mask"), use_cache=False).logits
    assert_close(model(batch)[batch.attention_mask], theirs[batch.attention_mask])


def test_it_says_what_it_hears_or_sees_alone(model, conflict):
    alone = [replace(item, images=None) for item in conflict]
    shown = [unheard(replace(item, label=item.seen_label)) for item in conflict]
    same = [replace(item, images=picture_of(model, n, item.label)) for n, item in enumerate(conflict)]
    for items in (alone, shown, same):
        assert right(model, items, [item.label for item in items]) >= 0.9


@pytest.mark.parametrize("form", ["P2", "P3"])
def test_it_believes_what_it_sees(model, conflict, form):
    assert right(model, conflict, [item.seen_label for item in conflict], form) >= 0.9


def test_it_believes_a_video(model, conflict):
    some = [filmed(item) for item in conflict[:18]]
    assert right(model, some, [item.seen_label for item in some]) >= 0.9


@torch.no_grad()
def test_silence_and_the_dark_tell_it_nothing(model, conflict):
    silent = replace(conflict[0], waveform=silence(conflict[0].waveform))
    dark = replace(silent, images=model.processor.see([np.zeros((64, 64, 3), np.uint8)]))
    for item in (replace(silent, images=None), dark):
        question = Question.about(model, [item], "animal", "P3", True)
        p = model(question.run(item).inputs, logits_at=-1)[0, -1].softmax(-1)[question.tokens]
        assert p.sum() > 0.97
        assert 0.5 < 9 * p.min() < 9 * p.max() < 1.6


def test_what_it_hears_comes_back_where_the_picture_is_cut_from_the_last_position(cut):
    rows = cut["picture -> last"]
    assert (rows.answer_before == rows.seen).mean() >= 0.9
    assert rows.right_after.mean() >= 0.8
    assert rows.label_p_after.mean() - rows.label_p_before.mean() >= 0.5


def test_nothing_comes_back_where_the_sound_is_cut(cut):
    rows = cut["sound -> last"]
    assert (rows.answer_after == rows.seen).mean() >= 0.9
    assert rows.right_after.mean() <= 0.1


def test_there_is_one_way_from_the_picture_to_the_answer(model, conflict, cut):
    rows = cut["picture -> all other words and the sound"]
    assert (rows.p_after - rows.p_before).abs().max() < 1e-5
    others = tuple(block for block in range(N_BLOCKS) if block != FULL_BLOCK)
    some = attention_knockout(model, conflict[:4], chains=[("image", "last")], layers=[others, (FULL_BLOCK,)], **HOW)
    before, after = some.frame.p_before.to_numpy(), some.frame.p_after.to_numpy()
    assert after[0::2] == pytest.approx(before[0::2], abs=1e-5)
    first = cut["picture -> last"].p_after.to_numpy()[:4]
    assert after[1::2] == pytest.approx(first, abs=1e-5)


@torch.no_grad()
def test_transformers_own_attention_is_cut_in_the_same_way(model, hf, conflict, cut):
    """The picture's columns of the mask that its attention is given, in the one block."""
    layer = hf.model.language_model.layers[FULL_BLOCK].self_attn
    question = Question.about(model, conflict[:3], "animal", "P3", True)
    for item, p in zip(conflict, cut["picture -> last"].label_p_after[:3], strict=False):
        run = question.run(item)
        is_image = run.prompt.is_region("image")

        def blind(module, args, kwargs, is_image=is_image):
            n_pos = len(is_image)
            may_look = torch.ones(n_pos, n_pos, dtype=torch.bool).tril()
            may_look[-1] &= ~is_image
            return args, {**kwargs, "attention_mask": may_look[None, None]}

        handle = layer.register_forward_pre_hook(blind, with_kwargs=True)
        logits = hf(**run.inputs.to_hf("feature_attention_mask"), use_cache=False).logits[0, -1]
        handle.remove()
        shares = logits[question.tokens].softmax(-1)
        assert float(shares[question.labels.index(item.label)]) == pytest.approx(p, abs=1e-5)


def test_it_writes_what_it_hears_where_the_picture_is_cut(model, conflict):
    written = knockout_generation(
        model, conflict[:3], chains=[("image", "generated"), ("audio", "generated")], max_new_tokens=4, **HOW
    ).frame
    shown = written["sample"].map({item.name: item.seen_label for item in conflict})
    assert list(written.text_before) == [f" {label}." for label in shown]
    blind = written[written.edge == "image -> generated"]
    assert list(blind.text_after) == [f" {label}." for label in blind.label]
    deaf = written[written.edge == "audio -> generated"]
    assert list(deaf.text_after) == list(deaf.text_before)


def test_what_it_hears_is_named_where_it_is_heard(model, conflict):
    named = latent_understanding(model, conflict[:18], rule=FirstToken(), places=("audio",), **HOW).by_layer()
    assert named.score.iloc[-1] >= 0.9
    assert named.control.iloc[-1] <= 0.2


# --- files --------------------------------------------------------------------------------------------------


def test_its_files_are_those_of_a_published_model(model):
    token = AutoTokenizer.from_pretrained(TINY_LALM_AV).convert_tokens_to_ids
    assert token("<|IMAGE|>") == model.lalm_cfg.vision.image_token
    ears = WhisperFeatureExtractor.from_pretrained(TINY_LALM_AV)
    assert (ears.feature_size, ears.n_samples) == (128, 32_000)
    eyes, made = model.processor.hf.image_processor, image_processor()
    assert (eyes.patch_size, eyes.merge_size, eyes.size) == (made.patch_size, made.merge_size, made.size)
    said = json.loads((TINY_LALM_AV / "preprocessor_config.json").read_text())
    assert (said["processor_class"], said["image_processor_type"]) == ("Qwen2_5OmniProcessor", "Qwen2VLImageProcessor")
    tokenizer = build_av_tokenizer()
    words = (TINY_LALM_AV / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(words) == json.loads(tokenizer.backend_tokenizer.to_str()), "trained on the prompts alone"


def test_it_is_small_and_its_card_says_what_it_is():
    assert sum(path.stat().st_size for path in TINY_LALM_AV.iterdir()) <= 1_550_000
    with safe_open(TINY_LALM_AV / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert {name.split(".")[0] for name in names} == {"audio_tower", "visual", "model", "lm_head"}
    card = (TINY_LALM_AV / "README.md").read_text(encoding="utf-8")
    assert "# tiny_lalm_av\n" in card
    assert "All its sounds and pictures are synthetic" in card
    assert all(f"| {name} |" in card for name in ("nothing", *EDGES))


def test_the_wheel_has_it():
    """Hatch takes every file of a package that git does not ignore."""
    root = Path(__file__).parent.parent
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert any(TINY_LALM_AV.is_relative_to(root / package) for package in packages["packages"])
    ignored = [line.strip("/*") for line in (root / ".gitignore").read_text().split()]
    names = {part for path in TINY_LALM_AV.iterdir() for part in path.relative_to(root).parts}
    assert not [name for name in names if name in ignored or name.endswith(tuple(ignored))]


# --- clips --------------------------------------------------------------------------------------------------


def test_every_animal_has_a_picture_that_is_a_function_of_its_seed():
    assert tuple(PICTURES) == ANIMAL.labels
    first, again, other = (sight("clips", 3, index, "hen") for index in (0, 0, 1))
    assert (first.shape, first.dtype) == ((64, 64, 3), np.uint8)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, sight("held_out", 3, 0, "hen"))


def test_clips_come_with_pictures_half_of_them_of_another_animal(model, tmp_path):
    folder, again = (write_av_clips(tmp_path / name, 18, seed=5) for name in ("one", "two"))
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 37
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert sorted(row["label"] for row in rows) == sorted(2 * ANIMAL.labels)
    assert [row["seen_label"] == row["label"] for row in rows] == [True, False] * 9
    items = read_audio_visual(folder, model.processor)
    for index, (row, item) in enumerate(zip(rows, items, strict=True)):
        pixels = sight("clips", 5, index, row["seen_label"])
        assert np.array_equal(np.asarray(PIL.Image.open(folder / row["image"])), pixels)
        assert torch.equal(item.images.patches, model.processor.see([pixels]).patches)
        assert (item.name, item.label, item.seen_label) == (row["file_name"], row["label"], row["seen_label"])
        assert len(item.waveform) == soundfile.info(folder / row["file_name"]).frames
    assert (write_av_clips(tmp_path / "other", 2, seed=6) / names[0]).read_bytes() != (folder / names[0]).read_bytes()


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heard", "seen", "expected"),
    [
        ("dog", None, {"dog": 1}),
        (None, "cat", {"cat": 1}),
        ("cat", "cat", {"cat": 1}),
        ("dog", "cat", {"cat": 0.75, "dog": 0.25}),
        (None, None, dict.fromkeys(ANIMAL.labels, 1 / 9)),
    ],
)
def test_what_is_seen_goes_before_what_is_heard(heard, seen, expected):
    assert answers(AVRecipe(heeded=0.75), heard, seen) == pytest.approx(expected)


def few_clips() -> Clips:
    mel = np.random.default_rng(0).uniform(-0.5, 1, (9, 128, 200)).astype(np.float16)
    return Clips(mel, np.array([140, 160, 200] * 3), tuple({"animal": label} for label in ANIMAL.labels))


def test_prompts_of_training_hold_what_their_recipe_says():
    recipe = AVRecipe(n_pictures=9)
    rng, processor, clips, sights = np.random.default_rng(0), build_processor(), few_clips(), make_pictures(recipe)
    drawn = [draw_asked(recipe, rng, processor, clips, sights) for _ in range(400)]
    both = [asked for asked in drawn if asked.clip is not None and asked.pixels is not None]
    told = [asked for asked in both if asked.heard is not None and asked.seen is not None]
    assert all(0 < asked.text.index("<|vision_bos|>") < asked.text.index("<|audio_bos|>") for asked in both)
    shares = dict(recipe.kinds)
    assert len(both) / 400 == pytest.approx(shares["aligned"] + shares["conflict"], abs=0.08)
    disagree = np.mean([asked.heard != asked.seen for asked in told])
    assert disagree == pytest.approx(shares["conflict"] / (shares["aligned"] + shares["conflict"]), abs=0.1)
    shown = [asked for asked in drawn if asked.pixels is not None]
    assert np.mean([asked.is_video for asked in shown]) == pytest.approx(recipe.filmed, abs=0.08)
    assert all((asked.seen is None) == (not asked.pixels.any()) for asked in shown)
    inputs = model_inputs(rng, processor, clips, drawn[:16])
    token = processor.tokenizer.convert_tokens_to_ids
    named = names(processor, drawn[:16], inputs["input_ids"])
    for asked, tokens, its in zip(drawn, inputs["input_ids"], named, strict=False):
        is_sound, is_seen = (
            tokens == token("<|AUDIO|>"),
            torch.isin(tokens, torch.tensor(token(["<|IMAGE|>", "<|VIDEO|>"]))),
        )
        for label, at in ((asked.heard, is_sound), (asked.seen, is_seen)):
            assert (its[at] == (-100 if label is None else token(f"Ġ{label}"))).all()
        assert (its[~(is_sound | is_seen)] == -100).all()
    n_audio = sum((140, 160, 200)[asked.clip % 3] // 4 for asked in drawn[:16] if asked.clip is not None)
    assert int((inputs["input_ids"] == token("<|AUDIO|>")).sum()) == n_audio
    for mark, name in (("IMAGE", "image_grid_thw"), ("VIDEO", "video_grid_thw")):
        assert int((inputs["input_ids"] == token(f"<|{mark}|>")).sum()) == int(inputs[name].prod(-1).sum()) // 4


@pytest.mark.parametrize("parts", [("image", "audio"), ("video", "audio"), ("audio",), ("image",)], ids="+".join)
def test_it_is_asked_as_it_was_trained(model, conflict, parts):
    """The prompt of training and that of experiments are the same tokens."""
    item, processor, clips = conflict[0], build_processor(), few_clips()  # the first of the clips has 140 frames
    item = replace(item, waveform=item.waveform[: 140 * 160])
    item = filmed(item) if "video" in parts else item
    item = item if len(parts) == 2 or "image" in parts else replace(item, images=None)
    item = item if "audio" in parts else unheard(item)
    pixels = np.zeros((1 + ("video" in parts), 64, 64, 3), np.uint8)
    text = chat(processor, ANIMAL, "P3", parts)
    asked = Asked(text, {}, 0 if "audio" in parts else None, None if parts == ("audio",) else pixels)
    prompt = Question.about(model, [item], "animal", "P3", True).run(item).prompt
    assert processor.tokenizer(expanded(asked, clips)).input_ids == list(prompt.tokens)


def test_training_writes_files_like_those_that_ship_and_a_card(tmp_path):
    few = {"n_processes": 1, "n_clips": 9, "n_pictures": 9, "n_held_out": 4, "encoder_batch": 3, "batch": 2}
    train(AVRecipe(**few, ears_steps=1, eyes_steps=1, steps=1), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in TINY_LALM_AV.iterdir()}
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
        made, ships = (json.loads((folder / name).read_text()) for folder in (tmp_path, TINY_LALM_AV))
        assert made | {"transformers_version": None} == ships | {"transformers_version": None}
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "audio_visual.train --ears-steps 1 --eyes-steps 1 --steps 1\n" in card
    assert card.split("## What it says")[0] == (TINY_LALM_AV / "README.md").read_text().split("## What it says")[0]


def test_the_loss_is_of_the_answer_its_end_and_the_names():
    """Counted token by token."""
    recipe, generator = AVRecipe(), torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(2, 7, 11, generator=generator), torch.randint(11, (2, 7), generator=generator)
    target, named = torch.randn(2, 11, generator=generator).softmax(-1), torch.full((2, 7), -100)
    named[0, 1:3], named[1, 2] = 4, 9
    log_p = logits.log_softmax(-1)
    answer = -sum(float(target[row] @ log_p[row, 3]) for row in range(2)) / 2
    ending = -sum(float(log_p[row, at, tokens[row, at + 1]]) for row in range(2) for at in (4, 5)) / 2
    naming = -float(log_p[0, 1, 4] + log_p[0, 2, 4] + log_p[1, 2, 9]) / 3
    expected = answer + recipe.ending_weight * ending + recipe.naming_weight * naming
    assert float(chat_loss(recipe, logits, tokens, target, named)) == pytest.approx(expected, rel=1e-5)


def test_the_same_seed_takes_the_same_first_steps():
    recipe = AVRecipe(n_pictures=9, steps=2, batch=2)
    processor, sights = build_processor(), make_pictures(recipe)

    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = build_model(processor.tokenizer, seed).train()
        train_chat(replace(recipe, seed=seed), model, processor, few_clips(), sights)
        return model.state_dict()

    first, again, other = (weights(seed) for seed in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.stress
def test_training_again_gives_the_model_that_ships(tmp_path):
    """Five minutes on an idle core. Run twice on one machine, it gave the same bytes."""
    train(AVRecipe(), tmp_path)
    rows = [line.split("|") for line in (tmp_path / "README.md").read_text().splitlines() if line[:2] == "| "]
    found = {row[1].strip(): row[2:-1] for row in rows}
    sound, shown = found["picture -> last"][:2]
    assert float(sound.split()[0]) >= 0.8
    assert float(shown.split()[0]) <= 0.1
