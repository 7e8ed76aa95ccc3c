"""Correlations of many resamples at once, one in a row."""

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata, t

Numbers = Float[np.ndarray, " resample"]


def correlation(a: Float[np.ndarray, "resample point"], b: Float[np.ndarray, "resample point"]) -> Numbers:
    """Pearson's, row by row, of the points that are defined in both; NaN below three, or where they do not vary."""
    defined = np.isfinite(a) & np.isfinite(b)
    n = defined.sum(1)
    if not n.max(initial=0):
        return np.full(len(a), np.nan)
    a, b = (np.where(defined, its, 0) for its in (a, b))
    a, b = (np.where(defined, its - (its.sum(1) / np.maximum(n, 1))[:, None], 0) for its in (a, b))
    spread = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    is_there = (n > 2) & (spread > 1e-12)
    return np.divide((a * b).sum(1), spread, out=np.full(len(a), np.nan), where=is_there)


def p_of(r: Numbers, n: Int[np.ndarray, " resample"] | int) -> Numbers:
    """Two-sided p of a correlation of `n` points."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 2 * t.sf(abs(r) * np.sqrt((n - 2) / (1 - r**2)), n - 2)


def rank_correlation(curves: Float[np.ndarray, "resample *rest layer"]) -> Float[np.ndarray, "resample *rest"]:
    """Spearman's correlation with the number of the layer."""
    ranks = rankdata(curves, axis=-1)
    layers = np.broadcast_to(np.arange(1.0, curves.shape[-1] + 1), ranks.shape)
    flat = (its.reshape(-1, curves.shape[-1]) for its in (ranks, layers))
    return correlation(*flat).reshape(curves.shape[:-1])
