"""Where a model resolves what it hears: critical layers, and whether early ones go with accuracy (arXiv 2506.05140).

    s[l]    = max(0, I[l] - (1 + alpha) / |Y|)                                                      (eq. 3)
    l*      = sum_l s[l] l / sum_l s[l], l = 1 ... L                                                (eq. 4)

with I the information scores of `information_score`.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import pearsonr

from lalm_lens.errors import DataError, InputError
from lalm_lens.shapes import typed


@typed
def critical_layer(
    scores: Float[np.ndarray, "*curve layer"], n_labels: int, *, alpha: float = 0.2, layer_base: int = 1
) -> Float[np.ndarray, "*curve"]:
    """The mean layer of information scores, each weighted by what it has above (1 + alpha) / n_labels (eq. 3, 4).

    The first layer is counted as `layer_base`. NaN where no layer has more than that.
    """
    if n_labels < 1:
        raise InputError(f"Information scores are of one label or more; got {n_labels}.")
    weights = np.maximum(0, scores - (1 + alpha) / n_labels)
    layers = np.arange(scores.shape[-1]) + layer_base
    total = weights.sum(-1)
    return np.divide((weights * layers).sum(-1), total, out=np.full(total.shape, np.nan), where=total > 0)


def mean_defined(layers: Float[np.ndarray, "*curve form"]) -> Float[np.ndarray, "*curve"]:
    """The mean without what is NaN, and NaN where all are."""
    is_defined = np.isfinite(layers)
    n = is_defined.sum(-1)
    return np.divide(np.where(is_defined, layers, 0).sum(-1), n, out=np.full(n.shape, np.nan), where=n > 0)


@typed
def resolution_correlation(points: pd.DataFrame, without: Sequence[str] = ()) -> pd.DataFrame:
    """Pearson's correlation of accuracy and critical layer over attributes and prompts, and its p (Table III).

    `points` have a row per attribute and form with `critical_layer` and `accuracy`, as `InformationScore.points` makes
    them. One row for all of them, and one without each attribute that is in `without`. Undefined critical layers are
    dropped: `n` points are left, and r and p are NaN below three, or where they do not vary.
    """
    names = points.attribute.unique()
    if unknown := [name for name in without if name not in names]:
        raise DataError(f"There are no points of {', '.join(unknown)}, only of {', '.join(names)}.")
    by = [name for name in ("model", "label_space", "norm", "knockout", "place") if name in points]
    groups = points.groupby(by, sort=False) if by else [((), points)]
    return pd.DataFrame(
        {**dict(zip(by, key, strict=True)), "without": left_out, **correlated(rows[rows.attribute != left_out])}
        for key, rows in groups
        for left_out in ("", *without)
    )


def correlated(points: pd.DataFrame) -> dict[str, int | float]:
    defined = points.dropna(subset=["critical_layer", "accuracy"])
    about = {"n": len(defined), "n_dropped": len(points) - len(defined)}
    if len(defined) < 3 or defined.critical_layer.nunique() < 2 or defined.accuracy.nunique() < 2:
        return {**about, "r": float("nan"), "p": float("nan")}
    r, p = np.asarray(pearsonr(defined.accuracy, defined.critical_layer)).tolist()
    return {**about, "r": r, "p": p}
