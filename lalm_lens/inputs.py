"""What a model takes: tokens with audio and pictures beside them, or the embeddings already made of all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lalm_lens.errors import InputError

_FRAME_MASKS = {"feature_attention_mask", "input_features_mask"}  # Qwen2-Audio's name, and Audio Flamingo 3's
_IMAGES, _VIDEOS = ("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")
_SECONDS = "video_second_per_grid"
Seen = TypeVar("Seen", bound="Images")
_HF_NAMES = {
    *("input_ids", "attention_mask", "position_ids", "input_features", *_FRAME_MASKS),
    *(*_IMAGES, *_VIDEOS, _SECONDS, "use_audio_in_video"),
}


@dataclass(frozen=True)
class Images:
    """Images as patches of pixels, one image after the other."""

    patches: Float[Tensor, "patch pixels"]
    grid: Int[Tensor, "item 3"]  # patches of each in time, which is 1, in height and in width

    def __post_init__(self) -> None:
        if self.grid.is_floating_point() or not len(self.grid):
            raise InputError(f"A grid has three whole numbers for each picture; got {self.grid.tolist()}.")
        if self.grid.min() < 1 or len(self.patches) != self.grid.prod(-1).sum():
            raise InputError(
                f"Grids of {self.grid.tolist()} patches do not hold {len(self.patches)} patches: give the pixels and "
                "the grid that one processor made."
            )
        if not self.patches.isfinite().all():
            raise InputError("The pixels hold NaN or infinity. Check the images they were made from.")

    def to(self, device: torch.device | str | None, non_blocking: bool = False) -> "Images":
        """As `Tensor.to`."""
        return replace(
            self, **{name: value.to(device, non_blocking=non_blocking) for name, value in vars(self).items()}
        )


@dataclass(frozen=True)
class Videos(Images):
    """Videos in the same way. Where their sound is heard too, the prompt says so by its tokens."""

    seconds: Float[Tensor, " item"]  # of each, how long a patch lasts

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.seconds > 0).all():
            raise InputError(f"A patch of a video lasts some time, got {self.seconds.tolist()} s.")


@dataclass(frozen=True)
class HeardVideo(Videos):
    """One video that is heard: the clip beside it is its sound, which comes in turn with its frames."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.grid) != 1:
            raise InputError(f"A clip is the sound of one video, and here are {len(self.grid)}.")


def joined(pictures: Sequence[Seen]) -> Seen | None:
    """One after the other; None of none."""
    if not pictures:
        return None
    names = vars(pictures[0])
    return replace(pictures[0], **{name: torch.cat([getattr(its, name) for its in pictures]) for name in names})


@dataclass(frozen=True)
class Inputs:
    """A left-padded batch of prompts with their clips, images and videos, each in the order of their placeholders.

    A clip that is longer than one window of the encoder is several clips here, one after the other. `positions` are
    those that the decoder rotates by, where its own would not do.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]  # False on padding
    mel: Float[Tensor, "clip mel frames"] | None = None
    n_frames: Int[Tensor, " clip"] | None = None  # mel frames (10 ms) that belong to the sound
    images: Images | None = None
    videos: Videos | None = None
    positions: Int[Tensor, "3 batch pos"] | None = None  # in time, height and width

    def __post_init__(self) -> None:
        if not self.attention_mask[:, -1].all():
            raise InputError("Batches are padded on the left: set the tokenizer's padding_side to 'left'.")
        if (self.mel is None) != (self.n_frames is None):
            raise InputError("Mel features and their numbers of frames come together: give both or neither.")
        if self.mel is not None and not self.mel.isfinite().all():
            raise InputError("The audio features hold NaN or infinity. Check the waveform they were made from.")

    @classmethod
    def from_hf(cls, batch: Mapping[str, Any]) -> "Inputs":
        """From what an HF processor returns. Without a mask of frames, all of them are heard.

        `use_audio_in_video` is not needed: the prompt's own tokens say it.
        """
        unknown = set(batch) - _HF_NAMES
        if unknown:
            raise InputError(f"Unknown model inputs {sorted(unknown)}; known are {sorted(_HF_NAMES)}.")
        tokens = batch["input_ids"]
        mel, masks = batch.get("input_features"), [batch[name] for name in _FRAME_MASKS & set(batch)]
        if mel is not None and not masks:
            masks = [torch.ones_like(mel[:, 0], dtype=torch.long)]
        if masks and not (masks[0].bool() == from_the_first(masks[0].sum(-1), masks[0].shape[-1])).all():
            raise InputError("Features are padded on the right: set the feature extractor's padding_side to 'right'.")
        return cls(
            tokens=tokens,
            attention_mask=batch.get("attention_mask", torch.ones_like(tokens)).bool(),
            mel=mel,
            n_frames=masks[0].sum(-1).long() if masks else None,
            images=Images(*together(batch, *_IMAGES)) if _IMAGES[0] in batch else None,
            videos=Videos(*together(batch, *_VIDEOS, _SECONDS)) if _VIDEOS[0] in batch else None,
            positions=batch.get("position_ids"),
        )

    def to_hf(self, frame_mask: str | None) -> dict[str, Tensor]:
        """What an HF model takes that has this name for the mask of frames, or none: `from_hf` undone. Conversions know
        it as `frame_mask`; Qwen2-Audio's and Omni's is "feature_attention_mask"."""
        batch = {"input_ids": self.tokens, "attention_mask": self.attention_mask.long()}
        batch |= {} if self.positions is None else {"position_ids": self.positions}
        batch |= {} if self.images is None else dict(zip(_IMAGES, vars(self.images).values(), strict=True))
        batch |= {} if self.videos is None else dict(zip((*_VIDEOS, _SECONDS), vars(self.videos).values(), strict=True))
        if self.mel is None or self.n_frames is None:
            return batch
        is_frame = from_the_first(self.n_frames, self.mel.shape[-1])
        masks = {} if frame_mask is None else {frame_mask: is_frame.long()}
        return {**batch, "input_features": self.mel, **masks}

    def to(self, device: torch.device | str | None, non_blocking: bool = False) -> "Inputs":
        """As `Tensor.to`; accelerate, which moves what an offloaded model is given, may say None: stay."""
        moved = {
            name: value.to(device, non_blocking=non_blocking) for name, value in vars(self).items() if value is not None
        }
        return replace(self, **moved)


def from_the_first(n: Int[Tensor, " row"], n_all: int) -> Bool[Tensor, "row all"]:
    """True for the first so many of each row."""
    return torch.arange(n_all, device=n.device) < n[:, None]


def together(batch: Mapping[str, Any], *names: str) -> list[Tensor]:
    """What comes together, or not at all."""
    if missing := [name for name in names if batch.get(name) is None]:
        raise InputError(f"{names[0]} come with {', '.join(names[1:])}; {', '.join(missing)} is missing.")
    return [torch.as_tensor(batch[name]) for name in names]


@dataclass(frozen=True)
class Embedded:
    """Inputs after embedding and merge. The encoders have run; hooks on them will not fire again."""

    embed: Float[Tensor, "batch pos d_model"]
    attention_mask: Bool[Tensor, "batch pos"]
    positions: Int[Tensor, "3 batch pos"] | None = None  # in time, height and width, where those are not one

    def to(self, device: torch.device | str) -> "Embedded":
        """As `Tensor.to`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)
