"""Pre-norm transformer blocks: x + attn(ln1(x)), then x + mlp(ln2(x))."""

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.config import DecoderConfig, EncoderConfig
from lalm_lens.nn.attention import BidirectionalAttention, Mask, Projections, RotaryAttention
from lalm_lens.nn.mlp import MLP, GatedMLP
from lalm_lens.nn.norm import LayerNorm, RMSNorm
from lalm_lens.nn.rope import Rotation


class Block(nn.Module):
    """What every block has in common: one residual stream and where it can be read and changed."""

    hook_out_is_single_residual_stream = True  # TransformerLens' logit lens asks for this promise
    ln1: nn.Module
    ln2: nn.Module
    attn: nn.Module
    mlp: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.hook_resid_pre = HookPoint()  # [batch, pos, d_model], as are the four below
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, resid: Float[Tensor, "batch pos d_model"], *where: Mask | Rotation | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """`where` is what the attention of this kind of block needs beside the states: mask, rotation."""
        resid_pre = self.hook_resid_pre(resid)
        resid_mid = self.hook_resid_mid(resid_pre + self.hook_attn_out(self.attn(self.ln1(resid_pre), *where)))
        return self.hook_resid_post(resid_mid + self.hook_mlp_out(self.mlp(self.ln2(resid_mid))))


class DecoderBlock(Block):
    """Llama's and Qwen2's: RMSNorm, rotary grouped-query attention, gated MLP."""

    def __init__(self, cfg: DecoderConfig):
        super().__init__()
        qkv = cfg.qkv_bias
        self.ln1 = RMSNorm(cfg.d_model, cfg.eps)
        self.attn = RotaryAttention(
            cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.d_head, Projections(q=qkv, k=qkv, v=qkv, o=False)
        )
        self.ln2 = RMSNorm(cfg.d_model, cfg.eps)
        self.mlp = GatedMLP(cfg.d_model, cfg.d_mlp)


class EncoderBlock(Block):
    """Whisper's: LayerNorm, bidirectional attention without a key bias, GELU MLP."""

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.ln1 = LayerNorm(cfg.d_model)
        self.attn = BidirectionalAttention(
            cfg.d_model,
            cfg.n_heads,
            cfg.n_heads,
            cfg.d_model // cfg.n_heads,
            Projections(q=True, k=False, v=True, o=True),
        )
        self.ln2 = LayerNorm(cfg.d_model)
        self.mlp = MLP(cfg.d_model, cfg.d_mlp)
