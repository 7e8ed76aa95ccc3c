"""The tables of a folder, each recognised by what a study says of it or by its columns."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet
from pyarrow import ArrowInvalid

from lalm_lens.aggregates import ONE_RUN, SETTINGS, corruption_kinds
from lalm_lens.attributes import Attribute
from lalm_lens.discovery import experiments
from lalm_lens.errors import DataError
from lalm_lens.experiments.information_score import InformationScore
from lalm_lens.experiments.logit_lens import LogitLens
from lalm_lens.results import CausalTrace
from lalm_lens.runner import ENDING
from lalm_lens.study_results import HIDDEN, finished_in
from lalm_lens.tables import Table
from lalm_lens.units import ABOUT

PARTS: tuple[type[Table], ...] = CausalTrace, InformationScore, LogitLens  # that have figures of their own on a page
ASKED = ["model", "attribute", "form"]
ONE_SCORE = [*ASKED, "sample", "label_space", "norm", "knockout", "place", "layer"]
OF_STUDY = [name for name in SETTINGS if name not in ("kind", "site", "corruption")]
TOLD = ["of_site", *(name for name in OF_STUDY if name not in ASKED)]
USUAL = {"site": "resid post", "metric": "probability", "direction": "denoising"}  # what a trace has if nobody asks


@dataclass(frozen=True)
class Study:
    """The rows of one model, one question and one way to trace it; `rows` is empty where only a lens was read. `how`
    says what no column does of a trace that shares runs with others, and `told` are the settings to tell of it: those
    that are not usual, or not as in others."""

    model: str
    attribute: str
    form: str
    rows: pd.DataFrame
    how: str = ""
    told: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What is asked of which model, and how where that is told."""
        ways = (its if name in USUAL else f"{name} {its}" for name, its in self.told.items())
        return f"{self.model}: {', '.join(filter(None, (self.attribute, self.form, *ways, self.how)))}"

    @property
    def asked(self) -> tuple[str, str, str]:
        return self.model, self.attribute, self.form

    @property
    def heard(self) -> str:
        """What the corrupted run hears, in a word or two, of noise its level; nothing where there is none."""
        kind, _, which = "".join(self.rows.corruption[:1]).partition(" ")
        return ", ".join((kind.replace("_", " "), *([which] if kind == "white_noise" else [])))

    @property
    def settings(self) -> dict[str, str]:
        """Of its trace, in words by their columns; those of the question are the same in all of one attribute."""
        first = self.rows.iloc[0]
        return {name.removeprefix("of_").replace("_", " "): in_words(first[name]) for name in TOLD}

    @property
    def whole(self) -> pd.DataFrame:
        """The rows of whole states: those of a head, or of some neurons, are left out."""
        return self.rows[self.rows["head"].isna() & self.rows.neurons.isna()]


