"""One entry for every model that is tested: tiny random checkpoints of HF's own class, with HF's own processor.

A new conversion is tested by all of tests/test_families.py because its entry is here. `REAL` holds the config.json of
the published sizes.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mistral_common
import soundfile
import torch
from mistral_common.tokens.tokenizers.base import SpecialTokens
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from reference import CHUNK_S, RATE_HZ, extractor, randomise
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    VoxtralProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.tokenization_mistral_common import MistralCommonBackend

from lalm_lens.assets.checkpoint import build_tokenizer

N_MELS = 16
N_WORDS = 2000  # of tekken's vocabulary: bytes and the most frequent merges
QUESTION = "What is the gender of the speaker in the speech?"

ENCODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "num_mel_bins": N_MELS,
    "max_source_positions": 50 * CHUNK_S,
}
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}


@dataclass(frozen=True)
class Family:
    """What a test has to know of one model type."""

    title: str
    hf: type[PreTrainedModel]
    config: Callable[..., PreTrainedConfig]  # of a tiny model; keywords go into its text config
    processor: Callable[[], ProcessorMixin]
    batch: Callable[[ProcessorMixin, list[Tensor], Sequence[str]], dict[str, Tensor]]  # clips, questions: HF's own
    prompt: Callable[[ProcessorMixin, Tensor, str | None, str], list[int]]  # HF's tokens up to a forced answer
    longest_s: float  # of a clip, in whole windows
    n_audio: int  # audio tokens of 1.37 s

    def build(self, seed: int = 0, **text: object) -> PreTrainedModel:
        torch.manual_seed(seed)
        return randomise(self.hf(self.config(**text))).eval()

    def save(self, folder: Path, seed: int = 0, **text: object) -> PreTrainedModel:
        """A checkpoint as it is published, its processor beside it."""
        hf = self.build(seed, **text)
        hf.save_pretrained(folder)
        self.processor().save_pretrained(folder)
        return hf


def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    return -(-len(tokenizer) // 16) * 16


@cache
def qwen2_audio_processor() -> Qwen2AudioProcessor:
    processor = Qwen2AudioProcessor(feature_extractor=extractor(N_MELS), tokenizer=build_tokenizer())
    processor.chat_template = processor.default_chat_template
    return processor


def qwen2_audio_config(**text: object) -> Qwen2AudioConfig:
    tokenizer = qwen2_audio_processor().tokenizer
    return Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "encoder_ffn_dim": 48, **ENCODER},
        text_config={"model_type": "qwen2", "vocab_size": vocab_size(tokenizer), **DECODER, **text},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )


SOUND_TEMPLATE = """{% for turn in messages %}{% if loop.first %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ turn.role }}
{% for part in turn.content %}{% if part.type == 'audio' %}<sound>{% endif %}{% endfor %}\
{% for part in turn.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@cache
def audioflamingo3_processor() -> AudioFlamingo3Processor:
    words = build_tokenizer().backend_tokenizer.to_str().replace("<|AUDIO|>", "<sound>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(words),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<sound>"],
        padding_side="left",
    )
    return AudioFlamingo3Processor(extractor(N_MELS), tokenizer, SOUND_TEMPLATE, max_audio_len=3 * CHUNK_S)


def audioflamingo3_config(**text: object) -> AudioFlamingo3Config:
    tokenizer = audioflamingo3_processor().tokenizer
    return AudioFlamingo3Config(
        audio_config={"model_type": "audioflamingo3_encoder", "encoder_ffn_dim": 48, **ENCODER},
        text_config={"model_type": "qwen2", "vocab_size": vocab_size(tokenizer), **DECODER, **text},
        audio_token_id=tokenizer.convert_tokens_to_ids("<sound>"),
    )


