"""`HookedTransformer`: a decoder on TransformerLens' hook points, under TransformerLens' names."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint

from lalm_lens.config import DecoderConfig
from lalm_lens.errors import InputError
from lalm_lens.hooks import StrictHooks
from lalm_lens.nn.attention import RotaryAttention, causal_mask
from lalm_lens.nn.block import DecoderBlock
from lalm_lens.nn.embed import Embed, Unembed
from lalm_lens.nn.norm import RMSNorm
from lalm_lens.nn.rope import ROTARY
from lalm_lens.shapes import typed

At = int | slice | Int[Tensor, " at"] | None  # positions; None is all


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


def _stacked(part: str, name: str) -> property:
    """A weight of all blocks, [layer, ...]: a copy, unlike the views of one block."""
    return property(lambda self: torch.stack([getattr(getattr(block, part), name) for block in self.blocks]))


class HookedTransformer(StrictHooks):
    """A decoder whose every activation can be cached and replaced.

    Hook points: `hook_embed`, `blocks.{l}.hook_resid_pre/mid/post`, `blocks.{l}.hook_attn_out/mlp_out`,
    `blocks.{l}.attn.hook_q/k/v/rot_q/rot_k/attn_scores/pattern/z/result`,
    `blocks.{l}.mlp.hook_pre/pre_linear/post`, `blocks.{l}.ln1/ln2.hook_scale/hook_normalized`, `ln_final.hook_*`.
    """

    def __init__(self, cfg: DecoderConfig, name: str = "custom"):
        super().__init__()
        self.decoder_cfg = cfg
        self.cfg = bridge_config(cfg, name)
        self.embed = Embed(cfg.d_vocab, cfg.d_model)
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        self.rotary = ROTARY[type(cfg.rope)](cfg.rope, cfg.d_head)
        self.blocks = nn.ModuleList(DecoderBlock(cfg) for _ in range(cfg.n_layers))
        self.ln_final = RMSNorm(cfg.d_model, cfg.eps)
        self.unembed = Unembed(cfg.d_model, cfg.d_vocab)
        self.tie()
        self.setup()

    def tie(self) -> None:
        """Let the unembedding be the embedding, where the config says so."""
        if self.decoder_cfg.tied:
            self.unembed.linear.weight = self.embed.table.weight

    @typed
    def forward(
        self,
        inputs: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
        *,
        attention_mask: Bool[Tensor, "batch pos"] | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        logits_at: At = None,
    ) -> Float[Tensor, "batch at width"]:
        """Logits [batch, at, d_vocab]; with `stop_at_layer`, the residual stream [batch, pos, d_model] before it.

        `inputs` are tokens, embeddings, or, with `start_at_layer`, the residual stream before that block.
        `attention_mask` is False on padding, which is on the left. `logits_at` names the positions to unembed
        (-1: the last one alone); the axis of positions stays.
        """
        return self.decode(inputs, attention_mask, start_at_layer, stop_at_layer, logits_at)

    def decode(
        self,
        inputs: Any,
        attention_mask: Bool[Tensor, "batch pos"] | None,
        start_at_layer: int | None,
        stop_at_layer: int | None,
        logits_at: At,
    ) -> Float[Tensor, "batch at width"]:
        layers = self.layers(start_at_layer, stop_at_layer)
        self.refuse_silent_hooks(inputs, start_at_layer=start_at_layer, stop_at_layer=stop_at_layer)
        if start_at_layer is None:
            resid, attention_mask = self.enter(inputs, attention_mask)
        else:
            resid = resumed(inputs)
        resid = self.run_blocks(resid, attention_mask, layers)
        if stop_at_layer is not None:
            return resid
        return self.unembed(self.ln_final(at_positions(resid, logits_at)))

    def enter(
        self, inputs: Tensor, attention_mask: Bool[Tensor, "batch pos"] | None
    ) -> tuple[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"] | None]:
        """The residual stream before block 0, and which of its positions are no padding."""
        # A copy: hooks may edit in place (TransformerLens' own setters do), and the caller runs these again.
        return self.hook_embed(inputs.clone() if inputs.is_floating_point() else self.embed(inputs)), attention_mask

    def run_blocks(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        is_token: Bool[Tensor, "batch pos"] | None,
        layers: range,
    ) -> Float[Tensor, "batch pos d_model"]:
        n_pos, device = resid.shape[1], resid.device
        if is_token is not None and is_token.all():
            is_token = None
        positions = (
            torch.arange(n_pos, device=device)[None]
            if is_token is None
            else (is_token.cumsum(-1) - 1).clamp(min=0)  # the first word of a padded prompt is at position 0
        )
        rotation = self.rotary(positions, resid.dtype)
        windows = self.decoder_cfg.windows
        masks = {window: causal_mask(is_token, n_pos, window, device) for window in set(windows)}
        for layer in layers:
            resid = self.blocks[layer](resid, masks[windows[layer]], rotation)
        return resid

    def live(
        self, inputs: Any = None, *, start_at_layer: int | None = None, stop_at_layer: int | None = None, **_: Any
    ) -> set[str]:
        layers = self.layers(start_at_layer, stop_at_layer)
        passed = {
            "blocks": lambda name: int(name.split(".")[1]) in layers,
            "hook_embed": lambda name: start_at_layer is None,
            "ln_final": lambda name: stop_at_layer is None,
        }
        return {
            name
            for name in self.hook_dict
            if passed.get(name.split(".")[0], lambda name: True)(name) and not self.switched_off(name)
        }

    def layers(self, start: int | None, stop: int | None) -> range:
        """The blocks from `start` to before `stop`."""
        n_layers = self.decoder_cfg.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n_layers <= layer <= n_layers:
                raise InputError(f"{name} = {layer}, but this model has {n_layers} blocks.")
        first, last, _ = slice(start, stop).indices(n_layers)
        if first > last:
            raise InputError(f"start_at_layer = {start} is behind stop_at_layer = {stop}.")
        return range(first, last)

    def switched_off(self, name: str) -> bool:
        return name.endswith("attn.hook_result") and not self.cfg.use_attn_result

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether every head's own contribution is computed: `attn.hook_result` [batch, pos, head, d_model]."""
        self.cfg.use_attn_result = use_attn_result
        for module in self.blocks.modules():
            if isinstance(module, RotaryAttention):
                module.use_result = use_attn_result

    def _apply(self, fn: Callable, recurse: bool = True) -> "HookedTransformer":
        super()._apply(fn, recurse)
        self.follow_weights()
        return self

    def follow_weights(self) -> None:
        """`cfg` says where the weights are and of what type."""
        weight = self.embed.table.weight
        self.cfg.device, self.cfg.dtype = str(weight.device), weight.dtype

    W_E = property(lambda self: self.embed.W_E)  # [d_vocab, d_model], a view
    W_U = property(lambda self: self.unembed.W_U)  # [d_model, d_vocab], a view
    b_U = property(lambda self: self.unembed.b_U)  # [d_vocab]
    W_Q, W_K, W_V, W_O = (_stacked("attn", name) for name in ("W_Q", "W_K", "W_V", "W_O"))
    b_Q, b_K, b_V, b_O = (_stacked("attn", name) for name in ("b_Q", "b_K", "b_V", "b_O"))
    W_in, W_gate, W_out = (_stacked("mlp", name) for name in ("W_in", "W_gate", "W_out"))
    b_in, b_out = (_stacked("mlp", name) for name in ("b_in", "b_out"))


def resumed(inputs: Any) -> Float[Tensor, "batch pos d_model"]:
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point()):
        raise InputError("With start_at_layer, give the residual stream before that block: [batch, pos, d_model].")
    return inputs.clone()  # as in `enter`


def at_positions(resid: Float[Tensor, "batch pos d_model"], at: At) -> Float[Tensor, "batch at d_model"]:
    if at is None:
        return resid
    return resid[:, [at]] if isinstance(at, int) else resid[:, at]
