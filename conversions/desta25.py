"""DeSTA2.5-Audio-Llama-3.1-8B (arXiv 2507.02768): four states of whisper-large-v3, a Q-Former, Llama 3.1.

Checked against the authors' own code.
"""

from collections.abc import Mapping
from typing import Any

from lalm_lens.config import ConfigReader, LALMConfig, Llama3Rope
from lalm_lens.errors import ConversionError
from lalm_lens.prompts import Desta25Template, PaddedWindow
from lalm_lens.weights import Conversion, Layout, Part, Under

from ._desta import adapter, encoder, lalm_config, looked_at, own_config, rows, whisper_part
from ._llama import llama_config

# By the Whisper that a connector was trained with: its mel bins, and the blocks whose output is looked at, the last
# one's before the encoder's norm.
TAPS = {
    "openai/whisper-tiny": (80, (0, 1, 2, 3)),
    "openai/whisper-small": (80, (2, 5, 8, 11)),
    "openai/whisper-medium": (80, (5, 11, 17, 23)),
    "openai/whisper-large-v3": (128, (7, 15, 23, 31)),
}
PLACEHOLDER = "<|reserved_special_token_87|>"


def config(hf: Mapping[str, Any]) -> LALMConfig:
    read = ConfigReader(hf, "config.json")
    read.expect("model_type", "desta25")
    read.expect("connector_mode", "qformer_1")
    read.expect("use_lora", False)
    read.expect("audio_locator", "<|AUDIO|>")
    read.expect("placeholder_token", PLACEHOLDER)
    read.ignore("llm_model_id", "info")
    whisper = read("encoder_model_id", "openai/whisper-large-v3")
    n_mels, blocks = looked_at(whisper, TAPS)
    if (said := read.sizes("target_layer_ids", blocks)) != blocks:
        raise ConversionError(f"config.json: target_layer_ids = {said}, but of {whisper} the code takes {blocks}.")
    decoder = own_config(read, "llm", "llm_config", llama_config)
    if not isinstance(decoder.rope, Llama3Rope):
        raise ConversionError("The part 'llm' is no Llama 3.1, whose rotary embedding is scaled (rope_type llama3).")
    cfg = lalm_config(
        "desta25",
        own_config(read, "whisper", "encoder_config", whisper_part),
        decoder,
        n_mels=n_mels,
        taps=tuple(block + 1 for block in blocks),
        n_layers=read.size("qformer_num_hidden_layers", 2),
        n_queries=read.size("prompt_size", 64),
        audio_token=placeholder(read),
    )
    read.finish()
    return cfg


def placeholder(read: ConfigReader) -> int:
    """Its token, as the part's tokenizer has it: in tokenizer_config.json, since transformers 5 in tokenizer.json."""
    files = read.inner("parts").inner("llm")
    older = files.inner("tokenizer_config").inner("added_tokens_decoder").section
    added = [{"id": token, **its} for token, its in older.items()]
    added += files.inner("tokenizer").section.get("added_tokens") or []
    tokens = [int(its["id"]) for its in added if its.get("content") == PLACEHOLDER]
    return tokens[0] if tokens else 128095


DESTA25 = Conversion(
    model_type="desta25",
    config=config,
    encoder=encoder,
    adapter=adapter,
    rows=lambda cfg: rows(cfg, "perception.connector."),
    layouts=(Layout(),),
    template=Desta25Template(),
    hearing=PaddedWindow(),
    hf_class=None,
    frame_mask=None,
    wide=Under(("audio_encoder", "adapter")),  # the code has Llama alone in bfloat16
    parts=(
        Part("whisper", "encoder_model_id", "openai/whisper-large-v3"),
        Part("llm", "llm_model_id", "DeSTA-ntu/Llama-3.1-8B-Instruct"),
    ),
)