def write_tekken(folder: Path, n_words: int | None = None, chunk_s: float = 30.0, version: str = "v7") -> None:
    """The vocabulary that mistral-common bundles, made to hear: an audio section and the marks that Voxtral has."""
    tekken = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text())
    names = {token["rank"]: token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS}
    names |= {24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]"}
    names |= dict(enumerate(sorted(set(SpecialTokens) - set(names.values())), start=35))  # of later versions
    tekken["special_tokens"] = [
        {"rank": rank, "token_str": names.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
        for rank in range(max(names) + 1)
    ]
    n_words = n_words or tekken["config"]["default_vocab_size"] - 1000
    tekken["vocab"] = tekken["vocab"][:n_words]
    tekken["config"] |= {"version": version, "default_vocab_size": n_words + 1000, "num_vocab_tokens": n_words}
    tekken["audio"] = {
        "sampling_rate": RATE_HZ,
        "frame_rate": 12.5,
        "audio_encoding_config": {"num_mel_bins": N_MELS, "hop_length": 160, "window_size": 400},
        "chunk_length_s": chunk_s,
    }
    (folder / "tekken.json").write_text(json.dumps(tekken))


@cache
def voxtral_processor() -> VoxtralProcessor:
    folder = Path(mkdtemp(prefix="tekken_"))
    write_tekken(folder, N_WORDS, CHUNK_S)
    return VoxtralProcessor(extractor(N_MELS), MistralCommonBackend.from_pretrained(folder))


def voxtral_config(**text: object) -> VoxtralConfig:
    wide_heads = {"head_dim": 24}  # not d_model / n_heads
    return VoxtralConfig(
        audio_config={"model_type": "voxtral_encoder", "encoder_ffn_dim": 4 * ENCODER["d_model"], **ENCODER},
        text_config={"model_type": "llama", "vocab_size": 1000 + N_WORDS, **DECODER, **wide_heads, **text},
        audio_token_id=24,
    )


SEEING_TEMPLATE = """{% for turn in messages %}{% if loop.first %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ turn.role }}
{% for part in turn.content %}{% if part.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>\
{% elif part.type == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>\
{% elif part.type == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NAMES = "AUDIO IMAGE VIDEO audio_bos audio_eos vision_bos vision_eos".split()
OMNI_MARKS = [f"<|{name}|>" for name in NAMES]


class OmniProcessor(Qwen2_5OmniProcessor):
    """HF's own without its video processor, which needs torchvision."""

    def __init__(self, image_processor=None, feature_extractor=None, tokenizer=None, chat_template=None):
        ProcessorMixin.__init__(self, image_processor, feature_extractor, tokenizer, chat_template=chat_template)
        for name, mark in zip(NAMES, OMNI_MARKS, strict=True):
            setattr(self, f"{name.lower()}_token", mark)
            setattr(self, f"{name.lower()}_token_id", tokenizer.convert_tokens_to_ids(mark))


@cache
def omni_processor() -> OmniProcessor:
    words = build_tokenizer().backend_tokenizer.to_str().replace("<|AUDIO|>", "<|audio_pad|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(words),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *OMNI_MARKS],
        padding_side="left",
    )
    pixels = {"shortest_edge": 64, "longest_edge": 4096}
    images = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, size=pixels)
    return OmniProcessor(images, extractor(N_MELS), tokenizer, SEEING_TEMPLATE)


def omni_config(**text: object) -> Qwen2_5OmniThinkerConfig:
    token = omni_processor().tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    decoder = {name: value for name, value in DECODER.items() if name != "rope_theta"}
    return Qwen2_5OmniThinkerConfig(
        audio_config={"encoder_ffn_dim": 48, "n_window": 25, "output_dim": DECODER["hidden_size"], **ENCODER},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "out_hidden_size": DECODER["hidden_size"],
            "fullatt_block_indexes": [1],
        },
        text_config={"vocab_size": vocab_size(omni_processor().tokenizer), "rope_parameters": rope, **decoder, **text},
        audio_token_index=token("<|AUDIO|>"),
        image_token_index=token("<|IMAGE|>"),
        video_token_index=token("<|VIDEO|>"),
        audio_start_token_id=token("<|audio_bos|>"),
        audio_end_token_id=token("<|audio_eos|>"),
        vision_start_token_id=token("<|vision_bos|>"),
        vision_end_token_id=token("<|vision_eos|>"),
    )


