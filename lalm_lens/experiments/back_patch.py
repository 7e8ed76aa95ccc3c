"""Back-patching: what deep layers made of the audio is given to earlier layers, which go on from there.

    h[target + k] <- h[source + k]        for k = -(w // 2) .. w // 2, at the positions of one place

Run 1 is unchanged; in run 2, on the same input, states behind its blocks become those of run 1 from deeper blocks, and
all that comes after is computed again. Pairs of which one layer is none are left out. So arXiv 2506.09047 patches the
positions of images; one position alone is arXiv 2406.12775. The pair of layers is chosen on other clips than it is
measured on, and, as published, on the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from tqdm import tqdm

from lalm_lens.attributes import Attribute, Form
from lalm_lens.conflict import CONFLICT_COLUMNS
from lalm_lens.counterfactual import heard_clip
from lalm_lens.datasets import Sample
from lalm_lens.draws import refuse_seed
from lalm_lens.engine.branches import check
from lalm_lens.engine.plan import Engine
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question, questions
from lalm_lens.experiments.back_patch_choice import BackPatchChoice, By, On
from lalm_lens.experiments.changed import ANSWER_COLUMNS, Changed, How, Variant, answers
from lalm_lens.experiments.cuts import place_name
from lalm_lens.experiments.enrich import split
from lalm_lens.experiments.layer_pairs import CONTROL, MATCHED, Later, Pair, Regions, Spot
from lalm_lens.experiments.loops import looped
from lalm_lens.experiments.repair import before_and_after, followed, in_short, minus_control, pair_scores, repairs
from lalm_lens.experiments.text_dominance import SIDES
from lalm_lens.fingerprints import weights_fingerprint
from lalm_lens.metrics import Predict
from lalm_lens.model import HookedLALM
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.runs import Run
from lalm_lens.shapes import typed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_LAYERS = 8  # of a grid, where no layers are asked for
ROUNDING = 1e-6  # probabilities that are no further apart are the same
CELL = ("place", "source", "target", "window", "later", "max_loops")
ONE_WAY = ("model", "attribute", "form", "label_space", "predict", "order", "framing", "strength", "later", "max_loops")
ONE_WAY += ("fingerprint", "seed")


@typed
def back_patch(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute | None = None,
    sources: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    windows: Sequence[int] = (1, 3, 5),
    places: Sequence[Regions] = ("audio", CONTROL),
    later: Later = "recomputed",
    max_loops: int = 1,
    n_choosing: int | None = None,
    seed: int = 0,
    form: Form = "P3",
    predict: Predict = "labels",
    label_space: bool = True,
    engine: Engine = "auto",
    token_budget: int | None = None,
    n_together: int = 8,
    progress: bool = True,
) -> "BackPatch":
    """Back-patch every pair of a source and an earlier target layer, in windows of some layers, and read the answer.

    A grid over all pairs is dear (in 32 layers and 3 windows about 1,000 forwards a clip), so by default sources and
    targets are 8 layers, evenly spread; `range(n_layers)` is all. Each of the `places`, a region of the prompt or
    several as in `attention_knockout`, is patched by itself: `control` is the control of `audio`, text without what is
    stated of the clip, without the last position, and without the words that the answer is forced to begin with.
    `audio_matched` is as many positions of the audio as `control` has, drawn by `seed`, the same of all prompts of one
    length; where the audio has no more of them, all. Behind the target all is computed again, or with `later="pinned"`
    the states of the place are those of run 1 in all later blocks, so that others have one look at what was patched for
    each block of the window. With `max_loops` above 1, a patched run is the source of the next one, until the answer
    stays the same; these run with hooks, one by one.

    `samples` are clips, or items of `make_conflict`; without an `attribute` each item is asked its own question, as
    those of `read_alme` are. `n_choosing` of the clips, by default half of them, in the proportions of their labels,
    are there for the choice of a pair alone, in all conditions of a conflict; `seed` says which. `engine` and
    `token_budget` are those of `Plan`;
    `n_together` clips share a sweep. Raises what `attention_knockout` raises, and `InputError` for layers without a
    pair, and for items without a clip where its states are to be patched.
    """
    refuse_seed(seed)
    asked = questions(model, samples, attribute, form, label_space)
    pairs = grid(model.decoder_cfg.n_layers, sources, targets, windows)
    if max_loops < 1:
        raise InputError(f"max_loops is 1 or more; got {max_loops}.")
    if isinstance(places, str) or not places:
        raise InputError(f'Places are a list of regions, one or more, as ["audio"]; got {places!r}.')
    refuse_unheard(samples, places)
    spots = [Spot(place, pair, later, seed) for place, pair in product(places, pairs)]
    n_choosing = len(set(map(heard_clip, samples))) // 2 if n_choosing is None else n_choosing
    held_out = names(samples, n_choosing, seed) if n_choosing else set()
    how = How(predict, engine, token_budget, n_together, progress and len(asked) == 1)
    frames = []
    for question, its in tqdm(asked, "back-patching", unit="question", disable=not progress or len(asked) == 1):
        n_labels = len(question.labels)
        frames += [frame.assign(n_labels=n_labels) for frame in frames_of(question, its, spots, max_loops, how)]
    table = pd.concat(frames, ignore_index=True)
    side = np.where(table["sample"].isin(held_out), "choosing", "test")
    weights = {"n_layers": model.decoder_cfg.n_layers, "fingerprint": weights_fingerprint(model)}
    return BackPatch.concat([table.assign(split=side, max_loops=max_loops, seed=seed, **weights)])


def frames_of(
    question: Question, samples: Sequence[Sample], spots: Sequence["Spot"], max_loops: int, how: How
) -> Iterator[pd.DataFrame]:
    """One table for each clip."""
    if max_loops > 1:
        return looped(question, samples, spots, max_loops, how)

    def variants(sample: Sample, run: Run) -> list[Variant]:
        return [spot.variant(question.model, run) for spot in spots]

    return answers(question, samples, variants, how, "back-patching")


def grid(
    n_layers: int, sources: Sequence[int] | None, targets: Sequence[int] | None, windows: Sequence[int]
) -> list[Pair]:
    """Every target with every later source. Raises `InputError` if there are none."""
    spread = sorted(set(np.linspace(0, n_layers - 1, min(N_LAYERS, n_layers)).round().astype(int).tolist()))
    sources, targets = (spread if its is None else sorted(set(its)) for its in (sources, targets))
    check((*sources, *targets), n_layers, "layers in the decoder")
    pairs = [
        Pair(source, target, window) for window, source, target in product(windows, sources, targets) if target < source
    ]
    if not pairs:
        raise InputError(f"No source layer of {list(sources)} is behind a target layer of {list(targets)}.")
    return pairs


def refuse_unheard(samples: Sequence[Sample], places: Sequence[Regions]) -> None:
    absent = [sample.name for sample in samples if not sample.is_heard]
    if absent and (audio := [place for place in places if place in ("audio", MATCHED)]):
        raise InputError(
            f"{absent[0]} has no clip, so there is no {audio[0]!r} to patch: leave out such items, as with "
            'conditions=["audio_only", "conflict"].'
        )


def names(samples: Sequence[Sample], n_choosing: int, seed: int) -> set[str]:
    """Of what is there for the choice: all that is made of some clips."""
    clips = {heard_clip(sample): replace(sample, name=heard_clip(sample)) for sample in samples}
    chosen = {clip.name for clip in split(list(clips.values()), n_choosing, seed)[0]}
    return {sample.name for sample in samples if heard_clip(sample) in chosen}


@dataclass(frozen=True, repr=False)
class BackPatch(Changed):
    """Answers before and after back-patching, one row per clip, place and pair of layers."""

    NAME: ClassVar[str] = "a table of back-patching"
    CELL: ClassVar[tuple[str, ...]] = CELL
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        "n_labels": "int64",
        **CONFLICT_COLUMNS,  # of a clip of which a text says something else
        "predict": "str",  # a prediction is the largest logit among the labels, or in the vocabulary
        "split": "str",  # choosing, or test
        "place": "str",  # whose states were patched
        "source": "int64",  # of a window the block in its middle
        "target": "int64",
        "window": "int64",  # how many blocks, some of which there may not be
        "later": "str",  # recomputed, or pinned
        "max_loops": "int64",
        "seed": "int64",  # of the split, and of the positions of audio_matched
        "n_layers": "int64",  # of the decoder
        "fingerprint": "str",  # of the weights
        "loops": "int64",  # after how many the answer stayed as it was
        "n_positions": "int64",
        **ANSWER_COLUMNS,
    }

    @property
    def places(self) -> list[str]:
        return list(self.frame.place.unique())

    def clips(self, on: On) -> pd.DataFrame:
        """What a pair is chosen on: the clips that are there for it, or the test clips; of conflicts, where there are
        some, these alone."""
        rows = self.frame[self.frame.split == {"held_out": "choosing", "same": "test"}[on]]
        if not len(rows):
            raise DataError("All clips are test clips: give n_choosing, and the choice is made on so many others.")
        is_conflict = rows.condition == "conflict"
        rows = rows[is_conflict] if is_conflict.any() else rows
        BackPatch(rows).refuse_mixed(ONE_WAY)
        return rows

    @typed
    def scores(self, on: On = "held_out", by: By = "accuracy", min_clear: float | int = 0.5) -> pd.DataFrame:
        """The pairs of each place, best first, over the clips that a pair is chosen on: accuracy, probability of the
        true label among the labels, and text dominance ratio (the lower the better) of the `n_clear` answers that
        follow text or audio, NaN where there is none. Of pairs that are equally good the one under which the true label
        is likelier comes first, by more than rounding, and then that with the narrower window, and with earlier layers.

        A ratio of hardly any answers says nothing: by "tdr", pairs that leave fewer clear answers than `min_clear`
        times those of the unchanged runs, or none, are left out. Raises `DataError` where a place has no other.
        """
        if not 0 <= min_clear <= 1:
            raise InputError(f"min_clear is a share of the clear answers before, from 0 to 1; got {min_clear}.")
        rows = self.clips(on)
        scores = pair_scores(rows, ["place", "source", "target", "window"])
        order = list(dict.fromkeys(("place", by, "label_probability", "window", "source", "target")))
        scores = scores.assign(place=pd.Categorical(scores.place, self.places))
        rising = [name not in ("accuracy", "label_probability") for name in order]
        scores = scores.sort_values(order, ascending=rising, ignore_index=True, key=level).astype({"place": "str"})
        return clear_enough(scores, rows, min_clear) if by == "tdr" else scores

    @typed
    def chosen(
        self, on: On = "held_out", by: By = "accuracy", place: str | None = None, min_clear: float | int = 0.5
    ) -> BackPatchChoice:
        """The best pair of a place, by default of the first: chosen on clips that nothing else is said of, or, as
        published, on the same clips that it is measured on. `min_clear` is that of `scores`."""
        if (place := self.places[0] if place is None else place) not in self.places:
            raise DataError(f"The table has no place {place!r}, only {', '.join(self.places)}.")
        scores = self.scores(on, by, min_clear)
        best, first = scores[scores.place == place].iloc[0], self.frame.iloc[0]
        regions = tuple(place.split("+"))
        return BackPatchChoice(
            model=first.model,
            n_layers=int(first.n_layers),
            fingerprint=first.fingerprint,
            attribute=first.attribute,
            place=place if len(regions) == 1 else regions,
            source=int(best.source),
            target=int(best.target),
            window=int(best.window),
            later=first.later,
            picked_on=on,
            picked_by=by,
            seed=int(first.seed),
            n_clips=int(best.n),
        )

    def tested(self, choice: BackPatchChoice) -> pd.DataFrame:
        """The test clips under a chosen pair."""
        its = {"split": "test", "place": place_name(choice.place), **asdict(choice.pair)}
        return self.frame[np.logical_and.reduce([self.frame[name] == value for name, value in its.items()])]

    @typed
    def summary(
        self,
        by: By = "accuracy",
        control: str | None = None,
        min_clear: float | int = 0.5,
        n_resamples: int = 1000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """What the best pair of each place does to the test clips, chosen on others (`held_out`) and, as published, on
        the same, which is too good by as much as the best of many pairs is by chance. One row for each condition, where
        there are some.

        Before, after, and the change with its 95 % interval over clips, each of which counts with both its runs;
        `won` and `lost` are clips that became right and wrong, `p` is that of McNemar's exact test, `h` Cohen's. Text
        dominance (`tdr`) is that of `text_dominance`, of answers among the labels, of which `n_clear_before` and
        `n_clear_after` follow text or audio: there, `won` are clips that followed the audio before and follow the text
        after. `minus_control` is a place's number after, minus that of the same clips under the best pair of `control`
        (the place of that name, where the table has it), with its 95 % interval. Intervals of shares are those of
        `change_interval`, those of label probabilities bootstraps.

        Who no longer hears is right by `chance`: 1 / labels, on average over clips, or the share of the label that most
        clips have, if that is more; accuracy after is `above_chance` where its whole 95 % Wilson interval is. A pair
        `repairs` where accuracy after is above chance, accuracy has risen or text dominance fallen (p < 0.05), and
        accuracy has not fallen (p < 0.05), neither there nor on the clips alone (`audio_only`), where the table has
        these.
        """
        on_what: list[On] = ["held_out", "same"] if (self.frame.split == "choosing").any() else ["same"]
        control = CONTROL if control is None and CONTROL in self.places else control
        found = []
        for place, on in product(self.places, on_what):
            choice = self.chosen(on, by, place, min_clear)
            others = None if control in (None, place) else self.tested(self.chosen(on, by, control, min_clear))
            for condition, rows in self.tested(choice).groupby("condition", sort=False, dropna=False):
                about = {"place": place, "picked_on": on, **asdict(choice.pair), "condition": condition, "n": len(rows)}
                its = before_and_after(rows, n_resamples, seed)
                its |= {} if others is None else minus_control(rows, others, n_resamples, seed)
                found.append(about | its)
        table = pd.DataFrame(found)
        return table.assign(repairs=repairs(table)).dropna(axis="columns", how="all")

    def overview(self) -> pd.DataFrame:
        """What of `summary` says whether there is a repair: the chosen layers, accuracy and text dominance before and
        after, and McNemar's p of accuracy."""
        return in_short(self.summary())

    @typed
    def plot(self, on: On = "held_out", by: By = "accuracy", min_clear: float | int = 0.5) -> "Figure":
        """How accuracy, label probability or text dominance change by source and target, over the clips that a pair is
        chosen on: a panel for each place and window, and a frame around the best pair of each place."""
        before = pair_scores(self.clips(on).drop_duplicates("sample"), ["attribute"], "before")[by].iloc[0]
        best = {place: asdict(self.chosen(on, by, place, min_clear).pair) for place in self.places}
        scores = self.scores(on, by, min_clear)
        return plots_module("pair_plots").pair_maps(self.frame, scores, float(before), by, best)

    def about(self) -> str:
        n_pairs = (
            self.frame.drop_duplicates(["place", "source", "target", "window"]).groupby("place", sort=False).size()
        )
        return ", ".join(f"{n} pairs of layers at {place}" for place, n in n_pairs.items())


def level(column: pd.Series) -> pd.Series:
    """To be sorted by: probabilities without what rounding changes, and other columns as they are."""
    if column.name != "label_probability":
        return column
    return (column.sort_values().diff() > ROUNDING).cumsum().reindex(column.index)


def clear_enough(scores: pd.DataFrame, rows: pd.DataFrame, min_clear: float | int) -> pd.DataFrame:
    """The pairs that leave enough answers that follow text or audio, of as many as there are before."""
    n_before = int(followed(rows.drop_duplicates("sample"), "before").isin(SIDES).sum())
    left = scores[(scores.n_clear >= min_clear * n_before) & (scores.n_clear > 0)]
    if missing := [place for place in scores.place.unique() if place not in set(left.place)]:
        raise DataError(
            f"No pair at {missing[0]} leaves {min_clear:g} of the {n_before} answers that follow text or audio, so "
            "none is chosen by tdr. Lower min_clear, choose by accuracy, or give more clips that a text contradicts."
        )
    return left.reset_index(drop=True)
