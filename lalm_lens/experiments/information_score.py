"""What every layer knows of what is heard: information scores (arXiv 2506.05140, sections IV-B and VI).

    I[l]    = share of clips whose true label is the largest of the labels' logits at layer l       (eq. 2)

The logits are the logit lens' at the prompt's last position, or at the penultimate one, which names the attribute. The
accuracy is the score of the last layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from tqdm import tqdm

from lalm_lens.aggregates import intervals
from lalm_lens.attributes import Attribute, Form, attribute_named
from lalm_lens.datasets import Sample
from lalm_lens.draws import drawing
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import check_asked, processor_of
from lalm_lens.experiments.lens import Asked, Reading, Words, read_all, run_of, told
from lalm_lens.experiments.resolution import critical_layer, mean_defined
from lalm_lens.interventions import Knockout
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import Processor
from lalm_lens.results import plots_module
from lalm_lens.shapes import typed
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ScoreView = Literal["forms", "outcomes", "places"]

ONE_CURVE = ["model", "attribute", "n_labels", "label_space", "norm", "knockout", "place", "form"]
POINT = ["critical_layer", "critical_low", "critical_high", "accuracy", "accuracy_low", "accuracy_high"]


@dataclass(frozen=True, repr=False)
class InformationScore(Table):
    """What each layer predicts of each clip: one row per clip, prompt, place, layer and way to score a label."""

    NAME: ClassVar[str] = "an information score"
    BY_CLIP: ClassVar[bool] = True
    COLUMNS: ClassVar[dict[str, str]] = {
        "model": "str",
        "attribute": "str",
        "form": "str",  # P1, P2, P3
        "sample": "str",
        "label": "str",
        "n_labels": "int64",
        "label_space": "bool",  # labels are scored by their first token, with or without the space before it
        "norm": "bool",  # whether the final norm was applied
        "knockout": "str",  # what could not look at what, in words
        "place": "str",  # last, or penultimate: the word that names the attribute
        "layer": "int64",  # 0-based block
        "predicted": "str",  # the label with the largest logit, the first of those that have it
        "is_right": "bool",
        "right_at_end": "bool",  # whether the last layer is right at the last position
        "probability": "float64",  # of the true label's first token, over the whole vocabulary
    }

    def curves(self, by_outcome: bool = False, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Information scores by layer with their 95 % bootstrap intervals over clips; with `by_outcome`, of the clips
        that the last layer gets right and of those that it gets wrong apart."""
        by = [*ONE_CURVE, "right_at_end"] if by_outcome else ONE_CURVE
        found = []
        for key, rows in self.frame.groupby(by, sort=False):
            rights = rights_of(rows)[:, 0]
            low, high = intervals(rights, lambda means: means, n_resamples, seed)
            curve = {"layer": sorted(rows.layer.unique()), "n": len(rights), "score": rights.mean(0)}
            found.append(pd.DataFrame({**dict(zip(by, key, strict=True)), **curve, "low": low, "high": high}))
        return pd.concat(found, ignore_index=True)

    def points(self, alpha: float = 0.2, layer_base: int = 1, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Critical layer and accuracy of every attribute and prompt, with 95 % bootstrap intervals over clips: what
        `resolution_correlation` correlates. An interval is NaN if the critical layer of some resample is undefined."""
        groups = self.frame.groupby(ONE_CURVE, sort=False)
        return pd.DataFrame(
            {**dict(zip(ONE_CURVE, key, strict=True)), **point(rows, alpha, layer_base, n_resamples, seed)}
            for key, rows in groups
        )

    def table(self, alpha: float = 0.2, layer_base: int = 1, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Table II: critical layer and accuracy averaged over prompts. A prompt whose critical layer is undefined is
        left out of that mean; `n_defined` counts the others."""
        by = ONE_CURVE[:-1]
        return pd.DataFrame(
            {
                **dict(zip(by, key, strict=True)),
                "forms": ", ".join(sorted(rows.form.unique())),
                **point(rows, alpha, layer_base, n_resamples, seed),
            }
            for key, rows in self.frame.groupby(by, sort=False)
        )

    def shuffled(self, seed: int = 0) -> "InformationScore":
        """The same predictions of clips whose labels have changed places: what chance alone would score."""
        clips = self.frame[["model", "attribute", "sample", "label"]].drop_duplicates()
        of_attribute = clips.groupby(["model", "attribute"], sort=False).label
        drawn = drawing(seed)
        new = clips.assign(label=of_attribute.transform(lambda labels: drawn.permutation(labels.to_numpy())))
        frame = self.frame.drop(columns="label").merge(new, on=["model", "attribute", "sample"])
        frame = frame.assign(is_right=frame.predicted == frame.label, probability=np.nan)
        return InformationScore.concat([with_outcomes(frame)])

    def plot(self, view: ScoreView = "forms") -> "Figure":
        """Scores by layer, a panel per attribute. `forms`: at the last position, by prompt (Fig. 2). `outcomes`: the
        clips that the last layer gets right, and wrong (Fig. 3). `places`: at the last and the penultimate position,
        and under knockouts that are in the table (Fig. 4). The last two are of the last of the forms, P3."""
        if view not in get_args(ScoreView):
            raise DataError(f"There is no view {view!r}. Choose one of {', '.join(get_args(ScoreView))}.")
        self.refuse_mixed(("model", "norm"))
        frame = self.frame[self.frame.label_space == self.frame.label_space.iloc[0]]
        is_last, is_whole = frame.place == "last", frame.knockout == "none"
        frame = frame[is_last | is_whole if view == "places" else is_last & is_whole]
        if view != "forms":
            frame = frame[frame.form == frame.form.max()]
        if not len(frame):
            raise DataError(f"The table has nothing to show as {view}: score the last position without knockouts.")
        curves = InformationScore(frame).curves(by_outcome=view == "outcomes")
        return plots_module("lens_plots").score_curves(curves.assign(line=line_names(curves, view)))

    def __repr__(self) -> str:
        shown = self.table(n_resamples=100).drop(columns=["model", "norm"])
        if (shown.knockout == "none").all():
            shown = shown.drop(columns="knockout")
        table = shown.to_string(index=False, float_format="{:.3f}".format)
        return f"InformationScore({self.frame.model.iloc[0]}, {self.frame['sample'].nunique()} clips)\n{table}"


def line_names(curves: pd.DataFrame, view: ScoreView) -> pd.Series:
    if view == "forms":
        return curves.form
    if view == "outcomes":
        return curves.right_at_end.map({True: "right at the end", False: "wrong at the end"})
    return curves.place.where(curves.knockout == "none", curves.place + ", " + curves.knockout)


def rights_of(rows: pd.DataFrame) -> Shaped[np.ndarray, "sample form layer"]:
    """Whether each layer is right about each clip. Raises `DataError` unless it was asked in the same prompts."""
    grid = rows.pivot_table(index="sample", columns=["form", "layer"], values="is_right", aggfunc="size")
    if (grid != 1).any(axis=None):
        raise DataError(
            "Some clips are missing in one of the prompts, or in the table twice. Score all in all of them."
        )
    rights = rows.pivot(index="sample", columns=["form", "layer"], values="is_right").sort_index(axis="columns")
    return rights.to_numpy(bool).reshape(len(rights), rows.form.nunique(), -1)


def point(rows: pd.DataFrame, alpha: float, layer_base: int, n_resamples: int, seed: int) -> dict[str, int | float]:
    """Critical layer and accuracy of one prompt, or their means over several."""
    rights, n_labels = rights_of(rows), int(rows.n_labels.iloc[0])

    def of(means: Float[np.ndarray, "resample form layer"]) -> Float[np.ndarray, "resample 2"]:
        layers = critical_layer(means, n_labels, alpha=alpha, layer_base=layer_base)
        return np.stack([mean_defined(layers), means[..., -1].mean(-1)], axis=-1)

    means = rights.mean(0)[None]
    (layer, accuracy), (low, high) = of(means)[0], intervals(rights, of, n_resamples, seed)
    defined = int(np.isfinite(critical_layer(means, n_labels, alpha=alpha)).sum())
    numbers = (layer, low[0], high[0], accuracy, low[1], high[1])
    return {
        "layer_base": layer_base,
        "n": len(rights),
        "n_defined": defined,
        **dict(zip(POINT, map(float, numbers), strict=True)),
    }


@typed
def information_score(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    forms: Sequence[Form] = ("P1", "P2", "P3"),
    label_spaces: Sequence[bool] = (False, True),
    norm: bool = True,
    knockouts: Sequence[Knockout] = (),
    token_budget: int | None = None,
    progress: bool = True,
) -> InformationScore:
    """What every layer predicts of every clip, at the last position and at the one before the last word.

    A prediction is the label whose first token has the largest logit; the first of them where several have it. Of
    `label_spaces`, the paper's released code takes False: labels without the space before them; what comes first here
    is drawn. All clips count. `knockouts` are made in the run that is read: the paper's masking of auditory inputs
    (section VI-D) is `Knockout(range(n_layers), (-1,), "audio")`. `token_budget` as in `logit_lens`.

    Raises `PromptError` for labels that cannot be told apart or are not the attribute's, `AudioError` for a clip that
    the model cannot hear, `DataError` for a clip that comes twice.
    """
    attribute = attribute_named(attribute) if isinstance(attribute, str) else attribute
    if not forms or not label_spaces:
        raise InputError("Nothing is scored: name at least one of the forms, and of the label spaces.")
    check_asked(model, samples, attribute, label_spaces)
    processor = processor_of(model)
    tokens = [token for space in label_spaces for token in processor.label_tokens(attribute.labels, space).values()]
    frames = []
    with tqdm(total=len(samples) * len(forms), desc=f"reading {attribute.name}", disable=not progress) as bar:
        for form in forms:
            asked = [asked_of(processor, sample, attribute, form) for sample in samples]
            read = read_all(model, processor, asked, Reading(tuple(tokens), norm=norm), knockouts, token_budget, bar)
            for each, its in zip(asked, read, strict=True):
                frames += [frame.assign(form=form) for frame in predictions(each, its, attribute, label_spaces)]
    about = {"model": model.cfg.model_name, "attribute": attribute.name, "n_labels": len(attribute.labels)}
    frame = pd.concat(frames, ignore_index=True).assign(**about, norm=norm, knockout=told(knockouts))
    return InformationScore.concat([with_outcomes(frame)])


def asked_of(processor: Processor, sample: Sample, attribute: Attribute, form: Form) -> Asked:
    """To be read at the last position and, where the answer begins with two words or more, behind the last but one."""
    asked = Asked.of(processor, sample, attribute, form, (-1,))
    if not asked.prompt.is_region("attribute").any():
        return asked
    penultimate = run_of(asked.prompt).indices("attribute")[-1]
    return Asked(sample, asked.prompt, (penultimate, *asked.at))


def predictions(
    asked: Asked, read: Words, attribute: Attribute, label_spaces: Sequence[bool]
) -> Iterator[pd.DataFrame]:
    """A table for every place and label space."""
    n_labels, true = len(attribute.labels), attribute.labels.index(asked.sample.label)
    for at, place in ((-1, "last"), (-2, "penultimate"))[: len(asked.at)]:
        for n, label_space in enumerate(label_spaces):
            own = slice(n * n_labels, (n + 1) * n_labels)
            chosen = np.argmax(read.logit[:, at, own].numpy(), axis=-1)  # the first of the largest
            yield pd.DataFrame(
                {
                    "sample": asked.sample.name,
                    "label": asked.sample.label,
                    "label_space": label_space,
                    "place": place,
                    "layer": np.arange(len(chosen)),
                    "predicted": np.array(attribute.labels)[chosen],
                    "is_right": chosen == true,
                    "probability": read.log_prob[:, at, own][:, true].double().exp().numpy(),
                }
            )


def with_outcomes(frame: pd.DataFrame) -> pd.DataFrame:
    """With what the last layer makes of each clip at the last position."""
    one_run = ["model", "attribute", "form", "label_space", "norm", "knockout", "sample"]
    ends = frame[(frame.place == "last") & (frame.layer == frame.groupby("model").layer.transform("max"))]
    ends = ends[[*one_run, "is_right"]].rename(columns={"is_right": "right_at_end"})
    return frame.drop(columns="right_at_end", errors="ignore").merge(ends, on=one_run, how="left")
