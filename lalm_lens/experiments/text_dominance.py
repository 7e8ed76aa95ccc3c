"""Whose word counts where a text disagrees with the clip: the text dominance ratio (arXiv 2602.11488).

    TDR = text / (text + audio)

over clips in the condition `conflict`: how many are answered as the text says, and how many as the audio does. Answers
that are neither are left out of it, and reported as *other*. Above 1/2 the text dominates. `tdr_text_validated` counts
the clips whose text alone is answered right. How the text is put moves all of it, so framing, strength and order stand
beside every number.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

from lalm_lens.attributes import Attribute, Form
from lalm_lens.conflict import CONFLICT_COLUMNS, Condition, ConflictItem, make_conflict
from lalm_lens.datasets import Sample
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question, by_attribute, own_items, processor_of
from lalm_lens.experiments.lens import Asked, Reading, Words, read_all, told
from lalm_lens.interventions import Knockout
from lalm_lens.metrics import Predict
from lalm_lens.model import HookedLALM
from lalm_lens.proportions import McNemar, change_interval, cohens_h, share
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.shapes import typed
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Outcome = Literal["text", "right"]
FRAME = ("framing", "strength", "order")
SETTINGS = ("model", "form", "label_space", "predict", "knockout")
Group = tuple[Question, list[ConflictItem]]
AT_ONCE = 32  # labels: the rank of each in the vocabulary is counted at every layer
SIDES = ("audio", "text")
WHEN = ("before", "after")
ANSWER_COLUMNS = {
    "predict": "str",  # a prediction is the largest logit among the labels, or in the vocabulary
    "answer": "str",  # the label that is predicted, the first of those with the largest logit; or none of them
    "right": "bool",  # whether it is the item's label
}


@dataclass(frozen=True, repr=False)
class TextDominance(Table):
    """What is answered, one row per item."""

    NAME: ClassVar[str] = "a table of text dominance"
    HEADLINE: ClassVar[tuple[str, str] | None] = "tdr", "Text dominance ratio: text / (text + audio)"
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        **CONFLICT_COLUMNS,
        **ANSWER_COLUMNS,
        "follows": "str",  # text, audio, both where they agree, or other
        "p_audio": "float64",  # of the audio's label, its first token, over the whole vocabulary
        "p_text": "float64",
        "label_p_audio": "float64",  # among the labels
        "label_p_text": "float64",
        "knockout": "str",  # what could not look at what, in words
    }

    @typed
    def tdr(self, by: Sequence[str] = ("attribute", *FRAME)) -> pd.DataFrame:
        """Text dominance of the conflicting items, one row per group of `by`, with 95 % Wilson intervals.

        `n_text`, `n_audio` and `n_other` add up to `n`; rates of the three are of `n`. `tdr` is NaN where neither text
        nor audio is followed, `tdr_text_validated` where no text alone was answered right, or none was asked. Raises
        `DataError` without conflicting items, and if other settings vary.
        """
        self.check(by)
        conflict = self.frame.assign(is_valid=self.text_is_right())[self.frame.condition == "conflict"]
        if not len(conflict):
            raise DataError("No item is in conflict, so there is no text dominance: make_conflict makes them.")
        TextDominance(conflict).refuse_mixed((*SETTINGS, *FRAME), by)
        return grouped(conflict, by, dominance)

    @typed
    def accuracies(self, by: Sequence[str] = ("attribute", "condition", *FRAME)) -> pd.DataFrame:
        """How often the answer is the item's label, with 95 % Wilson intervals; where text and audio conflict, that is
        the audio's."""
        self.check(by)
        self.refuse_mixed((*SETTINGS, "condition"), by)
        for name in FRAME:  # what has no text has no framing
            TextDominance(self.frame.dropna(subset=[name])).refuse_mixed([name], by)
        return grouped(self.frame, by, accuracy)

    def text_is_right(self) -> pd.Series:
        """Of each row, whether the text alone is answered right: of the same clip and framing, in the same order and
        strength where silence was heard."""
        alone = self.frame[self.frame.condition == "text_only"]
        right = dict(zip(keys(alone), alone.right, strict=True))
        both = zip(keys(self.frame), keys(self.frame.assign(order=None, strength=None)), strict=True)
        return pd.Series([right.get(key, right.get(bare, False)) for key, bare in both], self.frame.index, bool)

    def check(self, by: Sequence[str]) -> None:
        """Raise `DataError` for columns that there are not, and for items that would count twice."""
        if unknown := [name for name in by if name not in self.frame]:
            raise DataError(
                f"Rows are grouped by columns of the table, not by {unknown}: {', '.join(self.frame.columns)}."
            )
        twice = self.frame.duplicated([*SETTINGS, "attribute", "sample"])
        if twice.any():
            raise DataError(f"{twice.sum()} items, as {self.frame[twice]['sample'].iloc[0]}, are in the table twice.")

    def overview(self) -> pd.DataFrame:
        """Without the rates, which are numbers of `n`."""
        return self.tdr().drop(columns="attribute").filter(regex="^(?!.*rate)")

    def plot(self) -> "Figure":
        """TDR by framing and order with its interval, and shares of text, audio and other; a row per attribute."""
        table = self.tdr()
        return plots_module("conflict_plots").dominance(table, self.frame)

    def __repr__(self) -> str:
        n = self.frame.condition.value_counts()
        counts = ", ".join(f"{n[name]} {name}" for name in n.index)
        if "conflict" not in n:
            return f"TextDominance({self.frame.model.iloc[0]}, {counts})"
        columns = ["n", "n_text", "n_audio", "n_other", "tdr", "tdr_low", "tdr_high", "tdr_text_validated"]
        by = [
            name for name in (*SETTINGS, "attribute", *FRAME) if name == "attribute" or self.frame[name].nunique() > 1
        ]
        table = self.tdr(by)[[*by, *columns]].to_string(index=False, float_format="{:.3f}".format)
        return f"TextDominance({self.frame.model.iloc[0]}, {counts})\n{table}"


