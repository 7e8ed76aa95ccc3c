"""`MarkedLALM`: a `HookedLALM` that has its own vectors for the beginning and the end of a clip."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lalm_lens.config import LALMConfig
from lalm_lens.encoders.base import AudioEncoder
from lalm_lens.inputs import Inputs
from lalm_lens.model import HookedLALM


class MarkedLALM(HookedLALM):
    """Qwen-Audio's: a clip fills what stands between two tokens, whatever that is, and the two are no words there but
    vectors that belong to the audio encoder. Those are not rows of `hook_audio_embed`, which has the sound alone.
    """

    def __init__(self, cfg: LALMConfig, audio_encoder: AudioEncoder, adapter: nn.Module, name: str = "custom"):
        super().__init__(cfg, audio_encoder, adapter, name)
        self.audio_marks = nn.Embedding(2, cfg.decoder.d_model)

    @property
    def marks(self) -> tuple[int, int]:
        """Ids of the tokens around a clip."""
        assert self.lalm_cfg.audio_marks is not None
        return self.lalm_cfg.audio_marks

    def hear(self, inputs: Inputs, embed: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        first, last = self.audio_marks(torch.arange(2, device=embed.device))
        for token, mark in zip(self.marks, (first, last), strict=True):
            embed = torch.where((inputs.tokens == token)[..., None], mark, embed)
        return super().hear(inputs, embed)

    def is_audio(self, tokens: Int[Tensor, "*batch pos"]) -> Bool[Tensor, "*batch pos"]:
        begun, ended = ((tokens == mark).cumsum(-1) for mark in self.marks)
        return (begun > ended) & (tokens != self.marks[0])

    def is_placeholder(self, tokens: Int[Tensor, "*batch pos"]) -> Bool[Tensor, "*batch pos"]:
        return self.is_audio(tokens) | torch.isin(tokens, torch.tensor(self.marks, device=tokens.device))
