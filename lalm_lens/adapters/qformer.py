"""DeSTA's connector (arXiv 2409.20007, 2507.02768): a Q-Former that looks at several states of the encoder."""

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.config import QFormerConfig
from lalm_lens.nn.norm import LayerNorm
from lalm_lens.nn.qformer import QFormerBlock
from lalm_lens.nn.views import BiasView, Viewed, WeightView


class QFormerAdapter(Viewed):
    """For each tap, queries of its own go through blocks that all taps share. Then each query is mixed over the taps,
    by weights that it has learned, and brought to the width of the decoder.

    In the blocks, the first axis is `clip_tap`: clip by clip, the taps of each, so that tap t of clip c is at
    c * n_taps + t.
    """

    W = WeightView("linear", "d_model d_encoder -> d_encoder d_model")
    b = BiasView("linear", "d_model -> d_model")

    def __init__(self, cfg: QFormerConfig, d_encoder: int, d_model: int):
        super().__init__()
        n_taps = len(cfg.taps)
        for tap in range(n_taps):  # its own parameters, and no list of them, so that they come with it when offloaded
            self.register_parameter(f"queries_{tap}", nn.Parameter(torch.empty(1, cfg.n_queries, d_encoder)))
        self.mixture = nn.Parameter(torch.empty(cfg.n_queries, n_taps))  # before its softmax
        self.blocks = nn.ModuleList(QFormerBlock(d_encoder, cfg.n_heads, cfg.d_mlp) for _ in range(cfg.n_layers))
        self.ln = LayerNorm(d_encoder)
        self.linear = nn.Linear(d_encoder, d_model)
        self.hook_in = HookPoint()  # [clip, state_pos, tap, d_encoder]
        self.hook_queries = HookPoint()  # [clip_tap, pos, d_encoder]
        self.hook_mixture = HookPoint()  # [clip, audio_pos, tap], which sums to 1 over the taps
        self.hook_mixed = HookPoint()  # [clip, audio_pos, d_encoder]
        self.hook_out = HookPoint()  # [clip, audio_pos, d_model]

    @property
    def queries(self) -> Float[Tensor, "tap pos d_encoder"]:
        """What each tap is asked, before it is looked at: a copy."""
        return torch.cat([getattr(self, f"queries_{tap}") for tap in range(self.mixture.shape[1])])

    def forward(self, states: Float[Tensor, "clip state_pos tap d_encoder"]) -> Float[Tensor, "clip audio_pos d_model"]:
        n_clips, states = len(states), self.hook_in(states)
        states = rearrange(states, "clip pos tap d_encoder -> (clip tap) pos d_encoder")
        queries = repeat(self.queries, "tap pos d_encoder -> (clip tap) pos d_encoder", clip=n_clips)
        queries = self.hook_queries(queries)
        for block in self.blocks:
            queries = block(queries, states)
        by_tap = rearrange(queries, "(clip tap) audio_pos d_encoder -> clip audio_pos tap d_encoder", clip=n_clips)
        mixture = repeat(self.mixture.softmax(-1), "audio_pos tap -> clip audio_pos tap", clip=n_clips)
        mixed = einsum(
            by_tap,
            self.hook_mixture(mixture),
            "clip audio_pos tap d_encoder, clip audio_pos tap -> clip audio_pos d_encoder",
        )
        return self.hook_out(self.linear(self.ln(self.hook_mixed(mixed))))