def keys(frame: pd.DataFrame) -> list[tuple]:
    """What a text alone and the conflict that it belongs to have in common, as text."""
    its = frame[[*SETTINGS, "attribute", "clip", *FRAME]].astype("object")
    return list(its.where(its.notna(), None).itertuples(index=False, name=None))


def grouped(
    frame: pd.DataFrame, by: Sequence[str], of: Callable[[pd.DataFrame], dict[str, int | float]]
) -> pd.DataFrame:
    """One row per group of `by`; what has nothing in one of these columns is a group as well."""
    groups = frame.groupby(list(by), sort=False, dropna=False) if by else [((), frame)]
    found = [{**dict(zip(by, key, strict=True)), **of(rows)} for key, rows in groups]
    return pd.DataFrame(found).astype({name: frame[name].dtype for name in by})


def accuracy(rows: pd.DataFrame) -> dict[str, int | float]:
    return {"n": len(rows), **share("accuracy", int(rows.right.sum()), len(rows))}


def dominance(rows: pd.DataFrame) -> dict[str, int | float]:
    n = {name: int((rows.follows == name).sum()) for name in ("text", "audio", "other")}
    clear = n["text"] + n["audio"]
    valid = rows[rows.is_valid]
    n_valid, text_valid = (int(valid.follows.isin(names).sum()) for names in (("text", "audio"), ("text",)))
    return {
        "n": len(rows),
        **{f"n_{name}": its for name, its in n.items()},
        **share("tdr", n["text"], clear),
        **{key: its for name in n for key, its in share(f"{name}_rate", n[name], len(rows)).items()},
        "n_validated": n_valid,
        **share("tdr_text_validated", text_valid, n_valid),
    }


