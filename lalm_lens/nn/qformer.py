"""Post-norm blocks of a Q-Former: queries look at each other, then at states from elsewhere, then think."""

from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from lalm_lens.nn.attention import BidirectionalAttention, CrossAttention, Projections
from lalm_lens.nn.block import Block
from lalm_lens.nn.mlp import MLP
from lalm_lens.nn.norm import LayerNorm

BERT_EPS = 1e-12


class QFormerBlock(Block):
    """BERT's (arXiv 1810.04805) with cross-attention, under TransformerLens' names for it: each sum is normed before
    the next part reads it, so a `resid` hook is on the sum, and `hook_normalized_resid_post` on what the block returns.

    There is no single residual stream: what a norm leaves is what is added to.
    """

    hook_out_is_single_residual_stream = False

    def __init__(self, d_model: int, n_heads: int, d_mlp: int):
        super().__init__()
        sizes = (d_model, n_heads, n_heads, d_model // n_heads)
        bias = Projections(q=True, k=True, v=True, o=True)
        self.attn = BidirectionalAttention(*sizes, bias)
        self.ln1 = LayerNorm(d_model, BERT_EPS)
        self.cross_attn = CrossAttention(*sizes, bias)
        self.ln_cross = LayerNorm(d_model, BERT_EPS)
        self.mlp = MLP(d_model, d_mlp)
        self.ln2 = LayerNorm(d_model, BERT_EPS)
        self.hook_cross_attn_out = (
            HookPoint()
        )  # [clip_tap, pos, d_model], as are the two below and those of every block
        self.hook_resid_cross = HookPoint()
        self.hook_normalized_resid_post = HookPoint()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  it needs other states, and knows no mask
        self, resid: Float[Tensor, "clip_tap pos d_model"], states: Float[Tensor, "clip_tap state_pos d_model"]
    ) -> Float[Tensor, "clip_tap pos d_model"]:
        resid_pre = self.hook_resid_pre(resid)
        resid_mid = self.ln1(self.hook_resid_mid(resid_pre + self.hook_attn_out(self.attn(resid_pre, None))))
        looked = self.hook_cross_attn_out(self.cross_attn(resid_mid, states))
        resid_cross = self.ln_cross(self.hook_resid_cross(resid_mid + looked))
        resid_post = self.hook_resid_post(resid_cross + self.hook_mlp_out(self.mlp(resid_cross)))
        return self.hook_normalized_resid_post(self.ln2(resid_post))
