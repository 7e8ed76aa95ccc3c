"""Suppressed or erased? What is left of the answer that is heard where a text says something else.

Four runs of a clip: *audio_only*, without the text; *conflict*, with a text that states another label; *cut*, the
conflict in which the last position cannot look at the text; and *hidden*, in which no position behind the text can. In
each, the logit lens says layer by layer whether the labels' largest logit is the audio's or the text's, at the last
position and at the options. With A the share of clips for which it is the audio's, at the last layer and position,

    returned = (A_cut - A_conflict) / (A_audio_only - A_conflict)

Where the audio's answer returns once the last position cannot see the text, it was suppressed at the end. Where it does
not, and does return once the text is hidden from all, the text acted before, and what reached the end was erased.
Behind the clip a text cannot change the audio's own states, so that only positions behind the text tell (`last`, the
options).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from tqdm import tqdm

from lalm_lens.aggregates import intervals
from lalm_lens.attributes import Attribute, Form
from lalm_lens.conflict import CONFLICT_COLUMNS, ConflictItem, Framing, Order, audio_only, make_conflict
from lalm_lens.datasets import Sample
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question, own_items, processor_of, questions
from lalm_lens.experiments.lens import Asked, Reading, Words, read_all, told
from lalm_lens.interventions import Knockout
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import Prompt
from lalm_lens.proportions import wilson
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.shapes import typed
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lalm_lens.experiments.probe import Probe

Kind = Literal["audio_only", "conflict", "cut", "hidden"]
Place = Literal["last", "object"]
PLACES: tuple[Place, ...] = ("last", "object")
RUNS: tuple[Kind, ...] = ("audio_only", "conflict", "cut", "hidden")
FRAME = ("framing", "strength", "order")
MIN_CLIPS = 10  # with fewer, an interval of shares of 0 or 1 says nothing
SETTINGS = ("model", "attribute", "form", "label_space", *FRAME, "cut_layers")


@dataclass(frozen=True, repr=False)
class Suppression(Table):
    """What layers say of clips with which a text disagrees: one row per clip, run, place and layer."""

    NAME: ClassVar[str] = "a table of suppression"
    HEADLINE: ClassVar[tuple[str, str] | None] = (
        "back",
        "Share of clips whose audio's label is back once the last position cannot see the text",
    )
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        **CONFLICT_COLUMNS,  # of the conflict, in all four runs
        "n_labels": "int64",
        "run": "str",  # audio_only, conflict, cut, hidden
        "cut_layers": "str",  # in which the text is out of sight, in the runs `cut` and `hidden`
        "place": "str",  # last, or object: the tokens of the options, whose log-probabilities are averaged
        "layer": "int64",  # 0-based block
        "predicted": "str",  # the label with the largest logit
        "says": "str",  # audio, text, or other
        "log_p_audio": "float64",  # of the audio's label among the labels
        "log_p_text": "float64",
    }

    def curves(self, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """How often the audio's and the text's label are said, by run, place and layer, with 95 % bootstrap intervals
        over clips."""
        self.refuse_mixed(SETTINGS)
        found = []
        for (run, place), rows in self.frame.groupby(["run", "place"], sort=False):
            for side in ("audio", "text"):
                said = rows.assign(hit=rows.says == side).pivot(index="clip", columns="layer", values="hit")
                low, high = intervals(said.to_numpy(float), lambda means: means, n_resamples, seed)
                about = {"run": run, "place": place, "side": side, "n": len(said)}
                rates = {"layer": said.columns, "rate": said.mean().to_numpy(), "low": low, "high": high}
                found.append(pd.DataFrame({**about, **rates}))
        return pd.concat(found, ignore_index=True)

    @typed
    def verdict(
        self, tolerance: float = 0.05, level: float = 0.5, n_resamples: int = 10_000, seed: int = 0
    ) -> dict[str, int | float | str]:
        """Whether the audio's answer returns once the text is out of sight, with 95 % paired bootstrap intervals.

        `audio_only`, `conflict`, `cut` and `hidden` are the shares of clips for which the last layer says the audio's
        label at the last position; `taken` is audio_only - conflict and `back` is cut - conflict, with their intervals;
        `bite` is by how much the cut changes the text's log-probability among the labels, on average.

        Who no longer hears is still right by `chance`: 1 / labels, on average over clips, or the share of the label
        that most clips have, if that is more. What returns is counted from the `floor` on, chance or `conflict`,
        whichever is more: enough is back where `cut` is at least floor + level * (audio_only - floor). The `verdict` is

        - "suppression" where enough is back by its whole interval, `cut` is above chance (its Wilson interval, from
          `cut_low` on, is), and within `tolerance` of `audio_only` or not told from it;
        - "erasure" where less than that is back by its whole interval, `cut` is within `tolerance` of `conflict`, not
          told from it, or not above chance, and enough would be back if the text were hidden from all;
        - "no dominance" where the text takes no more than `tolerance`;
        - "in part" where it is none of these, and "undecided" where intervals tell too little, as of fewer than 10
          clips, of clips whose answer is not above chance without the text either, or of a text that takes something
          without being told from `tolerance`.
        """
        self.refuse_mixed(SETTINGS)
        ends = self.frame[(self.frame.place == "last") & (self.frame.layer == self.frame.layer.max())]
        hits = ends.assign(hit=ends.says == "audio").pivot(index="clip", columns="run", values="hit")
        rights, chance = hits[list(RUNS)].to_numpy(float), chance_of(ends[ends.run == "conflict"])

        def of(means: Float[np.ndarray, "resample 4"]) -> Float[np.ndarray, "resample 5"]:
            alone, conflict, cut, hidden = means.T
            floor = np.maximum(conflict, chance)
            enough = floor + level * (alone - floor)
            return np.stack([alone - conflict, cut - conflict, alone - cut, cut - enough, hidden - enough], axis=-1)

        means = rights.mean(0)[None]
        (low, high), (taken, back, *_) = intervals(rights, of, n_resamples, seed), of(means)[0]
        shares = dict(zip(RUNS, map(float, means[0]), strict=True))
        above = {run: wilson(int(hits[run].sum()), len(hits))[0] > chance for run in ("audio_only", "cut")}
        text = ends.pivot(index="clip", columns="run", values="log_p_text")
        found = {
            "n": len(rights),
            **shares,
            "cut_low": wilson(int(hits["cut"].sum()), len(hits))[0],
            "chance": chance,
            "taken": float(taken),
            "taken_low": float(low[0]),
            "taken_high": float(high[0]),
            "back": float(back),
            "back_low": float(low[1]),
            "back_high": float(high[1]),
            "returned": float(back / taken) if taken > tolerance else float("nan"),
            "bite": float((text["cut"] - text["conflict"]).abs().mean()),
        }
        return {**found, "verdict": judged(len(rights), float(taken), low, high, tolerance, **above)}

    def overview(self) -> pd.DataFrame:
        verdict = pd.DataFrame([self.verdict()])
        shown = ["verdict", "n", *RUNS, "chance"]
        return verdict[[*shown, *(f"{name}{end}" for name in ("taken", "back") for end in ("", "_low", "_high"))]]

    def lines(self) -> pd.DataFrame:
        """How often the audio's label is said, by run."""
        curves = self.curves()
        rows = curves[(curves.place == "last") & (curves.side == "audio")]
        return rows.rename(columns={"run": "line"})[["line", "layer", "rate", "low", "high"]]

    def plot(self, probes: "dict[str, Probe] | None" = None) -> "Figure":
        """By layer, how often each place says the audio's label and the text's, in each of the runs. `probes` of the
        conflict, by `audio` and `text`, are drawn beside, for the places that they have."""
        curves = self.curves()
        read = {side: its.layers() for side, its in (probes or {}).items()}
        return plots_module("conflict_plots").suppression(curves, read, self.about())

    def about(self) -> str:
        one, its = self.frame.iloc[0], self.verdict(n_resamples=1000)
        back = "" if np.isnan(float(its["returned"])) else f", {its['returned']:.2f} returned"
        return f"{one.model}: {one.attribute}, {one.framing}, {one.order}\n{its['verdict']}{back}"

    def __repr__(self) -> str:
        its = self.verdict(n_resamples=1000)
        shares = ", ".join(f"{run} {its[run]:.3f}" for run in RUNS)
        return (
            f"Suppression({self.frame.model.iloc[0]}, {its['n']} clips: {its['verdict']})\n"
            f"the audio's answer at the end: {shares}; back {its['back']:.3f} (95 % {its['back_low']:.3f} to "
            f"{its['back_high']:.3f}) of {its['taken']:.3f} taken; the cut changes the text's log-probability by "
            f"{its['bite']:.2g}"
        )


