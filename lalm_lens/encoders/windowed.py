"""Qwen2.5-Omni's audio encoder (arXiv 2503.20215): Whisper's, hearing 2 s at a time and nothing around them."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.config import EncoderConfig
from lalm_lens.encoders.base import AudioEncoder, Frames
from lalm_lens.encoders.whisper import in_pairs, n_pooled_states, n_states, sinusoids
from lalm_lens.errors import InputError
from lalm_lens.nn.block import EncoderBlock
from lalm_lens.nn.norm import LayerNorm


class WindowedWhisperEncoder(AudioEncoder):
    """Each window is convolved alone, has the positions from 0 on, and attends to itself. Then states are averaged in
    pairs over the whole clip, before the last norm.

    A clip may have any number of frames. Positions are those of the clip, 20 ms each, window after window.
    """

    def __init__(self, cfg: EncoderConfig):
        super().__init__()
        assert cfg.window is not None, "an encoder without windows is a PooledWhisperEncoder"
        self.cfg, self.window = cfg, cfg.window
        self.conv1 = nn.Conv1d(cfg.n_mels, cfg.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(cfg.d_model, cfg.d_model, kernel_size=3, stride=2, padding=1)
        self.blocks = nn.ModuleList(EncoderBlock(cfg) for _ in range(cfg.n_layers))
        self.ln_post = LayerNorm(cfg.d_model)
        self.hook_embed = HookPoint()  # [clip, pos, d_model], the convolved sound before positions are added
        self.hook_out = HookPoint()  # [clip, audio_pos, d_model]

    def n_audio(self, n_frames: Frames) -> Frames:
        return n_pooled_states(n_frames)

    def forward(
        self, mel: Float[Tensor, "clip mel frames"], n_frames: Int[Tensor, " clip"]
    ) -> Float[Tensor, "clip audio_pos d_model"]:
        """States of the clip and of what pads it; `n_pooled_states(n_frames)` of them belong to the sound."""
        resid = self.embed(mel, n_frames)
        is_sound = torch.arange(resid.shape[1], device=mel.device) < n_states(n_frames)[:, None]
        for block in self.blocks:
            resid = block(resid, is_sound[:, None, None, :])
        return self.hook_out(self.ln_post(in_pairs(resid)))

    def embed(
        self, mel: Float[Tensor, "clip mel frames"], n_frames: Int[Tensor, " clip"]
    ) -> Float[Tensor, "clip pos d_model"]:
        if mel.shape[1] != self.cfg.n_mels:
            raise InputError(
                f"The encoder takes {self.cfg.n_mels} mel bins, got {mel.shape[1]}. Use the feature extractor that "
                "belongs to the model."
            )
        mel = F.pad(mel, (0, -mel.shape[-1] % (2 * self.window))).to(self.conv1.weight.dtype)
        is_sound = (torch.arange(mel.shape[-1], device=mel.device) < n_frames[:, None])[:, None]
        mel, is_sound = self.by_window(torch.where(is_sound, mel, 0)), self.by_window(is_sound)
        sound = F.gelu(self.conv1(mel)) * is_sound  # what lies behind the clip is silent to conv2 as well
        sound = rearrange(
            F.gelu(self.conv2(sound)), "(clip window) d_model pos -> clip (window pos) d_model", clip=len(n_frames)
        )
        sound = self.hook_embed(sound)
        positions = sinusoids(self.window, self.cfg.d_model).to(sound)
        return sound + positions.repeat(sound.shape[1] // self.window, 1)

    def by_window(self, x: Tensor) -> Tensor:
        """Each window as a clip of its own: [clip window, channel, frames]."""
        return rearrange(x, "clip channel (window frames) -> (clip window) channel frames", frames=2 * self.window)
