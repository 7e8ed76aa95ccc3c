"""Linear probes: what can be read from the states of every layer by a linear classifier (arXiv 1610.01644).

Each layer's states are scaled and classified by multinomial logistic regression, in cross-validation. Beside it stands
a control that goes through all of the same with labels that have changed places: what a probe reaches without there
being anything to find. Selectivity is accuracy minus that of the control (after arXiv 1909.03368).
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from lalm_lens.aggregates import intervals
from lalm_lens.attributes import Attribute, Form
from lalm_lens.counterfactual import heard_clip
from lalm_lens.datasets import Sample
from lalm_lens.datasets.splits import speakers_of
from lalm_lens.draws import drawing
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import names_of, questions
from lalm_lens.experiments.cuts import Place
from lalm_lens.experiments.features import Spot, Stack, features
from lalm_lens.model import HookedLALM
from lalm_lens.results import plots_module
from lalm_lens.shapes import typed
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

States = Float[np.ndarray, "clip width"]
SPOT = list(Spot._fields)


@dataclass(frozen=True, repr=False)
class Probe(Table):
    """What probes say: one row per clip, spot and draw of the labels, each clip in the fold that tests it."""

    NAME: ClassVar[str] = "a table of probes"
    HEADLINE: ClassVar[tuple[str, str] | None] = "accuracy", "Largest accuracy of a layer's probe"
    COLUMNS: ClassVar[dict[str, str]] = {
        "model": "str",
        "attribute": "str",  # what is asked; what is probed is the target
        "form": "str",
        "C": "float64",  # the inverse of the strength of the L2 penalty
        "stack": "str",  # audio_encoder, adapter, vision_encoder, vision_adapter, decoder
        "layer": "int64",  # 0-based block; -1 is what enters the first
        "place": "str",  # of the prompt, or clip, or pictures
        "labels": "str",  # true, or shuffled: the control
        "seed": "Int64",  # of the shuffling
        "fold": "int64",
        "n_train": "int64",
        "converged": "bool",  # whether the fit of the fold did
        "sample": "str",
        "group": "str",  # never in training and in the test of one fold
        "target": "str",  # under shuffled labels, what was put in place of the true one
        "predicted": "str",
        "is_right": "bool",
    }

    def folds(self) -> pd.DataFrame:
        """Accuracy of every fit: one row per spot, draw of the labels and fold."""
        one_fit = [*SPOT, "labels", "seed", "fold"]
        by_fit = self.frame.groupby(one_fit, sort=False, dropna=False)
        found = by_fit.agg(
            n_train=("n_train", "first"),
            n_test=("is_right", "size"),
            accuracy=("is_right", "mean"),
            converged=("converged", "first"),
        )
        return found.reset_index()

    def layers(self, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """One row per spot: accuracy over all clips, each tested once, and `chance`, the share of the largest class.

        `control` is the mean accuracy under shuffled labels, `selectivity` what the true ones have above it, `p` the
        share of draws of the labels, the true one among them, that are as accurate. 95 % intervals are over clips, or
        over groups where there are any, drawn again; that folds share their training clips is not in them.
        """
        self.refuse_mixed(("model", "attribute", "form", "C"))
        true, control = (self.frame[self.frame.labels == which] for which in ("true", "shuffled"))
        unit = "sample" if true.group.isna().all() else "group"
        counts = [true.pivot_table(index=unit, columns=SPOT, values="is_right", aggfunc=how) for how in ("sum", "size")]
        right, n = (its.to_numpy(dtype=float) for its in counts)
        n_draws = control.seed.nunique()
        shuffled = np.full_like(right, np.nan)
        if n_draws:
            by_unit = control.pivot_table(index=unit, columns=SPOT, values="is_right", aggfunc="sum")
            shuffled = by_unit.to_numpy(dtype=float) / n_draws
        sums = np.stack([right, right - shuffled, n], axis=1)  # [unit, statistic, spot]

        def rates(means: np.ndarray) -> np.ndarray:
            return means[..., :2, :] / means[..., 2:, :]

        (accuracy, selectivity), (low, high) = rates(sums.mean(0)), intervals(sums, rates, n_resamples, seed)
        found = pd.DataFrame(counts[0].columns.tolist(), columns=SPOT).assign(
            n=int(n[:, 0].sum()),
            chance=true[true.layer == true.layer.iloc[0]].drop_duplicates("sample").target.value_counts(True).max(),
            accuracy=accuracy,
            low=low[0],
            high=high[0],
            control=accuracy - selectivity,
            selectivity=selectivity,
            selectivity_low=low[1],
            selectivity_high=high[1],
            p=self.p_values(),
        )
        in_order = true[SPOT].drop_duplicates().sort_values("place", kind="stable", key=lambda its: its.map(first(its)))
        return in_order.merge(found)

    def p_values(self) -> Float[np.ndarray, " spot"]:
        draws = self.frame.assign(draw=self.frame.seed.fillna(-1))  # -1 is the true one
        accuracy = draws.pivot_table(index=SPOT, columns="draw", values="is_right", aggfunc="mean")
        p = accuracy.ge(accuracy[-1] - 1e-12, axis="index").mean(axis="columns")
        return p.to_numpy() if accuracy.shape[1] > 1 else np.full(len(accuracy), np.nan)

    def first_layer(self, above: float = 0.0, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Of each stack and place, the first layer whose selectivity, with its whole interval, is above a number; none
        is <NA>. Of layers without anything to find, one in 40 is above 0."""
        layers = self.layers(n_resamples, seed)
        found = layers.assign(layer=layers.layer.where(layers.selectivity_low > above).astype("Int64"))
        return found.groupby(["stack", "place"], sort=False).layer.min().rename("first_layer").reset_index()

    def overview(self) -> pd.DataFrame:
        """Of each stack and place the layer with the largest accuracy."""
        layers = self.layers()
        return layers.loc[layers.groupby(["stack", "place"], sort=False).accuracy.idxmax()]

    def lines(self) -> pd.DataFrame:
        layers = self.layers()
        layers = layers.assign(line=layers["stack"] + ", " + layers.place)
        return layers[["line", "layer", "accuracy", "low", "high"]]

    def plot(self) -> "Figure":
        """Accuracy by layer with its interval, control and chance; a panel per stack and place."""
        one = self.frame.iloc[0]
        classes = self.frame[self.frame.labels == "true"].target.nunique()
        about = f"{one.model}: linear probes for {classes} classes while asked about {one.attribute}, {one.form}"
        return plots_module("representation_plots").probe_curves(self.layers(), about)

    def __repr__(self) -> str:
        layers, true = self.layers(n_resamples=100), self.frame[self.frame.labels == "true"]
        failed = (~self.folds().converged).sum()
        best = layers.loc[layers.groupby(["stack", "place"], sort=False).accuracy.idxmax()]
        shown = best[[*SPOT, "accuracy", "low", "high", "control", "p"]]
        return (
            f"Probe({true.model.iloc[0]}, {true['sample'].nunique()} clips, {true.target.nunique()} classes, "
            f"chance {layers.chance.iloc[0]:.3f}{f'; {failed} fits did not converge' if failed else ''})\n"
            f"best layers, chosen after the fact:\n{shown.to_string(index=False, float_format='{:.3f}'.format)}"
        )


