"""Train a tiny model that ships with the package: `python -m lalm_lens.assets.train tiny_lalm`.

A Qwen2-Audio of about two million parameters, in Hugging Face's own layout, learns to answer the questions of
`lalm_lens.attributes` about the sounds of `lalm_lens.assets.clips`. First the encoder alone, under throw-away
linear heads; then the whole model, on chat prompts. On silence it is taught to spread its answer evenly over the
labels, so that a corrupted run knows nothing. The saved checkpoint is read back and measured for its model card.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import Qwen2AudioEncoder, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.card import measure_all, model_card
from lalm_lens.assets.checkpoint import (
    AUDIO,
    N_BLOCKS,
    PROMPTS,
    build_model,
    build_processor,
    chat,
    feature_extractor,
    label_tokens,
)
from lalm_lens.assets.recipe import FLAGS, RECIPES, Recipe
from lalm_lens.assets.training_clips import Clips, augment, make_clips
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.audio import RATE_HZ
from lalm_lens.encoders.whisper import n_pooled_states, n_states


def train_encoder(recipe: Recipe, tower: Qwen2AudioEncoder, clips: Clips) -> None:
    """Teach the encoder every attribute at once, read from its mean by linear heads that are thrown away."""
    rng = np.random.default_rng([recipe.seed, 1])
    d_model = tower.config.d_model
    heads = nn.ModuleDict({name: nn.Linear(d_model, len(a.labels)) for name, a in ATTRIBUTES.items()})
    targets = label_indices(clips)
    parameters = [p for p in (*tower.parameters(), *heads.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.encoder_lr, weight_decay=0.02)
    for _ in schedule(optimizer, recipe.encoder_steps, 0.15, "encoder"):
        batch = rng.integers(0, len(clips.labels), recipe.encoder_batch)
        mel = torch.from_numpy(np.stack([augment(rng, clips.mel[i].astype(np.float32)) for i in batch]))
        mean = pooled(tower, mel, torch.from_numpy(clips.n_frames[batch]))
        losses = [F.cross_entropy(head(mean), targets[name][batch], ignore_index=-1) for name, head in heads.items()]
        step(optimizer, parameters, torch.stack(losses).nansum())


def label_indices(clips: Clips) -> dict[str, Int[Tensor, " clip"]]:
    """For each attribute, which of its labels is true of each clip; -1 where it is not asked."""
    return {
        name: torch.tensor([a.labels.index(row[name]) if name in row else -1 for row in clips.labels])
        for name, a in ATTRIBUTES.items()
    }


def pooled(
    tower: Qwen2AudioEncoder, mel: Float[Tensor, "clip mel frames"], n_frames: Int[Tensor, " clip"]
) -> Float[Tensor, "clip d_model"]:
    """The encoder's mean over the audio tokens that are not padding."""
    is_key = torch.arange(mel.shape[-1] // 2) < n_states(n_frames)[:, None]
    hidden = tower(mel, attention_mask=rearrange(is_key, "clip key -> clip 1 1 key")).last_hidden_state
    is_audio = (torch.arange(hidden.shape[1]) < n_pooled_states(n_frames)[:, None])[..., None]
    return (hidden * is_audio).sum(1) / is_audio.sum(1)


def schedule(optimizer: torch.optim.Optimizer, n_steps: int, warmup: float, name: str) -> Iterator[int]:
    """Count the steps while the learning rates rise for the share `warmup` of them, then fall to nothing."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=n_steps + 1, pct_start=warmup)
    for index in tqdm(range(n_steps), name, mininterval=10):
        yield index
        rates.step()


def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], loss: Float[Tensor, ""]) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


@dataclass(frozen=True)
class Question:
    """A training prompt about a clip. `answers` are the labels that the model should find equally likely."""

    clip: int
    text: str
    answers: tuple[str, ...]
    silent: bool


def draw_question(recipe: Recipe, rng: Generator, processor: Qwen2AudioProcessor, clips: Clips) -> Question:
    attribute = ATTRIBUTES[str(rng.choice(list(ATTRIBUTES), p=recipe.attribute_weights))]
    prompt = str(rng.choice(PROMPTS, p=recipe.prompt_weights))
    shuffled = rng.random() < recipe.shuffled
    options = [str(o) for o in rng.permutation(attribute.labels)] if shuffled else list(attribute.labels)
    clip, silent = int(rng.choice(clips.about(attribute))), bool(rng.random() < recipe.silence)
    # Uniform rather than one random label: the same optimum, reached with less noise.
    answers = attribute.labels if silent else (clips.labels[clip][attribute.name],)
    return Question(clip, chat(processor, attribute, prompt, options), answers, silent)


def model_inputs(
    rng: Generator, processor: Qwen2AudioProcessor, clips: Clips, questions: Sequence[Question]
) -> dict[str, Tensor]:
    """What the processor would give, from features made beforehand; each text ends with one of the answers."""
    n_frames = torch.from_numpy(clips.n_frames[[q.clip for q in questions]])
    texts = [
        f"{q.text} {rng.choice(q.answers)}.<|im_end|>".replace(AUDIO, AUDIO * n)
        for q, n in zip(questions, n_pooled_states(n_frames).tolist(), strict=True)
    ]
    mel = [silent_mel() if q.silent else augment(rng, clips.mel[q.clip].astype(np.float32)) for q in questions]
    return {
        **processor.tokenizer(texts, padding=True, return_tensors="pt"),
        "input_features": torch.from_numpy(np.stack(mel)),
        "feature_attention_mask": (torch.arange(mel[0].shape[1]) < n_frames[:, None]).long(),
    }


@cache
def silent_mel() -> Float32[np.ndarray, "mel frames"]:
    return feature_extractor()(np.zeros(RATE_HZ), sampling_rate=RATE_HZ, return_tensors="np")["input_features"][0]


def answer_distribution(
    processor: Qwen2AudioProcessor, questions: Sequence[Question], d_vocab: int
) -> Float[Tensor, "batch d_vocab"]:
    target = torch.zeros(len(questions), d_vocab)
    for row, question in zip(target, questions, strict=True):
        row[label_tokens(processor, question.answers)] = 1 / len(question.answers)
    return target


def chat_loss(
    recipe: Recipe,
    model: Qwen2AudioForConditionalGeneration,
    inputs: dict[str, Tensor],
    target: Float[Tensor, "batch d_vocab"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the answer, and with small weights of what ends it and of the prompt after the audio.

    Texts are padded on the left, so the last three tokens of each are the answer, the full stop and <|im_end|>.
    """
    log_p = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    tokens = inputs["input_ids"][:, 1:]
    surprise = -log_p.gather(-1, tokens[..., None])[..., 0]
    is_audio = tokens == model.config.audio_token_index
    after_audio = is_audio.flip(1).cumsum(1).flip(1) == 0  # left padding is before the audio
    prompt = (surprise * after_audio)[:, :-3].sum()
    answer = -(target * log_p[:, -3]).sum()
    ending = surprise[:, -2:].sum()
    return (answer + recipe.ending_weight * ending + recipe.prompt_loss_weight * prompt) / len(tokens)


def train_chat(
    recipe: Recipe, model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor, clips: Clips
) -> None:
    rng = np.random.default_rng([recipe.seed, 2])
    tower = [p for p in model.model.audio_tower.parameters() if p.requires_grad]
    rest = [p for name, p in model.named_parameters() if "audio_tower" not in name]
    groups = [{"params": rest, "lr": recipe.lr}, {"params": tower, "lr": recipe.tower_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.03, betas=(0.9, 0.98))
    decoder_config = model.model.language_model.config  # HF reads it, and makes its masks anew, in every forward
    for index in schedule(optimizer, recipe.steps, 0.1, "chat"):
        decoder_config.sliding_window = recipe.window(index)
        questions = [draw_question(recipe, rng, processor, clips) for _ in range(recipe.batch)]
        target = answer_distribution(processor, questions, model.lm_head.out_features)
        inputs = model_inputs(rng, processor, clips, questions)
        step(optimizer, rest + tower, chat_loss(recipe, model, inputs, target))


def attention(recipe: Recipe) -> dict[str, object]:
    """What the text config says about sliding windows; nothing, where attention is full."""
    if not recipe.windows:
        return {}
    kinds = ["full_attention" if block in recipe.full_blocks else "sliding_attention" for block in range(N_BLOCKS)]
    return {"use_sliding_window": True, "sliding_window": recipe.windows[-1], "layer_types": kinds}


def train(recipe: Recipe, folder: Path) -> None:
    """Train by the recipe, save as bfloat16 in Hugging Face layout, read back, measure and write the model card."""
    started = time.monotonic()
    processor = build_processor()
    clips = make_clips(recipe)
    model = build_model(processor.tokenizer, recipe.seed, **attention(recipe)).train()
    train_encoder(recipe, model.model.audio_tower, clips)
    train_chat(recipe, model, processor, clips)
    model.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors 0.8 lets only its owner read the file
    minutes = (time.monotonic() - started) / 60
    card = model_card(recipe, model.num_parameters(), *measure_all(recipe, folder), minutes)
    (folder / "README.md").write_text(card, encoding="utf-8")


def parse() -> tuple[Recipe, Path]:
    parser = argparse.ArgumentParser(description="Train a tiny model that ships with lalm_lens.")
    parser.add_argument("name", nargs="?", choices=RECIPES, default=Recipe.name, help="which model")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint; by default where it ships")
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{text}; by default the recipe's")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    folder = given.pop("out", TINY_LALM.parent / given["name"])
    return replace(RECIPES[given["name"]], **given), folder


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums in one order, so that the weights do not depend on the number of cores
    train(*parse())
