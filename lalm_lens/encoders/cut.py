"""Qwen-Audio's encoder (arXiv 2311.07919): Whisper's, which hears a clip and nothing behind it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lalm_lens.encoders.whisper import PooledWhisperEncoder, in_pairs, n_states
from lalm_lens.errors import InputError


class CutWhisperEncoder(PooledWhisperEncoder):
    """The features end with the clip before they are convolved, so its last frame has nothing behind it but the zeros
    of the convolution. States are averaged in pairs before the last norm.

    Each clip of a batch is cut by itself. The original cuts all of them behind the longest, so that a shorter one
    hears silence to that point, and is answered otherwise than it is alone.
    """

    def forward(
        self, mel: Float[Tensor, "clip mel frames"], n_frames: Int[Tensor, " clip"]
    ) -> Float[Tensor, "clip audio_pos d_model"]:
        """States of the clip and of what pads it; `n_pooled_states(n_frames)` of them belong to the sound."""
        n_sound = n_states(n_frames)[:, None]
        is_heard = torch.arange(mel.shape[-1], device=mel.device) < 2 * n_sound
        is_sound = torch.arange(mel.shape[-1] // 2, device=mel.device) < n_sound
        resid = self.run_blocks(torch.where(is_heard[:, None], mel, 0), is_sound[:, None, None, :])
        return self.hook_out(self.ln_post(in_pairs(resid)))

    def check(self, mel: Float[Tensor, "clip mel frames"]) -> None:
        if mel.shape[1] != self.cfg.n_mels or mel.shape[2] % 2 or mel.shape[2] > self.cfg.n_frames:
            raise InputError(
                f"The encoder takes {self.cfg.n_mels} mel bins x an even number of frames up to {self.cfg.n_frames}, "
                f"got {mel.shape[1]} x {mel.shape[2]}. Use the feature extractor that belongs to the model."
            )
