"""What a clip's answer is before and after something is changed in its run: one way for all experiments that ask it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lalm_lens.aggregates import interval, refuse_columns
from lalm_lens.datasets import Sample
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import Engine, Outcome, Plan
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question, Told
from lalm_lens.interventions import Change, Recompute
from lalm_lens.metrics import Predict
from lalm_lens.results import QUESTION_COLUMNS
from lalm_lens.runs import Run
from lalm_lens.shapes import typed
from lalm_lens.tables import Table

T = TypeVar("T", bound="Changed")
Effect = Literal["probability", "relative_probability", "logit_difference", "label_probability", "accuracy"]
N_SHOWN = 5  # of an overview
NUMBERS = {name: name for name in ("logit_difference", "right", "answer")}
NUMBERS |= {"probability": "p", "label_probability": "label_p"}  # columns, before and after
COLUMN = {
    "probability": "p",
    "relative_probability": "p",
    "logit_difference": "logit_difference",
    "label_probability": "label_p",
    "accuracy": "right",
}
ANSWER_COLUMNS = {
    **{f"p_{when}": "float64" for when in ("before", "after")},  # of the true label's first token
    **{f"logit_difference_{when}": "float64" for when in ("before", "after")},  # to the label that was second
    **{f"label_p_{when}": "float64" for when in ("before", "after")},  # of the true label, among the labels
    **{f"right_{when}": "bool" for when in ("before", "after")},
    **{f"answer_{when}": "str" for when in ("before", "after")},  # the largest logit among the labels
    "noise": "float64",  # the change of p in a run in which nothing is changed: what rounding alone does
    "engine": "str",  # sweep, or hooks
}


@dataclass(frozen=True)
class Variant:
    """A clip's run with some changes, and what a table says of them."""

    columns: dict[str, Any]
    changes: tuple[Change, ...]


Variants = Callable[[Sample, Run], Sequence[Variant]]


@dataclass(frozen=True)
class How:
    """How variants are run: `engine` and `token_budget` are those of `Plan`, and `n_together` clips share a sweep."""

    predict: Predict = "labels"
    engine: Engine = "auto"
    token_budget: int | None = None
    n_together: int = 8
    progress: bool = True

    def __post_init__(self) -> None:
        if self.n_together < 1:
            raise InputError(f"n_together is a number of clips, 1 or more; got {self.n_together}.")


def answers(
    question: Question, samples: Sequence[Sample], variants: Variants, how: How, doing: str
) -> Iterator[pd.DataFrame]:
    """One table for each clip, one row per variant. The progress bar says what the variants of its clips cost."""
    told = {"desc": f"{doing}, {question.attribute.name}", "unit": "clip", "disable": not how.progress}
    with tqdm(total=len(samples), **told) as bar:
        for start in range(0, len(samples), how.n_together):
            together = samples[start : start + how.n_together]
            runs = [question.run(sample) for sample in together]
            its = [variants(sample, run) for sample, run in zip(together, runs, strict=True)]
            if not all(its):
                raise InputError("Nothing is changed: give one layer, factor or gain, or more, of what varies.")
            outcome = run_all(question, runs, its, how, bar)
            yield from frames_of(question, together, its, outcome, how.predict)
            bar.update(len(together))


def run_all(
    question: Question, runs: Sequence[Run], variants: Sequence[Sequence[Variant]], how: How, bar: tqdm
) -> Outcome:
    """Every variant of every run, and behind those of each run one in which nothing is changed and all is computed
    again."""
    branches = []
    for run, its in zip(runs, variants, strict=True):
        branches += [Branch(run, each.changes) for each in its]
        again = (run.indices("audio")[-1] + 1,) if run.has("audio") else (-1,)
        branches.append(Branch(run, (Recompute("resid_pre", 0, again),)))
    readout = Told.readout(question.tokens)
    plan = Plan(question.model, branches, readout, engine=how.engine, token_budget=how.token_budget)
    bar.set_postfix_str(str(plan.cost()))
    return plan.run(how.progress)


def frames_of(
    question: Question,
    samples: Sequence[Sample],
    variants: Sequence[Sequence[Variant]],
    outcome: Outcome,
    predict: Predict,
) -> Iterator[pd.DataFrame]:
    start = 0
    for sample, its in zip(samples, variants, strict=True):
        mine = slice(start, start + len(its) + 1)
        start = mine.stop
        yield frame_of(question, sample, its, outcome.values[mine], outcome.base[mine], predict).assign(
            predict=predict, engine=outcome.engine
        )


