"""Pre-norm transformer blocks: x + attn(ln1(x)), then x + mlp(ln2(x))."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.config import DecoderConfig, EncoderConfig, VisionConfig
from lalm_lens.nn.attention import (
    AxialAttention,
    BidirectionalAttention,
    ByHead,
    Projections,
    RotaryAttention,
    WindowedAttention,
)
from lalm_lens.nn.mlp import MLP, GatedMLP
from lalm_lens.nn.norm import LayerNorm, RMSNorm

Where = Any  # what the attention of a kind of block needs beside the states: mask, rotation, memory
VISION_EPS = 1e-6  # of the norms of a vision tower: written into HF's code, and in no config
Fork = Callable[[Tensor], tuple[ByHead, ByHead, ByHead]]


class Block(nn.Module):
    """What every block has in common: one residual stream and where it can be read and changed."""

    hook_out_is_single_residual_stream = True  # TransformerLens' logit lens asks for this promise

    def __init__(self) -> None:
        super().__init__()
        self.hook_resid_pre = HookPoint()  # [batch, pos, d_model], as are the four below
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, resid: Float[Tensor, "batch pos d_model"], *where: Where) -> Float[Tensor, "batch pos d_model"]:
        resid_pre = self.hook_resid_pre(resid)
        resid_mid = self.hook_resid_mid(resid_pre + self.hook_attn_out(self.read(resid_pre, *where)))
        return self.hook_resid_post(resid_mid + self.hook_mlp_out(self.think(resid_mid)))

    def read(self, resid_pre: Float[Tensor, "batch pos d_model"], *where: Where) -> Float[Tensor, "batch pos d_model"]:
        """What attention adds to the residual stream."""
        raise NotImplementedError

    def think(self, resid_mid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the residual stream."""
        raise NotImplementedError


class DecoderBlock(Block):
    """Llama's and Qwen2's: RMSNorm, rotary grouped-query attention, gated MLP."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        self.fork: Fork | None = None  # set by the model: every head reads its own copy of the residual stream
        self.use_mlp_in = False
        self.hook_mlp_in = HookPoint()  # [batch, pos, d_model]; off until the model switches it on
        qkv = cfg.qkv_bias
        self.ln1 = RMSNorm(cfg.d_model, cfg.eps)
        self.attn = RotaryAttention(
            cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head, Projections(q=qkv, k=qkv, v=qkv, o=False)
        )
        self.ln2 = RMSNorm(cfg.d_model, cfg.eps)
        self.mlp = GatedMLP(cfg.d_model, cfg.d_mlp)

    def read(self, resid_pre: Float[Tensor, "batch pos d_model"], *where: Where) -> Float[Tensor, "batch pos d_model"]:
        if self.fork is None:
            return self.attn(self.ln1(resid_pre), *where)
        q_k_v = self.attn.project_by_head(*(self.ln1(each) for each in self.fork(resid_pre)))
        return self.attn.mix(*q_k_v, *where)

    def think(self, resid_mid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        # A copy: an edit in place changes what the MLP reads, and nothing else.
        return self.mlp(self.ln2(self.hook_mlp_in(resid_mid.clone()) if self.use_mlp_in else resid_mid))


class EncoderBlock(Block):
    """Whisper's: LayerNorm, bidirectional attention without a key bias, GELU MLP."""

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.ln1 = LayerNorm(cfg.d_model)
        sizes = (cfg.d_model, cfg.n_heads, cfg.n_heads, cfg.d_model // cfg.n_heads)
        bias = Projections(q=True, k=False, v=True, o=True)
        self.attn = (
            BidirectionalAttention(*sizes, bias)
            if cfg.window is None
            else WindowedAttention(*sizes, bias, window=cfg.window)
        )
        self.ln2 = LayerNorm(cfg.d_model)
        self.mlp = MLP(cfg.d_model, cfg.d_mlp)

    def read(self, resid_pre: Float[Tensor, "batch pos d_model"], *where: Where) -> Float[Tensor, "batch pos d_model"]:
        return self.attn(self.ln1(resid_pre), *where)

    def think(self, resid_mid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.mlp(self.ln2(resid_mid))


class VisionBlock(Block):
    """Qwen2.5-VL's: RMSNorm, bidirectional attention rotated by row and column, gated MLP, biases everywhere."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.ln1 = RMSNorm(cfg.d_model, VISION_EPS)
        self.attn = AxialAttention(
            cfg.d_model,
            cfg.n_heads,
            cfg.n_heads,
            cfg.d_model // cfg.n_heads,
            Projections(q=True, k=True, v=True, o=True),
        )
        self.ln2 = RMSNorm(cfg.d_model, VISION_EPS)
        self.mlp = GatedMLP(cfg.d_model, cfg.d_mlp, bias=True)

    def read(self, resid_pre: Float[Tensor, "batch pos d_model"], *where: Where) -> Float[Tensor, "batch pos d_model"]:
        return self.attn(self.ln1(resid_pre), *where)

    def think(self, resid_mid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.mlp(self.ln2(resid_mid))
