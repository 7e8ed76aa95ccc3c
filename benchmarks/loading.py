"""Loading a checkpoint of more than 1 GB in a fresh process each time, ours and transformers' interleaved.

    python benchmarks/loading.py [rounds]

Prints, for each, the median, minimum and maximum of the seconds until every weight is loaded and has been touched,
and the largest peak of memory above the level before: anonymous (what the process itself takes) and total (with the
pages of mapped files, which the system can take back). The second HF row is HF against itself.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForMultimodalLM, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from lalm_lens.loading import from_pretrained

N_ROUNDS = 9
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 32_000,
}
AUDIO = {
    "model_type": "qwen2_audio_encoder",
    "d_model": 64,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "max_source_positions": 100,
}
LOADERS: dict[str, Callable] = {
    "HF": lambda folder, dtype: AutoModelForMultimodalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False),
    "lalm_lens": lambda folder, dtype: from_pretrained(folder, dtype=dtype),
}
ROWS = [  # name, loader, dtype; the checkpoint is in bfloat16
    ("HF", "HF", "bfloat16"),
    ("HF again", "HF", "bfloat16"),
    ("lalm_lens", "lalm_lens", "bfloat16"),
    ("HF, cast to float32", "HF", "float32"),
    ("lalm_lens, cast to float32", "lalm_lens", "float32"),
]


def memory() -> dict[str, int]:
    """Bytes of this process that are resident now: anonymous and in total."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(status[key].split()[0]) for name, key in (("anonymous", "RssAnon"), ("total", "VmRSS"))}


class Peak:
    """The most memory that was taken while this context was open, looked up every 2 ms."""

    def __enter__(self) -> "Peak":
        self.before, self.above = memory(), {"anonymous": 0, "total": 0}
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        stopped = False
        while not stopped:
            stopped, now = self.stop.wait(0.002), memory()  # once more at the end
            self.above = {name: max(self.above[name], now[name] - self.before[name]) for name in now}

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def load_once(loader: str, folder: str, dtype: str) -> dict[str, float]:
    torch.set_num_threads(1)
    with Peak() as peak:
        start = time.perf_counter()
        model = LOADERS[loader](folder, getattr(torch, dtype))
        for parameter in model.parameters():
            parameter.detach().flatten()[::1024].sum()  # every page
        taken = time.perf_counter() - start
    return {"seconds": taken, **peak.above}


def in_a_fresh_process(*args: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "once", *args],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return json.loads(done.stdout)


def main(n_rounds: int = N_ROUNDS) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = Qwen2AudioConfig(audio_config=AUDIO, text_config=TEXT, audio_token_index=31_999)
        Qwen2AudioForConditionalGeneration(config).bfloat16().save_pretrained(folder, max_shard_size="300MB")
        n_bytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        taken: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in ROWS}
        for _ in range(n_rounds):
            for name, loader, dtype in ROWS:
                taken[name].append(in_a_fresh_process(loader, folder, dtype))
    print(f"checkpoint {n_bytes / 1e6:,.0f} MB in bfloat16, {n_rounds} rounds")
    print(f"{'':28} {'median s':>9} {'min':>7} {'max':>7} {'anonymous MB':>13} {'total MB':>9}")
    for name, each in taken.items():
        seconds = [one["seconds"] for one in each]
        anonymous, total = (max(one[kind] for one in each) / 1e6 for kind in ("anonymous", "total"))
        print(
            f"{name:28} {statistics.median(seconds):9.2f} {min(seconds):7.2f} {max(seconds):7.2f} "
            f"{anonymous:13,.0f} {total:9,.0f}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["once"]:
        print(json.dumps(load_once(*sys.argv[2:])))
    else:
        main(*map(int, sys.argv[1:]))
