"""The synthesiser and the training of the tiny model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from lalm_lens.assets.animals import ANIMALS
from lalm_lens.assets.checkpoint import build_model, build_processor
from lalm_lens.assets.clips import sound, write_clips
from lalm_lens.assets.languages import LANGUAGES
from lalm_lens.assets.recipe import RECIPES, Recipe
from lalm_lens.assets.speech import EMOTIONS, VOICES
from lalm_lens.assets.train import attention, chat_loss, train
from lalm_lens.attributes import ATTRIBUTES

pytestmark = pytest.mark.numbers

SMOKE = {
    "n_processes": 1,
    "n_speech": 80,  # each combination of labels once
    "n_animal": 36,
    "n_held_out_speech": 16,
    "n_held_out_animal": 9,
    "encoder_steps": 2,
    "encoder_batch": 8,
    "steps": 2,
    "batch": 4,
}
SLIDING, FULL = "sliding_attention", "full_attention"


def test_every_label_has_a_sound():
    tables = {"gender": VOICES, "language": LANGUAGES, "emotion": EMOTIONS, "animal": ANIMALS}
    assert {name: tuple(table) for name, table in tables.items()} == {
        name: attribute.labels for name, attribute in ATTRIBUTES.items()
    }


@pytest.mark.parametrize("labels", [{"gender": "male", "language": "German", "emotion": "sad"}, {"animal": "hen"}])
def test_a_sound_is_a_function_of_its_seed(labels):
    first, again, other = (sound(np.random.default_rng(seed), labels, 1.4) for seed in (3, 3, 4))
    assert first.dtype == np.float32
    assert len(first) == 22_400
    assert np.abs(first).max() <= 1
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_clips_are_balanced_wav_files(tmp_path, name):
    labels = ATTRIBUTES[name].labels
    folder = write_clips(tmp_path / name, name, 2 * len(labels), seed=0)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert sorted(row["label"] for row in rows) == sorted(2 * labels)
    for row in rows:
        info = soundfile.info(folder / row["file_name"])
        assert (info.samplerate, info.channels, info.subtype, info.frames) == (16_000, 1, "PCM_16", 25_600)


@pytest.mark.parametrize(
    ("name", "windows", "kinds"),
    [
        ("tiny_lalm", [None, None], [FULL] * 8),
        pytest.param("tiny_lalm_planted", [1, 1], [SLIDING] * 4 + [FULL] + [SLIDING] * 3, marks=pytest.mark.stress),
        pytest.param("tiny_lalm_relay", [28, 20], [SLIDING] * 8, marks=pytest.mark.stress),
        ("tiny_lalm_suppress", [1, 1], [SLIDING] * 4 + [FULL] + [SLIDING] * 3),
        pytest.param("tiny_lalm_erase", [28, 28], [SLIDING] * 8, marks=pytest.mark.stress),
    ],
)
def test_training_writes_a_checkpoint_that_transformers_loads_and_a_card(tmp_path, monkeypatch, name, windows, kinds):
    seen = []

    def watched(recipe: Recipe, model: Qwen2AudioForConditionalGeneration, *rest: object) -> torch.Tensor:
        seen.append(model.config.text_config.sliding_window)
        return chat_loss(recipe, model, *rest)

    monkeypatch.setattr("lalm_lens.assets.train.chat_loss", watched)
    monkeypatch.setattr("lalm_lens.assets.train.told", lambda recipe, folder: f"\n{recipe.name} was told.\n")
    train(replace(RECIPES[name], **SMOKE), tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"# {name}\n" in card
    assert f"lalm_lens.assets.train {name} --encoder-steps 2 --steps 2\n" in card
    assert "| gender |" in card
    assert f"|\n\n{name} was told.\n\n## Training" in card
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert seen == windows
    assert (hf.config.text_config.sliding_window, hf.config.text_config.layer_types) == (windows[-1], kinds)
    processor = AutoProcessor.from_pretrained(tmp_path)
    text = processor.audio_token + "The speaker's gender is"
    inputs = processor(text=text, audio=np.zeros(16_000), sampling_rate=16_000, return_tensors="pt")
    assert hf.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2


def test_the_window_narrows_in_equal_shares_and_ends_with_the_last():
    recipe = Recipe(windows=(40, 30, 20), steps=6)
    assert [recipe.window(step) for step in range(6)] == [40, 40, 30, 30, 20, 20]
    assert replace(recipe, steps=1).window(0) == 20
    assert Recipe().window(0) is None


@torch.no_grad()
def test_a_model_whose_window_is_changed_is_the_model_built_with_that_window():
    """Training changes the config of a model that runs. Its last window must be the one that is saved and read back."""
    tokenizer, tokens = build_processor().tokenizer, torch.arange(10, 70)[None]
    wide, narrow = (build_model(tokenizer, 0, **attention(Recipe(windows=(window,)))).eval() for window in (40, 20))
    before = wide(input_ids=tokens).logits
    wide.model.language_model.config.sliding_window = 20
    assert torch.equal(wide(input_ids=tokens).logits, narrow(input_ids=tokens).logits)
    assert not torch.equal(wide(input_ids=tokens).logits, before)


@pytest.mark.stress
@pytest.mark.parametrize("name", RECIPES)
def test_training_again_gives_a_model_that_listens(name, tmp_path):
    """Seven minutes on two idle cores; twenty for the relay. The twins begin with what ships."""
    train(RECIPES[name], tmp_path)
    rows = [line.split("|")[1:-1] for line in (tmp_path / "README.md").read_text().splitlines() if line[:2] == "| "]
    accuracy = {row[0].strip(): float(row[3]) for row in rows if row[0].strip() in ATTRIBUTES and len(row) == 6}
    assert set(accuracy) == set(ATTRIBUTES)
    assert min(accuracy.values()) >= 0.9
