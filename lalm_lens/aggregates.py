"""Averages over samples: what stands in a row of a table or at a point of a curve."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped
from scipy.stats import DegenerateDataWarning, bootstrap

from lalm_lens.draws import drawing_again
from lalm_lens.errors import DataError

BY_SAMPLE = ["model", "attribute", "sample"]
SETTINGS = [
    "model",
    "attribute",
    "form",
    "question",
    "labels",
    "prefix",
    "label_space",
    "corruption",
    "seed",
    "transcript",
    "transcript_is",
    "voice_activity",
    "site",
    "metric",
    "predict",
    "direction",
    "kind",
]
ASKED = ("question", "labels", "prefix")  # each attribute has its own, and each form
ONE_RUN = list(dict.fromkeys([*BY_SAMPLE, *SETTINGS, "layer", "position", "head", "neurons", "start_s", "end_s"]))
AVERAGES = {
    "n": "int64",
    "mean": "float64",
    "low": "float64",
    "high": "float64",
    "macro_mean": "float64",
    "n_classes": "int64",
    "median": "float64",
    "ratio_of_means": "float64",
    "noise": "float64",  # the largest noise floor of the samples
}


def aggregate(
    frame: pd.DataFrame, by: Sequence[str], min_gap: float = 0.0, n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """One row per group of `by`. The rows of one sample in a group are averaged first, then the samples.

    `low`, `high`: 95 % percentile bootstrap over samples, NaN for one sample. `macro_mean`: mean over classes of their
    means. `ratio_of_means`: mean difference over mean gap. Samples with a gap below `min_gap` are left out, and rows
    that have nothing in a column of `by` (a `segment`, say). Raises `DataError` if other settings than `by` vary.
    """
    refuse_columns(frame, by)
    rows = frame.dropna(subset=[*by, "recovery"])
    refuse_mixed(rows, by)
    gap = rows.m_clean - rows.m_corrupted
    rows = rows.assign(gap=gap)[gap.abs() >= min_gap]
    one_sample = [*by, *(name for name in (*BY_SAMPLE, "label") if name not in by)]
    per_sample = (
        rows.groupby(one_sample)
        .agg(recovery=("recovery", "mean"), gap=("gap", "first"), noise=("noise", "max"))
        .reset_index()
    )
    records = [
        {**dict(zip(by, key, strict=True)), **averaged(group, n_resamples, seed)}
        for key, group in per_sample.groupby(list(by))
    ]
    types = {**{name: frame[name].dtype for name in by}, **AVERAGES}
    return pd.DataFrame(records, columns=list(types)).astype(types)


def refuse_columns(frame: pd.DataFrame, by: Sequence[str]) -> None:
    """Raise `DataError` for none, or some that the table has not."""
    unknown = [name for name in by if name not in frame]
    if unknown or not by:
        raise DataError(f"Rows are grouped by columns of the table, not by {unknown}: {', '.join(frame.columns)}.")


def averaged(group: pd.DataFrame, n_resamples: int, seed: int) -> dict[str, int | float]:
    classes = group.groupby(["attribute", "label"]).recovery.mean()
    low, high = interval(group.recovery.to_numpy(), n_resamples, seed)
    return {
        "n": len(group),
        "mean": group.recovery.mean(),
        "low": low,
        "high": high,
        "macro_mean": classes.mean(),
        "n_classes": len(classes),
        "median": group.recovery.median(),
        "noise": group.noise.max(),
        "ratio_of_means": (group.recovery * group.gap).mean() / group.gap.mean(),
    }


def interval(values: np.ndarray, n_resamples: int, seed: int) -> tuple[float, float]:
    """95 % of the means of samples drawn again. One value says nothing about how values vary: NaN."""
    rng = drawing_again(n_resamples, seed)
    if len(values) < 2:
        return float("nan"), float("nan")
    found = bootstrap((values,), np.mean, n_resamples=n_resamples, method="percentile", rng=rng)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def intervals(
    values: Shaped[np.ndarray, "sample *rest"],
    of: Callable[[Float[np.ndarray, "resample *rest"]], Float[np.ndarray, "resample *found"]],
    n_resamples: int,
    seed: int,
) -> tuple[Float[np.ndarray, "*found"], Float[np.ndarray, "*found"]]:
    """95 % of what is made `of` the means of samples drawn again, whole samples at a time. NaN for one sample, and
    where what is made of some of the means is not a number."""
    return intervals_of((values,), of, n_resamples, seed)


def intervals_of(
    groups: Sequence[Shaped[np.ndarray, "_ ..."]],
    of: Callable[..., Float[np.ndarray, "resample *found"]],
    n_resamples: int,
    seed: int,
) -> tuple[Float[np.ndarray, "*found"], Float[np.ndarray, "*found"]]:
    """The same of several groups of samples, each drawn again by itself: `of` takes the means of each."""
    rng = drawing_again(n_resamples, seed)
    if min(map(len, groups)) < 2:
        nothing = np.full(of(*(values[:1].astype(float) for values in groups)).shape[1:], np.nan)
        return nothing, nothing

    def statistic(*drawn: np.ndarray, axis: int) -> np.ndarray:
        return np.moveaxis(of(*map(means_of, groups, drawn)), 0, -1)

    clips = tuple(np.arange(len(values)) for values in groups)
    with warnings.catch_warnings(category=DegenerateDataWarning, action="ignore"):  # not a number, as told above
        found = bootstrap(clips, statistic, n_resamples=n_resamples, batch=100, method="percentile", rng=rng)
    return np.asarray(found.confidence_interval.low), np.asarray(found.confidence_interval.high)


def means_of(
    values: Shaped[np.ndarray, "sample *rest"], drawn: Int[np.ndarray, "*resample sample"]
) -> Float[np.ndarray, "..."]:
    """Means of the samples that were drawn, each counted as often as it was: one product of matrices."""
    times = np.apply_along_axis(np.bincount, -1, drawn, minlength=len(values))
    return np.tensordot(times, values.astype(float), axes=1) / drawn.shape[-1]


def corruption_kinds(frame: pd.DataFrame) -> pd.Series:
    """What the corrupted run heard, without which of the other clips it was."""
    return frame.corruption.str.replace(r"^other_clip .*", "other_clip", regex=True)


def refuse_mixed(frame: pd.DataFrame, by: Sequence[str]) -> None:
    """Raise `DataError` unless all settings that are not in `by` are the same: others have no common mean. Also if a
    patched run stands twice in the table."""
    settings = frame.assign(corruption=corruption_kinds(frame), site=frame.site.replace("embed", pd.NA))
    for name in SETTINGS:
        own = [each for each in ("attribute", "form") if each in by and name in ASKED]
        groups = settings.groupby(own) if own else [("all", settings)]
        for _, rows in groups:
            values = sorted(map(str, rows[name].dropna().unique()))
            if name not in by and len(values) > 1:
                raise DataError(
                    f"The table has more than one {name}: {'; '.join(values)}. Choose the rows of one, or group by it."
                )
    twice = frame[frame.duplicated(ONE_RUN)]
    if len(twice):
        raise DataError(f"{len(twice)} patched runs, as of {twice['sample'].iloc[0]}, are in the table twice.")
