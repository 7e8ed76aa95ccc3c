"""Train a tiny model that ships with the package: `python -m lalm_lens.assets.train tiny_lalm`.

A Qwen2-Audio of about two million parameters, in Hugging Face's own layout, learns to answer the questions of
`lalm_lens.attributes` about the sounds of `lalm_lens.assets.clips`. First the encoder alone, under throw-away
linear heads; then the whole model, on chat prompts. On silence it is taught to spread its answer evenly over the
labels, so that a corrupted run knows nothing. The saved checkpoint is read back and measured for its model card.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int
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
from lalm_lens.assets.recipe import FLAGS, N_QUIET, RECIPES, Recipe
from lalm_lens.assets.training_clips import Clips, augment, make_clips
from lalm_lens.assets.twins import ORDERS, told
from lalm_lens.attributes import ATTRIBUTES, Attribute
from lalm_lens.audio import RATE_HZ
from lalm_lens.conflict import FRAMINGS
from lalm_lens.encoders.whisper import n_pooled_states, n_states
from lalm_lens.pieces import Statement

N_NAMED = 24  # clips of a label
REMARKS = (  # texts of several lengths that state no label
    "The speech.",
    "You are a helpful assistant.",
    "The sound is in the file.",
    "The speaker is the speaker of the speech in the sound file.",
)


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
    """A training prompt about a clip, and how likely the model should find which labels."""

    clip: int
    text: str
    answers: dict[str, float]
    heard: dict[str, float]  # without what the text states
    silent: bool
    is_told: bool  # whether the text states a label


def draw_question(recipe: Recipe, rng: Generator, processor: Qwen2AudioProcessor, clips: Clips) -> Question:
    attribute = ATTRIBUTES[str(rng.choice(list(ATTRIBUTES), p=recipe.attribute_weights))]
    prompt = PROMPTS[rng.choice(len(PROMPTS), p=recipe.prompt_weights)]
    shuffled = rng.random() < recipe.shuffled
    options = [str(o) for o in rng.permutation(attribute.labels)] if shuffled else list(attribute.labels)
    clip, silent = int(rng.choice(clips.about(attribute))), bool(rng.random() < recipe.silence)
    # Uniform rather than one random label: the same optimum, reached with less noise.
    heard = attribute.labels if silent else (clips.labels[clip][attribute.name],)
    statement = draw_statement(recipe, rng, attribute, heard)
    told = None if statement is None else statement.label
    text = chat(processor, attribute, prompt, options, statement)
    return Question(
        clip=clip,
        text=text,
        answers=answers(recipe, heard, told),
        heard=answers(recipe, heard, None),
        silent=silent,
        is_told=told is not None,
    )


def draw_statement(recipe: Recipe, rng: Generator, attribute: Attribute, heard: Sequence[str]) -> Statement | None:
    """What the text says of the clip: a label, or nothing of it; None without a text."""
    if not (recipe.hinted or recipe.remarked):
        return None
    kind = rng.choice(3, p=[recipe.hinted, recipe.remarked, 1 - recipe.hinted - recipe.remarked])
    order = ORDERS[rng.integers(2)]
    if kind == 1:
        return Statement(str(rng.choice(REMARKS)), order=order)
    others = [label for label in attribute.labels if label not in heard]
    told = str(rng.choice(heard if not others or rng.random() < recipe.true_hints else others))
    return FRAMINGS["statement"].statement(attribute, told, order) if kind == 0 else None


def answers(recipe: Recipe, heard: Sequence[str], told: str | None) -> dict[str, float]:
    """What is heard, one as likely as the other; a label that is told takes its share before them."""
    share = 0.0 if told is None else recipe.heeded
    likely = {label: (1 - share) / len(heard) for label in heard}
    if told is not None:
        likely[told] = likely.get(told, 0.0) + share
    return {label: p for label, p in likely.items() if p}


def model_inputs(
    rng: Generator, processor: Qwen2AudioProcessor, clips: Clips, questions: Sequence[Question]
) -> dict[str, Tensor]:
    """What the processor would give, from features made beforehand; each text ends with one of the answers."""
    n_frames = torch.from_numpy(clips.n_frames[[q.clip for q in questions]])
    texts = [
        f"{q.text} {rng.choice(tuple(q.answers))}.<|im_end|>".replace(AUDIO, AUDIO * n)
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
    processor: Qwen2AudioProcessor, answers: Sequence[dict[str, float]], d_vocab: int
) -> Float[Tensor, "batch d_vocab"]:
    target = torch.zeros(len(answers), d_vocab)
    for row, its in zip(target, answers, strict=True):
        row[label_tokens(processor, tuple(its))] = torch.tensor(list(its.values()))
    return target


def chat_loss(
    recipe: Recipe,
    model: Qwen2AudioForConditionalGeneration,
    inputs: dict[str, Tensor],
    target: Float[Tensor, "batch d_vocab"],
    is_told: Bool[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the answer, and with small weights of what ends it and of the prompt after the audio; where a
    label is told, what is left of the sound too.

    Texts are padded on the left, so the last three tokens of each are the answer, the full stop and <|im_end|>.
    """
    out = model(**inputs, use_cache=False, output_hidden_states=recipe.erasure > 0)
    log_p = out.logits[:, :-1].log_softmax(-1)
    tokens = inputs["input_ids"][:, 1:]
    surprise = -log_p.gather(-1, tokens[..., None])[..., 0]
    is_audio = tokens == model.config.audio_token_index
    after_audio = is_audio.flip(1).cumsum(1).flip(1) == 0  # left padding is before the audio
    prompt = (surprise * after_audio)[:, :-3].sum()
    answer = -(target * log_p[:, -3]).sum()
    ending = surprise[:, -2:].sum()
    loss = (answer + recipe.ending_weight * ending + recipe.prompt_loss_weight * prompt) / len(tokens)
    if not (recipe.erasure and is_told.any()):
        return loss
    return loss + recipe.erasure * traces(model, inputs, out.hidden_states, is_told)