def first(names: pd.Series) -> dict[str, int]:
    """In the order in which they come."""
    return {name: n for n, name in enumerate(names.unique())}


# --- one set of states ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probing:
    """How states are probed. `groups`, one for each clip, are never in training and in the test of one fold (the clips
    of one speaker, say). `C` is the inverse strength of the L2 penalty, in units of scikit-learn."""

    groups: tuple[str, ...] | None = None
    n_folds: int = 5
    C: float = 1.0
    max_iter: int = 1000
    n_controls: int = 5
    seed: int = 0

    def check(self, labels: Sequence[str]) -> None:
        """Raise `DataError` for labels that cannot be told apart in this many folds, `InputError` for settings."""
        if self.n_folds < 2 or self.n_controls < 0 or self.max_iter < 1 or not self.C > 0:
            raise InputError(
                "Probes need n_folds of 2 or more, n_controls of 0 or more, max_iter of 1 or more and a C above 0; got "
                f"{self.n_folds}, {self.n_controls}, {self.max_iter} and {self.C}."
            )
        if self.groups is not None and len(self.groups) != len(labels):
            raise DataError(f"{len(labels)} clips need as many groups; got {len(self.groups)}.")
        of_class: dict[str, set[object]] = defaultdict(set)
        for n, label in enumerate(labels):
            of_class[label].add(n if self.groups is None else self.groups[n])
        if len(of_class) < 2:
            raise DataError(f"All {len(labels)} clips are {labels[0]!r}: a probe tells two classes apart, or more.")
        label, its = min(of_class.items(), key=lambda each: len(each[1]))
        if len(its) < self.n_folds:
            what = "clips" if self.groups is None else "groups"
            raise DataError(
                f"{self.n_folds} folds need as many {what} of every class, and {label!r} has {len(its)}: give more "
                f"{what}, or a smaller n_folds."
            )

    @typed
    def of(self, states: Float[np.ndarray, "clip width"], labels: Sequence[str]) -> pd.DataFrame:
        """What probes of these states say of each clip, under the true labels and under `n_controls` draws of shuffled
        ones. Raises as `check` does, and `InputError` for states that are not finite or not as many."""
        self.check(labels)
        if len(states) != len(labels):
            raise InputError(f"{len(labels)} labels need as many states; got {len(states)}.")
        if n_broken := np.count_nonzero(~np.isfinite(states).all(1)):
            raise InputError(
                f"{n_broken} of {len(states)} clips have states that are not finite, which no probe reads."
            )
        true = np.asarray(labels)
        draws = [(self.seed + n, self.shuffled(true, self.seed + n)) for n in range(self.n_controls)]
        frames = [self.predicted(states, true).assign(labels="true", seed=None)]
        frames += [self.predicted(states, drawn).assign(labels="shuffled", seed=seed) for seed, drawn in draws]
        return pd.concat(frames, ignore_index=True).astype({"seed": "Int64"})

    def shuffled(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Labels that have changed places: between whole groups where each has one label, else between clips."""
        rng = drawing(seed)
        if self.groups is None or any(len(its) > 1 for its in labels_by(self.groups, labels).values()):
            return rng.permutation(labels)
        names, members = np.unique(self.groups, return_inverse=True)
        by_group = np.array([labels[members == n][0] for n in range(len(names))])
        return rng.permutation(by_group)[members]

    def predicted(self, states: States, labels: np.ndarray) -> pd.DataFrame:
        """Of every clip, by the fit of the fold that tests it."""
        frames = []
        for fold, (train, test) in enumerate(self.folds(labels)):
            fit, converged = fitted(self.pipeline(), states[train], labels[train])
            predicted = fit.predict(states[test])
            its = {"clip": test, "fold": fold, "n_train": len(train), "converged": converged, "target": labels[test]}
            frames.append(pd.DataFrame({**its, "predicted": predicted, "is_right": predicted == labels[test]}))
        return pd.concat(frames)

    def folds(self, labels: np.ndarray) -> Iterator[tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]]:
        """In the proportions of the labels. The folds of shuffled labels are drawn for those."""
        how = {"n_splits": self.n_folds, "shuffle": True, "random_state": self.seed}
        if self.groups is None:
            yield from StratifiedKFold(**how).split(labels, labels)
            return
        for train, test in StratifiedGroupKFold(**how).split(labels, labels, self.groups):
            if missing := set(labels) - set(labels[train]):
                raise DataError(f"The groups leave a fold without {min(missing)!r} in training: take fewer folds.")
            yield train, test

    def pipeline(self) -> Pipeline:
        return make_pipeline(StandardScaler(), LogisticRegression(C=self.C, max_iter=self.max_iter))


def groups_of(samples: Sequence[Sample], given: Sequence[str] | None, by_speaker: bool) -> tuple[str, ...] | None:
    if by_speaker and given is not None:
        raise InputError("by_speaker makes a group of each speaker: give that, or groups.")
    if by_speaker:
        return tuple(speakers_of(samples))
    return of_one_clip(samples) if given is None else tuple(given)


def of_one_clip(samples: Sequence[Sample]) -> tuple[str, ...] | None:
    """What is heard in samples, where several have one clip, as items of a conflict or counterfactuals have: these are
    never told apart."""
    clips = tuple(map(heard_clip, samples))
    return clips if len(set(clips)) < len(clips) else None


def labels_by(groups: Sequence[str], labels: np.ndarray) -> Mapping[str, Counter]:
    found: dict[str, Counter] = defaultdict(Counter)
    for group, label in zip(groups, labels, strict=True):
        found[group][label] += 1
    return found


def fitted(pipeline: Pipeline, states: States, labels: np.ndarray) -> tuple[Pipeline, bool]:
    """And whether it converged, which the table says."""
    with warnings.catch_warnings(category=ConvergenceWarning, action="ignore"):
        pipeline.fit(states, labels)
    regression = pipeline.named_steps["logisticregression"]
    return pipeline, bool((regression.n_iter_ < regression.max_iter).all())


# --- all layers of a model --------------------------------------------------------------------------------------


@typed
def probe(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute | None = None,
    form: Form = "P3",
    stacks: Sequence[Stack] = ("audio_encoder", "adapter", "decoder"),
    places: Sequence[Place] = ("last",),
    targets: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    by_speaker: bool = False,
    n_folds: int = 5,
    C: float | int = 1.0,
    max_iter: int = 1000,
    n_controls: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Probe:
    """Probe every layer for the clips' labels, or for `targets`, one for each clip, while `attribute` is asked, or
    without one the question of each item of a conflict (`make_conflict`, `read_alme`).

    In the decoder, states are the mean over each of the `places` (as in `attention_knockout`: "last", "audio",
    positions); in an encoder over the states that belong to the clip, or to the pictures, and behind an adapter over
    what it makes. One forward per clip. They are scaled to variance 1 and fitted with `StandardScaler` and
    `LogisticRegression(C)` of scikit-learn, in `n_folds` that keep the proportions of the classes and, with `groups`,
    no group apart. `n_controls` draws of shuffled labels are the control. Items made of one clip are a group, as are
    counterfactuals in which one is heard (`swap_audio`), unless `groups` says otherwise; with `by_speaker` the clips of
    each speaker are.

    Raises `DataError` for one class alone, for a class of fewer clips (or groups) than folds, for targets or groups
    that are not as many as clips, for speakers that are not known; `InputError` for states that are not finite; and
    what `causal_trace` raises.
    """
    asked = questions(model, samples, attribute, form, label_space=True)
    if targets is not None and len(targets) != len(samples):
        raise DataError(f"{len(samples)} clips need as many targets; got {len(targets)}.")
    labels = [sample.label for sample in samples] if targets is None else list(targets)
    together = groups_of(samples, groups, by_speaker)
    probing = Probing(together, n_folds, float(C), max_iter, n_controls, seed)
    probing.check(labels)
    if not stacks or ("decoder" in stacks and not places):
        raise InputError("Nothing is probed: name one stack or more, and of the decoder a place.")
    shown = {"unit": "clip", "disable": not progress}
    question_of = {its.name: question for question, some in asked for its in some}
    runs = (question_of[its.name].run(its) for its in tqdm(samples, "reading states", **shown))
    read = [features(model, run, stacks, places) for run in runs]
    frames = []
    for spot in tqdm(read[0], desc="probing", unit="layer", disable=not progress):
        frame = probing.of(np.stack([states[spot] for states in read]), labels)
        frames.append(frame.assign(**spot._asdict()))
    frame = pd.concat(frames)
    clips = pd.DataFrame({"sample": [sample.name for sample in samples], "group": together})
    about = {"model": model.cfg.model_name, "attribute": names_of(asked), "form": form, "C": float(C)}
    return Probe.concat([frame.merge(clips, left_on="clip", right_index=True).assign(**about)])
