"""The words for axes, and `typed`, which checks them on public functions.

batch             prompts in one forward              clip       recordings in one forward
pos               positions of the merged sequence    audio_pos  positions that hold audio (40 ms each in Qwen2-Audio)
query_pos key_pos the two axes of an attention map    layer      0-based index of a block
head kv_head      attention heads, key-value heads    d_head d_model d_mlp d_vocab   widths
samples           16 kHz audio samples                frames mel 10 ms mel frames, mel bins
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from beartype import beartype
from jaxtyping import jaxtyped
from torch import Tensor

F = TypeVar("F", bound=Callable)


def typed(function: F) -> F:
    """Check the shapes of a public function at each call (about 20 us). Inner code is checked in tests only."""
    return jaxtyped(typechecker=beartype)(function)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it was: what norms, rotations and softmaxes are computed in."""
    return x.to(widened(x.dtype))


def widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