# --- before and after ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The same clips before and after something was changed.

    `before` and `after` are shares: of text among the `n_clear_before` and `n_clear_after` answers that follow text or
    audio (`outcome` "text"), or of right answers, all of which are clear. `difference` is after - before, `low` and
    `high` its 95 % interval (`lalm_lens.proportions.change_interval`); they are NaN where no answer is clear on one
    side. `mcnemar` is of the `n` pairs that are clear on both sides; `n_unclear` follow neither text nor audio on one.
    """

    outcome: Outcome
    before: float
    after: float
    difference: float
    low: float
    high: float
    h: float
    mcnemar: McNemar
    n: int
    n_unclear: int
    n_clear_before: int
    n_clear_after: int

    def __repr__(self) -> str:
        what = "TDR" if self.outcome == "text" else "accuracy"
        return (
            f"{what} {self.before:.3f} -> {self.after:.3f} ({self.difference:+.3f}, 95 % {self.low:+.3f} to "
            f"{self.high:+.3f}), Cohen's h {self.h:+.2f}, McNemar p = {self.mcnemar.exact:.2g} exact "
            f"({self.mcnemar.lost} lost, {self.mcnemar.won} won of {self.n} pairs; {self.n_unclear} unclear; "
            f"{self.n_clear_before} and {self.n_clear_after} answers)"
        )


@typed
def compare_dominance(
    before: TextDominance,
    after: TextDominance,
    *,
    condition: Condition = "conflict",
    outcome: Outcome = "text",
) -> Comparison:
    """The same clips with the same texts in two tables: of two framings, orders or models, or under a knockout.

    With `outcome="right"` it is accuracy that is compared. Raises `DataError` unless both tables hold the same clips
    and labels in that condition, once each.
    """
    pairs = paired(before, after, condition)
    if outcome == "text":
        hits = [pairs[f"follows_{when}"] == "text" for when in WHEN]
        clear = [pairs[f"follows_{when}"].isin(["text", "audio"]) for when in WHEN]
    else:
        hits = [pairs[f"right_{when}"] for when in WHEN]
        clear = [pd.Series(True, pairs.index)] * 2
    return comparison(outcome, hits, clear)


def comparison(outcome: Outcome, hits: Sequence[pd.Series], clear: Sequence[pd.Series]) -> Comparison:
    """Of the same clips before and after: which are hits, and which are clear, the only ones that are counted."""
    both = clear[0] & clear[1]
    n_clear = [int(its.sum()) for its in clear]
    before, after = (int(hit.sum()) / n if n else float("nan") for hit, n in zip(hits, n_clear, strict=True))
    low, high = change_interval(*(np.stack(its, axis=-1).astype(bool) for its in (hits, clear)))
    return Comparison(
        outcome,
        before,
        after,
        after - before,
        low,
        high,
        cohens_h(before, after) if all(n_clear) else float("nan"),
        McNemar(int((both & hits[0] & ~hits[1]).sum()), int((both & ~hits[0] & hits[1]).sum())),
        int(both.sum()),
        int((~both).sum()),
        *n_clear,
    )


def paired(before: TextDominance, after: TextDominance, condition: Condition) -> pd.DataFrame:
    """One row per clip, what is said before and after side by side."""
    one = ["attribute", "clip", "audio_label", "text_label"]
    sides = []
    for when, table in zip(WHEN, (before, after), strict=True):
        rows = table.frame[table.frame.condition == condition]
        twice = rows.duplicated(one)
        if twice.any() or not len(rows):
            raise DataError(
                f"The table {when} has {len(rows)} items in the condition {condition}, {twice.sum()} of them twice. "
                "Choose the rows of one framing, strength, order and model."
            )
        sides.append(rows[[*one, "follows", "right"]])
    pairs = sides[0].merge(sides[1], on=one, suffixes=[f"_{when}" for when in WHEN])
    if not len(pairs) == len(sides[0]) == len(sides[1]):
        raise DataError(
            f"Only {len(pairs)} clips are in both tables with the same labels, of {len(sides[0])} before and "
            f"{len(sides[1])} after. Make both of the same clips with one seed."
        )
    return pairs


# --- asking -------------------------------------------------------------------------------------------------


@typed
def text_dominance(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute | None = None,
    form: Form = "P3",
    predict: Predict = "labels",
    label_space: bool = True,
    knockouts: Sequence[Knockout] = (),
    token_budget: int | None = None,
    progress: bool = True,
) -> TextDominance:
    """What the model answers where clip and text agree, disagree, or are alone.

    `samples` are items of `make_conflict` or `read_alme`, each with its own question; or plain clips and an
    `attribute`, of which `make_conflict` makes them with what it does by default. An answer is the label whose first
    token has the largest logit, the first of them where several have it; with `predict="vocab"` none of them, and so
    other, unless it is the largest in the vocabulary too. `knockouts` are made in every run: what they name has to be
    in every prompt. `token_budget` as in `logit_lens`.

    Raises `InputError` for clips without an attribute, and for items with another one; else as `causal_trace`.
    """
    items = items_of(samples, attribute)
    groups = [(Question.about(model, its, about, form, label_space), its) for about, its in by_attribute(items).items()]
    rows = []
    with tqdm(total=len(items), desc="text against audio", unit="item", disable=not progress) as bar:
        for some in chunks(groups):
            asked = [(question, item) for question, its in some for item in its]
            read = answers(asked, knockouts, token_budget, bar)
            rows += [
                {**question.columns(item), **answered(question, item, words, predict)}
                for (question, item), words in zip(asked, read, strict=True)
            ]
    return TextDominance.concat([pd.DataFrame(rows).assign(predict=predict, knockout=told(knockouts))])


def items_of(samples: Sequence[Sample], attribute: str | Attribute | None) -> list[ConflictItem]:
    if attribute is not None and not any(isinstance(sample, ConflictItem) for sample in samples):
        return make_conflict(samples, attribute)
    items = own_items(samples)
    name = attribute.name if isinstance(attribute, Attribute) else attribute
    if name is not None and (others := {item.attribute.name for item in items} - {name}):
        raise InputError(f"The items ask for {', '.join(sorted(others))}, not for {name}. Leave the attribute out.")
    return items


def chunks(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Questions that are asked together: as many as have few labels in all."""
    some: list[Group] = []
    for group in groups:
        if some and sum(len(question.labels) for question, _ in [*some, group]) > AT_ONCE:
            yield some
            some = []
        some.append(group)
    yield some


