"""What a model takes: tokens with audio beside them, or the embeddings already made of both."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lalm_lens.errors import InputError

_FRAME_MASKS = {"feature_attention_mask", "input_features_mask"}  # Qwen2-Audio's name, and Audio Flamingo 3's
_HF_NAMES = {"input_ids", "attention_mask", "input_features", *_FRAME_MASKS}


@dataclass(frozen=True)
class Inputs:
    """A left-padded batch of prompts with their clips, in the order of their placeholders.

    A clip that is longer than one window of the encoder is several clips here, one after the other.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]  # False on padding
    mel: Float[Tensor, "clip mel frames"] | None = None
    n_frames: Int[Tensor, " clip"] | None = None  # mel frames (10 ms) that belong to the sound

    def __post_init__(self) -> None:
        if not self.attention_mask[:, -1].all():
            raise InputError("Batches are padded on the left: set the tokenizer's padding_side to 'left'.")
        if (self.mel is None) != (self.n_frames is None):
            raise InputError("Mel features and their numbers of frames come together: give both or neither.")
        if self.mel is not None and not self.mel.isfinite().all():
            raise InputError("The audio features hold NaN or infinity. Check the waveform they were made from.")

    @classmethod
    def from_hf(cls, batch: Mapping[str, Tensor]) -> "Inputs":
        """From what an HF processor returns. Without a mask of frames, all of them are heard."""
        unknown = set(batch) - _HF_NAMES
        if unknown:
            raise InputError(f"Unknown model inputs {sorted(unknown)}; known are {sorted(_HF_NAMES)}.")
        tokens = batch["input_ids"]
        mel, masks = batch.get("input_features"), [batch[name] for name in _FRAME_MASKS & set(batch)]
        if mel is not None and not masks:
            masks = [torch.ones_like(mel[:, 0])]
        return cls(
            tokens=tokens,
            attention_mask=batch.get("attention_mask", torch.ones_like(tokens)).bool(),
            mel=mel,
            n_frames=masks[0].sum(-1).long() if masks else None,
        )

    def to_hf(self, frame_mask: str | None = "feature_attention_mask") -> dict[str, Tensor]:
        """What an HF model takes that has this name for the mask of frames, or none: `from_hf` undone."""
        batch = {"input_ids": self.tokens, "attention_mask": self.attention_mask.long()}
        if self.mel is None or self.n_frames is None:
            return batch
        is_frame = torch.arange(self.mel.shape[-1], device=self.mel.device) < self.n_frames[:, None]
        masks = {} if frame_mask is None else {frame_mask: is_frame.long()}
        return {**batch, "input_features": self.mel, **masks}

    def to(self, device: torch.device | str | None, non_blocking: bool = False) -> "Inputs":
        """As `Tensor.to`; accelerate, which moves what an offloaded model is given, may say None: stay."""
        moved = {
            name: value.to(device, non_blocking=non_blocking) for name, value in vars(self).items() if value is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Embedded:
    """Inputs after embedding and merge. The audio encoder has run; hooks on it will not fire again."""

    embed: Float[Tensor, "batch pos d_model"]
    attention_mask: Bool[Tensor, "batch pos"]

    def to(self, device: torch.device | str) -> "Embedded":
        """As `Tensor.to`."""
        return Embedded(self.embed.to(device), self.attention_mask.to(device))
