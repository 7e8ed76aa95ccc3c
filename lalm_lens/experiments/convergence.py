"""Where what is heard and what is read come to be the same: states of two prompts about one item, layer by layer.

Of every clip there are two prompts: one has the clip, the other a text that states what the clip is (the *twins*). At
each layer their states at one place, the last position by default, are compared: each with its twin (cosine), as two
sets of states (debiased CKA beside what it is when items are paired at random), and in where the two sets lie (modality
gap). See `lalm_lens.similarity`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from tqdm import tqdm

from lalm_lens.aggregates import intervals
from lalm_lens.attributes import Attribute, Form
from lalm_lens.conflict import ConflictItem, Framing, TextOnly, make_conflict
from lalm_lens.datasets import Sample
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import names_of, own_items, questions
from lalm_lens.experiments.cuts import Place
from lalm_lens.experiments.features import Features, Spot, features
from lalm_lens.model import HookedLALM
from lalm_lens.results import plots_module
from lalm_lens.shapes import typed
from lalm_lens.similarity import AT_LEAST, Tested, cka_test, cosines, has_shape, modality_gap, varies
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

States = Float[np.ndarray, "item width"]
PAIRS = ("cosine", "mismatched", "centred_cosine", "centred_mismatched")
WHOLE = ("cka", "cka_p", "cka_null_95", "gap", "spread")  # of all items together
NO_TEST = Tested(*[float("nan")] * 4)


@dataclass(frozen=True, repr=False)
class Convergence(Table):
    """How alike the states of twins are: one row per item, layer and place."""

    NAME: ClassVar[str] = "a table of convergence"
    HEADLINE: ClassVar[tuple[str, str] | None] = "cka", "Largest CKA of a layer, heard and read"
    COLUMNS: ClassVar[dict[str, str]] = {
        "model": "str",
        "attribute": "str",
        "form": "str",
        "framing": "str",  # how the text states the label
        "text_only": "str",  # whether there is silence beside the text, or no_audio
        "layer": "int64",  # 0-based block; -1 is the merged embedding
        "place": "str",
        "sample": "str",
        "label": "str",  # what is heard, and what is read
        "cosine": "float64",  # of the two twins
        "mismatched": "float64",  # the mean with texts that state other labels
        "centred_cosine": "float64",  # the same without the mean state of each modality
        "centred_mismatched": "float64",
        "cka": "float64",  # debiased, of all items together, and so on; NaN where states of a modality have no shape
        "cka_p": "float64",
        "cka_null_95": "float64",
        "gap": "float64",  # between the means of the modalities
        "spread": "float64",  # root mean square distance of items from the mean of theirs
    }

    def layers(self, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """One row per place and layer: means over items of cosines, and of what twins have above mismatched pairs
        (`above`, `centred_above`), with 95 % bootstrap intervals over items; CKA with its null; the gap, and the gap in
        units of the spread."""
        self.refuse_mixed(("model", "attribute", "form", "framing", "text_only"))
        return pd.concat(
            [self.at_place(rows, n_resamples, seed) for _, rows in self.frame.groupby("place", sort=False)],
            ignore_index=True,
        )

    def at_place(self, rows: pd.DataFrame, n_resamples: int, seed: int) -> pd.DataFrame:
        tables = [rows.pivot(index="sample", columns="layer", values=name) for name in PAIRS]
        plain, centred = (tables[n].to_numpy() - tables[n + 1].to_numpy() for n in (0, 2))
        values = np.stack([*(its.to_numpy() for its in tables), plain, centred], axis=1)  # [item, statistic, layer]
        low, high = intervals(values, lambda means: means, n_resamples, seed)
        found = pd.DataFrame({"place": rows.place.iloc[0], "layer": tables[0].columns, "n": len(values)})
        for n, name in enumerate((*PAIRS, "above", "centred_above")):
            found = found.assign(**{name: values[:, n].mean(0), f"{name}_low": low[n], f"{name}_high": high[n]})
        whole = rows.groupby("layer")[list(WHOLE)].first()
        relative = whole.gap / whole.spread.where(whole.spread > 0)
        return found.merge(whole.assign(relative_gap=relative), left_on="layer", right_index=True)

    def first_layer(
        self, statistic: str = "cka", threshold: float | None = None, place: str | None = None
    ) -> int | None:
        """The first layer at which a column of `layers()` is above a threshold; None if there is none.

        Without a threshold, CKA is compared with 95 % of its null, and the others with the lower end of their interval
        with 0: of layers without anything in common, one in 20, or in 40, is above that by chance. Raises `DataError`
        for a statistic or a place that there is not, and where there are several places.
        """
        layers = self.layers()
        places = list(layers.place.unique())
        if len(places) > 1 if place is None else place not in places:
            raise DataError(f"The table has the places {', '.join(places)}: name one of them, as place={places[0]!r}.")
        known = [str(name) for name in layers if pd.api.types.is_float_dtype(layers[name])]
        if statistic not in known:
            raise DataError(f"There is no statistic {statistic!r}. Choose one of {', '.join(known)}.")
        its = layers if place is None else layers[layers.place == place]
        if threshold is not None:
            reached = its[statistic] > threshold
        elif statistic == "cka":
            reached = its.cka > its.cka_null_95
        elif f"{statistic}_low" in its:
            reached = its[f"{statistic}_low"] > 0
        else:
            raise DataError(f"From where on counts {statistic}? Give a threshold.")
        return int(its.layer[reached].min()) if reached.any() else None

    def overview(self) -> pd.DataFrame:
        """Of each place the layer with the largest CKA."""
        layers = self.layers().dropna(subset=["cka"])
        most = layers.loc[layers.groupby("place", sort=False).cka.idxmax()]
        shown = [
            "place",
            "layer",
            "n",
            "cka",
            "cka_null_95",
            "centred_above",
            "centred_above_low",
            "centred_above_high",
        ]
        return most[shown]

    def lines(self) -> pd.DataFrame:
        return self.layers().rename(columns={"place": "line"})[["line", "layer", "cka"]]

    def plot(self) -> "Figure":
        """Cosines, centred cosines, CKA and modality gap by layer; a row of panels per place."""
        one = self.frame.iloc[0]
        beside = "" if one.text_only == "no_audio" else " beside silence"
        about = f"{one.model}: {one.attribute}, {one.form}, a clip and a text{beside} that states what it is"
        return plots_module("representation_plots").convergence_curves(self.layers(), about)

    def __repr__(self) -> str:
        layers = self.layers(n_resamples=100)
        shown = layers[["place", "layer", "cosine", "above", "centred_above", "cka", "cka_p", "relative_gap"]]
        return (
            f"Convergence({self.frame.model.iloc[0]}, {layers.n.iloc[0]} items, {self.frame.attribute.iloc[0]})\n"
            f"{shown.to_string(index=False, float_format='{:.3f}'.format)}"
        )


@typed
def convergence(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute | None = None,
    form: Form = "P3",
    framing: str | Framing = "statement",
    text_only: TextOnly = "no_audio",
    places: Sequence[Place] = ("last",),
    n_permutations: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Convergence:
    """Compare the states of prompts with a clip with those of prompts with a text that states the clip's label.

    The twins are `audio_only` and `text_only` of `make_conflict`, which takes `framing` and `text_only`. Without an
    `attribute`, `samples` are items of `read_alme` (or of `make_conflict`, whose text alone states what the clip is),
    each with its own question, and those two of each clip are taken. At each of the `places`, which both prompts have,
    states are the mean over positions. Texts of one label are the same, so that mismatched pairs are of other labels,
    and CKA is of as many different texts as there are labels. Two forwards per clip.

    Raises `DataError` for fewer than 4 clips, for one label alone, and for items that are no twins; and what
    `make_conflict` and `causal_trace` raise.
    """
    twins = twins_of(own_items(samples)) if attribute is None else make_twins(samples, attribute, framing, text_only)
    if len(twins) < AT_LEAST or len({audio.label for audio, _ in twins}) < 2:
        raise DataError(f"Twins are compared among {AT_LEAST} clips or more, of two labels or more.")
    asked = questions(model, [item for both in twins for item in both], attribute, form, label_space=True)
    run_of = {its.name: question.run for question, some in asked for its in some}
    heard, read = [], []
    for audio, text in tqdm(twins, "reading twins", unit="clip", disable=not progress):
        heard.append(features(model, run_of[audio.name](audio), ["decoder"], places))
        read.append(features(model, run_of[text.name](text), ["decoder"], places))
    items = pd.DataFrame({"sample": [its.source.name for its, _ in twins], "label": [its.label for its, _ in twins]})
    frames = []
    for spot in tqdm(heard[0], desc="comparing", unit="layer", disable=not progress):
        audio, text = stacked(heard, spot), stacked(read, spot)
        frame = compared(audio, text, items.label.tolist(), n_permutations=n_permutations, seed=seed)
        frames.append(pd.concat([items, frame], axis="columns").assign(layer=spot.layer, place=spot.place))
    text = twins[0][1]
    beside = {"framing": text.framing, "text_only": "silence" if text.is_heard else "no_audio"}
    about = {"model": model.cfg.model_name, "attribute": names_of(asked), "form": form, **beside}
    return Convergence.concat([frame.assign(**about) for frame in frames])


def make_twins(
    samples: Sequence[Sample], attribute: str | Attribute, framing: str | Framing, text_only: TextOnly
) -> list[tuple[ConflictItem, ConflictItem]]:
    """Of each clip, the item that has it, and the one that states its label."""
    how = {"framing": framing, "text_only": text_only, "text_only_states": "audio"}
    return twins_of(make_conflict(samples, attribute, conditions=("audio_only", "text_only"), **how))


def twins_of(items: Sequence[ConflictItem]) -> list[tuple[ConflictItem, ConflictItem]]:
    """The same of items that are there, of which others are left out."""
    audio, text = (
        [item for item in items if item.condition == condition and item.label == item.source.label]
        for condition in ("audio_only", "text_only")
    )
    read = {item.source.name: item for item in text}
    if {item.source.name for item in audio} != set(read) or not len(audio) == len(read) == len(text):
        raise DataError(
            "Twins are one item audio_only and one text_only of each clip, which states what the clip is: make them of "
            'one framing, with read_alme(...) or make_conflict(..., text_only_states="audio").'
        )
    return [(item, read[item.source.name]) for item in audio]


def stacked(read: Sequence[Features], spot: Spot) -> States:
    return np.stack([states[spot] for states in read])


@typed
def compared(
    audio: Float[np.ndarray, "item width"],
    text: Float[np.ndarray, "item width"],
    labels: Sequence[str],
    *,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Twins' states at one layer: a row per item, with what is of all items together in each of them. CKA is NaN where
    the states of a modality have no shape (`has_shape`), as texts of one label for all clips but one."""
    audio, text = audio.astype(np.float64), text.astype(np.float64)
    other = np.array(labels)[:, None] != np.array(labels)
    if not other.any(1).all():
        raise InputError("Every item needs one of another label beside it: mismatched pairs are of different labels.")
    both_vary, both_have_shape = (all(map(its, (audio, text))) for its in (varies, has_shape))
    test = cka_test(audio, text, n_permutations=n_permutations, seed=seed) if both_have_shape else NO_TEST
    gap = modality_gap(audio, text)
    whole = {"cka": test.value, "cka_p": test.p, "cka_null_95": test.null_95, "gap": gap.gap, "spread": gap.spread}
    plain = paired(audio, text, other)
    centred = paired(audio - audio.mean(0), text - text.mean(0), other) if both_vary else {}
    nothing = {f"centred_{name}": np.nan for name in plain}
    return pd.DataFrame({**plain, **nothing, **{f"centred_{name}": its for name, its in centred.items()}, **whole})


def paired(
    audio: States, text: States, other: Bool[np.ndarray, "item item"]
) -> Mapping[str, Float[np.ndarray, " item"]]:
    """Of each clip, the cosine with its own text, and the mean of those with other texts."""
    every = cosines(audio, text)
    return {"cosine": every.diagonal(), "mismatched": np.where(other, every, 0).sum(1) / other.sum(1)}
