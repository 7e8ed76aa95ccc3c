"""TransformerLens' config from ours, which is the truth, and ours from a TransformerLens config that a user gives."""

from typing import Any

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.config.transformer_lens_config import TransformerLensConfig

from lalm_lens.config import DecoderConfig, Rope
from lalm_lens.errors import ConversionError


def bridge_config(cfg: DecoderConfig, name: str) -> TransformerBridgeConfig:
    """What TransformerLens' tools read as `model.cfg`. It is derived, and never read back."""
    return TransformerBridgeConfig(
        model_name=name,
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        n_layers=cfg.n_layers,
        n_ctx=cfg.n_ctx,
        n_heads=cfg.n_heads,
        n_key_value_heads=cfg.n_kv_heads,
        d_mlp=cfg.d_mlp,
        d_vocab=cfg.d_vocab,
        d_vocab_out=cfg.d_vocab,
        act_fn="silu",
        eps=cfg.eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_base=cfg.rope.theta,
        rotary_dim=cfg.d_head,
        default_prepend_bos=False,
        device="cpu",
    )


# What our decoder computes, in TransformerLens' words. A field that a config does not have is not asked for.
COMPUTED: dict[str, tuple[Any, ...]] = {
    "normalization_type": ("RMS",),
    "positional_embedding_type": ("rotary",),
    "act_fn": ("silu",),
    "gated_mlp": (True,),
    "attn_only": (False,),
    "parallel_attn_mlp": (False,),
    "attention_dir": ("causal",),
    "use_attn_scale": (True,),
    "attn_scale": (-1.0,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "attn_scores_soft_cap": (-1.0,),
    "output_logits_soft_cap": (-1.0,),
    "use_qk_norm": (False,),
    "post_embedding_ln": (False,),
    "use_normalization_before_and_after": (False,),
    "rmsnorm_uses_offset": (False,),
    "use_NTK_by_parts_rope": (False,),
    "rotary_adjacent_pairs": (False,),
    "num_experts": (None,),
    "per_layer_head_dim": (None,),
    "per_layer_num_key_value_heads": (None,),
    "scale_embedding": (None, False),
    "use_hook_tokens": (False,),
    "init_weights": (True,),
    "n_devices": (1,),
}


def decoder_config(theirs: TransformerLensConfig) -> DecoderConfig:
    """Raises `ConversionError` for a field that asks for arithmetic we do not do, or that has no value."""
    for name, allowed in COMPUTED.items():
        if getattr(theirs, name, allowed[0]) not in allowed:
            raise ConversionError(f"{name} = {getattr(theirs, name)!r} is not supported (only {allowed}).")
    for name in ("n_heads", "d_vocab", "d_mlp"):
        if (getattr(theirs, name) or -1) < 1:
            raise ConversionError(f"{name} = {getattr(theirs, name)} should be 1 or more.")
    for name, allowed in (("rotary_dim", (None, theirs.d_head)), ("d_vocab_out", (-1, theirs.d_vocab))):
        if getattr(theirs, name, allowed[0]) not in allowed:
            raise ConversionError(f"{name} = {getattr(theirs, name)} is not supported (only {allowed}).")
    return DecoderConfig(
        n_layers=theirs.n_layers,
        d_model=theirs.d_model,
        n_heads=theirs.n_heads,
        n_kv_heads=theirs.n_key_value_heads or theirs.n_heads,
        d_head=theirs.d_head,
        d_mlp=theirs.d_mlp or 0,
        d_vocab=theirs.d_vocab,
        n_ctx=theirs.n_ctx,
        eps=theirs.eps,
        rope=Rope(theta=float(getattr(theirs, "rotary_base", 10_000))),
        qkv_bias=False,
        windows=windows(theirs),
        tied=getattr(theirs, "tie_word_embeddings", False),
    )


def windows(theirs: TransformerLensConfig) -> tuple[int | None, ...]:
    """The sliding window of each block."""
    if not getattr(theirs, "use_local_attn", False):
        return (None,) * theirs.n_layers
    kinds, width = getattr(theirs, "attn_types", None), getattr(theirs, "window_size", None)
    if not kinds or width is None or not set(kinds) <= {"global", "local"}:
        raise ConversionError(f"use_local_attn needs window_size and attn_types of global and local, got {kinds}.")
    return tuple(width if kind == "local" else None for kind in kinds)