def as_theirs(ours: Tensor, theirs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """States of the encoder or adapter as HF has them. Voxtral's adapter has its clips one after the other, Omni's
    tower and adapter the sound of them alone."""
    if ours.numel() == theirs.numel():
        return ours.reshape(theirs.shape)
    n_frames = batch["feature_attention_mask"].sum(-1)
    n_states = (n_frames - 1) // 2 + 1
    n_real = n_states if len(theirs) == n_states.sum() else n_states // 2
    return ours[torch.arange(ours.shape[1]) < n_real[:, None]]


def spoken(processor: ProcessorMixin, user: list[dict], answer: str | None) -> str:
    """A chat template's text."""
    turns: list[dict] = [{"role": "user", "content": user}]
    if answer is None:
        return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + answer


def template_batch(processor: ProcessorMixin, clips: list[Tensor], questions: Sequence[str]) -> dict[str, Tensor]:
    users = [[{"type": "audio", "audio_url": "clip"}, {"type": "text", "text": question}] for question in questions]
    return dict(
        processor(
            text=[spoken(processor, user, None) for user in users],
            audio=[clip.numpy() for clip in clips],
            sampling_rate=RATE_HZ,
            text_kwargs={"padding": True},
            audio_kwargs={"padding": "max_length"},
            return_tensors="pt",
        )
    )


def template_prompt(processor: ProcessorMixin, clip: Tensor, question: str | None, answer: str) -> list[int]:
    user: list[dict] = [{"type": "audio", "audio_url": "clip"}]
    user += [] if question is None else [{"type": "text", "text": question}]
    text = spoken(processor, user, answer)
    batch = processor(text=[text], audio=[clip.numpy()], sampling_rate=RATE_HZ, return_tensors="pt")
    return batch["input_ids"][0].tolist()


def as_wav(clip: Tensor) -> str:
    file = io.BytesIO()
    soundfile.write(file, clip.numpy(), RATE_HZ, format="WAV", subtype="FLOAT")
    return base64.b64encode(file.getvalue()).decode()


def mistral_turns(clip: Tensor, question: str | None, answer: str | None) -> list[dict]:
    text = [] if question is None else [{"type": "text", "text": question}]
    user = {"role": "user", "content": [{"type": "audio", "base64": as_wav(clip)}, *text]}
    return [user] if answer is None else [user, {"role": "assistant", "content": answer}]


def mistral_batch(processor: ProcessorMixin, clips: list[Tensor], questions: Sequence[str]) -> dict[str, Tensor]:
    size = processor.feature_extractor.n_samples
    conversations = [mistral_turns(*its, None) for its in zip(clips, questions, strict=True)]
    windows = {"pad_to_multiple_of": size, "max_source_positions": processor.feature_extractor.nb_max_frames}
    return dict(processor.apply_chat_template(conversations, processor_kwargs=windows, tokenize=True, return_dict=True))


def mistral_prompt(processor: ProcessorMixin, clip: Tensor, question: str | None, answer: str) -> list[int]:
    turns = mistral_turns(clip, question, answer)
    return processor.tokenizer.apply_chat_template(turns, continue_final_message=True, tokenize=True)["input_ids"]


FAMILIES = {
    "qwen2_audio": Family(
        title="Qwen2-Audio",
        hf=Qwen2AudioForConditionalGeneration,
        config=qwen2_audio_config,
        processor=qwen2_audio_processor,
        batch=template_batch,
        prompt=template_prompt,
        longest_s=CHUNK_S,
        n_audio=34,
    ),
    "audioflamingo3": Family(
        title="Audio Flamingo 3",
        hf=AudioFlamingo3ForConditionalGeneration,
        config=audioflamingo3_config,
        processor=audioflamingo3_processor,
        batch=template_batch,
        prompt=template_prompt,
        longest_s=3 * CHUNK_S,
        n_audio=34,
    ),
    "voxtral": Family(
        title="Voxtral",
        hf=VoxtralForConditionalGeneration,
        config=voxtral_config,
        processor=voxtral_processor,
        batch=mistral_batch,
        prompt=mistral_prompt,
        longest_s=20 * CHUNK_S,  # 512 positions, 25 for a window
        n_audio=25,
    ),
    "qwen2_5_omni_thinker": Family(
        title="Qwen2.5-Omni",
        hf=Qwen2_5OmniThinkerForConditionalGeneration,
        config=omni_config,
        processor=omni_processor,
        batch=template_batch,
        prompt=template_prompt,
        longest_s=CHUNK_S,
        n_audio=34,
    ),
}
PARTS = {"qwen2_5_omni": "qwen2_5_omni_thinker"}  # whole models of which we open a part: tests/test_omni.py

OMNI_TOKENS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
REAL = {  # what the published config.json files say of sizes
    "qwen2_audio-7b": {
        "model_type": "qwen2_audio",
        "audio_config": {"model_type": "qwen2_audio_encoder"},
        "text_config": {"model_type": "qwen2", "intermediate_size": 11008, "vocab_size": 156032},
    },
    "audioflamingo3-7b": {
        "model_type": "audioflamingo3",
        "audio_config": {"model_type": "audioflamingo3_encoder"},
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 151672,
        },
    },
    "qwen2.5-omni-7b": {
        "model_type": "qwen2_5_omni_thinker",
        "audio_config": {"output_dim": 3584},
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
        "text_config": {},
        **OMNI_TOKENS,
    },
    "qwen2.5-omni-3b": {
        "model_type": "qwen2_5_omni_thinker",
        "audio_config": {"output_dim": 2048},
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        **OMNI_TOKENS,
    },
    "voxtral-mini-3b": {"model_type": "voxtral", "audio_token_id": 24},
    "voxtral-small-24b": {
        "model_type": "voxtral",
        "audio_token_id": 24,
        "hidden_size": 5120,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 131072,
        },
    },
}
