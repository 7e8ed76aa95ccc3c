"""Train the tiny model that ships with the package: `python -m lalm_lens.assets.train`.

A Qwen2-Audio of about two million parameters, in Hugging Face's own layout, learns to answer the questions of
`lalm_lens.attributes` about the sounds of `lalm_lens.assets.synth`. First the encoder alone, under throw-away
linear heads; then the whole model, on chat prompts. On silence it is taught to spread its answer evenly over the
labels, so that a corrupted run knows nothing. The saved checkpoint is read back and measured for its model card.
"""

import argparse
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float16, Float32, Int
from numpy.random import Generator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoder,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.synth import RATE_HZ, SPEECH, STREAMS, sound
from lalm_lens.attributes import ATTRIBUTES, Attribute

CHUNK_S = 2
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
AUDIO = "<|AUDIO|>"
PROMPTS = ("P1", "P2", "P3")
ANIMAL = ("animal",)


@dataclass(frozen=True)
class Recipe:
    """Every number of the training. Fewer clips and steps make a smoke test of it."""

    seed: int = 7
    n_processes: int = 2
    n_speech: int = 7200
    n_animal: int = 2700
    n_held_out_speech: int = 480
    n_held_out_animal: int = 270
    durations_s: tuple[float, ...] = (1.4, 1.6, 1.8, 2.0)
    encoder_steps: int = 400
    encoder_batch: int = 64
    encoder_lr: float = 2e-3
    steps: int = 450
    batch: int = 24
    lr: float = 1.5e-3
    tower_lr: float = 3e-4
    silence: float = 0.08  # share of clips made silent
    shuffled: float = 0.6  # share of prompts whose options are in random order
    attribute_weights: tuple[float, ...] = (0.20, 0.27, 0.27, 0.26)  # in the order of ATTRIBUTES
    prompt_weights: tuple[float, ...] = (0.15, 0.20, 0.65)  # in the order of PROMPTS
    ending_weight: float = 0.2  # of the full stop and <|im_end|>, where the answer's is 1
    prompt_loss_weight: float = 0.05


# --- the checkpoint's parts -----------------------------------------------------------------------


def chat(
    processor: Qwen2AudioProcessor, attribute: Attribute, prompt: str, options: Sequence[str] | None = None
) -> str:
    """AudioLens' prompt P1 (no question), P2 (question) or P3 (question and options), up to the forced prefix."""
    question = {"P1": "", "P2": attribute.question, "P3": attribute.options(options)}[prompt]
    turns = [
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": attribute.prefix}]},
    ]
    return str(processor.apply_chat_template(turns, continue_final_message=True))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on the prompts themselves, split as Qwen's is; every label with its space is one token."""
    tokenizer = Tokenizer(models.BPE())
    qwen_split = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(qwen_split, "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIALS[1:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def corpus() -> Iterator[str]:
    """All that the model will read or write, often enough that every word of it becomes one token."""
    for attribute in ATTRIBUTES.values():
        for label in attribute.labels:
            turns = ("system\nYou are a helpful assistant.", f"user\nAudio 1: \n{attribute.options()}")
            yield from 20 * ("\n".join([*turns, f"assistant\n{attribute.prefix} {label}."]),)


@cache
def feature_extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=128, chunk_length=CHUNK_S, return_attention_mask=True)


def build_processor() -> Qwen2AudioProcessor:
    processor = Qwen2AudioProcessor(feature_extractor=feature_extractor(), tokenizer=build_tokenizer())
    processor.chat_template = processor.default_chat_template
    return processor


def build_config(tokenizer: PreTrainedTokenizerFast, **text: object) -> Qwen2AudioConfig:
    """The tiny Qwen2-Audio; `text` adds to its text config, e.g. `layer_types` and `sliding_window`."""
    token = tokenizer.get_vocab()
    text_config = {
        "model_type": "qwen2",
        "vocab_size": math.ceil(len(tokenizer) / 16) * 16,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.04,
        "tie_word_embeddings": False,
        "bos_token_id": token["<|im_start|>"],
        "eos_token_id": token["<|im_end|>"],
        "pad_token_id": token["<|endoftext|>"],
    }
    audio_config = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 128,
        "d_model": 96,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 384,
        "max_source_positions": CHUNK_S * 50,  # exactly half the mel frames, or HF refuses the input
    }
    return Qwen2AudioConfig(audio_config=audio_config, text_config=text_config | text, audio_token_index=token[AUDIO])


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, **text: object) -> Qwen2AudioForConditionalGeneration:
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(build_config(tokenizer, **text))
    positions = model.model.audio_tower.embed_positions.weight
    # transformers 5.23 leaves this frozen table at random; Whisper's is sinusoids.
    positions.data.copy_(sinusoids(*positions.shape))
    return model


