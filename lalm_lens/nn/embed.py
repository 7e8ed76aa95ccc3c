"""Token embedding and unembedding."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from lalm_lens.nn.views import BiasView, Viewed, WeightView


class Embed(Viewed):
    W_E = WeightView("table", "d_vocab d_model -> d_vocab d_model")

    def __init__(self, d_vocab: int, d_model: int):
        super().__init__()
        self.table = nn.Embedding(d_vocab, d_model)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return self.table(tokens)


class Unembed(Viewed):
    W_U = WeightView("linear", "d_vocab d_model -> d_model d_vocab")
    b_U = BiasView("linear", "d_vocab -> d_vocab")

    def __init__(self, d_model: int, d_vocab: int):
        super().__init__()
        self.linear = nn.Linear(d_model, d_vocab, bias=False)

    def forward(self, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        return self.linear(resid)
