"""The Thinker of Qwen2.5-Omni (arXiv 2503.20215), 3B and 7B: hears in windows of 2 s, sees, and writes; what makes it
speak is left out.

Checked against transformers 5.23 `Qwen2_5OmniThinkerForConditionalGeneration`. Absent keys of a config have the
defaults of transformers' own classes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lalm_lens.adapters.linear import LinearAdapter
from lalm_lens.config import ConfigReader, DecoderConfig, EncoderConfig, LALMConfig, MRope
from lalm_lens.encoders.windowed import WindowedWhisperEncoder
from lalm_lens.errors import ConversionError
from lalm_lens.prompts import ChatTemplate, OneWindow
from lalm_lens.weights import Conversion, Drop, Layout, Rule, Tied

from ._llama import DECODER, QKV_BIAS, windows
from ._whisper import BLOCKS, whisper_config

ROWS = (
    *(rule.under(hf="model.audio_tower.", ours="audio_encoder.") for rule in BLOCKS),
    Rule("model.audio_tower.ln_post.weight", "audio_encoder.ln_post.w"),
    Rule("model.audio_tower.ln_post.bias", "audio_encoder.ln_post.b"),
    Rule("model.audio_tower.proj.weight", "adapter.linear.weight"),
    Rule("model.audio_tower.proj.bias", "adapter.linear.bias"),
    Drop("model.audio_tower.audio_bos_eos_token.weight", why="no forward pass reads it: the marks are text tokens"),
    *(rule.under(hf="model.language_model.") for rule in DECODER + QKV_BIAS),
    Drop("model.visual.*", why="it is not seen with yet"),
    Drop("talker.*", why="it makes speech of what the Thinker has written"),
    Drop("token2wav.*", why="it makes sound of the Talker's codes"),
)
UNTIED = Rule("lm_head.weight", "unembed.linear.weight")
TIED = Tied("lm_head.weight", to="model.language_model.embed_tokens.weight")

THINKER = (
    ("audio_tower.", "model.audio_tower."),
    ("visual.", "model.visual."),
    ("model.", "model.language_model."),
)
LAYOUTS = (
    Layout((*((f"thinker.{disk}", table) for disk, table in THINKER), ("thinker.lm_head.", "lm_head."))),  # the Hub's
    Layout(THINKER),  # of a Thinker saved alone
    Layout((("thinker.", ""),)),  # transformers 5, in the whole model
    Layout(),  # transformers 5
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


def thinker_config(read: ConfigReader) -> LALMConfig:
    read.expect("model_type", "qwen2_5_omni_thinker")
    decoder = text_config(read.inner("text_config", {"sliding_window": 32768}))
    encoder = audio_config(read.inner("audio_config"), decoder.d_model)
    read.ignore("vision_config", "user_token_id", "audio_end_token_id", "vision_end_token_id", "vision_token_id")
    read.ignore("position_id_per_seconds", "seconds_per_chunk", "audio_start_token_id", "vision_start_token_id")
    read.ignore("image_token_index", "image_token_id", "video_token_index", "video_token_id")
    cfg = LALMConfig(
        model_type="qwen2_5_omni_thinker",
        decoder=replace(decoder, tied=read("tie_word_embeddings", False)),
        encoder=encoder,
        audio_token=read.one_of(("audio_token_index", "audio_token_id"), 151646),
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
    read.finish()
    return replace(thinker, model_type="qwen2_5_omni")


QWEN2_5_OMNI = Conversion(
    model_type="qwen2_5_omni",
    config=whole,
    encoder=lambda cfg: WindowedWhisperEncoder(cfg.encoder),
    adapter=lambda cfg: LinearAdapter(cfg.encoder.d_model, cfg.decoder.d_model),
    rows=lambda cfg: (*ROWS, TIED if cfg.decoder.tied else UNTIED),
    layouts=LAYOUTS,
    template=ChatTemplate(placeholder="<|AUDIO|>", before="<|audio_bos|>", after="<|audio_eos|>"),
    hearing=OneWindow(),
    frame_mask="feature_attention_mask",
)
QWEN2_5_OMNI_THINKER = replace(QWEN2_5_OMNI, model_type="qwen2_5_omni_thinker", config=alone)
