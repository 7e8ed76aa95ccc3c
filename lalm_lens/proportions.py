"""Shares of clips, and what is said of them: intervals, and tests of the same clips before and after."""

from dataclasses import dataclass
from math import asin, sqrt

import numpy as np
from jaxtyping import Bool
from scipy.stats import binomtest, chi2

from lalm_lens.errors import DataError


def wilson(n_hits: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share, NaN of nothing."""
    if not n:
        return float("nan"), float("nan")
    interval = binomtest(n_hits, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def share(name: str, n_hits: int, n: int) -> dict[str, float]:
    """A share and its interval as columns `name`, `name_low` and `name_high`. NaN of nothing."""
    low, high = wilson(n_hits, n)
    return {name: n_hits / n if n else float("nan"), f"{name}_low": low, f"{name}_high": high}


def cohens_h(before: float, after: float) -> float:
    """How far two shares are apart: 2 asin sqrt(after) - 2 asin sqrt(before). 0.2 is small, 0.5 medium, 0.8 large."""
    if not (0 <= before <= 1 and 0 <= after <= 1):
        raise DataError(f"Cohen's h is of two shares between 0 and 1; got {before} and {after}.")
    return 2 * asin(sqrt(after)) - 2 * asin(sqrt(before))


def change_interval(hits: Bool[np.ndarray, "clip 2"], clear: Bool[np.ndarray, "clip 2"]) -> tuple[float, float]:
    """The 95 % interval of a share after minus that before, each of the clips that are clear on its side; NaN where
    none is on one of them.

    Newcombe's, which squares and adds two Wilson intervals: of pairs (Stat. Med. 17, 2635 (1998), with phi as it is),
    of shares without a common clip (Stat. Med. 17, 873 (1998), method 10), and with the correlation of the two shares,
    phi n_both / sqrt(n_before n_after), of all that is between. It has a width with few clips, and where a share is 0
    or 1.
    """
    n, n_hits, both = clear.sum(0), (hits & clear).sum(0), clear.all(1)
    if not n.all():
        return float("nan"), float("nan")
    p, q = n_hits / n
    (p_low, p_high), (q_low, q_high) = (wilson(int(its), int(of)) for its, of in zip(n_hits, n, strict=True))
    shared = correlation(*hits[both].T) * both.sum() / sqrt(n.prod())

    def reach(one: float, other: float) -> float:
        return sqrt(max(0, one**2 - 2 * shared * one * other + other**2))

    return float(q - p - reach(q - q_low, p_high - p)), float(q - p + reach(q_high - q, p - p_low))


def correlation(before: Bool[np.ndarray, " clip"], after: Bool[np.ndarray, " clip"]) -> float:
    """Phi, and 0 where one of the two is the same for all clips."""
    is_varied = all(its.any() and not its.all() for its in (before, after))
    return float(np.corrcoef(before, after)[0, 1]) if is_varied else 0.0


@dataclass(frozen=True)
class McNemar:
    """Whether the same clips were hits more often before or after (McNemar 1947): `lost` were hits before alone, `won`
    after alone. `exact` is the two-sided p of the binomial test, 1 where nothing changed; `statistic` and `p` are those
    of chi squared with continuity correction, NaN where nothing changed."""

    lost: int
    won: int

    @property
    def n(self) -> int:
        """Clips that changed: the others say nothing."""
        return self.lost + self.won

    @property
    def exact(self) -> float:
        return float(binomtest(self.lost, self.n).pvalue) if self.n else 1.0

    @property
    def statistic(self) -> float:
        return max(0, abs(self.lost - self.won) - 1) ** 2 / self.n if self.n else float("nan")

    @property
    def p(self) -> float:
        return float(chi2.sf(self.statistic, 1)) if self.n else float("nan")
