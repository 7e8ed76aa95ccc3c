"""Whisper's encoder (arXiv 2212.04356), every block hooked under the decoder's names."""

import math
from collections import deque
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.config import EncoderConfig
from lalm_lens.encoders.base import AudioEncoder, Frames
from lalm_lens.errors import InputError
from lalm_lens.nn.attention import Mask
from lalm_lens.nn.block import EncoderBlock
from lalm_lens.nn.norm import LayerNorm


def n_states(n_frames: Frames) -> Frames:
    """Encoder states of `n_frames` mel frames (10 ms each -> 20 ms): conv2 has kernel 3, stride 2, padding 1."""
    return (n_frames - 1) // 2 + 1


def n_pooled_states(n_frames: Frames) -> Frames:
    """Audio tokens of `n_frames` mel frames (10 ms each -> 40 ms), after pooling pairs of encoder states.

    Same as HF `Qwen2AudioEncoder._get_feat_extract_output_lengths`. Needs at least 3 frames (30 ms).
    """
    return (n_states(n_frames) - 2) // 2 + 1  # AvgPool1d(2, stride=2) drops an odd last state


def in_pairs(states: Float[Tensor, "clip pos d_model"]) -> Float[Tensor, "clip audio_pos d_model"]:
    """The mean of each two states; an odd last one is dropped."""
    pooled = F.avg_pool1d(rearrange(states, "clip pos d_model -> clip d_model pos"), 2, stride=2)
    return rearrange(pooled, "clip d_model audio_pos -> clip audio_pos d_model")


def sinusoids(n_pos: int, d_model: int) -> Float[Tensor, "pos d_model"]:
    """Whisper's positions: sines, then cosines, at wavelengths from 2 pi to 10000 * 2 pi."""
    rate = torch.exp(-math.log(10_000) * torch.arange(d_model // 2) / (d_model // 2 - 1))
    angle = torch.arange(n_pos)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class WhisperEncoder(AudioEncoder):
    """Two convolutions, a table of positions, pre-norm blocks. What happens after the blocks differs by model."""

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        self.cfg = cfg
        self.conv1 = nn.Conv1d(cfg.n_mels, cfg.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(cfg.d_model, cfg.d_model, kernel_size=3, stride=2, padding=1)
        self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx, cfg.d_model), requires_grad=False)
        self.blocks = nn.ModuleList(EncoderBlock(cfg) for _ in range(cfg.n_layers))
        self.hook_embed = HookPoint()  # [clip, pos, d_model], the convolved sound before positions are added
        self.hook_out = HookPoint()  # [clip, audio_pos, d_model]; [clip, pos, tap, d_model] where taps are looked at

    def reset_parameters(self) -> None:
        self.W_pos.data.copy_(sinusoids(*self.W_pos.shape))

    def embed(self, mel: Float[Tensor, "clip mel frames"]) -> Float[Tensor, "clip pos d_model"]:
        self.check(mel)
        sound = F.gelu(self.conv2(F.gelu(self.conv1(mel.to(self.conv1.weight.dtype)))))
        sound = self.hook_embed(rearrange(sound, "clip d_model pos -> clip pos d_model"))
        return (sound + self.W_pos[: sound.shape[1]]).to(sound.dtype)  # Voxtral's table stays in float32

    def check(self, mel: Float[Tensor, "clip mel frames"]) -> None:
        """Raise `InputError` for features of another shape than the encoder takes."""
        if mel.shape[1:] != (self.cfg.n_mels, self.cfg.n_frames):
            raise InputError(
                f"The encoder takes {self.cfg.n_mels} mel bins x {self.cfg.n_frames} frames, got "
                f"{mel.shape[1]} x {mel.shape[2]}. Use the feature extractor that belongs to the model."
            )

    def run_blocks(self, mel: Float[Tensor, "clip mel frames"], mask: Mask | None) -> Float[Tensor, "clip pos d_model"]:
        return deque(self.states(mel, mask), maxlen=1).pop()

    def states(
        self, mel: Float[Tensor, "clip mel frames"], mask: Mask | None
    ) -> Iterator[Float[Tensor, "clip pos d_model"]]:
        """What enters the first block, and what leaves each."""
        resid = self.embed(mel)
        yield resid
        for block in self.blocks:
            resid = block(resid, mask)
            yield resid


class PooledWhisperEncoder(WhisperEncoder):
    """Qwen2-Audio's: keys past the end of the clip are masked; states are pooled in pairs *before* the last norm."""

    def __init__(self, cfg: EncoderConfig):
        super().__init__(cfg)
        self.ln_post = LayerNorm(cfg.d_model)

    def n_audio(self, n_frames: Frames) -> Frames:
        return n_pooled_states(n_frames)

    def forward(
        self, mel: Float[Tensor, "clip mel frames"], n_frames: Int[Tensor, " clip"]
    ) -> Float[Tensor, "clip audio_pos d_model"]:
        """States of the whole padded clip; `n_pooled_states(n_frames)` of them belong to the sound."""
        is_sound = torch.arange(self.cfg.n_ctx, device=mel.device) < n_states(n_frames)[:, None]
        resid = self.run_blocks(mel, is_sound[:, None, None, :])
        return self.hook_out(self.ln_post(in_pairs(resid)))


class WholeWhisperEncoder(WhisperEncoder):
    """Voxtral's: no mask, so the silence behind a clip is heard too; every window makes as many audio tokens.

    `n_stacked` states make a token, which is the adapter's work.
    """

    def __init__(self, cfg: EncoderConfig, n_stacked: int):
        super().__init__(cfg)
        self.n_stacked = n_stacked
        self.ln_post = LayerNorm(cfg.d_model)

    def n_audio(self, n_frames: Frames) -> Frames:
        n_windows = (n_frames - 1) // self.cfg.n_frames + 1
        return n_windows * (self.cfg.n_ctx // self.n_stacked)

    def forward(
        self, mel: Float[Tensor, "clip mel frames"], n_frames: Int[Tensor, " clip"]
    ) -> Float[Tensor, "clip pos d_model"]:
        return self.hook_out(self.ln_post(self.run_blocks(mel, None)))


class TappedWhisperEncoder(WhisperEncoder):
    """DeSTA's: no mask, and no last norm. The adapter looks at the states after some of the blocks, and makes as many
    audio tokens of every clip.

    The last block is the last that is tapped. Whisper's blocks behind it, if there are any, are not built: nothing that
    happened in them could be heard.
    """

    def __init__(self, cfg: EncoderConfig, taps: tuple[int, ...], n_queries: int):
        super().__init__(cfg)
        assert taps[-1] == cfg.n_layers, "a block that nobody listens to"
        self.taps, self.n_queries = taps, n_queries

    def n_audio(self, n_frames: Frames) -> Frames:
        return 0 * n_frames + self.n_queries

    def n_entering(self, n_frames: Frames) -> Frames:
        return n_states(n_frames)

    def forward(
        self, mel: Float[Tensor, "clip mel frames"], n_frames: Int[Tensor, " clip"]
    ) -> Float[Tensor, "clip pos tap d_model"]:
        """States of the whole window, silence included, after so many blocks as `taps` say."""
        heard = [state for n_passed, state in enumerate(self.states(mel, None)) if n_passed in self.taps]
        return self.hook_out(torch.stack(heard, dim=2))
