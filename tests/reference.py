"""The reference: transformers' own Qwen2-Audio, tiny and random, traced with plain PyTorch hooks.

Nothing here imports lalm_lens, so that nothing of it can vouch for itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

AUDIO_TOKEN = 250
CHUNK_S = 2
N_FRAMES = 100 * CHUNK_S
RATE_HZ = 16_000


def tiny_hf(seed: int = 0, n_kv_heads: int = 2, **text: object) -> Qwen2AudioForConditionalGeneration:
    """A random model with everything that could be forgotten: biases, norm weights and positions are all random."""
    torch.manual_seed(seed)
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "num_mel_bins": 16,
            "max_source_positions": N_FRAMES // 2,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": 260,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": n_kv_heads,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            **text,
        },
        audio_token_index=AUDIO_TOKEN,
    )
    return randomise(Qwen2AudioForConditionalGeneration(config)).eval()


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Norm weights of 1 and biases of 0 hide a norm applied twice and a bias left out."""
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter)).clamp_(0.3, 1.9)
        elif name.endswith("bias"):
            parameter.copy_(0.3 * torch.randn_like(parameter))
        elif parameter.ndim > 1:
            parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    return model


def extractor(n_mels: int = 16) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=n_mels, chunk_length=CHUNK_S)


def chirps(durations_s: list[float], seed: int = 0) -> list[Tensor]:
    """Rising tones in noise, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for n, duration_s in enumerate(durations_s):
        t = torch.arange(int(duration_s * RATE_HZ)) / RATE_HZ
        tone = torch.sin(2 * torch.pi * (200 + 90 * n + 300 * t) * t)
        clips.append(0.3 * tone + 0.05 * torch.randn(len(t), generator=generator))
    return clips


def n_audio_tokens(n_frames: int) -> int:
    """Counted on the real layers, not by formula."""
    x = nn.functional.conv1d(torch.zeros(1, 1, n_frames), torch.zeros(1, 1, 3), stride=2, padding=1)
    return nn.functional.avg_pool1d(x, 2, stride=2).shape[-1]


def hf_batch(waveforms: list[Tensor], seed: int = 0, n_mels: int = 16, n_text_after: int = 9) -> dict[str, Tensor]:
    """Left-padded prompts of random words around one clip each, as an HF processor would return them."""
    features = extractor(n_mels)(
        [waveform.numpy() for waveform in waveforms],
        sampling_rate=RATE_HZ,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="pt",
    )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for is_frame in features["attention_mask"]:
        n_audio = n_audio_tokens(int(is_frame.sum()))
        before, after = (torch.randint(10, 240, (n,), generator=generator) for n in (5, n_text_after))
        rows.append(torch.cat([before, torch.full((n_audio,), AUDIO_TOKEN), after]))
    return {
        **left_padded(rows),
        "input_features": features["input_features"],
        "feature_attention_mask": features["attention_mask"],
    }


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    n_pos = max(len(row) for row in rows)
    return {
        "input_ids": torch.stack([torch.cat([torch.zeros(n_pos - len(row), dtype=torch.long), row]) for row in rows]),
        "attention_mask": torch.stack(
            [torch.cat([torch.zeros(n_pos - len(row)), torch.ones(len(row))]).long() for row in rows]
        ),
    }


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What each module returns while the context is open."""
    states: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: states.update({name: out}))
        for name, module in modules.items()
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def hf_states(hf: Qwen2AudioForConditionalGeneration, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the outputs of every encoder block, the encoder, the projector and every decoder block."""
    inner = hf.model
    modules = {
        **{f"encoder.{n}": layer for n, layer in enumerate(inner.audio_tower.layers)},
        "encoder_norm": inner.audio_tower.layer_norm,
        "projector": inner.multi_modal_projector,
        **{f"decoder.{n}": layer for n, layer in enumerate(inner.language_model.layers)},
    }
    with recorded(modules) as states:
        logits = hf(**batch, use_cache=False).logits
    return logits, states


@torch.no_grad()
def hf_patched(
    hf: Qwen2AudioForConditionalGeneration,
    corrupted: dict[str, Tensor],
    layer: int,
    where: Tensor,
    clean: Tensor,
) -> Tensor:
    """Last logits of a corrupted run in which block `layer`'s output (-1: its input embeddings) is partly clean."""
    layers = hf.model.language_model.layers

    def after(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return torch.where(where[..., None], clean, out)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        if args:
            return (torch.where(where[..., None], clean, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": torch.where(where[..., None], clean, kwargs["hidden_states"])}

    handle = (
        layers[0].register_forward_pre_hook(before, with_kwargs=True)
        if layer < 0
        else layers[layer].register_forward_hook(after)
    )
    try:
        return hf(**corrupted, use_cache=False).logits[:, -1]
    finally:
        handle.remove()


@torch.no_grad()
def hf_embeds(hf: Qwen2AudioForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """What enters the first decoder block."""
    seen = {}

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["embeds"] = args[0] if args else kwargs["hidden_states"]

    handle = hf.model.language_model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    try:
        hf(**batch, use_cache=False)
    finally:
        handle.remove()
    return seen["embeds"]
