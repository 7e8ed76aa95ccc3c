"""Audio Flamingo 3 (arXiv 2507.08128): Qwen2-Audio's encoder, a layer more in the adapter, Qwen2; up to ten minutes.

Checked against transformers 5.23 `AudioFlamingo3ForConditionalGeneration`.
"""

from collections.abc import Mapping
from typing import Any

from lalm_lens.adapters.mlp import MLPAdapter
from lalm_lens.config import ConfigReader, LALMConfig
from lalm_lens.encoders.whisper import PooledWhisperEncoder
from lalm_lens.prompts import ClipFirstTemplate, Windows
from lalm_lens.weights import Conversion, Rule

from ._layouts import PUBLISHED, TRANSFORMERS_5
from ._llama import DECODER, QKV_BIAS, qwen2_config
from ._whisper import ENCODER, whisper_config

ROWS = (
    *(rule.under(hf="model.audio_tower.", ours="audio_encoder.") for rule in ENCODER),
    Rule("model.multi_modal_projector.linear_1.weight", "adapter.in_proj.weight"),
    Rule("model.multi_modal_projector.linear_1.bias", "adapter.in_proj.bias"),
    Rule("model.multi_modal_projector.linear_2.weight", "adapter.out_proj.weight"),
    Rule("model.multi_modal_projector.linear_2.bias", "adapter.out_proj.bias"),
    *(rule.under(hf="model.language_model.") for rule in DECODER + QKV_BIAS),
    Rule("lm_head.weight", "unembed.linear.weight"),
)


def config(hf: Mapping[str, Any]) -> LALMConfig:
    read = ConfigReader(hf, "config.json")
    read.expect("model_type", "audioflamingo3")
    read.expect("projector_hidden_act", "gelu")
    read.expect("projector_bias", True)
    read.expect("tie_word_embeddings", False)
    audio_token = read("audio_token_id", 151669)
    encoder = whisper_config(read.inner("audio_config"), "audioflamingo3_encoder")
    decoder = qwen2_config(read.inner("text_config"))
    read.finish()
    return LALMConfig(model_type="audioflamingo3", decoder=decoder, encoder=encoder, audio_token=audio_token)


AUDIO_FLAMINGO_3 = Conversion(
    model_type="audioflamingo3",
    config=config,
    encoder=lambda cfg: PooledWhisperEncoder(cfg.encoder),
    adapter=lambda cfg: MLPAdapter(cfg.encoder.d_model, cfg.decoder.d_model, bias=True),
    rows=lambda cfg: ROWS,
    layouts=(PUBLISHED, TRANSFORMERS_5),
    template=ClipFirstTemplate(placeholder="<sound>"),
    hearing=Windows(),
    hf_class="AudioFlamingo3ForConditionalGeneration",
    frame_mask="input_features_mask",
)
