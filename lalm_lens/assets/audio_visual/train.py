"""Train the tiny model that hears and sees: `python -m lalm_lens.assets.audio_visual.train`.

A Qwen2.5-Omni Thinker of 0.7 million parameters, in Hugging Face's own layout, learns to say which animal it hears.
First its two encoders alone, under throw-away linear heads; then the whole model, on chat prompts with a sound, a
picture, or both. Where they disagree it is taught to say what it sees. The saved checkpoint is read back and measured
for its model card.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from lalm_lens.assets import TINY_LALM_AV
from lalm_lens.assets.audio_visual.asked import (
    Sights,
    answer_distribution,
    draw_asked,
    make_pictures,
    model_inputs,
    names,
    patched,
)
from lalm_lens.assets.audio_visual.card import model_card
from lalm_lens.assets.audio_visual.checkpoint import D_MODEL, build_model, build_processor, save_processor
from lalm_lens.assets.audio_visual.clips import ANIMAL
from lalm_lens.assets.audio_visual.recipe import FLAGS, AVRecipe
from lalm_lens.assets.train import schedule, step
from lalm_lens.assets.training_clips import Clips, augment, make_clips
from lalm_lens.encoders.whisper import n_pooled_states
from lalm_lens.prompts import EarsAndEyes

Thinker = Qwen2_5OmniThinkerForConditionalGeneration


def train_ears(recipe: AVRecipe, model: Thinker, clips: Clips) -> None:
    """Teach the audio encoder what is heard, read from its mean by a linear head that is thrown away."""
    rng, targets = np.random.default_rng([recipe.seed, 1]), indices([labels["animal"] for labels in clips.labels])

    def draw() -> tuple[Float[Tensor, "clip d_model"], Int[Tensor, " clip"]]:
        batch = rng.integers(0, len(clips.labels), recipe.encoder_batch)
        mel = np.stack([augment(rng, clips.mel[n].astype(np.float32)) for n in batch])
        return heard_mean(model, torch.from_numpy(mel), torch.from_numpy(clips.n_frames[batch])), targets[batch]

    train_encoder(model.model.audio_tower, draw, recipe.ears_lr, recipe.ears_steps, "ears")


def train_eyes(recipe: AVRecipe, model: Thinker, processor: EarsAndEyes, sights: Sights) -> None:
    """The same for the vision encoder, and what is seen."""
    rng, targets = np.random.default_rng([recipe.seed, 2]), indices(sights.labels)

    def draw() -> tuple[Float[Tensor, "picture d_model"], Int[Tensor, " picture"]]:
        batch = rng.integers(0, len(sights.labels), recipe.encoder_batch)
        return seen_mean(model, processor, sights.pixels[batch]), targets[batch]

    train_encoder(model.model.visual, draw, recipe.eyes_lr, recipe.eyes_steps, "eyes")


def train_encoder(
    tower: nn.Module,
    draw: Callable[[], tuple[Float[Tensor, "item d_model"], Int[Tensor, " item"]]],
    lr: float,
    n_steps: int,
    name: str,
) -> None:
    head = nn.Linear(D_MODEL, len(ANIMAL.labels))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02)
    for _ in schedule(optimizer, n_steps, 0.15, name):
        states, targets = draw()
        step(optimizer, parameters, F.cross_entropy(head(states), targets))


def indices(labels: Sequence[str]) -> Int[Tensor, " item"]:
    return torch.tensor([ANIMAL.labels.index(label) for label in labels])


def heard_mean(
    model: Thinker, mel: Float[Tensor, "clip mel frames"], n_frames: Int[Tensor, " clip"]
) -> Float[Tensor, "clip d_model"]:
    """What the decoder would be given of each clip, in the mean."""
    is_sound = (torch.arange(mel.shape[-1]) < n_frames[:, None]).long()
    inner: Any = model.model
    states = inner.get_audio_features(mel, is_sound).last_hidden_state
    return torch.stack([its.mean(0) for its in states.split(n_pooled_states(n_frames).tolist())])


def seen_mean(
    model: Thinker, processor: EarsAndEyes, pixels: UInt8[np.ndarray, "picture row column 3"]
) -> Float[Tensor, "picture d_model"]:
    inner: Any = model.model
    return torch.stack([its.mean(0) for its in inner.get_image_features(*patched(processor, pixels)).pooler_output])


def chat_loss(
    recipe: AVRecipe,
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    target: Float[Tensor, "batch d_vocab"],
    named: Int[Tensor, "batch pos"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the answer, and with small weights of what ends it and of the names of sounds and pictures at
    their own positions. Texts are padded on the left: the last three tokens are the answer, the full stop, the end."""
    answer = -(target * logits[:, -4].log_softmax(-1)).sum(-1).mean()
    ending = F.cross_entropy(logits[:, -3:-1].flatten(0, 1), tokens[:, -2:].flatten())
    naming = F.cross_entropy(logits.flatten(0, 1), named.flatten(), ignore_index=-100)
    return answer + recipe.ending_weight * 2 * ending + recipe.naming_weight * naming


def train_chat(recipe: AVRecipe, model: Thinker, processor: EarsAndEyes, clips: Clips, sights: Sights) -> None:
    rng = np.random.default_rng([recipe.seed, 3])
    towers = [*model.model.audio_tower.parameters(), *model.model.visual.parameters()]
    rest = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    groups = [{"params": rest, "lr": recipe.lr}, {"params": towers, "lr": recipe.tower_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.03, betas=(0.9, 0.98))
    for _ in schedule(optimizer, recipe.steps, 0.1, "chat"):
        batch = [draw_asked(recipe, rng, processor, clips, sights) for _ in range(recipe.batch)]
        inputs = model_inputs(rng, processor, clips, batch)
        target = answer_distribution(processor, batch, model.lm_head.out_features)
        named = names(processor, batch, inputs["input_ids"])
        loss = chat_loss(recipe, model(**inputs, use_cache=False).logits, inputs["input_ids"], target, named)
        step(optimizer, rest + towers, loss)


def train(recipe: AVRecipe, folder: Path) -> None:
    """Train by the recipe, save as bfloat16 in Hugging Face layout, read back, measure and write the model card."""
    started = time.monotonic()
    processor = build_processor()
    clips, sights = make_clips(recipe.sounds), make_pictures(recipe)
    model = build_model(processor.tokenizer, recipe.seed).train()
    train_ears(recipe, model, clips)
    train_eyes(recipe, model, processor, sights)
    train_chat(recipe, model, processor, clips, sights)
    folder.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(folder)
    save_processor(processor, folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors 0.8 lets only its owner read the file
    minutes = (time.monotonic() - started) / 60
    (folder / "README.md").write_text(model_card(recipe, model.num_parameters(), folder, minutes), encoding="utf-8")


def parse() -> tuple[AVRecipe, Path]:
    parser = argparse.ArgumentParser(description="Train the tiny audio-visual model that ships with lalm_lens.")
    parser.add_argument("--out", type=Path, default=TINY_LALM_AV, help="folder of the checkpoint")
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{text}; by default the recipe's")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    folder = given.pop("out")
    return replace(AVRecipe(), **given), folder


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums in one order, so that the weights do not depend on the number of cores
    train(*parse())
