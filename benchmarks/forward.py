"""One forward and one cached forward, ours against transformers' on the same random weights, interleaved.

    python benchmarks/forward.py

Prints medians with minimum and maximum, and every time as a ratio to HF's; the second HF row is HF against itself,
which is the noise of this machine.
"""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from lalm_lens.assets import TINY_LALM
from lalm_lens.loading import from_hf

N_ROUNDS = 11
N_POS = 800
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 8_000,
    "max_position_embeddings": 2_048,
}
AUDIO = {
    "model_type": "qwen2_audio_encoder",
    "d_model": 64,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "max_source_positions": 100,
}


def rivals() -> dict[str, Callable[[], object]]:
    """What is timed: the decoder alone, from embeddings, in float32 with the fused attention kernel."""
    config = Qwen2AudioConfig(audio_config=AUDIO, text_config=TEXT, audio_token_index=7_999)
    hf = Qwen2AudioForConditionalGeneration(config).eval()
    ours, theirs = from_hf(hf), bridge(copy.deepcopy(hf))
    embeds = torch.randn(1, N_POS, TEXT["hidden_size"])
    resid_post = [f"blocks.{layer}.hook_resid_post" for layer in range(ours.cfg.n_layers)]
    return {
        "HF": lambda: hf(inputs_embeds=embeds, use_cache=False),
        "HF again": lambda: hf(inputs_embeds=embeds, use_cache=False),
        "lalm_lens": lambda: ours(embeds),
        "lalm_lens, every resid_post cached": lambda: ours.run_with_cache(embeds, names_filter=resid_post),
        "lalm_lens, last logits only": lambda: ours(embeds, logits_at=-1),
        "TransformerLens bridge": lambda: theirs(embeds),
        "TransformerLens bridge, every resid_post cached": lambda: theirs.run_with_cache(
            embeds, names_filter=resid_post
        ),
    }


def bridge(hf: Qwen2AudioForConditionalGeneration) -> TransformerBridge:
    """TransformerLens' own wrapper. It changes the model it is given; name and tokenizer are needed, and never used."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_LALM, trust_remote_code=False)
    return TransformerBridge.boot_transformers(str(TINY_LALM), hf_model=hf, device=str(hf.device), tokenizer=tokenizer)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    timed = rivals()
    times: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(N_ROUNDS + 1):
        for name, call in timed.items():
            start = time.perf_counter()
            call()
            if round_:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    reference = statistics.median(times["HF"])
    print(f"{'':48} {'median':>8} {'min':>8} {'max':>8}  ratio   ({N_ROUNDS} rounds, ms)")
    for name, taken in times.items():
        median = statistics.median(taken)
        print(
            f"{name:48} {1e3 * median:8.1f} {1e3 * min(taken):8.1f} {1e3 * max(taken):8.1f}  {median / reference:.3f}"
        )


if __name__ == "__main__":
    main()
