"""The Thinker of Qwen2.5-Omni (arXiv 2503.20215), 3B and 7B: hears in windows of 2 s, sees, and writes; what makes it
speak is left out.

Checked against transformers 5.23 `Qwen2_5OmniThinkerForConditionalGeneration`. Absent keys of a config have the
defaults of transformers' own classes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lalm_lens.adapters.linear import LinearAdapter
from lalm_lens.adapters.mlp import StackedAdapter
from lalm_lens.config import ConfigReader, DecoderConfig, EncoderConfig, LALMConfig, MRope, VisionConfig
from lalm_lens.encoders.vision import VisionEncoder
from lalm_lens.encoders.windowed import WindowedWhisperEncoder
from lalm_lens.errors import ConversionError
from lalm_lens.prompts import ChatTemplate, Mark, WholeClip
from lalm_lens.weights import Conversion, Drop, Layout, Rule, Sight, Tied

from ._llama import DECODER, QKV_BIAS, windows
from ._whisper import BLOCKS, whisper_config

VISION = (
    Rule("patch_embed.proj.weight", "patch_embed.weight"),
    Rule("blocks.{i}.norm1.weight", "blocks.{i}.ln1.w"),
    Rule("blocks.{i}.attn.q.weight", "blocks.{i}.attn.q_proj.weight"),
    Rule("blocks.{i}.attn.q.bias", "blocks.{i}.attn.q_proj.bias"),
    Rule("blocks.{i}.attn.k.weight", "blocks.{i}.attn.k_proj.weight"),
    Rule("blocks.{i}.attn.k.bias", "blocks.{i}.attn.k_proj.bias"),
    Rule("blocks.{i}.attn.v.weight", "blocks.{i}.attn.v_proj.weight"),
    Rule("blocks.{i}.attn.v.bias", "blocks.{i}.attn.v_proj.bias"),
    Rule("blocks.{i}.attn.proj.weight", "blocks.{i}.attn.o_proj.weight"),
    Rule("blocks.{i}.attn.proj.bias", "blocks.{i}.attn.o_proj.bias"),
    Rule("blocks.{i}.norm2.weight", "blocks.{i}.ln2.w"),
    Rule("blocks.{i}.mlp.gate_proj.weight", "blocks.{i}.mlp.gate_proj.weight"),
    Rule("blocks.{i}.mlp.gate_proj.bias", "blocks.{i}.mlp.gate_proj.bias"),
    Rule("blocks.{i}.mlp.up_proj.weight", "blocks.{i}.mlp.in_proj.weight"),
    Rule("blocks.{i}.mlp.up_proj.bias", "blocks.{i}.mlp.in_proj.bias"),
    Rule("blocks.{i}.mlp.down_proj.weight", "blocks.{i}.mlp.out_proj.weight"),
    Rule("blocks.{i}.mlp.down_proj.bias", "blocks.{i}.mlp.out_proj.bias"),
    Rule("merger.ln_q.weight", "ln_post.w"),
)
ROWS = (
    *(rule.under(hf="model.audio_tower.", ours="audio_encoder.") for rule in BLOCKS),
    Rule("model.audio_tower.ln_post.weight", "audio_encoder.ln_post.w"),
    Rule("model.audio_tower.ln_post.bias", "audio_encoder.ln_post.b"),
    Rule("model.audio_tower.proj.weight", "adapter.linear.weight"),
    Rule("model.audio_tower.proj.bias", "adapter.linear.bias"),
    Drop("model.audio_tower.audio_bos_eos_token.weight", why="no forward pass reads it: the marks are text tokens"),
    *(rule.under(hf="model.language_model.") for rule in DECODER + QKV_BIAS),
    *(rule.under(hf="model.visual.", ours="vision_encoder.") for rule in VISION),
    Rule("model.visual.merger.mlp.0.weight", "vision_adapter.in_proj.weight"),
    Rule("model.visual.merger.mlp.0.bias", "vision_adapter.in_proj.bias"),
    Rule("model.visual.merger.mlp.2.weight", "vision_adapter.out_proj.weight"),
    Rule("model.visual.merger.mlp.2.bias", "vision_adapter.out_proj.bias"),
    Drop("talker.*", why="it makes speech of what the Thinker has written"),
    Drop("token2wav.*", why="it makes sound of the Talker's codes"),
)
UNTIED = Rule("lm_head.weight", "unembed.linear.weight")
TIED = Tied("lm_head.weight", to="model.language_model.embed_tokens.weight")

THINKER = (  # as published, and as it is saved alone
    ("audio_tower.", "model.audio_tower."),
    ("visual.", "model.visual."),
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
)


def text_config(read: ConfigReader) -> DecoderConfig:
    read.expect("model_type", "qwen2_5_omni_text")
    read.expect("hidden_act", "silu")
    read.ignore("tie_word_embeddings")  # the class says true and means nothing by it: the Thinker's own is asked
    n_heads, d_model = read.size("num_attention_heads", 28), read.size("hidden_size", 3584)
    n_layers = read.size("num_hidden_layers", 28)
    cfg = DecoderConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=read.optional_size("num_key_value_heads", 4) or n_heads,
        d_head=read.size("head_dim", d_model // n_heads),
        d_mlp=read.size("intermediate_size", 18944),
        d_vocab=read.size("vocab_size", 152064),
        n_ctx=read.size("max_position_embeddings", 32768),
        eps=read("rms_norm_eps", 1e-6),
        rope=rope(read),
        qkv_bias=True,
        windows=windows(read, n_layers),
    )
    read.finish()
    return cfg


def rope(read: ConfigReader) -> MRope:
    """transformers 5 keeps it in `rope_parameters`, older files in `rope_scaling` and `rope_theta`."""
    old, new = read.inner("rope_scaling"), read.inner("rope_parameters")
    for parameters in (old, new):
        parameters.expect("rope_type", "default")
        parameters.expect("type", "default")
    theta = new("rope_theta", old("rope_theta", read("rope_theta", 1e6)))
    sections = new.sizes("mrope_section", old.sizes("mrope_section", (16, 24, 24)))
    old.finish()
    new.finish()
    return MRope(theta, sections)


def audio_config(read: ConfigReader, d_model: int) -> EncoderConfig:
    read.expect("output_dim", d_model)
    window = read.size("n_window", 100)
    cfg = whisper_config(read, "qwen2_5_omni_audio_encoder")
    if window > cfg.n_ctx:
        raise ConversionError(f"{read.where}: a window of {window} positions, of which there are {cfg.n_ctx}.")
    return replace(cfg, window=window)


def vision_config(read: ConfigReader, thinker: ConfigReader, d_model: int) -> VisionConfig:
    read.expect("model_type", "qwen2_5_omni_vision_encoder")
    read.expect("hidden_act", "silu")
    read.expect("out_hidden_size", d_model)
    # Of Qwen2-VL's class, which made the published file, and of a config of any kind.
    read.ignore("embed_dim", "tokens_per_second", "tie_word_embeddings")
    rope = read.inner("rope_parameters")
    rope.expect("rope_type", "axial", "default")
    patch, merge = read.size("patch_size", 14), read.size("spatial_merge_size", 2)
    n_channels = read.size("in_channels", 3)
    read.expect("in_chans", n_channels)
    read.expect("spatial_patch_size", patch)
    cfg = VisionConfig(
        n_layers=read.one_of(("depth", "num_hidden_layers"), 32),
        d_model=read.size("hidden_size", 3584),  # the class's; what is published has 1280 and says so
        n_heads=read.one_of(("num_heads", "num_attention_heads"), 16),
        d_mlp=read.size("intermediate_size", 3420),
        n_channels=n_channels,
        patch=patch,
        n_frames=read.size("temporal_patch_size", 2),
        merge=merge,
        window=read.size("window_size", 112) // merge // patch,
        whole=read.sizes("fullatt_block_indexes", (7, 15, 23, 31)),
        theta=rope("rope_theta", 10_000.0),
        image_token=thinker.one_of(("image_token_index", "image_token_id"), 151655),
        video_token=thinker.one_of(("video_token_index", "video_token_id"), 151656),
        start_token=thinker.required("vision_start_token_id"),
        audio_start_token=thinker("audio_start_token_id", 151647),
        positions_per_s=thinker.size("position_id_per_seconds", 25),
    )
    rope.finish()
    read.finish()
    return cfg


def thinker_config(read: ConfigReader) -> LALMConfig:
    read.expect("model_type", "qwen2_5_omni_thinker")
    decoder = text_config(read.inner("text_config", {"sliding_window": 32768}))
    encoder = audio_config(read.inner("audio_config"), decoder.d_model)
    vision = vision_config(read.inner("vision_config"), read, decoder.d_model)
    # What ends a clip or picture, and how long the processor's chunks of a heard video are: the prompt's tokens say it.
    read.ignore("audio_end_token_id", "vision_end_token_id", "vision_token_id", "user_token_id", "seconds_per_chunk")
    cfg = LALMConfig(
        model_type="qwen2_5_omni_thinker",
        decoder=replace(decoder, tied=read("tie_word_embeddings", False)),
        encoder=encoder,
        audio_token=read.one_of(("audio_token_index", "audio_token_id"), 151646),
        vision=vision,
    )
    read.finish()
    return cfg


def alone(hf: Mapping[str, Any]) -> LALMConfig:
    return thinker_config(ConfigReader(hf, "config.json"))


def whole(hf: Mapping[str, Any]) -> LALMConfig:
    read = ConfigReader(hf, "config.json")
    read.expect("model_type", "qwen2_5_omni")
    read.ignore("talker_config", "token2wav_config", "enable_audio_output", "enable_talker", "tie_word_embeddings")
    thinker = thinker_config(read.inner("thinker_config"))
    read.expect("hidden_size", thinker.decoder.d_model)
    read.finish()
    return replace(thinker, model_type="qwen2_5_omni")


def sees(cfg: LALMConfig) -> VisionConfig:
    assert cfg.vision is not None
    return cfg.vision


def merger(cfg: LALMConfig) -> StackedAdapter:
    """A square of patches side by side, and an MLP as wide as it."""
    d_square = sees(cfg).merge ** 2 * sees(cfg).d_model
    return StackedAdapter(sees(cfg).d_model, sees(cfg).merge ** 2, cfg.decoder.d_model, bias=True, d_mlp=d_square)


QWEN2_5_OMNI = Conversion(
    model_type="qwen2_5_omni",
    config=whole,
    encoder=lambda cfg: WindowedWhisperEncoder(cfg.encoder),
    adapter=lambda cfg: LinearAdapter(cfg.encoder.d_model, cfg.decoder.d_model),
    rows=lambda cfg: (*ROWS, TIED if cfg.decoder.tied else UNTIED),
    layouts=(Layout(tuple((f"thinker.{disk}", table) for disk, table in THINKER)), Layout((("thinker.", ""),))),
    template=ChatTemplate(
        placeholder="<|AUDIO|>",
        before="<|audio_bos|>",
        after="<|audio_eos|>",
        image=Mark("<|IMAGE|>", "<|vision_bos|>", "<|vision_eos|>"),
        video=Mark("<|VIDEO|>", "<|vision_bos|>", "<|vision_eos|>"),
    ),
    hearing=WholeClip(),
    hf_class="Qwen2_5OmniThinkerForConditionalGeneration",
    frame_mask="feature_attention_mask",
    sight=Sight(encoder=lambda cfg: VisionEncoder(sees(cfg)), adapter=merger),
)
QWEN2_5_OMNI_THINKER = replace(
    QWEN2_5_OMNI, model_type="qwen2_5_omni_thinker", config=alone, layouts=(Layout(THINKER), Layout())
)
