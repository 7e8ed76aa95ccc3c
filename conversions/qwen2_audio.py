"""Qwen2-Audio (arXiv 2407.10759): Whisper encoder with masked padding, states pooled in pairs, one linear layer, Qwen2.

Checked against transformers 5.23 `Qwen2AudioForConditionalGeneration`, in the Hub's layout and in transformers 5's.
"""

from collections.abc import Mapping
from typing import Any

from lalm_lens.adapters.linear import LinearAdapter
from lalm_lens.config import ConfigReader, LALMConfig
from lalm_lens.encoders.whisper import PooledWhisperEncoder
from lalm_lens.prompts import ChatTemplate, OneWindow
from lalm_lens.weights import Conversion, Rule

from ._layouts import PUBLISHED, TRANSFORMERS_5
from ._llama import DECODER, QKV_BIAS, qwen2_config
from ._whisper import ENCODER, whisper_config

ROWS = (
    *(rule.under(hf="model.audio_tower.", ours="audio_encoder.") for rule in ENCODER),
    Rule("model.multi_modal_projector.linear.weight", "adapter.linear.weight"),
    Rule("model.multi_modal_projector.linear.bias", "adapter.linear.bias"),
    *(rule.under(hf="model.language_model.") for rule in DECODER + QKV_BIAS),
    Rule("lm_head.weight", "unembed.linear.weight"),
)


def config(hf: Mapping[str, Any]) -> LALMConfig:
    read = ConfigReader(hf, "config.json")
    read.expect("model_type", "qwen2_audio")
    read.expect("tie_word_embeddings", False)
    read.ignore("vocab_size")  # the same as the text model's
    audio_token = read("audio_token_index", read("audio_token_id", 151646))
    encoder = whisper_config(read.inner("audio_config"), "qwen2_audio_encoder")
    decoder = qwen2_config(read.inner("text_config"))
    read.finish()
    return LALMConfig(model_type="qwen2_audio", decoder=decoder, encoder=encoder, audio_token=audio_token)


QWEN2_AUDIO = Conversion(
    model_type="qwen2_audio",
    config=config,
    encoder=lambda cfg: PooledWhisperEncoder(cfg.encoder),
    adapter=lambda cfg: LinearAdapter(cfg.encoder.d_model, cfg.decoder.d_model),
    rows=lambda cfg: ROWS,
    layouts=(PUBLISHED, TRANSFORMERS_5),
    template=ChatTemplate(placeholder="<|AUDIO|>", before="<|audio_bos|>", after="<|audio_eos|>"),
    hearing=OneWindow(),
    hf_class="Qwen2AudioForConditionalGeneration",
    frame_mask="feature_attention_mask",
)
