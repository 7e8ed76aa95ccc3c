"""Shares of clips, and what is said of them: intervals, and tests of the same clips before and after."""

from dataclasses import dataclass
from math import asin, sqrt

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