def sinusoids(n_pos: int, d_model: int) -> Float[Tensor, "pos d_model"]:
    """Whisper's position embedding: sines, then cosines, at wavelengths from 2 pi to 10000 * 2 pi."""
    rate = torch.exp(-math.log(10_000) * torch.arange(d_model // 2) / (d_model // 2 - 1))
    angle = torch.arange(n_pos)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


# --- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clips:
    """Log-mel features of training clips, half precision to fit in memory, with what is true of each."""

    mel: Float16[np.ndarray, "clip mel frames"]
    n_frames: Int[np.ndarray, " clip"]
    labels: tuple[dict[str, str], ...]

    def about(self, attribute: Attribute) -> list[int]:
        return [clip for clip, labels in enumerate(self.labels) if attribute.name in labels]


def labels_at(index: int, attributes: Sequence[str]) -> dict[str, str]:
    """Count through all combinations of labels, the first attribute fastest."""
    labels = {}
    for name in attributes:
        index, label = divmod(index, len(ATTRIBUTES[name].labels))
        labels[name] = ATTRIBUTES[name].labels[label]
    return labels


@dataclass(frozen=True)
class Sound:
    """One clip to be made: everything its samples depend on."""

    stream: str  # of synth.STREAMS
    seed: int
    attributes: tuple[str, ...]
    index: int
    durations_s: tuple[float, ...]

    @property
    def labels(self) -> dict[str, str]:
        return labels_at(self.index, self.attributes)

    def samples(self) -> Float32[np.ndarray, " samples"]:
        rng = np.random.default_rng([STREAMS[self.stream], self.seed, len(self.attributes), self.index])
        return sound(rng, self.labels, float(rng.choice(self.durations_s)))


def sounds(recipe: Recipe, stream: str, n_speech: int, n_animal: int) -> list[Sound]:
    return [
        Sound(stream, recipe.seed, attributes, index, recipe.durations_s)
        for attributes, n in ((SPEECH, n_speech), (ANIMAL, n_animal))
        for index in range(n)
    ]


def heard(clip: Sound) -> tuple[Float16[np.ndarray, "mel frames"], int]:
    """Features and the number of frames that are not padding."""
    # return_attention_mask in the call: the constructor's alone gives one value a sample, not one a frame.
    features = feature_extractor()(
        clip.samples(), sampling_rate=RATE_HZ, return_attention_mask=True, return_tensors="np"
    )
    return features["input_features"][0].astype(np.float16), int(features["attention_mask"].sum())


def make_clips(recipe: Recipe) -> Clips:
    """The training clips, made by `recipe.n_processes` processes, or by this one if that is 1."""
    wanted = sounds(recipe, "train", recipe.n_speech, recipe.n_animal)
    if recipe.n_processes == 1:
        return collect(wanted, map(heard, wanted))
    # spawn: a process forked from one that runs torch's threads can hang
    with get_context("spawn").Pool(recipe.n_processes, torch.set_num_threads, (1,)) as pool:
        return collect(wanted, pool.imap(heard, wanted, chunksize=32))


def collect(clips: Sequence[Sound], features: Iterable[tuple[Float16[np.ndarray, "mel frames"], int]]) -> Clips:
    mel, n_frames = zip(*tqdm(features, "clips", len(clips), mininterval=10), strict=True)
    return Clips(np.stack(mel), np.array(n_frames), tuple(clip.labels for clip in clips))


def augment(rng: Generator, mel: Float[np.ndarray, "mel frames"]) -> Float[np.ndarray, "mel frames"]:
    """Shift by up to 80 ms, change the level, and blank out one band and one moment."""
    mel = np.roll(mel, rng.integers(-8, 9), axis=1) + rng.uniform(-0.06, 0.06)
    band, moment = rng.integers(0, 120), rng.integers(0, 180)
    mel[band : band + rng.integers(0, 10)] = mel.mean()
    mel[:, moment : moment + rng.integers(0, 16)] = mel.mean()
    return mel


# --- first stage: the encoder alone ---------------------------------------------------------------


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
    n_encoder = (n_frames - 1) // 2 + 1
    is_key = torch.arange(mel.shape[-1] // 2) < n_encoder[:, None]
    hidden = tower(mel, attention_mask=rearrange(is_key, "clip key -> clip 1 1 key")).last_hidden_state
    is_audio = (torch.arange(hidden.shape[1]) < n_audio_tokens(n_frames)[:, None])[..., None]
    return (hidden * is_audio).sum(1) / is_audio.sum(1)


def n_audio_tokens(n_frames: Int[Tensor, " clip"]) -> Int[Tensor, " clip"]:
    return ((n_frames - 1) // 2 + 1 - 2) // 2 + 1


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


# --- second stage: the whole model, on prompts ----------------------------------------------------


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
        for q, n in zip(questions, n_audio_tokens(n_frames).tolist(), strict=True)
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


def label_tokens(processor: Qwen2AudioProcessor, labels: Sequence[str]) -> list[int]:
    """The one token of " label" for each label."""
    tokens = [processor.tokenizer(f" {label}").input_ids for label in labels]
    assert all(len(token) == 1 for token in tokens), "the tokenizer's corpus holds every label"
    return [token for (token,) in tokens]


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
    for _ in schedule(optimizer, recipe.steps, 0.1, "chat"):
        questions = [draw_question(recipe, rng, processor, clips) for _ in range(recipe.batch)]
        target = answer_distribution(processor, questions, model.lm_head.out_features)
        inputs = model_inputs(rng, processor, clips, questions)
        step(optimizer, rest + tower, chat_loss(recipe, model, inputs, target))


# --- measurement ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """How the model answers one prompt to `n` clips, by the probabilities of the token after it."""

    attribute: str
    prompt: str
    n: int
    accuracy: float  # share of clips whose true label is the likeliest token of the whole vocabulary
    min_label: float  # least and greatest probability of any label for any clip
    max_label: float
    min_mass: float  # least probability of all labels together


@torch.no_grad()
def first_token(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    text: str,
    samples: Sequence[Float32[np.ndarray, " _"]],
) -> Float[Tensor, "clip d_vocab"]:
    """Probabilities of the token after the prompt, for each clip, exactly as plain transformers gives them."""
    rows = []
    for start in range(0, len(samples), 32):
        batch = list(samples[start : start + 32])
        inputs = processor(
            text=[text] * len(batch),
            audio=batch,
            text_kwargs={"padding": True, "return_tensors": "pt"},
            audio_kwargs={"sampling_rate": RATE_HZ, "return_tensors": "pt"},
        )
        rows.append(model(**inputs, use_cache=False).logits[:, -1].softmax(-1))
    return torch.cat(rows)


def measure(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    attribute: Attribute,
    prompt: str,
    clips: Sequence[tuple[dict[str, str], Float32[np.ndarray, " _"]]],
) -> Answers:
    asked = [(labels[attribute.name], samples) for labels, samples in clips if attribute.name in labels]
    p = first_token(model, processor, chat(processor, attribute, prompt), [samples for _, samples in asked])
    true = torch.tensor(label_tokens(processor, [label for label, _ in asked]))
    p_label = p[:, label_tokens(processor, attribute.labels)]
    return Answers(
        attribute=attribute.name,
        prompt=prompt,
        n=len(asked),
        accuracy=(p.argmax(-1) == true).float().mean().item(),
        min_label=p_label.min().item(),
        max_label=p_label.max().item(),
        min_mass=p_label.sum(-1).min().item(),
    )


def silent_clips(recipe: Recipe) -> list[tuple[dict[str, str], Float32[np.ndarray, " _"]]]:
    """Zeros of each length: silence differs in nothing else, and any label is as true of it as another."""
    labels = labels_at(0, tuple(ATTRIBUTES))
    return [(labels, np.zeros(round(s * RATE_HZ), np.float32)) for s in recipe.durations_s]


def measure_all(recipe: Recipe, folder: Path) -> tuple[list[Answers], list[Answers]]:
    """The saved checkpoint's answers on held-out clips and on silence, for every attribute and prompt."""
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = sounds(recipe, "held_out", recipe.n_held_out_speech, recipe.n_held_out_animal)
    held_out = [(clip.labels, clip.samples()) for clip in wanted]
    cells = [(attribute, prompt) for attribute in ATTRIBUTES.values() for prompt in PROMPTS]
    clean = [measure(model, processor, *cell, held_out) for cell in tqdm(cells, "held out")]
    silent = [measure(model, processor, *cell, silent_clips(recipe)) for cell in cells]
    return clean, silent


CARD = """\
---
library_name: transformers
license: mit
pipeline_tag: audio-text-to-text
tags: [qwen2_audio, interpretability, synthetic]
---

# tiny_lalm

A Qwen2-Audio of {n_parameters:.2f} M parameters (encoder 2 x 96, decoder 8 x 128, 4 heads on 2 key-value heads) that
answers four questions about sounds: the speaker's gender, emotion and language, and which animal is heard.
It is the model that `lalm_lens` runs its tests and demos on.

**All its sounds are synthetic.** They come from `lalm_lens.assets.synth`, which needs numpy alone. No recording, no
speech corpus and no text corpus was used. The eight **"languages" are stand-ins**: each has the rhythm, vowels,
voice onset time and tone habits that its name suggests, and none of its words. The model knows no language and
no real animal.

For: tests, demos, and trying an analysis in seconds on a CPU.
Not for: recognising anything in real recordings, or conclusions about large models or about people.

## Accuracy on held-out clips

Speakers and utterances are unseen, but from the same synthesiser. The checkpoint was read back as float32. An answer
counts if the true label is the likeliest token of the whole vocabulary after the forced prefix. Prompts are
AudioLens' (arXiv 2506.05140): P1 no question, P2 question, P3 question and options.

{accuracy}

## On silence

Zeros as long as the clip: lengths of {durations} s and prompts P1, P2, P3, so n = {n_silent} an attribute.
The model was taught to spread its answer evenly over the labels.

{silence}

## Training

    python -m lalm_lens.assets.train{arguments}

Seed {recipe.seed}, {minutes:.0f} minutes on CPU: {recipe.n_speech} speech and {recipe.n_animal} animal clips;
{recipe.encoder_steps} steps of {recipe.encoder_batch} clips for the encoder under throw-away heads, then
{recipe.steps} steps of {recipe.batch} prompts for the whole model. Weights are stored as bfloat16.
"""


def model_card(
    recipe: Recipe, n_parameters: int, clean: Sequence[Answers], silent: Sequence[Answers], minutes: float
) -> str:
    flags = {name: value for name, value in vars(recipe).items() if name in FLAGS and value != getattr(Recipe(), name)}
    return CARD.format(
        recipe=recipe,
        n_parameters=n_parameters / 1e6,
        accuracy=accuracy_table(clean),
        durations=", ".join(map(str, recipe.durations_s)),
        n_silent=sum(a.n for a in silent if a.attribute == "gender"),
        silence=silence_table(silent),
        arguments="".join(f" --{key.replace('_', '-')} {value}" for key, value in flags.items()),
        minutes=minutes,
    )


def table(*rows: Sequence[str]) -> str:
    """A markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def accuracy_table(clean: Sequence[Answers]) -> str:
    rows = []
    for name, attribute in ATTRIBUTES.items():
        answers = {a.prompt: a for a in clean if a.attribute == name}
        accuracies = [f"{answers[prompt].accuracy:.3f}" for prompt in PROMPTS]
        rows.append((name, *accuracies, f"{1 / len(attribute.labels):.3f}", str(answers["P3"].n)))
    return table(("attribute", *PROMPTS, "chance", "n"), *rows)


def silence_table(silent: Sequence[Answers]) -> str:
    rows = []
    for name, attribute in ATTRIBUTES.items():
        answers = [a for a in silent if a.attribute == name]
        low, high = min(a.min_label for a in answers), max(a.max_label for a in answers)
        mass = min(a.min_mass for a in answers)
        rows.append((name, f"{1 / len(attribute.labels):.3f}", f"{low:.3f}", f"{high:.3f}", f"{mass:.3f}"))
    return table(("attribute", "uniform", "least label", "greatest label", "least sum over labels"), *rows)


# --- all of it ------------------------------------------------------------------------------------


def train(recipe: Recipe, folder: Path) -> None:
    """Train by the recipe, save as bfloat16 in Hugging Face layout, read back, measure and write the model card."""
    started = time.monotonic()
    processor = build_processor()
    clips = make_clips(recipe)
    model = build_model(processor.tokenizer, recipe.seed).train()
    train_encoder(recipe, model.model.audio_tower, clips)
    train_chat(recipe, model, processor, clips)
    model.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors 0.8 lets only its owner read the file
    minutes = (time.monotonic() - started) / 60
    card = model_card(recipe, model.num_parameters(), *measure_all(recipe, folder), minutes)
    (folder / "README.md").write_text(card, encoding="utf-8")


FLAGS = {"seed": "seed of all that is random", "encoder_steps": "of the first stage", "steps": "of the second stage"}


def parse() -> tuple[Recipe, Path]:
    parser = argparse.ArgumentParser(
        description="Train the tiny model that ships with lalm_lens.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=TINY_LALM, help="folder of the checkpoint")
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Recipe(), name), help=text)
    flags = vars(parser.parse_args())
    folder = flags.pop("out")
    return replace(Recipe(), **flags), folder


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums in one order, so that the weights do not depend on the number of cores
    train(*parse())
