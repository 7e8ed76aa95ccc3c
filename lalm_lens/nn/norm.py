"""Normalisation, in float32, with TransformerLens' two hook points."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.shapes import at_least_float32


class RMSNorm(nn.Module):
    """x / rms(x) * w (arXiv 1910.07467)."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.w = nn.Parameter(torch.ones(d_model))
        self.eps = eps
        self.hook_scale = HookPoint()  # [batch, pos, 1]
        self.hook_normalized = HookPoint()  # [batch, pos, d_model]

    def reset_parameters(self) -> None:
        nn.init.ones_(self.w)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        wide = at_least_float32(x)
        scale = self.hook_scale((wide.square().mean(-1, keepdim=True) + self.eps).sqrt())
        # HF rounds before it multiplies by w: the other order changes 26 % of bf16 values.
        return self.hook_normalized(wide / scale).to(x.dtype) * self.w


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * w + b (arXiv 1607.06450)."""

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.w = nn.Parameter(torch.ones(d_model))
        self.b = nn.Parameter(torch.zeros(d_model))
        self.eps = eps
        self.hook_scale = HookPoint()  # [batch, pos, 1]
        self.hook_normalized = HookPoint()  # [batch, pos, d_model]

    def reset_parameters(self) -> None:
        nn.init.ones_(self.w)
        nn.init.zeros_(self.b)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        wide = at_least_float32(x)
        centred = wide - wide.mean(-1, keepdim=True)
        scale = self.hook_scale((centred.square().mean(-1, keepdim=True) + self.eps).sqrt())
        normalized = self.hook_normalized(centred / scale)
        return (normalized * self.w.to(wide.dtype) + self.b.to(wide.dtype)).to(x.dtype)
