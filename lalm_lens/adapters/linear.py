"""One linear layer from encoder states to decoder embeddings (Qwen2-Audio)."""

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.nn.views import BiasView, Viewed, WeightView


class LinearAdapter(Viewed):
    W = WeightView("linear", "d_model d_encoder -> d_encoder d_model")
    b = BiasView("linear", "d_model -> d_model")

    def __init__(self, d_encoder: int, d_model: int):
        super().__init__()
        self.linear = nn.Linear(d_encoder, d_model)
        self.hook_in = HookPoint()  # [clip, audio_pos, d_encoder]
        self.hook_out = HookPoint()  # [clip, audio_pos, d_model]

    def forward(self, states: Float[Tensor, "clip audio_pos d_encoder"]) -> Float[Tensor, "clip audio_pos d_model"]:
        return self.hook_out(self.linear(self.hook_in(states)))
