"""What is drawn by chance, and from what seed."""

from collections.abc import Sequence

import numpy as np

from lalm_lens.errors import InputError


def refuse_seed(seed: int) -> None:
    """Raise `InputError` for one that NumPy does not take."""
    if seed < 0:
        raise InputError(f"A seed is a whole number, 0 or more; got {seed}.")


def drawing(seed: int | Sequence[int]) -> np.random.Generator:
    """NumPy's generator; raises `InputError` for a seed below 0."""
    refuse_seed(seed if isinstance(seed, int) else min(seed))
    return np.random.default_rng(seed)


def drawing_again(n_resamples: int, seed: int) -> np.random.Generator:
    """That of a bootstrap; raises `InputError` for one that draws nothing."""
    if n_resamples < 1:
        raise InputError(f"n_resamples is how often samples are drawn again, 1 or more; got {n_resamples}.")
    return drawing(seed)
