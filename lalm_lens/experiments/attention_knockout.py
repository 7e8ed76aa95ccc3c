"""Attention knockout: what an answer loses when some positions may not look at some others (arXiv 2304.14767).

In the chosen layers and heads, the scores of the queries of one place on the keys of another are -infinity before the
softmax; all else is as it was. An edge "audio -> last" is the way from the audio (keys) to the last position (queries).
AudioLens masks the audio for the last position in all layers and heads (arXiv 2506.05140, section VI-D).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lalm_lens.aggregates import interval
from lalm_lens.attributes import Attribute, Form
from lalm_lens.datasets import Sample
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import Engine, Outcome, Plan
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question, Told
from lalm_lens.experiments.cuts import Chain, Cut, Heads, LayerSets, cuts
from lalm_lens.interventions import Recompute
from lalm_lens.metrics import Predict
from lalm_lens.model import HookedLALM
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.runs import Run
from lalm_lens.shapes import typed
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Effect = Literal["probability", "relative_probability", "logit_difference", "label_probability", "accuracy"]
NUMBERS = {name: name for name in ("logit_difference", "right", "answer")}
NUMBERS |= {"probability": "p", "label_probability": "label_p"}  # columns, before and after
COLUMN = {
    "probability": "p",
    "relative_probability": "p",
    "logit_difference": "logit_difference",
    "label_probability": "label_p",
    "accuracy": "right",
}
CELL = ("edge", "kind", "layer", "layers", "heads")
SETTINGS = ("model", "attribute", "form", "label_space", *CELL)
RUN_COLUMNS = {
    "edge": "str",  # from keys to queries
    "kind": "str",  # how the layers were chosen
    "layer": "Int64",  # of a window the one in its middle, of `up_to` the last, of `from` the first; none of `all`
    "layers": "str",  # those that are cut, as "2-5"
    "heads": "str",
}


@typed
def attention_knockout(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    chains: Sequence[Chain] = (("audio", "last"),),
    layers: Sequence[LayerSets] = (1, "all"),
    heads: Heads = "all",
    form: Form = "P3",
    predict: Predict = "labels",
    label_space: bool = True,
    engine: Engine = "auto",
    token_budget: int | None = None,
    n_together: int = 8,
    progress: bool = True,
) -> "AttentionKnockout":
    """Cut attention from place to place, and read the answer at the last position, before and after.

    A chain of two places is an edge, from keys to queries; of a longer one, ("audio", "object", "last"), every edge is
    cut by itself, and all of them at once. A place is a region of the prompt, a tuple of regions (those that the prompt
    has), `audio_side`, `text`, `penultimate`, `generated` (here the last position), or positions. `layers` are windows
    by their odd size (1: every single layer), `up_to` and `from` each layer, `all`, or a tuple of layers; `heads` are
    `all` of them together, `each`, or a tuple. `engine` and `token_budget` are those of `Plan`; `n_together` clips go
    through the model in one sweep.

    Raises `InputError` for places, layers and heads that there are not, and for a query that would be left with no key
    to look at; for samples and prompts as `causal_trace` does.
    """
    question = Question.about(model, samples, attribute, form, label_space)
    if n_together < 1:
        raise InputError(f"n_together is a number of clips, 1 or more; got {n_together}.")
    frames = []
    told = {"desc": f"knocking out, {question.attribute.name}", "unit": "clip", "disable": not progress}
    with tqdm(total=len(samples), **told) as bar:
        for start in range(0, len(samples), n_together):
            together = samples[start : start + n_together]
            runs = [question.run(sample) for sample in together]
            its_cuts = [cuts(model, run, chains, layers, heads) for run in runs]
            outcome = knocked_out(model, runs, its_cuts, question.tokens, engine, token_budget, progress)
            frames += frames_of(question, together, its_cuts, outcome, predict)
            bar.update(len(together))
    return AttentionKnockout.concat(frames)


@typed
def audio_knockout(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    queries: Sequence[Literal["last", "penultimate"]] = ("last", "penultimate"),
    form: Form = "P3",
    predict: Predict = "labels",
    label_space: bool = True,
    engine: Engine = "auto",
    progress: bool = True,
) -> "AttentionKnockout":
    """AudioLens' knockout: in all layers and heads, the last position cannot look at the audio, nor at its transcript
    where the prompt has one (section VI-D, footnotes 4 and 5). The position before it is knocked out too, by itself.

    It is `attention_knockout` of those edges, and raises what that raises.
    """
    return attention_knockout(
        model,
        samples,
        attribute=attribute,
        chains=[("audio_side", query) for query in queries],
        layers=["all"],
        form=form,
        predict=predict,
        label_space=label_space,
        engine=engine,
        progress=progress,
    )


def knocked_out(
    model: HookedLALM,
    runs: Sequence[Run],
    its_cuts: Sequence[Sequence[Cut]],
    tokens: Sequence[int],
    engine: Engine,
    token_budget: int | None,
    progress: bool,
) -> Outcome:
    """Every cut of every run, and behind those of each run one in which nothing is cut and all is computed again."""
    branches = []
    for run, cut in zip(runs, its_cuts, strict=True):
        branches += [Branch(run, each.knockouts) for each in cut]
        branches.append(Branch(run, (Recompute("resid_pre", 0, (run.indices("audio")[-1] + 1,)),)))
    return Plan(model, branches, Told.readout(tokens), engine=engine, token_budget=token_budget).run(progress)


def frames_of(
    question: Question, samples: Sequence[Sample], its_cuts: Sequence[Sequence[Cut]], outcome: Outcome, predict: Predict
) -> Iterator[pd.DataFrame]:
    """One table for each clip, one row per cut."""
    start = 0
    for sample, cut in zip(samples, its_cuts, strict=True):
        mine = slice(start, start + len(cut) + 1)
        start = mine.stop
        yield frame_of(question, sample, cut, outcome.values[mine], outcome.base[mine], predict).assign(
            predict=predict, engine=outcome.engine
        )


def frame_of(
    question: Question,
    sample: Sample,
    its_cuts: Sequence[Cut],
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
    rows = [{**question.columns(sample), **cut.columns(), "noise": noise} for cut in its_cuts]
    return pd.DataFrame(rows).assign(**columns)


@dataclass(frozen=True, repr=False)
class AttentionKnockout(Table):
    """Answers before and after a knockout, one row per clip and knocked-out run."""

    NAME: ClassVar[str] = "a table of attention knockout"
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        "predict": "str",  # a prediction is the largest logit among the labels, or in the vocabulary
        **RUN_COLUMNS,
        "n_pairs": "int64",  # of a query and a key, those that could not see each other included
        **{f"p_{when}": "float64" for when in ("before", "after")},  # of the true label's first token
        **{f"logit_difference_{when}": "float64" for when in ("before", "after")},  # to the label that was second
        **{f"label_p_{when}": "float64" for when in ("before", "after")},  # of the true label, among the labels
        **{f"right_{when}": "bool" for when in ("before", "after")},
        **{f"answer_{when}": "str" for when in ("before", "after")},  # the largest logit among the labels
        "noise": "float64",  # the change of p in a run in which nothing is cut: what rounding alone does
        "engine": "str",  # sweep, or hooks
    }

    @property
    def right(self) -> "AttentionKnockout":
        """The rows of clips that were answered right before anything was cut: those that arXiv 2304.14767 looks at."""
        return AttentionKnockout(self.frame[self.frame.right_before])

    @typed
    def effects(
        self,
        effect: Effect = "probability",
        by: Sequence[str] = ("attribute", *CELL),
        n_resamples: int = 1000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Means over clips, one row per group of `by`: `before`, `after`, and the `change` with its 95 % bootstrap
        interval over clips (NaN for one).

        The change is after - before, and for `relative_probability` (after - before) / before, clip by clip. Raises
        `DataError` for columns that there are not, and if other settings vary.
        """
        self.refuse_mixed([*SETTINGS, "predict"], by)
        before, after = (self.frame[f"{COLUMN[effect]}_{when}"].astype(float) for when in ("before", "after"))
        change = (after - before) / before if effect == "relative_probability" else after - before
        return changes(self.frame.assign(before=before, after=after, change=change), by, n_resamples, seed)

    @typed
    def plot(self, effect: Effect = "probability") -> "Figure":
        """The change by layer, a line for each way to choose the layers, `all` as a level; a panel per attribute and
        edge. Raises `DataError` for several models or other settings in one table, and without matplotlib."""
        return plots_module().knockout_curves(self.effects(effect), effect, self.frame)

    def __repr__(self) -> str:
        n = self.frame.groupby("attribute", sort=False)["sample"].nunique()
        clips = ", ".join(f"{n_clips} of {name}" for name, n_clips in n.items())
        return f"AttentionKnockout({len(self.frame)} runs, clips: {clips}; {', '.join(self.frame.edge.unique())})"


def changes(frame: pd.DataFrame, by: Sequence[str], n_resamples: int, seed: int) -> pd.DataFrame:
    """Means over clips of `before`, `after` and `change`, one row per group of `by`."""
    if unknown := [name for name in by if name not in frame]:
        raise DataError(f"Rows are grouped by columns of the table, not by {unknown}: {', '.join(frame.columns)}.")
    twice = frame.duplicated([name for name in (*QUESTION_COLUMNS, "predict", *CELL) if name in frame])
    if twice.any():
        raise DataError(f"{twice.sum()} runs, as of {frame[twice]['sample'].iloc[0]}, are in the table twice.")
    found = []
    for key, group in frame.groupby(list(by), sort=False, dropna=False):
        low, high = interval(group.change.to_numpy(), n_resamples, seed)
        means = {name: group[name].mean() for name in ("before", "after", "change")}
        found.append({**dict(zip(by, key, strict=True)), "n": len(group), **means, "low": low, "high": high})
    return pd.DataFrame(found).astype({name: frame[name].dtype for name in by})
