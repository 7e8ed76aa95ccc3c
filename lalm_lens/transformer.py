"""`HookedTransformer`: a decoder on TransformerLens' hook points, under TransformerLens' names."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint

from lalm_lens.config import DecoderConfig
from lalm_lens.errors import HookError, InputError
from lalm_lens.nn.attention import RotaryAttention, causal_mask
from lalm_lens.nn.block import DecoderBlock
from lalm_lens.nn.embed import Embed, Unembed
from lalm_lens.nn.norm import RMSNorm
from lalm_lens.nn.rope import ROTARY
from lalm_lens.shapes import typed

NamesFilter = Callable[[str], bool] | str | list[str] | None
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


class HookedTransformer(HookedRootModule):
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
        if start_at_layer is None:
            resid, attention_mask = self.enter(inputs, attention_mask)
        else:
            resid = resumed(inputs)
        resid = self.run_blocks(resid, attention_mask, slice(start_at_layer, stop_at_layer))
        if stop_at_layer is not None:
            return resid
        return self.unembed(self.ln_final(at_positions(resid, logits_at)))

    def enter(
        self, inputs: Tensor, attention_mask: Bool[Tensor, "batch pos"] | None
    ) -> tuple[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"] | None]:
        """The residual stream before block 0, and which of its positions are no padding."""
        return self.hook_embed(inputs if inputs.is_floating_point() else self.embed(inputs)), attention_mask

    def run_blocks(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        is_token: Bool[Tensor, "batch pos"] | None,
        layers: slice,
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
        windows = self.decoder_cfg.windows[layers]
        masks = {window: causal_mask(is_token, n_pos, window, device) for window in set(windows)}
        for block, window in zip(self.blocks[layers], windows, strict=True):
            resid = block(resid, masks[window], rotation)
        return resid

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]  an ActivationCache, not its dict
        self,
        *args: Any,
        names_filter: NamesFilter = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ActivationCache | dict[str, Tensor]]:
        """TransformerLens' `run_with_cache`; a filter that matches no hook point raises `HookError`."""
        out, cache = super().run_with_cache(
            *args, names_filter=names_filter, remove_batch_dim=remove_batch_dim, **kwargs
        )
        if not return_cache_object:
            return out, cache
        return out, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    def get_caching_hooks(self, names_filter: NamesFilter = None, *args: Any, **kwargs: Any) -> tuple:
        return super().get_caching_hooks(self.names(names_filter).__contains__, *args, **kwargs)

    def names(self, names_filter: NamesFilter) -> set[str]:
        """The hook points that a filter selects; without one, all that are switched on."""
        if names_filter is None:
            return {name for name in self.hook_dict if not self.switched_off(name)}
        if callable(names_filter):
            chosen = {name for name in self.hook_dict if names_filter(name)}
            if not chosen:
                raise HookError("The names filter matches no hook point. `model.hook_dict` lists them all.")
            return {name for name in chosen if not self.switched_off(name)} or self.names(min(chosen))
        chosen = {names_filter} if isinstance(names_filter, str) else set(names_filter)
        for name in chosen:
            self.check_name(name)
        return chosen

    def switched_off(self, name: str) -> bool:
        """Whether a hook point exists and never fires as the model is set."""
        return name.endswith("attn.hook_result") and not self.cfg.use_attn_result

    def check_name(self, name: str) -> None:
        if name not in self.hook_dict:
            nearest = difflib.get_close_matches(name, self.hook_dict, n=3, cutoff=0.0)
            raise HookError(f"There is no hook point {name!r}. The nearest are {', '.join(nearest)}.")
        if self.switched_off(name):
            raise HookError(f"{name} never fires: call `model.set_use_attn_result(True)` first.")

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        for chosen in [name] if isinstance(name, str) else self.names(name):
            self.check_name(chosen)
            super().add_hook(chosen, *args, **kwargs)

    def _enable_hook_with_name(self, name: str, hook: Callable, dir: Any) -> None:
        self.check_name(name)
        super()._enable_hook_with_name(name, hook, dir)

    def _enable_hooks_for_points(
        self, hook_points: Iterable[tuple[str, HookPoint]], enabled: Callable, hook: Callable, dir: Any
    ) -> None:
        super()._enable_hooks_for_points(hook_points, self.names(enabled).__contains__, hook, dir)

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
    return inputs


def at_positions(resid: Float[Tensor, "batch pos d_model"], at: At) -> Float[Tensor, "batch at d_model"]:
    if at is None:
        return resid
    return resid[:, [at]] if isinstance(at, int) else resid[:, at]
