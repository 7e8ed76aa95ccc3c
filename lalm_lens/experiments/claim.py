"""What a claim is: a measure takes means over clips, many resamples of them at once; its bound decides."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from lalm_lens.aggregates import intervals_of

Numbers = Float[np.ndarray, " resample"]
Curve = Float[np.ndarray, "resample layer"]
Measure = Callable[..., Numbers]
Relation = Literal["<", ">", ">="]
# What a measure reads: recovery of all text by layer; of single positions, by segment (`PLACES`) and layer; scores by
# form and layer, of one attribute or of four; by place and layer; with and without the audio; of the clips that end
# right, and wrong; accuracy by arm and factor; the same change of accuracy; recovery of all text of several models.
Reads = Literal[
    "text", "places", "scores", "attributes", "positions", "masked", "right", "wrong", "factors", "knockout", "models"
]
RELATIONS: dict[Relation, Callable[[float, float], bool]] = {"<": operator.lt, ">": operator.gt, ">=": operator.ge}
PLACES = ("early", "object", "late", "last")  # the segments of arXiv 2603.13768, section 3.3


@dataclass(frozen=True)
class Finding:
    """A number with its 95 % bootstrap interval over `n` clips; NaN where it is undefined."""

    measured: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Evidence:
    """Numbers of each clip; several groups of clips where several attributes or models are compared.

    `weights` [sample] are those of the clips in a mean, by default equal; `layer_base` numbers the first layer;
    `constant` is the best score of who gives all clips of the first group the same answer.
    """

    groups: tuple[Float[np.ndarray, "..."], ...]  # each [sample, ...]
    weights: tuple[Float[np.ndarray, "..."], ...] | None = None
    n_labels: tuple[int, ...] = ()
    constant: float = 0.0
    layer_base: int = 1
    alpha: float = 0.2
    factors: tuple[float, ...] = ()

    @property
    def n(self) -> int:
        return sum(map(len, self.groups))

    def chance(self, group: int = 0) -> float:
        return 1 / self.n_labels[group]

    def find(self, measure: Callable[..., Numbers], n_resamples: int = 1000, seed: int = 0) -> Finding:
        return self.find_all([measure], n_resamples, seed)[0]

    def find_all(self, measures: Sequence[Callable[..., Numbers]], n_resamples: int, seed: int) -> list[Finding]:
        """Several measures of the same resamples; NaN where a part of what they read is not there."""
        weights = self.weights or tuple(np.ones(len(group)) for group in self.groups)
        weighted = [
            np.column_stack([weight, (weight.reshape(-1, *[1] * (group.ndim - 1)) * group).reshape(len(group), -1)])
            for group, weight in zip(self.groups, weights, strict=True)
        ]

        def of(*means: Float[np.ndarray, "resample _"]) -> Float[np.ndarray, "resample measure"]:
            both = zip(means, self.groups, strict=True)
            groups = [(its[:, 1:] / its[:, :1]).reshape(-1, *group.shape[1:]) for its, group in both]
            found = np.stack([measure(self, *groups) for measure in measures], axis=-1)
            lacks = np.any([np.isnan(its).reshape(len(its), -1).any(1) for its in groups], axis=0)
            return np.where(lacks[:, None], np.nan, found)

        lows, highs = intervals_of(weighted, of, n_resamples, seed)
        found = of(*(its.mean(0, keepdims=True) for its in weighted))[0]
        numbers = np.stack([found, lows, highs], axis=-1).tolist()
        return [Finding(measured, low, high, self.n) for measured, low, high in numbers]


@dataclass(frozen=True)
class Claim:
    """What is claimed in the paper's sense, where, and when it holds: if `measure` is on the right side of `bound`."""

    words: str
    source: str
    reads: Reads
    measure: Measure
    relation: Relation
    bound: float
    counts_layers: bool  # whether it depends on the number of the first layer

    @property
    def name(self) -> str:
        return self.measure.__name__

    @property
    def condition(self) -> str:
        return f"{self.relation} {self.bound:g}"

    def holds(self, measured: float) -> bool:
        return RELATIONS[self.relation](measured, self.bound)


@dataclass(frozen=True)
class Quantity:
    """A number that a paper prints."""

    reads: Reads
    measure: Measure

    @property
    def name(self) -> str:
        return self.measure.__name__
