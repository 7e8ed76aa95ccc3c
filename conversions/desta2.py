"""DeSTA2-8B-beta (arXiv 2409.20007): four states of whisper-small, a Q-Former of two blocks, Llama 3.

Checked against the authors' own code. Its connector is published as a pickle, of which the tensors alone are read.
"""

from collections.abc import Mapping
from typing import Any

from lalm_lens.config import ConfigReader, LALMConfig, Llama3Rope
from lalm_lens.errors import ConversionError
from lalm_lens.prompts import Desta2Template, PaddedWindow
from lalm_lens.weights import Conversion, Layout, Part, Under

from ._desta import adapter, encoder, lalm_config, looked_at, own_config, rows, whisper_part
from ._llama import llama_config

LAYERS = 2  # of the Q-Former: written into the code
# By the Whisper that a connector was trained with: its mel bins, and the states that are looked at. The code counts
# what enters the first block as one, so that these are the states after so many blocks.
TAPS = {
    "openai/whisper-tiny": (80, (0, 1, 2, 3)),
    "openai/whisper-small": (80, (2, 5, 8, 11)),
    "openai/whisper-medium": (80, (5, 11, 17, 23)),
    "openai/whisper-large-v3": (128, (3, 7, 11, 15, 19, 23, 27, 31)),
}


def config(hf: Mapping[str, Any]) -> LALMConfig:
    read = ConfigReader(hf, "config.json")
    read.expect("model_type", "DestaModel")
    read.ignore("llama_model_id")
    n_mels, taps = looked_at(read("whisper_model_id", "openai/whisper-small"), TAPS)
    decoder = own_config(read, "llm", "llama_config", llama_config)
    if isinstance(decoder.rope, Llama3Rope):
        raise ConversionError("The part 'llm' is a Llama 3.1, and this model was trained on Llama 3: give that.")
    cfg = lalm_config(
        "DestaModel",
        own_config(read, "whisper", "whisper_config", whisper_part),
        decoder,
        n_mels=n_mels,
        taps=taps,
        n_layers=LAYERS,
        n_queries=read.size("prompt_size", 64),
        # Ours: the code has no placeholder, and no prompt has Llama's last reserved token.
        audio_token=decoder.d_vocab - 1,
    )
    read.finish()
    return cfg


DESTA2 = Conversion(
    model_type="DestaModel",
    config=config,
    encoder=encoder,
    adapter=adapter,
    rows=lambda cfg: rows(cfg, ""),
    layouts=(Layout(),),
    template=Desta2Template(),
    hearing=PaddedWindow(),
    hf_class=None,
    frame_mask=None,
    wide=Under(("audio_encoder", "adapter")),  # the code has Llama alone in bfloat16
    parts=(
        Part("whisper", "whisper_model_id", "openai/whisper-small"),
        Part("llm", "llama_model_id", "meta-llama/Meta-Llama-3-8B-Instruct"),
    ),
    pickle="qformer_connector.pth",
)
