"""Where a patch can matter at all, by the reach of attention alone.

With sliding windows what is heard travels a few positions a block, and so does what reaches the last position. A state
matters only if both have touched it; patching any other brings back exactly nothing, whatever the weights are.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from lalm_lens.shapes import typed


@typed
def light_cone(windows: Sequence[int | None], is_audio: Bool[Tensor, " pos"]) -> Bool[Tensor, "layer pos"]:
    """For each block's output and each position, whether audio can have changed it and the last position can see it.

    `windows` are those of `DecoderConfig`: how far a query of each block looks back, itself included; None for all.
    """
    touched, seen = is_audio, torch.zeros_like(is_audio)
    seen[-1] = True
    forward, backward = [], [seen]
    for window in windows:
        touched = (visible(window, len(is_audio)) & touched).any(1)
        forward.append(touched)
    for window in windows[:0:-1]:
        seen = (visible(window, len(is_audio)) & seen[:, None]).any(0)
        backward.append(seen)
    return torch.stack(forward) & torch.stack(backward[::-1])


def visible(window: int | None, n_pos: int) -> Bool[Tensor, "query_pos key_pos"]:
    back = torch.arange(n_pos)[:, None] - torch.arange(n_pos)
    return (back >= 0) & (back < (n_pos if window is None else window))
