"""Which weights a model in memory has."""

from hashlib import sha256

import torch
from torch import nn

from lalm_lens.offload import own_weights
from lalm_lens.shapes import typed

N_NUMBERS = 64  # of each weight: all of a 7B model's are read in some hundredths of a second


@typed
def weights_fingerprint(model: nn.Module) -> str:
    """A hash of 64 numbers of every weight, evenly spread, with its name and shape.

    The numbers are rounded to bfloat16, so that a checkpoint has the same one whether it is opened in that or in
    float32, and wherever its weights lie. What differs in other numbers alone is not told apart.
    """
    digest = sha256()
    for name, module in model.named_modules():
        for leaf, weight in own_weights(module).items():
            some = weight.detach().flatten()[:: max(1, weight.numel() // N_NUMBERS)][:N_NUMBERS]
            digest.update(f"{name}.{leaf} {tuple(weight.shape)}".encode())
            digest.update(some.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
