"""Feed-forward layers under TransformerLens' names."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.nn.views import BiasView, Viewed, WeightView


class GatedMLP(Viewed):
    """W_out(silu(W_gate x) * W_in x): SwiGLU (arXiv 2002.05202). Decoders have no biases in it, vision towers have."""

    W_gate = WeightView("gate_proj", "d_mlp d_model -> d_model d_mlp")
    W_in = WeightView("in_proj", "d_mlp d_model -> d_model d_mlp")
    W_out = WeightView("out_proj", "d_model d_mlp -> d_mlp d_model")
    b_gate = BiasView("gate_proj", "d_mlp -> d_mlp")
    b_in = BiasView("in_proj", "d_mlp -> d_mlp")
    b_out = BiasView("out_proj", "d_model -> d_model")

    def __init__(self, d_model: int, d_mlp: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.in_proj = nn.Linear(d_model, d_mlp, bias=bias)
        self.out_proj = nn.Linear(d_mlp, d_model, bias=bias)
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp], the gate before its silu
        self.hook_pre_linear = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # [batch, pos, d_mlp]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.out_proj(self.hook_post(self.neurons(x)))

    def neurons(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_mlp"]:
        return F.silu(self.hook_pre(self.gate_proj(x))) * self.hook_pre_linear(self.in_proj(x))


class MLP(Viewed):
    """W_out(gelu(W_in x)), with biases: Whisper's."""

    W_in = WeightView("in_proj", "d_mlp d_model -> d_model d_mlp")
    W_out = WeightView("out_proj", "d_model d_mlp -> d_mlp d_model")
    b_in = BiasView("in_proj", "d_mlp -> d_mlp")
    b_out = BiasView("out_proj", "d_model -> d_model")

    def __init__(self, d_model: int, d_mlp: int):
        super().__init__()
        self.in_proj = nn.Linear(d_model, d_mlp)
        self.out_proj = nn.Linear(d_mlp, d_model)
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # [batch, pos, d_mlp]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.out_proj(self.hook_post(self.neurons(x)))

    def neurons(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_mlp"]:
        return F.gelu(self.hook_pre(self.in_proj(x)))