@dataclass(frozen=True)
class Source:
    """A file of a table, and what it says itself to be of, which is nothing where no study wrote it."""

    path: Path
    table: type[Table]
    told: Mapping[str, Any]

    @property
    def asked(self) -> tuple[str, str] | None:
        return (self.told["model"], self.told["attribute"]["name"]) if self.told else None

    @property
    def hidden(self) -> dict[str, Any]:
        return {**{name: self.told[name] for name in HIDDEN}, "fingerprint": self.told["fingerprint"][:8]}

    @property
    def settings(self) -> dict[str, str]:
        return {name: its for name, its in self.told["settings"].items() if name not in self.table.COLUMNS}

    @property
    def attribute(self) -> Attribute:
        told = self.told["attribute"]
        return Attribute(**{**told, "labels": tuple(told["labels"])})

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of the clips that were heard, in either run."""
        return {name: digest for name, digest, *_ in (*self.told["clips"], *self.told.get("others", ()))}


@dataclass(frozen=True)
class Found:
    """What a folder holds: traces, scores and lenses in one frame each without repeated rows, which may be empty, and
    the files of all tables. `repeated` says what runs were computed twice, in other batches."""

    trace: pd.DataFrame
    scores: pd.DataFrame
    lens: pd.DataFrame
    sources: tuple[Source, ...]
    repeated: str = ""

    def studies(self) -> list[Study]:
        """Traces that differ in a setting apart, and what was only read by a lens, in the order of the files."""
        kinds = corruption_kinds(self.trace) if len(self.trace) else None
        by = [*OF_STUDY, "of_site", "how", kinds]
        found = []
        for _, rows in self.trace.groupby(by, sort=False, dropna=False) if len(self.trace) else ():
            first = rows.iloc[0]
            found.append(Study(first.model, first.attribute, first.form, rows, first.how))
        traced = set(self.trace[ASKED].itertuples(index=False, name=None))
        for _, first in self.lens.drop_duplicates(ASKED).iterrows():
            if tuple(first[ASKED]) not in traced:
                found.append(Study(first.model, first.attribute, first.form, self.trace.iloc[:0]))
        models, attributes = ([getattr(its, name) for its in found] for name in ("model", "attribute"))
        found = sorted(found, key=lambda its: (models.index(its.model), attributes.index(its.attribute), its.form))
        return [*with_settings(found)]


def with_settings(studies: Sequence[Study]) -> Iterator[Study]:
    """Each says what is not usual, or differs on the page, and what else differs where the same is asked and heard."""
    settings = {n: its.settings for n, its in enumerate(studies) if len(its.rows)}
    same = [(its.asked, its.heard) for its in studies]
    for n, study in enumerate(studies):
        told = {}
        for name, mine in settings.get(n, {}).items():
            others = {its[name] for at, its in settings.items() if name in USUAL or same[at] == same[n]}
            if others != {USUAL.get(name, mine)}:
                told[name] = mine
        yield replace(study, told=told)


def in_words(value: Any) -> str:
    said = "none" if pd.isna(value) else str(value)
    return {"denoise": "denoising", "noise": "noising"}.get(said, said).replace("_", " ")


def find(folder: Path) -> Found:
    """The tables in a folder and in those inside it. A model is named with what differs between the tables of a study
    and no column tells, as the dataset or the dtype. Raises `DataError` if there is none, for a broken file, and for
    two that disagree on one patched run."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Give the one that `lalm-lens trace --out` wrote to.")
    sources = [its for path in tables_in(folder) if (its := source_of(path)) is not None]
    if not sources:
        raise DataError(f"{folder} holds no table: save one as Parquet, or run a trace or a study.")
    hidden = hidden_in(sources)
    frames: dict[type[Table], list[pd.DataFrame]] = {table: [] for table in PARTS}
    for n, its in enumerate(sources):
        if its.table in frames:
            frame = its.table.load(its.path).frame
            frames[its.table].append(frame.assign(model=frame.model + hidden[n], source=n, how=""))
    frames[CausalTrace] = [with_site(frame) for frame in frames[CausalTrace]]
    trace = told_apart(joined(CausalTrace, frames[CausalTrace]), [*ONE_RUN, "of_site"], sources)
    scores = told_apart(joined(InformationScore, frames[InformationScore]), ONE_SCORE, sources)
    lens = once(joined(LogitLens, frames[LogitLens]))
    trace, of_trace = first_of_each(trace, [*ONE_RUN, "of_site", "how"], "recovery", sources, folder)
    scores, of_scores = first_of_each(scores, [*ONE_SCORE, "how"], "probability", sources, folder)
    return Found(trace, scores, lens, tuple(sources), "; ".join(filter(None, (of_trace, of_scores))))


def tables_in(folder: Path) -> Iterator[Path]:
    """The Parquet files in a folder and in those inside it; where a study has its list, those alone that it holds."""
    for its in sorted({path.parent for path in folder.rglob("*.parquet")}):
        yield from finished_in(its) if any(its.glob(f"*{ENDING}")) else sorted(its.glob("*.parquet"))


def source_of(path: Path) -> Source | None:
    """None for what is no table of this package."""
    try:
        schema = pyarrow.parquet.read_schema(path)
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file ({error}).") from None
    told, known = json.loads((schema.metadata or {}).get(ABOUT, b"{}")), experiments()
    if told.get("experiment") in known:
        return Source(path, known[told["experiment"]].table, told)
    like = [kind for kind in kinds() if set(kind.COLUMNS) <= set(schema.names)]
    return Source(path, max(like, key=lambda kind: len(kind.COLUMNS)), told) if like else None