def chance_of(conflicts: pd.DataFrame) -> float:
    """How often an answer is right that does not listen: one of the labels by chance, or always the same."""
    most = conflicts.audio_label.value_counts(normalize=True).max()
    return float(max((1 / conflicts.n_labels).mean(), most))


def judged(
    n: int,
    taken: float,
    low: Float[np.ndarray, " 5"],
    high: Float[np.ndarray, " 5"],
    tolerance: float,
    audio_only: bool,
    cut: bool,
) -> str:
    """By intervals of: taken, back, audio_only - cut, cut - enough and hidden - enough; `audio_only` and `cut` say
    whether these are above chance."""
    if n < MIN_CLIPS:
        return "undecided"
    if not low[0] > tolerance:
        return "no dominance" if taken <= tolerance else "undecided"
    if not audio_only:
        return "undecided"
    if low[3] >= 0 and cut:
        return "suppression" if low[2] <= tolerance else "in part"
    if high[3] < 0 and (low[1] <= tolerance or not cut):
        return "erasure" if low[4] >= 0 else "in part"
    return "in part"


@typed
def suppression(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute | None = None,
    framing: str | Framing = "statement",
    order: Order = "audio_first",
    layers: Sequence[int] | None = None,
    places: Sequence[Place] = PLACES,
    form: Form = "P3",
    label_space: bool = True,
    seed: int = 0,
    token_budget: int | None = None,
    progress: bool = True,
) -> Suppression:
    """Read what every layer says of clips with which a text disagrees, with and without the text in sight.

    `samples` are plain clips and an `attribute`, of which `make_conflict` makes the conflicts with `framing`, `order`
    and `seed`; or items of `make_conflict` or `read_alme`, each with its own text and question, of which those in
    conflict are taken. In the run `cut`, the last position cannot look at the text in any of `layers`, by default all,
    in `hidden` no position of another region can. At `object`, the labels' log-probabilities are averaged over the
    options' tokens. Raises as `make_conflict` and `causal_trace` do, `DataError` for items without a conflict, and
    `InputError` without `last` among the places.
    """
    if "last" not in places:
        raise InputError('The verdict is read at the last position: give places=("last",), or ("last", "object").')
    items = conflicts_of(samples, attribute, {"framing": framing, "order": order, "seed": seed})
    asked = questions(model, items, attribute, form, label_space)
    cut_layers = tuple(range(model.decoder_cfg.n_layers)) if layers is None else tuple(layers)
    frames = []
    with tqdm(total=len(RUNS) * len(items), desc="suppressed or erased", unit="run", disable=not progress) as bar:
        for question, its in asked:
            frames += frames_of(question, own_items(its), cut_layers, places, token_budget, bar)
    return Suppression.concat(frames)


