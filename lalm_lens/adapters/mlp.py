"""Two linear layers from encoder states to decoder embeddings (Audio Flamingo 3, Voxtral, Qwen2.5-Omni's vision)."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.nn.views import BiasView, Viewed, WeightView


class MLPAdapter(Viewed):
    """W_out(gelu(W_in x))."""

    W_in = WeightView("in_proj", "d_mlp d_encoder -> d_encoder d_mlp")
    W_out = WeightView("out_proj", "d_model d_mlp -> d_mlp d_model")
    b_in = BiasView("in_proj", "d_mlp -> d_mlp")
    b_out = BiasView("out_proj", "d_model -> d_model")

    def __init__(self, d_encoder: int, d_model: int, bias: bool, d_mlp: int | None = None):
        super().__init__()
        self.in_proj = nn.Linear(d_encoder, d_mlp or d_model, bias=bias)
        self.out_proj = nn.Linear(d_mlp or d_model, d_model, bias=bias)
        self.hook_in = HookPoint()  # [clip, audio_pos, d_encoder]
        self.hook_pre = HookPoint()  # [clip, audio_pos, d_mlp]
        self.hook_post = HookPoint()  # [clip, audio_pos, d_mlp]
        self.hook_out = HookPoint()  # [clip, audio_pos, d_model]

    def forward(self, states: Float[Tensor, "clip audio_pos d_encoder"]) -> Float[Tensor, "clip audio_pos d_model"]:
        neurons = F.gelu(self.hook_pre(self.in_proj(self.hook_in(states))))
        return self.hook_out(self.out_proj(self.hook_post(neurons)))


class StackedAdapter(MLPAdapter):
    """The same on `n_stacked` encoder states side by side (Voxtral: 4, so that 20 ms become 80 ms; the vision of
    Qwen2.5-Omni: a square of 4 patches)."""

    def __init__(self, d_encoder: int, n_stacked: int, d_model: int, bias: bool, d_mlp: int | None = None):
        super().__init__(n_stacked * d_encoder, d_model, bias, d_mlp)
        self.n_stacked = n_stacked

    def forward(self, states: Float[Tensor, "clip pos d_encoder"]) -> Float[Tensor, "clip audio_pos d_model"]:
        n = self.n_stacked
        return super().forward(rearrange(states, "clip (audio_pos n) d_encoder -> clip audio_pos (n d_encoder)", n=n))
