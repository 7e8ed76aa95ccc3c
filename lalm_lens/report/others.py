"""The tables without figures of their own: what each kind says of itself, for each model, attribute and prompt."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from lalm_lens.errors import DataError
from lalm_lens.report.curves import line
from lalm_lens.report.found import ASKED, PARTS, Found, Source, differences, hidden_in
from lalm_lens.study_results import HIDDEN
from lalm_lens.tables import Table

ONE = (*HIDDEN, "model", "attribute", "form", "settings")  # of units that differ in their clips alone
PARTS_OF_LAYERS = {"head": "heads", "heads": "heads", "units": "heads or neurons"}  # by columns
N_LINES = 6  # of a figure, that are not hidden: the largest


@dataclass(frozen=True)
class Other:
    """What a page shows of one experiment; `missing` says why there is no summary of some of its tables."""

    name: str
    kind: type[Table]
    rows: pd.DataFrame
    curves: list[dict]
    missing: list[str]


def others(found: Found) -> Iterator[Other]:
    """By experiment, in the order of the files."""
    by_name: dict[str, list[int]] = {}
    for n, source in enumerate(found.sources):
        if source.table not in PARTS:
            by_name.setdefault(name_of(source), []).append(n)
    hidden = hidden_in(found.sources)
    for name, mine in by_name.items():
        yield other(name, {n: found.sources[n] for n in mine}, found.sources, {n: hidden[n] for n in mine})


def name_of(source: Source) -> str:
    """The experiment, or the kind of table where no study wrote it."""
    named = source.told.get("experiment") or source.table.NAME.partition(" ")[2].removeprefix("table of ")
    return named.replace("_", " ")


def other(name: str, mine: dict[int, Source], sources: Sequence[Source], hidden: dict[int, str]) -> Other:
    settings = differences({n: its.told["settings"] for n, its in mine.items() if its.told}, sources)
    rows, curves, missing = [], [], []
    kind = next(iter(mine.values())).table
    for group in alike(mine):
        how = settings.get(group[0], "")
        for about, table in tables_of([mine[n] for n in group]):
            about = about | {"model": f"{about.get('model', '')}{hidden[group[0]]}"} | ({"how": how} if how else {})
            told = ", ".join(str(its) for its in about.values() if not pd.isna(its))
            try:
                overview, lines = table.overview(), table.lines()
            except DataError as error:
                missing.append(f"{told}: {error}")
                continue
            rows.append(overview.assign(**about)[[*about, *overview.columns.difference(list(about), sort=False)]])
            if len(lines):
                curves.append(figure(f"{name}: {told}", table, lines))
    return Other(name, kind, pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(), curves, missing)


def alike(mine: dict[int, Source]) -> list[list[int]]:
    """Files that are one table: the units of an experiment, or each by itself where no study wrote it."""
    groups: dict[str, list[int]] = {}
    for n, its in mine.items():
        one = (*ONE, *(() if its.table.BY_CLIP else ("clips",)))
        key = json.dumps({name: its.told[name] for name in one}) if its.told else str(its.path)
        groups.setdefault(key, []).append(n)
    return list(groups.values())


def tables_of(sources: Sequence[Source]) -> Iterator[tuple[dict[str, str], Table]]:
    """Of each model, attribute and prompt one. A clip that two studies have has the rows of the first."""
    kind, frames, seen = sources[0].table, [], set()
    for its in sources:
        frame = its.table.load(its.path).frame
        if "sample" in frame:
            frame = frame[~frame["sample"].isin(seen)]
            seen |= set(frame["sample"])
        frames.append(frame)
    frame = pd.concat(frames, ignore_index=True)
    by = [name for name in ASKED if name in frame]
    for key, rows in frame.groupby(by, sort=False, dropna=False) if by else [((), frame)]:
        yield dict(zip(by, key, strict=True)), kind(rows.reset_index(drop=True))


def figure(title: str, table: Table, lines: pd.DataFrame) -> dict:
    """Its lines by layer; of many, those that are nowhere large are hidden."""
    value = next(name for name in map(str, lines) if name not in ("line", "layer", "low", "high"))
    lines = lines.assign(**{end: float("nan") for end in ("low", "high") if end not in lines})
    largest = lines[value].abs().groupby(lines.line, sort=False).max().nlargest(N_LINES)
    several = [name for name in PARTS_OF_LAYERS if name in table.frame and table.frame[name].nunique() > 1]
    parts = [PARTS_OF_LAYERS[name] for name in several if lines.low.isna().all()]
    return {
        "title": title,
        **({"note": f"mean over its {parts[0]}"} if parts else {}),
        "n": int(table.frame["sample"].nunique()) if "sample" in table.frame else len(table.frame),
        "y": value.replace("_", " "),
        "marks": [0],
        "lines": [
            {"name": str(name), "hidden": name not in largest, **line(its, value)}
            for name, its in lines.groupby("line", sort=False)
        ],
    }
