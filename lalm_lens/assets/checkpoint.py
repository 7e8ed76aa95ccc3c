"""The tiny Qwen2-Audio before training: tokenizer, processor, config, random weights; Hugging Face's own classes."""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import get_args

import torch
from jaxtyping import Float
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from lalm_lens.attributes import ATTRIBUTES, Attribute, Form
from lalm_lens.pieces import Statement, turn_of, words_of

CHUNK_S = 2
N_BLOCKS = 8
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
AUDIO = "<|AUDIO|>"
PROMPTS: tuple[Form, ...] = get_args(Form)


def chat(
    processor: Qwen2AudioProcessor,
    attribute: Attribute,
    prompt: Form,
    options: Sequence[str] | None = None,
    statement: Statement | None = None,
) -> str:
    """AudioLens' prompt P1 (no question), P2 (question) or P3 (question and options), up to the forced prefix; and what
    is stated of the clip, before or behind it."""
    turn = turn_of(attribute, prompt, options or attribute.labels, statement, has_clip=True)
    before, behind = words_of(turn.before), words_of(turn.behind) or ""
    said = [{"type": "audio"}, {"type": "text", "text": behind}]
    content = said if before is None else [{"type": "text", "text": f"{before}\n"}, *said]
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": attribute.prefix}]},
    ]
    return str(processor.apply_chat_template(turns, continue_final_message=True))


def label_tokens(processor: ProcessorMixin, labels: Sequence[str]) -> list[int]:
    """The one token of " label" for each label."""
    tokens = [processor.tokenizer(f" {label}").input_ids for label in labels]
    assert all(len(token) == 1 for token in tokens), "the tokenizer's corpus holds every label"
    return [token for (token,) in tokens]


def build_tokenizer(specials: Sequence[str] = SPECIALS, **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the prompts themselves, split as Qwen's is; every label with its space is one token. `named`
    are those of the special tokens that a processor asks for by a name."""
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
        vocab_size=640, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(specials[1:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
        **named,
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
        "num_hidden_layers": N_BLOCKS,
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
