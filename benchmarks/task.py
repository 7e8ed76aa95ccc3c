"""The task that is timed: a token-wise causal map of a random model in Qwen2-Audio format, from embeddings."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForMultimodalLM, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from benchmarks.forward import AUDIO

Embed = Float[Tensor, "1 pos d_model"]
Patches = Sequence[tuple[int, int]]  # layer and position: the clean resid_post goes into the corrupted run there
GAIN = 1.4  # of every matrix: large enough that attention picks, small enough that rounding is not amplified


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its prompt: a few tokens, the audio, then the text whose states are patched."""

    n_before: int = 8
    n_audio: int = 750
    n_text: int = 40
    n_layers: int = 12
    d_model: int = 512
    n_heads: int = 8
    d_mlp: int = 2_048
    d_vocab: int = 32_000

    @property
    def n_pos(self) -> int:
        return self.n_before + self.n_audio + self.n_text

    @property
    def patches(self) -> list[tuple[int, int]]:
        """The whole map: every block at every text position."""
        text = range(self.n_pos - self.n_text, self.n_pos)
        return [(layer, position) for layer in range(self.n_layers) for position in text]

    def sample(self, n: int, seed: int = 0) -> list[tuple[int, int]]:
        """One patch from each n-th of the map, which is in the order of layers: no layer is drawn too often."""
        rng, whole = random.Random(seed), self.patches
        n = min(n, len(whole))
        return [rng.choice(whole[k * len(whole) // n : (k + 1) * len(whole) // n]) for k in range(n)]

    def __str__(self) -> str:
        return (
            f"{self.n_layers} layers, d_model {self.d_model}, {self.n_heads} heads, d_mlp {self.d_mlp:,}, vocabulary "
            f"{self.d_vocab:,}; {self.n_before} + {self.n_audio} audio + {self.n_text} text positions, "
            f"{len(self.patches):,} patches"
        )


REFERENCE = Shape()
SHAPES = {
    "reference": REFERENCE,
    "audio-375": replace(REFERENCE, n_audio=375),
    "text-20": replace(REFERENCE, n_text=20),
    "text-80": replace(REFERENCE, n_text=80),
    "layers-6": replace(REFERENCE, n_layers=6),
    "layers-24": replace(REFERENCE, n_layers=24),
    "vocab-156032": replace(REFERENCE, d_vocab=156_032),
    "7b": replace(REFERENCE, n_layers=32, d_model=4_096, n_heads=32, d_mlp=11_008, d_vocab=156_032),
    "tiny": Shape(n_before=2, n_audio=12, n_text=5, n_layers=3, d_model=32, n_heads=4, d_mlp=64, d_vocab=100),
}


@dataclass(frozen=True)
class Task:
    shape: Shape
    hf: Qwen2AudioForConditionalGeneration
    clean: Embed
    corrupt: Embed
    token: int  # what the clean run answers
    log_probability: tuple[float, float]  # of it, clean and corrupt


@torch.no_grad()
def build(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Task:
    """Random weights, drawn on the device, and two prompts that differ in their audio alone."""
    torch.manual_seed(0)
    with torch.device(device):
        hf = AutoModelForMultimodalLM.from_config(config(shape), dtype=dtype).eval()
        for module in hf.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=GAIN / module.in_features**0.5)
        clean = 0.5 * torch.randn(1, shape.n_pos, shape.d_model, dtype=dtype)
        corrupt = clean.clone()
        audio = slice(shape.n_before, shape.n_before + shape.n_audio)
        corrupt[:, audio] = 0.1 * torch.randn(1, shape.n_audio, shape.d_model, dtype=dtype)
    answers = [
        hf(inputs_embeds=embed, use_cache=False).logits[0, -1].float().log_softmax(-1) for embed in (clean, corrupt)
    ]
    token = int(answers[0].argmax())
    return Task(shape, hf, clean, corrupt, token, (answers[0][token].item(), answers[1][token].item()))


def config(shape: Shape) -> Qwen2AudioConfig:
    text = {
        "model_type": "qwen2",
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_mlp,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_heads,
        "vocab_size": shape.d_vocab,
        "max_position_embeddings": 8_192,
    }
    return Qwen2AudioConfig(audio_config=AUDIO, text_config=text, audio_token_index=shape.d_vocab - 1)