def traces(
    model: Qwen2AudioForConditionalGeneration,
    inputs: dict[str, Tensor],
    states: Sequence[Float[Tensor, "batch pos d_model"]],
    is_told: Bool[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """What the sound changes where a label is told: the mean squared distance of states to those on silence, as a share
    of the latter's, over all layers and the last positions of the prompt."""
    told = {name: its[is_told] for name, its in inputs.items()}
    told["input_features"] = torch.from_numpy(silent_mel()).expand_as(told["input_features"])
    with torch.no_grad():
        silent = model(**told, use_cache=False, output_hidden_states=True).hidden_states
    ours, theirs = (torch.stack(its[1:])[:, :, -3 - N_QUIET : -3] for its in ([its[is_told] for its in states], silent))
    return ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()


def repair_loss(
    recipe: Recipe,
    rng: Generator,
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    inputs: dict[str, Tensor],
    questions: Sequence[Question],
) -> Float[Tensor, ""]:
    """Cross-entropy of the answer to prompts that state a label, under back-patches of the audio's states: half of them
    by `recipe.repair`, where what is heard is the answer, and half by any pair of blocks that does not reach further,
    where the answer is that of the prompt as it is."""
    told = [row for row, question in enumerate(questions) if question.is_told]
    if recipe.repair is None or not told:
        return torch.zeros(())
    pairs = [recipe.repair if rng.random() < 0.5 else draw_pair(rng, recipe.repair[1]) for _ in told]
    asked = [questions[row] for row in told]
    wanted = [q.heard if pair == recipe.repair else q.answers for q, pair in zip(asked, pairs, strict=True)]
    target = answer_distribution(processor, wanted, model.lm_head.out_features)
    sources, targets = torch.tensor(pairs).T
    logits = back_patched(model, {name: its[told] for name, its in inputs.items()}, sources, targets)
    return F.cross_entropy(logits[:, -4], target)


def draw_pair(rng: Generator, last_target: int) -> tuple[int, int]:
    """A source behind a target."""
    target = int(rng.integers(last_target + 1))
    return int(rng.integers(target + 1, N_BLOCKS)), target


def back_patched(
    model: Qwen2AudioForConditionalGeneration,
    inputs: dict[str, Tensor],
    sources: Int[Tensor, " batch"],
    targets: Int[Tensor, " batch"],
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits where each prompt's audio positions have, behind block `target`, what they have behind block `source` in
    the unchanged run. Gradients go through both runs."""
    blocks, kept = model.model.language_model.layers, []
    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(lambda block, args, state: kept.append(state)))
        model(**inputs, use_cache=False)
    states = torch.stack(kept)[sources, torch.arange(len(sources))]
    is_audio = inputs["input_ids"] == model.config.audio_token_index
    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            here = (is_audio & (targets == index)[:, None])[..., None]
            hooks.enter_context(
                block.register_forward_hook(lambda block, args, state, here=here: torch.where(here, states, state))
            )
        return model(**inputs, use_cache=False).logits


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
        target = answer_distribution(processor, [q.answers for q in questions], model.lm_head.out_features)
        inputs = model_inputs(rng, processor, clips, questions)
        is_told = torch.tensor([q.is_told for q in questions])
        loss = chat_loss(recipe, model, inputs, target, is_told)
        step(optimizer, rest + tower, loss + repair_loss(recipe, rng, model, processor, inputs, questions))


def attention(recipe: Recipe) -> dict[str, object]:
    """What the text config says about sliding windows; nothing, where attention is full."""
    if not recipe.windows:
        return {}
    kinds = ["full_attention" if block in recipe.full_blocks else "sliding_attention" for block in range(N_BLOCKS)]
    return {"use_sliding_window": True, "sliding_window": recipe.windows[-1], "layer_types": kinds}


def begin(recipe: Recipe, processor: Qwen2AudioProcessor, clips: Clips) -> Qwen2AudioForConditionalGeneration:
    """A model that hears already: its encoder is trained, or it goes on from another model."""
    if recipe.base is None:
        model = build_model(processor.tokenizer, recipe.seed, **attention(recipe)).train()
        train_encoder(recipe, model.model.audio_tower, clips)
        return model
    folder = TINY_LALM.with_name(recipe.base)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
    name_sounds(recipe, model, processor, clips)
    return model


@torch.no_grad()
def name_sounds(
    recipe: Recipe, model: Qwen2AudioForConditionalGeneration, processor: Qwen2AudioProcessor, clips: Clips
) -> None:
    """Add to the embedding of every label what tells its sounds from those of the other labels, so that whatever reads
    the sounds can begin to read the word."""
    rng = np.random.default_rng([recipe.seed, 3])
    embed = model.get_parameter("model.language_model.embed_tokens.weight")
    for name, targets in label_indices(clips).items():
        labels = ATTRIBUTES[name].labels
        heard = []
        for label in range(len(labels)):
            some = rng.permutation((targets == label).nonzero()[:, 0].numpy())[:N_NAMED]
            mel, n_frames = (torch.from_numpy(its[some]) for its in (clips.mel, clips.n_frames))
            states = model.model.multi_modal_projector(pooled(model.model.audio_tower, mel.float(), n_frames))
            heard.append(states.mean(0))
        means = torch.stack(heard)
        embed[label_tokens(processor, labels)] += means - means.mean(0)


def train(recipe: Recipe, folder: Path) -> None:
    """Train by the recipe, save as bfloat16 in Hugging Face layout, read back, measure and write the model card."""
    started = time.monotonic()
    processor = build_processor()
    clips = make_clips(recipe)
    model = begin(recipe, processor, clips)
    train_chat(recipe, model, processor, clips)
    model.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors 0.8 lets only its owner read the file
    minutes = (time.monotonic() - started) / 60
    card = model_card(recipe, model.num_parameters(), *measure_all(recipe, folder), told(recipe, folder), minutes)
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