def conflicts_of(samples: Sequence[Sample], attribute: str | Attribute | None, how: dict) -> list[ConflictItem]:
    if attribute is not None and not any(isinstance(sample, ConflictItem) for sample in samples):
        return make_conflict(samples, attribute, conditions=["conflict"], **how)
    items = [item for item in own_items(samples) if item.condition == "conflict"]
    if not items:
        raise DataError("No item is in conflict, so that no text suppresses anything: make_conflict makes them.")
    return items


def frames_of(
    question: Question,
    items: Sequence[ConflictItem],
    layers: tuple[int, ...],
    places: Sequence[Place],
    token_budget: int | None,
    bar: tqdm,
) -> Iterator[pd.DataFrame]:
    """A table for each item of one question, run and place."""
    text = text_region(question, items)
    others = sorted({position.region for position in prompt_of_run(question, items[0]).positions} - {text})
    cut = Knockout(layers, (-1,), text)
    runs: dict[Kind, tuple[Sequence[ConflictItem], list[Knockout]]] = {
        "audio_only": ([audio_only(item.source, item.attribute) for item in items], []),
        "conflict": (items, []),
        "cut": (items, [cut]),
        "hidden": (items, [Knockout(layers, region, text) for region in others]),
    }
    where = ["object" if place == "object" else (-1,) for place in places]
    model, processor = question.model, processor_of(question.model)
    for run, (clips, knockouts) in runs.items():
        asked = [Asked.of(processor, item, question.attribute, question.form, *where) for item in clips]
        read = read_all(model, processor, asked, Reading(tuple(question.tokens)), knockouts, token_budget, bar)
        for item, one, words in zip(items, asked, read, strict=True):
            about = {"run": run, "n_labels": len(question.labels), **question.columns(item)}
            for frame in rows(question, item, one, words, places):
                yield frame.assign(**about, cut_layers=told([cut]))


def prompt_of_run(question: Question, item: ConflictItem) -> Prompt:
    prompt = question.run(item).prompt
    assert prompt is not None
    return prompt


def text_region(question: Question, items: Sequence[ConflictItem]) -> str:
    """Where the text stands in the prompt: a transcript has its own place in models that read one."""
    prompt = prompt_of_run(question, items[0])
    stated = [position.region for position in prompt.positions if position.region in ("statement", "transcript")]
    if not stated:
        raise DataError("The prompt holds no text that could be out of sight.")
    return "statement" if "statement" in stated else "transcript"


def rows(
    question: Question, item: ConflictItem, asked: Asked, words: Words, places: Sequence[Place]
) -> Iterator[pd.DataFrame]:
    """A table for each place."""
    log_p = words.logit.double().log_softmax(-1).numpy()  # among the labels
    labels = np.array(question.labels)
    audio, text = (question.labels.index(str(label)) for label in (item.audio_label, item.text_label))
    is_last = np.array(asked.at) == len(asked.prompt) - 1
    for place in places:
        mean = log_p[:, is_last if place == "last" else ~is_last].mean(1)
        chosen = labels[mean.argmax(-1)]
        says = np.select([chosen == item.audio_label, chosen == item.text_label], ["audio", "text"], "other")
        its = {"place": place, "layer": np.arange(len(mean)), "predicted": chosen, "says": says}
        yield pd.DataFrame({**its, "log_p_audio": mean[:, audio], "log_p_text": mean[:, text]})
