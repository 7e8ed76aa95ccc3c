"""What a study has found, out of its many files: tidy tables, what was left out, and models side by side."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import ArrowInvalid, parquet

from lalm_lens.aggregates import interval
from lalm_lens.discovery import experiment_named
from lalm_lens.errors import DataError
from lalm_lens.runner import ENDING
from lalm_lens.shapes import typed
from lalm_lens.tables import Table
from lalm_lens.units import ABOUT

SHOWN = ["experiment", "model", "dataset", "attribute", "form", "dtype", "fingerprint", "n_heard", "lalm_lens"]
RAN = ["wall_s", "device", "device_map", "threads", "versions", "command"]
HIDDEN = ("dataset", "dtype", "fingerprint", "n_heard", "lalm_lens")  # what no table has a column for
EXCLUDED = ["model", "dataset", "attribute", "experiment", "sample", "reason"]


@dataclass(frozen=True, repr=False)
class Results:
    """The finished units of the studies in a folder. `units` has a row each: what it is of, its `settings`, `seed` and
    `clips`, how many they are, and its rows, how it ran (`wall_s`, `device`, `device_map`, `threads`, `versions`,
    `command`) and its `path`. `excluded` are the clips that were left out, and why: of all experiments where none is
    named. `n_unfinished` units are not there yet; `failures` says of some of them why the last run could not finish
    them. `failed` says what is left out altogether, and why: models by their paths, datasets with an attribute."""

    units: pd.DataFrame
    excluded: pd.DataFrame
    n_unfinished: int
    failed: Mapping[str, str]
    failures: Mapping[str, str]

    @property
    def experiments(self) -> list[str]:
        return list(self.units.experiment.unique())

    @property
    def machines(self) -> list[str]:
        """The kinds of devices and the versions of torch of the units: numbers of two differ in their last digits."""
        ran = zip(self.units.device, self.units.versions, strict=True)
        return list(dict.fromkeys(f"{device.partition(':')[0]}, torch {its['torch']}" for device, its in ran))

    def table(self, experiment: str, **chosen: Any) -> Table:
        """All rows of an experiment, as the table that it gives, in the study's order; `chosen` are columns of `units`
        or settings, as `dataset="clips"` or `corruption=Silence()`.

        Raises `DataError` if there are none, if the units differ in what no column of the table tells apart, or if a
        clip is in two of them.
        """
        kind = experiment_named(experiment).table
        rows = self.units[self.units.experiment == experiment]
        for name, value in chosen.items():
            rows = rows[told(rows, name) == (value if name in SHOWN else repr(value))]
        if not len(rows):
            wanted = "".join(f", {name} = {value!r}" for name, value in chosen.items())
            raise DataError(f"No finished unit is of {experiment}{wanted}; there are {', '.join(self.experiments)}.")
        with ThreadPoolExecutor() as pool:
            tables = list(pool.map(parquet.read_table, rows.path))
        frame = pa.concat_tables(tables, promote_options="permissive").to_pandas()
        refuse_mixed(rows, kind, frame)
        refuse_twice(rows)
        return kind.concat([frame])

    def __repr__(self) -> str:
        counts = self.units.groupby("experiment", sort=False).agg(n=("n_rows", "size"), rows=("n_rows", "sum"))
        parts = [f"{name}: {its.n} units, {its.rows} rows" for name, its in counts.iterrows()]
        parts += [f"computed on {' and '.join(kinds)}"] if len(kinds := self.machines) > 1 else []
        parts += [f"{self.n_unfinished} units unfinished"] if self.n_unfinished else []
        parts += [f"failed: {what}" for what in self.failures]
        parts += [f"{len(self.excluded)} clips left out"] if len(self.excluded) else []
        parts += [f"{what} left out" for what in self.failed]
        return f"Results({'; '.join(parts)})"


def told(rows: pd.DataFrame, name: str) -> pd.Series:
    """A column, or a setting. Raises `DataError` for neither."""
    if name in SHOWN:
        return rows[name]
    known = sorted({setting for settings in rows.settings for setting in settings})
    if name not in known:
        raise DataError(f"Units are chosen by {', '.join((*SHOWN[1:], *known))}, and not by {name}.")
    return pd.Series([settings.get(name) for settings in rows.settings], rows.index, dtype=object)


def refuse_mixed(units: pd.DataFrame, kind: type[Table], frame: pd.DataFrame) -> None:
    """Raise `DataError` for units that differ in a setting, unless a column tells it of every row: `metric`, or
    `knockout` of the setting `knockouts`, where the units have different ones."""
    settings = {name for each in units.settings for name in each} - set(kind.COLUMNS)
    for name in (*HIDDEN, *sorted(settings)):
        values, column = told(units, name).map(str), name.removesuffix("s")
        for _, alike in values.groupby([units.model, units.attribute]):
            if alike.nunique() > 1 and not (column in kind.COLUMNS and apart(frame[column], values, units.n_rows)):
                raise DataError(
                    f"These units are of more than one {name}, and no column of the table says which: "
                    f"{'; '.join(alike.unique())}. Choose one: {name}=..., or give models names."
                )


def refuse_twice(units: pd.DataFrame) -> None:
    """Raise `DataError` for a clip in two units that are the same but for the clips: its rows would count twice."""
    rows = units[[*SHOWN, "settings", "clips"]].explode("clips").astype(str)
    if len(twice := rows[rows.duplicated()]):
        raise DataError(
            f"{twice.clips.iloc[0]} is in more than one of these units ({twice.clips.nunique()} such clips), because "
            "studies of this folder divide their clips in other ways. Read one alone: load_results(folder, study=...)."
        )


def apart(column: pd.Series, values: pd.Series, n_rows: pd.Series) -> bool:
    """Whether units with different values of a setting have nothing in common in a column."""
    pairs = pd.DataFrame({"column": column.map(str).to_numpy(), "value": np.repeat(values.to_numpy(), n_rows)})
    return not pairs.drop_duplicates().column.duplicated().any()


@typed
def load_results(folder: str | Path, study: str | None = None) -> Results:
    """What `lalm-lens run` has finished in a folder, of all studies that have their list there, or of one, by the name
    of its file.

    Files of what a study no longer holds, because its clips or its settings have changed, are passed over. Raises
    `DataError` for a folder without a study, or without that one.
    """
    folder = Path(folder)
    known = {name.removesuffix(ENDING): its for name, its in lists_in(folder).items()}
    if not known:
        raise DataError(f"{folder} holds no study: give the folder that `lalm-lens run` wrote to.")
    if study is not None and study not in known:
        raise DataError(f"{folder} holds no study {study!r}, only {', '.join(known)}.")
    lists = [its for name, its in known.items() if study in (None, name)]
    names = units_of(lists)
    paths = [path for name in names if (path := folder / name).is_file()]
    with ThreadPoolExecutor() as pool:
        units = list(pool.map(about, paths))
    columns = [*SHOWN, "settings", "seed", "clips", "n_clips", "n_rows", *RAN, "path"]
    left_out = [each for its in lists for each in its["excluded"]] + [each for unit in units for each in refused(unit)]
    excluded = pd.DataFrame(left_out, columns=EXCLUDED).drop_duplicates(ignore_index=True)
    failed = {what: why for each in lists for what, why in each.get("failed", {}).items()}
    unfinished = set(names) - {path.name for path in paths}
    failures = {
        its["of"]: its["reason"]
        for each in lists
        for name, its in each.get("failures", {}).items()
        if name in unfinished
    }
    return Results(pd.DataFrame(units).reindex(columns=columns), excluded, len(unfinished), failed, failures)


def lists_in(folder: Path) -> dict[str, dict[str, Any]]:
    """What the studies of a folder say that they hold, by the files that say it."""
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"*{ENDING}"))}


def units_of(lists: Iterable[Mapping[str, Any]]) -> list[str]:
    """The files of the units of some studies, in their order."""
    return list(dict.fromkeys(name for each in lists for name in each["units"]))


def finished_in(folder: Path) -> list[Path]:
    """The files of the finished units that the studies of a folder hold."""
    return [path for name in units_of(lists_in(folder).values()) if (path := folder / name).is_file()]


def about(path: Path) -> dict[str, Any]:
    """The provenance of a unit's file."""
    try:
        metadata = parquet.read_metadata(path)
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file ({error}). Delete it, and run its study again.") from None
    told = json.loads((metadata.metadata or {}).get(ABOUT, b"{}"))
    if not told:
        raise DataError(f"{path} does not say what it is of: no study wrote it.")
    return {
        **told,
        "attribute": told["attribute"]["name"],
        "clips": [name for name, *_ in told["clips"]],
        "n_clips": len(told["clips"]),
        "n_rows": metadata.num_rows,
        "path": path,
    }