def answers(
    asked: Sequence[tuple[Question, Sample]], knockouts: Sequence[Knockout], token_budget: int | None, bar: tqdm
) -> list[Words]:
    """What the last layer says of the first tokens of each question's labels: [word]."""
    model = asked[0][0].model
    processor = processor_of(model)
    tokens_of = {question: question.tokens for question, _ in asked}
    tokens = list(dict.fromkeys(token for its in tokens_of.values() for token in its))
    prompts = [Asked.of(processor, sample, its.attribute, its.form, (-1,)) for its, sample in asked]
    read = read_all(model, processor, prompts, Reading(tuple(tokens)), knockouts, token_budget, bar)
    places = {question: [tokens.index(token) for token in its] for question, its in tokens_of.items()}
    return [
        Words(*(its[-1, 0, places[question]] for its in words))
        for (question, _), words in zip(asked, read, strict=True)
    ]


def answer_of(question: Question, words: Words, predict: Predict) -> str | None:
    """The label that is predicted; None where another word is."""
    chosen = int(words.logit.argmax())
    return question.labels[chosen] if predict == "labels" or int(words.rank[chosen]) == 0 else None


def answered(question: Question, item: ConflictItem, words: Words, predict: Predict) -> dict:
    answer, log_p = answer_of(question, words, predict), words.log_prob.double()
    p, label_p = (dict(zip(question.labels, its.tolist(), strict=True)) for its in (log_p.exp(), log_p.softmax(-1)))
    return {
        "answer": answer,
        "right": answer == item.label,
        "follows": followed(answer, item),
        **{f"p_{side}": p.get(getattr(item, f"{side}_label")) for side in SIDES},
        **{f"label_p_{side}": label_p.get(getattr(item, f"{side}_label")) for side in SIDES},
    }


def followed(answer: str | None, item: ConflictItem) -> str:
    sides = [side for side in SIDES if answer is not None and getattr(item, f"{side}_label") == answer]
    return {0: "other", 1: "".join(sides), 2: "both"}[len(sides)]
