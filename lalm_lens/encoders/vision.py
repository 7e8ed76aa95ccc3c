"""Qwen2.5-VL's vision tower (arXiv 2502.13923), every block hooked under the decoder's names.

An image is a frame, a video has one for every `n_frames` of its own. No frame looks at another, so frames are the batch
here, and positions are the patches of one frame: squares of `merge` x `merge`, row by row, and row by row in each.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformer_lens.hook_points import HookPoint

from lalm_lens.config import VisionConfig
from lalm_lens.errors import InputError
from lalm_lens.nn.attention import Mask
from lalm_lens.nn.block import VISION_EPS, VisionBlock
from lalm_lens.nn.norm import RMSNorm
from lalm_lens.nn.rope import AxialRotary


@dataclass(frozen=True)
class Frames:
    """Where the patches of some frames are. Frames are padded to the largest."""

    sizes: tuple[tuple[int, int], ...]  # patches of each frame in height and in width
    merge: int
    window: int
    device: torch.device

    @cached_property
    def n_patches(self) -> Int[Tensor, " frame"]:
        return torch.tensor([n_h * n_w for n_h, n_w in self.sizes], device=self.device)

    @cached_property
    def is_patch(self) -> Bool[Tensor, "frame pos"]:
        return torch.arange(int(self.n_patches.max()), device=self.device) < self.n_patches[:, None]

    @cached_property
    def is_token(self) -> Bool[Tensor, "frame vision_pos"]:
        return self.is_patch[:, :: self.merge**2]

    @cached_property
    def places(self) -> Int[Tensor, "frame pos side"]:
        """Row and column of each patch."""
        known = {size: self.places_in(*size) for size in set(self.sizes)}
        return pad_sequence([known[size] for size in self.sizes], batch_first=True).to(self.device)

    def places_in(self, n_h: int, n_w: int) -> Int[Tensor, "pos side"]:
        grid = torch.stack(torch.meshgrid(torch.arange(n_h), torch.arange(n_w), indexing="ij"))
        squares = {"m": self.merge, "n": self.merge}
        return rearrange(grid, "side (row m) (column n) -> (row column m n) side", **squares)

    @cached_property
    def whole(self) -> Mask:
        """True where a patch may look in its frame. What pads a frame looks at itself."""
        itself = torch.eye(self.is_patch.shape[1], dtype=torch.bool, device=self.device)
        return self.is_patch[:, None, None, :] | itself

    @cached_property
    def windows(self) -> Mask:
        """True where a patch may look in its window."""
        which = self.places // (self.merge * self.window)
        return (which[:, None, :, None] == which[:, None, None]).all(-1) & self.whole

    @cached_property
    def by_window(self) -> tuple[Int[Tensor, " patch"], Int[Tensor, " patch"]]:
        """Frame and position of each patch in HF's order: window after window in each frame."""
        return in_order(self.is_patch, self.places // (self.merge * self.window))

    @cached_property
    def tokens_by_window(self) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
        """The same of the squares that are one token each."""
        return in_order(self.is_token, self.places[:, :: self.merge**2] // (self.merge * self.window))

    def padded(self, patches: Float[Tensor, "patch d_model"]) -> Float[Tensor, "frame pos d_model"]:
        return pad_sequence(list(patches.split([n_h * n_w for n_h, n_w in self.sizes])), batch_first=True)


def in_order(
    is_there: Bool[Tensor, "frame pos"], windows: Int[Tensor, "frame pos side"]
) -> tuple[Int[Tensor, " there"], Int[Tensor, " there"]]:
    """Frames and positions of what is there, by window."""
    frame, pos = is_there.nonzero(as_tuple=True)
    row, column = windows[frame, pos].unbind(-1)
    each = (frame * (1 + row.max()) + row) * (1 + column.max()) + column
    order = each.argsort(stable=True)
    return frame[order], pos[order]


class VisionEncoder(nn.Module):
    """Patches of pixels in, states of patches out."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        size = (cfg.n_frames, cfg.patch, cfg.patch)
        self.patch_embed = nn.Conv3d(cfg.n_channels, cfg.d_model, kernel_size=size, stride=size, bias=False)
        self.rotary = AxialRotary(cfg.theta, cfg.d_model // cfg.n_heads)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.n_layers))
        self.ln_post = RMSNorm(cfg.d_model, VISION_EPS)
        self.hook_embed = HookPoint()  # [frame, pos, d_model]
        self.hook_out = HookPoint()  # [frame, pos, d_model]

    def frames(self, grid: Int[Tensor, "item 3"]) -> Frames:
        """Raises `InputError` for pictures that cannot be cut into squares."""
        sizes = tuple((n_h, n_w) for n_t, n_h, n_w in grid.tolist() for _ in range(n_t))
        odd = [size for size in sizes if size[0] % self.cfg.merge or size[1] % self.cfg.merge]
        if odd:
            raise InputError(
                f"A picture of {odd[0][0]} x {odd[0][1]} patches cannot be cut into squares of {self.cfg.merge} x "
                f"{self.cfg.merge}: use the image processor that belongs to the model."
            )
        return Frames(sizes, self.cfg.merge, self.cfg.window, grid.device)

    def embed(self, patches: Float[Tensor, "patch pixels"]) -> Float[Tensor, "patch d_model"]:
        if patches.shape[1] != self.cfg.n_pixels:
            raise InputError(
                f"A patch has {self.cfg.n_pixels} numbers in this model, got {patches.shape[1]}. Use the image "
                "processor that belongs to the model."
            )
        n_t, n_h, n_w = self.patch_embed.kernel_size
        cubes = rearrange(patches, "patch (c t h w) -> patch c t h w", t=n_t, h=n_h, w=n_w)
        return self.patch_embed(cubes.to(self.patch_embed.weight.dtype)).flatten(1)

    def forward(self, patches: Float[Tensor, "patch pixels"], frames: Frames) -> Float[Tensor, "frame pos d_model"]:
        """States of the patches and of what pads smaller frames; `frames.is_patch` tells which."""
        resid = self.hook_embed(frames.padded(self.embed(patches)))
        rotation = self.rotary(*frames.places.unbind(-1))
        for layer, block in enumerate(self.blocks):
            resid = block(resid, frames.whole if layer in self.cfg.whole else frames.windows, rotation)
        return self.hook_out(self.ln_post(resid))
