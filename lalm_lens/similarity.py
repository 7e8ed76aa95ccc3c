"""How alike two sets of states are, row by row (cosine), as a whole (CKA) and in where they lie (modality gap).

Rows belong together: row i of both sets is of one item. The widths of the two sets may differ where nothing else is
said. Everything is computed in float64.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import permutation_test

from lalm_lens.draws import drawing
from lalm_lens.errors import InputError
from lalm_lens.shapes import typed

States = Float[np.ndarray, "item width"]
Others = Float[np.ndarray, "item other_width"]
Gram = Float[np.ndarray, "item item"]

AT_LEAST = 4  # items: the unbiased estimator divides by n - 3
ROUNDING = 1e-6


@typed
def cosine(x: Float[np.ndarray, "*batch width"], y: Float[np.ndarray, "*batch width"]) -> Float[np.ndarray, "*batch"]:
    """Along the last axis; NaN for a vector of zeros."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    with np.errstate(invalid="ignore"):
        return np.asarray((x * y).sum(-1) / norms)


@typed
def cosines(x: Float[np.ndarray, "item width"], y: Float[np.ndarray, "other width"]) -> Float[np.ndarray, "item other"]:
    """Of every row of the one with every row of the other; NaN for a row of zeros."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return x @ y.T / np.linalg.norm(x, axis=-1)[:, None] / np.linalg.norm(y, axis=-1)


@typed
def debiased_cka(x: Float[np.ndarray, "item width"], y: Float[np.ndarray, "item other_width"]) -> float:
    """Linear centred kernel alignment (arXiv 1905.00414) with the unbiased estimator of HSIC in all three places.

        HSIC(x, x)^-1/2 HSIC(x, y) HSIC(y, y)^-1/2

    The usual estimator says .98 about independent noise of 100 items and 4,096 dimensions; this one is 0 there in the
    mean, 1 for equal sets, and may be below 0. No rotation or common scale of either set changes it.

    Raises `InputError` for fewer than 4 items, for states that are not finite, and where a set has no shape
    (`has_shape`): nothing is then aligned with anything.
    """
    x, y = centred(x), centred(y)
    return hsic(x, y) / (of_itself(x) * of_itself(y)) ** 0.5


def centred(x: States) -> States:
    if len(x) < AT_LEAST:
        raise InputError(f"CKA is estimated from {AT_LEAST} items or more; got {len(x)}.")
    if not np.isfinite(x).all():
        raise InputError(
            f"{np.count_nonzero(~np.isfinite(x).all(1))} of {len(x)} items have states that are not finite."
        )
    if not varies(x):
        raise alike()
    x = np.asarray(x, dtype=np.float64)
    return x - x.mean(0)


@typed
def varies(x: Float[np.ndarray, "item width"]) -> bool:
    """Whether items differ by more than a millionth of their size, which is what rounding alone does in float32."""
    x = np.asarray(x, dtype=np.float64)
    return bool(((x - x.mean(0)) ** 2).sum() > ROUNDING**2 * (x**2).sum())


def hsic(x: States, y: Others) -> float:
    """n (n - 3) times the unbiased HSIC of centred sets: Song et al., JMLR 13 (2012), eq. 5, for K 1 = L 1 = 0.

        tr(K L) - n / (n - 2) sum_i K_ii L_ii + tr K tr L / ((n - 1)(n - 2))    with K = x x', L = y y'

    The first term is also |x' y|^2: the smaller of the two products is made.
    """
    n = len(x)
    k, l = (x**2).sum(1), (y**2).sum(1)  # noqa: E741  the diagonals
    shared = ((x.T @ y) ** 2).sum() if x.shape[1] * y.shape[1] < n * n else ((x @ x.T) * (y @ y.T)).sum()
    return float(shared - n / (n - 2) * (k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2)))


def of_itself(x: States) -> float:
    found = hsic(x, x)
    if not is_apart(x, found):
        raise alike()
    return found


def is_apart(x: States, of_x: float) -> bool:
    return bool(of_x > ROUNDING**2 * (x**2).sum() ** 2)


@typed
def has_shape(x: Float[np.ndarray, "item width"]) -> bool:
    """Whether CKA with these items is defined: not where all are the same or equally far from each other, nor where one
    alone differs from all others. Their unbiased HSIC with themselves, by which CKA divides, is then 0."""
    if not varies(x):
        return False
    around = centred(x)
    return is_apart(around, hsic(around, around))


def alike() -> InputError:
    return InputError(
        "All items are equally far from each other, or one alone differs, so that there is nothing to be aligned with."
    )


@dataclass(frozen=True)
class Tested:
    """A statistic beside what it is when items of the one set are paired with other items of the other."""

    value: float
    p: float  # share of pairings that are as large, the true one counted
    null_mean: float
    null_95: float  # 95 % of the pairings are at most this


@typed
def cka_test(
    x: Float[np.ndarray, "item width"],
    y: Float[np.ndarray, "item other_width"],
    *,
    n_permutations: int = 1000,
    seed: int = 0,
) -> Tested:
    """Debiased CKA, with pairings drawn anew as its null; all of them where there are no more than `n_permutations`.

    It works on item x item matrices, which are made once. Raises as `debiased_cka` does.
    """
    if n_permutations < 1:
        raise InputError(f"n_permutations is 1 or more; got {n_permutations}.")
    of_x, of_y = aligned_gram(x), aligned_gram(y)

    def statistic(items: np.ndarray, axis: int = -1) -> np.ndarray:
        drawn = np.atleast_2d(items)
        return np.array([(of_x[np.ix_(its, its)] * of_y).sum() for its in drawn]).reshape(items.shape[:-1])

    items = (np.arange(len(x)),)
    how = {"n_resamples": n_permutations, "batch": 100, "alternative": "greater", "rng": drawing(seed)}
    found = permutation_test(items, statistic, permutation_type="pairings", vectorized=True, **how)
    null = found.null_distribution
    return Tested(float(found.statistic), float(found.pvalue), float(null.mean()), float(np.quantile(null, 0.95)))


def aligned_gram(x: States) -> Gram:
    """A matrix of norm 1 whose elementwise product with another set's sums to their debiased CKA: x x' with a diagonal
    of zeros, and off the diagonal without what belongs to single items (Szekely and Rizzo, Ann. Stat. 42 (2014))."""
    x, n = centred(x), len(x)
    gram = x @ x.T
    np.fill_diagonal(gram, 0)
    rows = gram.sum(0) / (n - 2)
    gram = gram - rows[:, None] - rows + gram.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(gram, 0)
    return gram / of_itself(x) ** 0.5


@dataclass(frozen=True)
class Gap:
    """How far apart the means of two sets are, in units of the states, and of how far items are from their mean."""

    gap: float
    spread: float

    @property
    def relative(self) -> float:
        return self.gap / self.spread if self.spread else float("nan")


@typed
def modality_gap(x: Float[np.ndarray, "item width"], y: Float[np.ndarray, "other width"]) -> Gap:
    """|mean x - mean y| (arXiv 2203.02053, without its scaling of states to length 1), and the root mean square
    distance of items from the mean of their own set, both sets counted alike."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    variances = [((its - its.mean(0)) ** 2).sum(1).mean() for its in (x, y)]
    return Gap(float(np.linalg.norm(x.mean(0) - y.mean(0))), float(np.mean(variances) ** 0.5))