def refused(unit: dict[str, Any]) -> Iterator[dict[str, Any]]:
    of = {name: unit[name] for name in EXCLUDED[:-2]}
    yield from ({**of, "sample": name, "reason": why} for name, why in unit["excluded"].items())


@typed
def compare_models(
    frame: pd.DataFrame,
    value: str,
    *,
    by: Sequence[str] = ("attribute",),
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Each model of a table beside each other one on the clips that both have: one row per pair and group of `by`, with
    the means of `value` over clips (of whose rows the mean is taken first), and their `difference` with its 95 %
    bootstrap interval over clips. Of each clip only those prompts (`form`) count in which both were asked.

    `load_results("traced").table("causal_trace").kept`, say, with `value="recovery"` and `by=["attribute", "kind",
    "layer"]`. Raises `DataError` for columns that there are not and for a table of one model.
    """
    if unknown := [name for name in (value, *by, "model", "sample") if name not in frame]:
        raise DataError(f"The table has no column {unknown[0]!r}, only {', '.join(frame.columns)}.")
    clip = list(dict.fromkeys([*by, *(name for name in ("attribute", "sample") if name in frame)]))
    asked = list(dict.fromkeys([*clip, *(name for name in ("form",) if name in frame)]))
    means = frame.groupby([*asked, "model"], sort=False)[value].mean().unstack("model")
    if means.shape[1] < 2:
        raise DataError(f"Only {', '.join(means.columns)} is in the table: nothing to compare it with.")
    found = []
    for one, other in combinations(means.columns, 2):
        both_asked = means[[one, other]].dropna().astype(float).groupby(level=clip, sort=False).mean()
        for key, both in both_asked.groupby(level=list(by), sort=False):
            names = key if isinstance(key, tuple) else (key,)
            difference = (both[one] - both[other]).to_numpy()
            low, high = interval(difference, n_resamples, seed)
            numbers = {"mean": both[one].mean(), "other_mean": both[other].mean(), "difference": difference.mean()}
            row = {"model": one, "other": other, **dict(zip(by, names, strict=True)), "n": len(both), **numbers}
            found.append({**row, "low": low, "high": high})
    return pd.DataFrame(found)
