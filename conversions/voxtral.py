"""Voxtral (arXiv 2507.13264): Whisper without a mask, four states side by side for each audio token, a Llama decoder.

Checked against transformers 5.23 `VoxtralForConditionalGeneration`. The same repositories also hold Mistral's own
format (`consolidated.safetensors`), whose queries and keys are in another order: it is not read.
"""

from collections.abc import Mapping
from typing import Any

from lalm_lens.adapters.mlp import StackedAdapter
from lalm_lens.config import ConfigReader, LALMConfig
from lalm_lens.encoders.whisper import WholeWhisperEncoder
from lalm_lens.errors import ConversionError
from lalm_lens.prompts import Chunks, MistralTemplate
from lalm_lens.weights import Conversion, Rule

from ._layouts import PUBLISHED, TRANSFORMERS_5
from ._llama import DECODER, llama_config
from ._whisper import ENCODER, whisper_config

ROWS = (
    *(rule.under(hf="model.audio_tower.", ours="audio_encoder.") for rule in ENCODER),
    Rule("model.multi_modal_projector.linear_1.weight", "adapter.in_proj.weight"),
    Rule("model.multi_modal_projector.linear_2.weight", "adapter.out_proj.weight"),
    *(rule.under(hf="model.language_model.") for rule in DECODER),
    Rule("lm_head.weight", "unembed.linear.weight"),
)

MINI = {  # what transformers' VoxtralConfig puts where a text_config says nothing
    "vocab_size": 131072,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 30,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e8,
    "head_dim": 128,
}


def config(hf: Mapping[str, Any]) -> LALMConfig:
    read = ConfigReader(hf, "config.json")
    read.expect("model_type", "voxtral")
    read.expect("projector_hidden_act", "gelu")
    read.expect("tie_word_embeddings", False)
    read.ignore("vocab_size")  # the same as the text model's
    audio_token = read("audio_token_id", 24)
    encoder = whisper_config(read.inner("audio_config"), "voxtral_encoder")
    decoder = llama_config(read.inner("text_config", MINI))
    read.expect("hidden_size", decoder.d_model)
    read.finish()
    cfg = LALMConfig(model_type="voxtral", decoder=decoder, encoder=encoder, audio_token=audio_token)
    n = n_stacked(cfg)
    if encoder.d_mlp % encoder.d_model or encoder.n_ctx % n:
        raise ConversionError(
            f"Voxtral puts encoder states side by side to the width of the encoder's MLP: {encoder.d_mlp} is not a "
            f"multiple of {encoder.d_model}, or {encoder.n_ctx} states are not a multiple of {n}."
        )
    return cfg


def n_stacked(cfg: LALMConfig) -> int:
    """Encoder states for one audio token: HF's adapter takes as many as are as wide as the encoder's MLP."""
    return max(1, cfg.encoder.d_mlp // cfg.encoder.d_model)


VOXTRAL = Conversion(
    model_type="voxtral",
    config=config,
    encoder=lambda cfg: WholeWhisperEncoder(cfg.encoder, n_stacked(cfg)),
    adapter=lambda cfg: StackedAdapter(cfg.encoder.d_model, n_stacked(cfg), cfg.decoder.d_model, bias=False),
    rows=lambda cfg: ROWS,
    layouts=(PUBLISHED, TRANSFORMERS_5),
    template=MistralTemplate(),
    hearing=Chunks(),
    hf_class="VoxtralForConditionalGeneration",
    frame_mask=None,
    wide=frozenset({"audio_encoder.W_pos"}),
)
