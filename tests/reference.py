"""The reference: transformers' own Qwen2-Audio, tiny and random, traced with plain PyTorch hooks.

Nothing here imports lalm_lens, so that nothing of it can vouch for itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
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
        if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
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
        module.register_forward_hook(
            lambda module, args, out, name=name: states.update({name: out[0] if isinstance(out, tuple) else out})
        )
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
        "encoder_norm": getattr(inner.audio_tower, "layer_norm", None) or inner.audio_tower.ln_post,
        "projector": getattr(inner, "multi_modal_projector", None) or inner.audio_tower.proj,
        **{f"decoder.{n}": layer for n, layer in enumerate(inner.language_model.layers)},
    }
    with recorded(modules) as states:
        logits = hf(**batch, use_cache=False).logits
    return logits, states


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def hf_state(hf: Qwen2AudioForConditionalGeneration, batch: dict[str, Tensor], layer: int, site: str) -> Tensor:
    """One of TransformerLens' five states of decoder block `layer`."""
    block, seen = hf.model.language_model.layers[layer], {}

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["state"] = args[0] if args else kwargs["hidden_states"]

    def look_after(module: nn.Module, args: tuple, out: Tensor | tuple) -> None:
        seen["state"] = out[0] if isinstance(out, tuple) else out

    handle = {
        "resid_pre": lambda: block.register_forward_pre_hook(look, with_kwargs=True),
        "resid_mid": lambda: block.post_attention_layernorm.register_forward_pre_hook(look, with_kwargs=True),
        "resid_post": lambda: block.register_forward_hook(look_after),
        "attn_out": lambda: block.self_attn.register_forward_hook(look_after),
        "mlp_out": lambda: block.mlp.register_forward_hook(look_after),
    }[site]()
    with hooked(handle):
        hf(**batch, use_cache=False)
    return seen["state"]


@torch.no_grad()
def hf_patched(
    hf: Qwen2AudioForConditionalGeneration,
    corrupted: dict[str, Tensor],
    layer: int,
    where: Tensor,
    clean: Tensor,
    site: str = "resid_post",
    n_read: int = 1,
) -> Tensor:
    """Last logits of a run in which one state of block `layer` (-1: its input embeddings) is partly another's."""
    block, entered = hf.model.language_model.layers[max(layer, 0)], {}

    def mixed(state: Tensor, new: Tensor = clean) -> Tensor:
        return torch.where(where[..., None], new, state)

    def after(module: nn.Module, args: tuple, out: Tensor | tuple) -> Tensor | tuple:
        return (mixed(out[0]), *out[1:]) if isinstance(out, tuple) else mixed(out)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        if args:
            return (mixed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": mixed(kwargs["hidden_states"])}

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        entered["resid"] = args[0] if args else kwargs["hidden_states"]

    def complete(module: nn.Module, args: tuple, out: tuple) -> tuple:
        """The stream after attention is the sum of what entered and this: norm and residual branch both see it."""
        return (mixed(out[0], clean - entered["resid"]), *out[1:])

    handles = {
        "resid_pre": lambda: [block.register_forward_pre_hook(before, with_kwargs=True)],
        "resid_mid": lambda: [
            block.register_forward_pre_hook(enter, with_kwargs=True),
            block.self_attn.register_forward_hook(complete),
        ],
        "resid_post": lambda: [block.register_forward_hook(after)],
        "attn_out": lambda: [block.self_attn.register_forward_hook(after)],
        "mlp_out": lambda: [block.mlp.register_forward_hook(after)],
    }["resid_pre" if layer < 0 else site]()
    with hooked(*handles):
        logits = hf(**corrupted, use_cache=False).logits
    return logits[:, -1] if n_read == 1 else logits[:, -n_read:]


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


@torch.no_grad()
def hf_cut(
    hf: Qwen2AudioForConditionalGeneration, batch: dict[str, Tensor], closed: dict[int, Tensor]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits and patterns of a run of one prompt whose decoder attends under an additive mask made here.

    `closed` says by layer, [head or 1, query_pos, key_pos], which queries may not look at which keys, or what is added
    to their scores.
    """
    assert hf.config.text_config._attn_implementation == "eager", "another kernel may drop the mask"
    n_pos = batch["input_ids"].shape[1]
    causal, patterns, handles = torch.ones(n_pos, n_pos).tril().bool(), {}, []

    def masked(layer: int):
        its = closed.get(layer, torch.zeros(1, n_pos, n_pos))
        shut = ~causal | its if its.dtype == torch.bool else ~causal.expand_as(its)
        added = torch.zeros(shut.shape) if its.dtype == torch.bool else its

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
            assert kwargs["attention_mask"].shape == (1, 1, n_pos, n_pos)
            mask = added.masked_fill(shut, torch.finfo(torch.float32).min)[None]
            return args, {**kwargs, "attention_mask": mask}

        def leave(module: nn.Module, args: tuple, out: tuple) -> None:
            patterns[layer] = out[1][0]

        return enter, leave

    for layer, block in enumerate(hf.model.language_model.layers):
        enter, leave = masked(layer)
        handles.append(block.self_attn.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(block.self_attn.register_forward_hook(leave))
    with hooked(*handles):
        logits = hf(**batch, use_cache=False).logits[0]
    return logits, patterns


PLACES = {  # of a state in a decoder block: the module, and whether it comes out of it or goes into it
    "resid_post": ("", "out"),
    "z": ("self_attn.o_proj", "in"),  # all heads, one after the other
    "post": ("mlp.down_proj", "in"),
}


@torch.no_grad()
def hf_edited(
    hf: nn.Module, batch: dict[str, Tensor], edits: dict[tuple[str, int], Callable[[Tensor], None]]
) -> Tensor:
    """Logits of one prompt [pos, d_vocab], with plain hooks that edit states [pos, width] in place; an edit that writes
    nothing can read."""
    handles = []
    for (site, layer), edit in edits.items():
        name, side = PLACES[site]
        module = hf.model.language_model.layers[layer].get_submodule(name)

        def enter(module: nn.Module, args: tuple, edit: Callable = edit) -> tuple:
            state = args[0].clone()
            edit(state[0])
            return (state, *args[1:])

        def leave(module: nn.Module, args: tuple, out: object, edit: Callable = edit) -> object:
            state = (out[0] if isinstance(out, tuple) else out).clone()
            edit(state[0])
            return (state, *out[1:]) if isinstance(out, tuple) else state

        register = module.register_forward_pre_hook if side == "in" else module.register_forward_hook
        handles.append(register(enter if side == "in" else leave))
    with hooked(*handles):
        return hf(**batch, use_cache=False).logits[0]


def hf_states_at(hf: nn.Module, batch: dict[str, Tensor], site: str) -> Tensor:
    """[layer, pos, width]"""
    n_layers, seen = len(hf.model.language_model.layers), {}
    hf_edited(hf, batch, {(site, n): lambda state, n=n: seen.update({n: state.clone()}) for n in range(n_layers)})
    return torch.stack([seen[n] for n in range(n_layers)])