def frame_of(
    question: Question,
    sample: Sample,
    variants: Sequence[Variant],
    values: Float[Tensor, "branch at twice"],
    base: Float[Tensor, "branch at twice"],
    predict: Predict,
) -> pd.DataFrame:
    answer = Told.of(base).answer(question.labels.index(sample.label))
    told = {when: Told.of(its).numbers(answer, predict) for when, its in (("before", base), ("after", values))}
    columns = {f"{NUMBERS[name]}_{when}": its[:-1].tolist() for when in told for name, its in told[when].items()}
    for when in told:
        columns[f"answer_{when}"] = [question.labels[n] for n in columns[f"answer_{when}"]]
    noise = abs(float(told["after"]["probability"][-1] - told["before"]["probability"][-1]))
    rows = [{**question.columns(sample), **each.columns, "noise": noise} for each in variants]
    return pd.DataFrame(rows).assign(**columns)


@dataclass(frozen=True, repr=False)
class Changed(Table):
    """Answers before and after a change, one row per clip and changed run. `CELL` names the columns that say what was
    changed."""

    CELL: ClassVar[tuple[str, ...]]

    @property
    def right(self: T) -> T:
        """The rows of clips that were answered right before anything was changed."""
        return type(self)(self.frame[self.frame.right_before])

    @typed
    def effects(
        self,
        effect: Effect = "probability",
        by: Sequence[str] | None = None,
        n_resamples: int = 1000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Means over clips, one row per group of `by` (the attribute and what was changed): `before`, `after`, and the
        `change` with its 95 % bootstrap interval over clips (NaN for one).

        The change is after - before, and for `relative_probability` (after - before) / before, clip by clip. Raises
        `DataError` for columns that there are not, and if other settings vary.
        """
        by = ("attribute", *self.CELL) if by is None else by
        self.refuse_mixed(["model", "attribute", "form", "label_space", *self.CELL, "predict"], by)
        before, after = (self.frame[f"{COLUMN[effect]}_{when}"].astype(float) for when in ("before", "after"))
        change = (after - before) / before if effect == "relative_probability" else after - before
        frame = self.frame.assign(before=before, after=after, change=change)
        return changes(frame, by, self.CELL, n_resamples, seed)

    def overview(self) -> pd.DataFrame:
        """What changes the true label's probability among the labels most, up or down."""
        cells = self.frame.groupby(list(self.CELL), sort=False, dropna=False).ngroup()
        most = (self.frame.label_p_after - self.frame.label_p_before).groupby(cells).mean().abs().nlargest(N_SHOWN)
        effects = type(self)(self.frame[cells.isin(most.index)]).effects("label_probability", self.CELL)
        return effects.sort_values("change", key=abs, ascending=False, kind="stable")

    def lines(self) -> pd.DataFrame:
        """How that probability changes by layer: on average where several parts of a layer are changed by themselves,
        and then without intervals."""
        if "layer" not in self.CELL:
            return Table.lines(self)
        rows = self.frame.dropna(subset=["layer"])
        rest = [name for name in self.CELL if name not in ("layer", "layers", "heads", "units")]
        told = [name for name in rest if rows[name].nunique() > 1]
        found = []
        for key, its in rows.groupby([*rest, "layer"], sort=False, dropna=False):
            change = (its.label_p_after - its.label_p_before).groupby(its["sample"]).agg(["mean", "size"])
            low, high = interval(change["mean"].to_numpy(), 1000, 0) if (change["size"] == 1).all() else (np.nan,) * 2
            line = ", ".join(f"{name} {its[name].iloc[0]}" for name in told or rest)
            change_of_p = {"change of label_p": change["mean"].mean(), "low": low, "high": high}
            found.append({"line": line, "layer": key[-1], **change_of_p})
        return pd.DataFrame(found, columns=["line", "layer", "change of label_p", "low", "high"])

    def __repr__(self) -> str:
        n = self.frame.groupby("attribute", sort=False)["sample"].nunique()
        clips = ", ".join(f"{n_clips} of {name}" for name, n_clips in n.items())
        return f"{type(self).__name__}({len(self.frame)} runs, clips: {clips}; {self.about()})"

    def about(self) -> str:
        """What was changed, in some words."""
        return ", ".join(map(str, self.frame[self.CELL[0]].unique()))


def changes(frame: pd.DataFrame, by: Sequence[str], cell: Sequence[str], n_resamples: int, seed: int) -> pd.DataFrame:
    """Means over clips of `before`, `after` and `change`, one row per group of `by`."""
    refuse_columns(frame, by)
    twice = frame.duplicated([name for name in (*QUESTION_COLUMNS, "predict", *cell) if name in frame])
    if twice.any():
        raise DataError(f"{twice.sum()} runs, as of {frame[twice]['sample'].iloc[0]}, are in the table twice.")
    found = []
    for key, group in frame.groupby(list(by), sort=False, dropna=False):
        low, high = interval(group.change.to_numpy(), n_resamples, seed)
        means = {name: group[name].mean() for name in ("before", "after", "change")}
        found.append({**dict(zip(by, key, strict=True)), "n": len(group), **means, "low": low, "high": high})
    return pd.DataFrame(found).astype({name: frame[name].dtype for name in by})