def kinds() -> list[type[Table]]:
    """All kinds of tables, those of no experiment of a study too."""
    experiments()  # imports them
    return [kind for kind in below(Table) if hasattr(kind, "COLUMNS")]


def below(kind: type[Table]) -> Iterator[type[Table]]:
    for each in kind.__subclasses__():
        yield each
        yield from below(each)


def hidden_in(sources: Sequence[Source]) -> list[str]:
    """What of files of a study is not the same in all about a model and attribute and no column tells, as it stands
    behind the model."""
    said = differences({n: its.hidden for n, its in enumerate(sources) if its.told}, sources)
    return [f" ({said[n]})" if said.get(n) else "" for n in range(len(sources))]


def differences(told: Mapping[int, Mapping[str, Any]], sources: Sequence[Source]) -> dict[int, str]:
    """What of files about one model and attribute is not the same in all of them, in words."""
    said = {}
    for asked in {sources[n].asked for n in told}:
        alike = pd.DataFrame({n: its for n, its in told.items() if sources[n].asked == asked}).map(str)
        other = alike[alike.nunique(axis=1) > 1]
        said |= {n: ", ".join(f"{name} {plain(its)}" for name, its in other[n].items()) for n in other if len(other)}
    return said


def plain(said: str) -> str:
    """A setting as one would say it: several without brackets and quotation marks."""
    return said.strip("()[]").rstrip(",").replace("'", "") if said[:1] in ("(", "[", "'") else said


def told_apart(rows: pd.DataFrame, one: Sequence[str], sources: Sequence[Source]) -> pd.DataFrame:
    """Without repeated rows. Where units of a study have the same run, `how` says which of their settings differ and no
    column tells: what ran beside it may change its last digits."""
    twice = rows[rows.duplicated(one, keep=False)]
    same = [(sources[n].asked, sources[n].told["settings"]) for n in twice.source.unique() if sources[n].told]
    units = {n: sources[n] for n in rows.source.unique().tolist() if sources[n].told}
    settings = {n: its.settings for n, its in units.items() if (its.asked, its.told["settings"]) in same}
    said = differences(settings, sources)
    how = [said.get(n, "") for n in rows.source.tolist()]
    return once(rows.assign(how=pd.Series(how, rows.index, dtype="str")))


def once(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that two files have, once."""
    return rows[~rows.drop(columns="source").duplicated()].reset_index(drop=True)


def first_of_each(
    rows: pd.DataFrame, one: Sequence[str], value: str, sources: Sequence[Source], folder: Path
) -> tuple[pd.DataFrame, str]:
    """One row of each run, and in words by how much others differ: two studies that have the same settings differ in
    the batches alone, and so in the last digits. Raises `DataError` for tables that are of no study, and disagree."""
    twice = rows[rows.duplicated(one)]
    if not len(twice):
        return rows, ""
    if not all(sources[n].told for n in rows[rows.duplicated(one, keep=False)].source.unique()):
        raise DataError(
            f"Tables in {folder} disagree on {len(twice)} patched runs, as of {twice['sample'].iloc[0]}. Report on "
            "each in a folder of its own."
        )
    values = rows.groupby(list(one), sort=False, dropna=False)[value]
    spread = (values.max() - values.min()).max()
    return rows.drop_duplicates(one, ignore_index=True), f"{len(twice)} rows ({value} differs by {spread:.0e} at most)"


def with_site(trace: pd.DataFrame) -> pd.DataFrame:
    """With the site whose map a row belongs to, `of_site`: the embedding's rows to that of the residual stream."""
    others = trace.site[trace.site != "embed"]
    streams = [*others[others.str.startswith("resid")], "embed"]
    return trace.assign(of_site=trace.site.replace("embed", streams[0]))


def joined(table: type[Table], frames: list[pd.DataFrame]) -> pd.DataFrame:
    """In one frame, which may be empty."""
    if not frames:
        types = {**table.COLUMNS, "of_site": "str", "source": "int64", "how": "str"}
        return pd.DataFrame(columns=list(types)).astype(types)
    return pd.concat(frames, ignore_index=True)
