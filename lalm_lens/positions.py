"""Where the tokens of a prompt with pictures are: in time, height and width (arXiv 2409.12191, 2503.20215)."""

from collections.abc import Iterator
from itertools import takewhile

import torch
from jaxtyping import Int
from torch import Tensor

from lalm_lens.config import LALMConfig, VisionConfig
from lalm_lens.errors import InputError
from lalm_lens.inputs import Inputs

Local = Int[Tensor, "3 pos"]  # positions of a stretch, counted from its own beginning
Stretch = tuple[Local, int]  # and how far behind that beginning the next stretch begins


def positions_of(inputs: Inputs, cfg: LALMConfig) -> Int[Tensor, "3 batch pos"] | None:
    """The positions of each token; None where no picture is seen, because then they are counted.

    Words and sounds go on by one in all three. A picture is a grid: rows and columns are counted from where it begins,
    a second of a video moves on by `positions_per_s`, and what follows begins behind its largest position. A video and
    its sound begin together. Same as HF `get_rope_index`; padding is at 0.
    """
    if cfg.vision is None or (inputs.images is None and inputs.videos is None):
        return None
    walk = Walk(inputs, cfg, cfg.vision)
    positions = inputs.tokens.new_zeros(3, *inputs.tokens.shape)
    for row, is_token in enumerate(inputs.attention_mask):
        positions[:, row, is_token] = walk.positions(inputs.tokens[row, is_token].tolist()).to(positions)
    return positions


class Walk:
    """Through the prompts of a batch, picture after picture."""

    def __init__(self, inputs: Inputs, cfg: LALMConfig, vision: VisionConfig):
        self.audio_token, self.vision = cfg.audio_token, vision
        self.images, self.videos = self.grids_of_images(inputs), self.grids_of_videos(inputs)

    def grids_of_images(self, inputs: Inputs) -> Iterator[Local]:
        if inputs.images is not None:
            for grid in inputs.images.grid.tolist():
                yield self.grid(grid, torch.tensor(1))

    def grids_of_videos(self, inputs: Inputs) -> Iterator[Local]:
        if inputs.videos is not None:
            for grid, seconds in zip(inputs.videos.grid.tolist(), inputs.videos.seconds.float().cpu(), strict=True):
                yield self.grid(grid, seconds)

    def grid(self, grid: list[int], seconds: Tensor) -> Local:
        n_t, n_h, n_w = grid
        t = (torch.arange(n_t) * seconds * self.vision.positions_per_s).long()  # HF's order, in float32
        h, w = (torch.arange(n // self.vision.merge) for n in (n_h, n_w))
        return torch.stack(torch.meshgrid(t, h, w, indexing="ij")).flatten(1)

    def positions(self, tokens: list[int]) -> Local:
        parts, begin = [], 0
        for local, n in self.stretches(tokens):
            parts.append(begin + local)
            begin += n
        return torch.cat(parts, dim=1)

    def stretches(self, tokens: list[int]) -> Iterator[Stretch]:
        at = 0
        while at < len(tokens):
            if self.begins_heard(tokens, at):
                begin, end = at + 2, at + 2 + self.n_mixed(tokens[at + 2 :])
                yield at_once(2)
                yield self.mixed(tokens[begin:end])
                at = min(end + 2, len(tokens))
                yield at_once(at - end)
            else:
                local = self.apart(tokens, at)
                at += local.shape[1]
                yield local, int(local.max()) + 1

    def apart(self, tokens: list[int], at: int) -> Local:
        """A picture, or words and sounds up to the next one."""
        its = {self.vision.image_token: self.images, self.vision.video_token: self.videos}
        if tokens[at] in its:
            n = sum(1 for _ in takewhile(tokens[at].__eq__, tokens[at:]))
            picture = next(its[tokens[at]], one_by_one(0))
            if not picture.shape[1] or picture.shape[1] > n:
                raise InputError(
                    f"A picture of {picture.shape[1]} tokens has {n} placeholders: give pictures in the order in which "
                    "the prompts were made for them."
                )
            return picture
        pictures = (self.vision.image_token, self.vision.video_token)
        ends = (n for n in range(at, len(tokens)) if tokens[n] in pictures or self.begins_heard(tokens, n))
        return one_by_one(next(ends, len(tokens)) - at)

    def begins_heard(self, tokens: list[int], at: int) -> bool:
        """Whether a video begins here whose sound is between its frames."""
        return tokens[at : at + 2] == [self.vision.start_token, self.vision.audio_start_token]

    def n_mixed(self, tokens: list[int]) -> int:
        return sum(1 for _ in takewhile((self.vision.video_token, self.audio_token).__contains__, tokens))

    def mixed(self, tokens: list[int]) -> Stretch:
        """A video and its sound, in turn. What follows begins behind what comes last, as in HF, even where the other
        of the two has come further."""
        is_video = torch.tensor(tokens, dtype=torch.long) == self.vision.video_token
        if not tokens:
            raise InputError("The prompt has the marks of a video that is heard, and no placeholders between them.")
        video = next(self.videos, one_by_one(0))
        if video.shape[1] != is_video.sum():
            raise InputError(
                f"A video of {video.shape[1]} tokens has {int(is_video.sum())} placeholders between those of its sound."
            )
        local = torch.empty(3, len(tokens), dtype=torch.long)
        local[:, is_video], local[:, ~is_video] = video, one_by_one(int((~is_video).sum()))
        n_last = sum(1 for _ in takewhile(is_video[-1].item().__eq__, is_video.flip(0).tolist()))
        return local, int(local[:, -n_last:].max()) + 1


def one_by_one(n: int) -> Local:
    return torch.arange(n).expand(3, n)


def at_once(n: int) -> Stretch:
    """The two marks before a video that is heard, or behind it, are in one place."""
    return torch.zeros(3, n, dtype=torch.long), min(n, 1)
