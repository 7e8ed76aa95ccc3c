"""`SeeingLALM`: a `HookedLALM` that also sees images and videos."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.config import LALMConfig, VisionConfig
from lalm_lens.encoders.base import AudioEncoder
from lalm_lens.encoders.vision import VisionEncoder
from lalm_lens.errors import HookError
from lalm_lens.inputs import Images, Inputs
from lalm_lens.model import HookedLALM, check_placeholders, splice
from lalm_lens.positions import positions_of
from lalm_lens.transformer import axis_sizes


class SeeingLALM(HookedLALM):
    """Beside the hook points of a `HookedLALM`: `vision_encoder.blocks.{l}.*` under the same names,
    `vision_encoder.hook_embed` and `hook_out`, `vision_adapter.hook_in/hook_pre/hook_post/hook_out`, and
    `hook_vision_embed`. All images and videos of a batch go through the vision tower together, images first; a frame of
    them is a row of its states.
    """

    def __init__(
        self,
        cfg: LALMConfig,
        audio_encoder: AudioEncoder,
        adapter: nn.Module,
        vision_encoder: VisionEncoder,
        vision_adapter: nn.Module,
        name: str = "custom",
    ):
        super().__init__(cfg, audio_encoder, adapter, name)
        self.vision_encoder = vision_encoder
        self.vision_adapter = vision_adapter
        self.hook_vision_embed = HookPoint()  # [vision_pos, d_model], all images one after the other, then all videos
        self.setup()

    @property
    def vision(self) -> VisionConfig:
        assert self.lalm_cfg.vision is not None
        return self.lalm_cfg.vision

    def see(self, inputs: Inputs, embed: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """With pictures where their placeholders are."""
        is_image, is_video = inputs.tokens == self.vision.image_token, inputs.tokens == self.vision.video_token
        check_placeholders(is_image, self.n_tokens(inputs.images, inputs.tokens), "image", "images")
        check_placeholders(is_video, self.n_tokens(inputs.videos, inputs.tokens), "video", "videos")
        pictures = [its for its in (inputs.images, inputs.videos) if its is not None]
        if not pictures:
            self.refuse_hooks(self.eyes())
            return embed
        frames = self.vision_encoder.frames(torch.cat([its.grid for its in pictures]))
        states = self.vision_encoder(torch.cat([its.patches for its in pictures]), frames)
        seen = self.hook_vision_embed(self.vision_adapter(states)[frames.is_token])
        n_image = int(is_image.sum())
        return splice(splice(embed, seen[:n_image], is_image), seen[n_image:], is_video)

    def n_tokens(self, pictures: Images | None, like: Int[Tensor, "batch pos"]) -> Int[Tensor, " item"]:
        """Of each image or video."""
        return like.new_zeros(0) if pictures is None else pictures.grid.prod(-1) // self.vision.merge**2

    def is_placeholder(self, tokens: Int[Tensor, "*batch pos"]) -> Bool[Tensor, "*batch pos"]:
        of_pictures = torch.tensor([self.vision.image_token, self.vision.video_token], device=tokens.device)
        return super().is_placeholder(tokens) | torch.isin(tokens, of_pictures)

    def perceived(self, inputs: Inputs, stack: str) -> list[tuple[int, int, int]]:
        if stack != "vision_encoder":
            return super().perceived(inputs, stack)
        grids = [its.grid for its in (inputs.images, inputs.videos) if its is not None]
        sizes = self.vision_encoder.frames(torch.cat(grids)).sizes if grids else ()
        n_patches = [n_h * n_w for n_h, n_w in sizes]
        return [(n, n // self.vision.merge**2, n // self.vision.merge**2) for n in n_patches]

    def fed(self, tokens: Int[Tensor, "*batch pos"], stack: str) -> Bool[Tensor, "*batch pos"]:
        audio = super().fed(tokens, stack)
        return audio if stack != "vision_encoder" else self.is_placeholder(tokens) & ~audio

    def positions_of(self, inputs: Any) -> Int[Tensor, "3 batch pos"] | None:
        given = super().positions_of(inputs)
        return positions_of(inputs, self.lalm_cfg) if given is None and isinstance(inputs, Inputs) else given

    def live(self, inputs: Any = None, *, start_at_layer: int | None = None, **rest: Any) -> set[str]:
        live = super().live(inputs, start_at_layer=start_at_layer, **rest)
        sees = isinstance(inputs, Inputs) and not (inputs.images is None and inputs.videos is None)
        return live if sees and start_at_layer is None else live - self.eyes()

    def sizes(self, inputs: Any = None, *_: Any) -> dict[str, dict[str, int]]:
        sizes = super().sizes(inputs)
        if not isinstance(inputs, Inputs):
            return sizes
        grids = [its.grid for its in (inputs.images, inputs.videos) if its is not None]
        if not grids:
            return sizes
        cfg, grid = self.vision, torch.cat(grids)
        seen = axis_sizes(cfg, int(grid[:, 0].sum()), int(grid[:, 1:].prod(-1).max()))
        seen |= {"kv_head": cfg.n_heads, "d_head": cfg.d_model // cfg.n_heads}
        return sizes | dict.fromkeys(("vision_encoder.", "vision_adapter."), seen)

    def front_end(self) -> set[str]:
        return self.ears() | self.eyes()

    def eyes(self) -> set[str]:
        """The hook points that fire only where something is seen."""
        return {
            name for name in self.hook_dict if name.startswith(("vision_encoder.", "vision_adapter.", "hook_vision"))
        }

    def silent(self, name: str) -> HookError:
        if name not in self.eyes():
            return super().silent(name)
        return HookError(
            f"A hook on {name} would not fire: this run holds no image or video, or one that was embedded before. Give "
            "the model `Inputs` to see it again."
        )
