"""The tiny Qwen2.5-Omni Thinker before training: tokenizer, processor, config, random weights."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lalm_lens.assets.audio_visual.recipe import FULL_BLOCK
from lalm_lens.assets.checkpoint import CHUNK_S, SPECIALS, build_tokenizer, feature_extractor
from lalm_lens.attributes import Attribute, Form
from lalm_lens.pieces import turn_of, words_of
from lalm_lens.prompts import EarsAndEyes

N_BLOCKS, D_MODEL = 6, 96
PATCH, MERGE = 8, 2  # pixels of a patch, patches of a token, each way
NAMES = ("audio", "image", "video", "audio_bos", "audio_eos", "vision_bos", "vision_eos")
MARKS = {
    name: f"<|{name.upper() if name in ('audio', 'image', 'video') else name}|>" for name in NAMES
}  # as Qwen2.5-Omni's
CHAT = """{% for turn in messages %}{% if loop.first %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ turn.role }}
{% for part in turn.content %}{% if part.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>\
{% elif part.type == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>\
{% elif part.type == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

Part = Literal["image", "video", "audio"]


def chat(
    processor: EarsAndEyes, attribute: Attribute, form: Form, parts: Sequence[Part], options: Sequence[str] = ()
) -> str:
    """AudioLens' prompt P1, P2 or P3 about what is seen and heard, up to the forced prefix."""
    said = words_of(turn_of(attribute, form, options or attribute.labels, None, has_clip="audio" in parts).behind)
    words = [{"type": "text", "text": said}] if said else []
    turns = [
        {"role": "user", "content": [*({"type": part} for part in parts), *words]},
        {"role": "assistant", "content": [{"type": "text", "text": attribute.prefix}]},
    ]
    return str(processor.apply_chat_template(turns, continue_final_message=True))


def build_av_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny models' own words, and Qwen2.5-Omni's marks."""
    specials = (*(token for token in SPECIALS if token not in MARKS.values()), *MARKS.values())
    return build_tokenizer(specials, **{f"{name}_token": mark for name, mark in MARKS.items()})


def image_processor() -> Qwen2VLImageProcessorPil:
    pixels = {"shortest_edge": (4 * PATCH) ** 2, "longest_edge": (16 * PATCH) ** 2}
    return Qwen2VLImageProcessorPil(patch_size=PATCH, temporal_patch_size=2, merge_size=MERGE, size=pixels)


def build_processor() -> EarsAndEyes:
    return EarsAndEyes(image_processor(), feature_extractor(), build_av_tokenizer(), CHAT)


def save_processor(processor: EarsAndEyes, folder: Path) -> None:
    """As Qwen2.5-Omni's own files are: features and pixels in one preprocessor_config.json."""
    processor.tokenizer.save_pretrained(folder)
    ears, eyes = processor.feature_extractor.to_dict(), processor.image_processor.to_dict()
    size = eyes.pop("size")
    its = {
        **{name: value for name, value in (eyes | ears).items() if value is not None},
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
        "processor_class": "Qwen2_5OmniProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(its, indent=2, sort_keys=True) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT)


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5OmniThinkerConfig:
    token = tokenizer.get_vocab()

    text_config = {
        "vocab_size": math.ceil(len(tokenizer) / 16) * 16,
        "hidden_size": D_MODEL,
        "intermediate_size": 160,
        "num_hidden_layers": N_BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 5, 5]},
        "initializer_range": 0.04,
        "use_sliding_window": True,
        "sliding_window": 1,
        "layer_types": [f"{'full' if block == FULL_BLOCK else 'sliding'}_attention" for block in range(N_BLOCKS)],
        "tie_word_embeddings": False,
        "bos_token_id": token["<|im_start|>"],
        "eos_token_id": token["<|im_end|>"],
        "pad_token_id": token["<|endoftext|>"],
    }
    audio_config = {
        "num_mel_bins": 128,
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "max_source_positions": CHUNK_S * 50,
        "n_window": 100,
        "output_dim": D_MODEL,
    }
    vision_config = {
        "depth": 2,
        "hidden_size": 40,
        "intermediate_size": 80,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.06,
        "out_hidden_size": D_MODEL,
    }
    marks: dict[str, Any] = {  # of no argument's name, and in the published file
        "vision_start_token_id": token[MARKS["vision_bos"]],
        "vision_end_token_id": token[MARKS["vision_eos"]],
    }
    return Qwen2_5OmniThinkerConfig(
        audio_config=audio_config,
        vision_config=vision_config,
        text_config=text_config,
        audio_token_index=token[MARKS["audio"]],
        image_token_index=token[MARKS["image"]],
        video_token_index=token[MARKS["video"]],
        audio_start_token_id=token[MARKS["audio_bos"]],
        audio_end_token_id=token[MARKS["audio_eos"]],
        user_token_id=token["user"],
        **marks,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2_5OmniThinkerForConditionalGeneration:
    torch.manual_seed(seed)
    return Qwen2_5OmniThinkerForConditionalGeneration(build_config(tokenizer))
