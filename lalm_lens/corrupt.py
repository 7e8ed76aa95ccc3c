"""What a corrupted run hears in place of the clip."""

import torch

from lalm_lens.audio import Waveform
from lalm_lens.shapes import typed


@typed
def silence(waveform: Waveform) -> Waveform:
    """A zero waveform of the same length: as many audio tokens, no sound (arXiv 2603.13768, section 3.1)."""
    return torch.zeros_like(waveform)
