"""Loading holds the weights once, and never a second copy of the checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conversions.qwen2_audio import PUBLISHED, QWEN2_AUDIO, ROWS
from lalm_lens.loading import skeleton
from lalm_lens.weights import Table

CONFIG = {
    "model_type": "qwen2_audio",
    "audio_config": {"model_type": "qwen2_audio_encoder", "encoder_layers": 1, "d_model": 64, "encoder_ffn_dim": 64},
    "text_config": {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 6144},
}
CONFIG["audio_config"]["encoder_attention_heads"] = 4
CONFIG["text_config"] |= {"num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32_000}

LOAD = """
import sys, threading, torch
from pathlib import Path
from lalm_lens.loading import from_pretrained

def anonymous():
    return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])

def watch():
    while not stop.wait(0.002):
        peaks.append(anonymous())

peaks, stop = [anonymous()], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
stop.set()
thread.join()
print(max(*peaks, anonymous()) - peaks[0])
"""


def checkpoint_of(folder: Path, n_layers: int, **text: int) -> Path:
    """bfloat16 zeros in shards, about 75 MB a layer."""
    config = CONFIG | {"text_config": CONFIG["text_config"] | {"num_hidden_layers": n_layers, **text}}
    (folder / "config.json").write_text(json.dumps(config))
    parameters = list(skeleton(config, QWEN2_AUDIO, "large").named_parameters())
    for n in range(4):
        tensors = {
            PUBLISHED.to_disk(Table(ROWS).hf_name(name)): torch.zeros(meta.shape, dtype=torch.bfloat16)
            for name, meta in parameters[n::4]
        }
        save_file(tensors, folder / f"model-{n}.safetensors")
    return folder


def growth(checkpoint: Path, dtype: str) -> int:
    """Peak bytes of anonymous memory that loading adds, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(checkpoint), dtype], check=True, text=True, stdout=subprocess.PIPE
    )
    return int(done.stdout)


@pytest.mark.parametrize(("dtype", "copies"), [("bfloat16", 0), ("float32", 2)])
def test_memory_grows_by_what_is_cast_alone(tmp_path, dtype, copies):
    checkpoint = checkpoint_of(tmp_path, n_layers=2)
    n_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert growth(checkpoint, dtype) < copies * n_bytes + 50e6


@pytest.mark.stress
@pytest.mark.parametrize(("dtype", "copies"), [("bfloat16", 1), ("float32", 2)])
def test_a_gigabyte_grows_by_the_weights_alone(tmp_path, dtype, copies):
    checkpoint = checkpoint_of(tmp_path, n_layers=12)
    n_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert n_bytes > 1e9
    assert growth(checkpoint, dtype) < 1.15 * copies * n_bytes + 600e6
