"""The tables of a folder that a report can show, recognised by their columns."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow.parquet
from pyarrow import ArrowInvalid

from lalm_lens.aggregates import ONE_RUN, SETTINGS, corruption_kinds
from lalm_lens.errors import DataError
from lalm_lens.experiments.information_score import InformationScore
from lalm_lens.experiments.logit_lens import LogitLens
from lalm_lens.results import CausalTrace
from lalm_lens.runner import ENDING
from lalm_lens.study_results import finished_in
from lalm_lens.tables import Table

KNOWN: tuple[type[Table], ...] = CausalTrace, InformationScore, LogitLens
ASKED = ["model", "attribute", "form"]
OF_STUDY = [name for name in SETTINGS if name not in ("kind", "site", "corruption")]


@dataclass(frozen=True)
class Study:
    """The rows of one model, one question and one way to trace it; `rows` is empty where only a lens was read."""

    model: str
    attribute: str
    form: str
    rows: pd.DataFrame

    @property
    def asked(self) -> tuple[str, str, str]:
        return self.model, self.attribute, self.form

    @property
    def heard(self) -> str:
        """What the corrupted run hears, in a word or two; nothing where there is none."""
        return "".join(self.rows.corruption[:1]).partition(" ")[0].replace("_", " ")

    @property
    def whole(self) -> pd.DataFrame:
        """The rows of whole states: those of a head, or of some neurons, are left out."""
        return self.rows[self.rows["head"].isna() & self.rows.neurons.isna()]


@dataclass(frozen=True)
class Found:
    """What a folder holds, each kind of table in one frame without repeated rows; a kind may be missing."""

    trace: pd.DataFrame
    scores: pd.DataFrame
    lens: pd.DataFrame
    paths: tuple[Path, ...]

    def studies(self) -> Iterator[Study]:
        """Traces that differ in a setting apart, then what was only read by a lens."""
        kinds = corruption_kinds(self.trace) if len(self.trace) else None
        by = [*OF_STUDY, "of_site", kinds]
        for _, rows in self.trace.groupby(by, sort=False, dropna=False) if len(self.trace) else ():
            first = rows.iloc[0]
            yield Study(first.model, first.attribute, first.form, rows)
        traced = set(self.trace[ASKED].itertuples(index=False, name=None))
        for model, attribute, form in self.lens[ASKED].drop_duplicates().itertuples(index=False, name=None):
            if (model, attribute, form) not in traced:
                yield Study(model, attribute, form, self.trace.iloc[:0])


def find(folder: Path) -> Found:
    """The tables in a folder and in those inside it. Raises `DataError` if there is none, for a broken file, and for
    two that disagree on one patched run."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Give the one that `lalm-lens trace --out` wrote to.")
    frames: dict[type[Table], list[pd.DataFrame]] = {table: [] for table in KNOWN}
    paths = []
    for path in tables_in(folder):
        for table in KNOWN:
            if set(table.COLUMNS) <= columns(path):
                frames[table].append(table.load(path).frame)
                paths.append(path)
    if not paths:
        names = ", ".join(table.NAME for table in KNOWN)
        raise DataError(f"{folder} holds no table that can be shown ({names}): save one as Parquet, or run a trace.")
    frames[CausalTrace] = [with_site(frame) for frame in frames[CausalTrace]]
    trace, scores, lens = (joined(table, its) for table, its in frames.items())
    if len(twice := trace[trace.duplicated([*ONE_RUN, "of_site"])]):
        raise DataError(
            f"Tables in {folder} disagree on {len(twice)} patched runs, as of {twice['sample'].iloc[0]}. Report on "
            "each in a folder of its own."
        )
    return Found(trace, scores, lens, tuple(paths))


def tables_in(folder: Path) -> Iterator[Path]:
    """The Parquet files in a folder and in those inside it; where a study has its list, those alone that it holds."""
    for its in sorted({path.parent for path in folder.rglob("*.parquet")}):
        yield from finished_in(its) if any(its.glob(f"*{ENDING}")) else sorted(its.glob("*.parquet"))


def columns(path: Path) -> set[str]:
    try:
        return set(pyarrow.parquet.read_schema(path).names)
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file ({error}).") from None


def with_site(trace: pd.DataFrame) -> pd.DataFrame:
    """With the site whose map a row belongs to, `of_site`: the embedding's rows to that of the residual stream."""
    others = trace.site[trace.site != "embed"]
    streams = [*others[others.str.startswith("resid")], "embed"]
    return trace.assign(of_site=trace.site.replace("embed", streams[0]))


def joined(table: type[Table], frames: list[pd.DataFrame]) -> pd.DataFrame:
    """In one frame, rows that two files have once."""
    if not frames:
        return pd.DataFrame(columns=list(table.COLUMNS)).astype(table.COLUMNS)
    return pd.concat(frames, ignore_index=True).drop_duplicates(ignore_index=True)
