"""Enrichment: give a deep layer what an earlier one knew (arXiv 2506.05140, section VI-E).

    h[l + gap] <- h[l + gap] + lambda h[l]        at the last position                                (eq. 5)

The layer l is that with the highest information score among the wrongly answered clips of a probing set; against it
stand layers drawn anew for every clip. What is gained is measured on other clips.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from tqdm import tqdm

from lalm_lens.aggregates import interval, intervals
from lalm_lens.attributes import Attribute, Form, attribute_named
from lalm_lens.datasets import Sample, split
from lalm_lens.draws import drawing, refuse_seed
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import Engine, Plan
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question, check_asked
from lalm_lens.experiments.information_score import information_score
from lalm_lens.interventions import Add
from lalm_lens.model import HookedLALM
from lalm_lens.readouts import Logits
from lalm_lens.results import plots_module
from lalm_lens.runs import OWN, Source
from lalm_lens.shapes import typed
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FACTORS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, repr=False)
class Enrichment(Table):
    """What is answered under enrichment: one row per clip, factor and layer."""

    NAME: ClassVar[str] = "an enrichment"
    COLUMNS: ClassVar[dict[str, str]] = {
        "model": "str",
        "attribute": "str",
        "form": "str",
        "label_space": "bool",
        "engine": "str",
        "split": "str",  # probing, or test
        "arm": "str",  # chosen: the layer of the probing set; random: drawn for each clip
        "seed": "Int64",  # of what is drawn
        "sample": "str",
        "label": "str",
        "layer": "int64",  # l, 0-based; enriched is l + gap
        "gap": "int64",
        "factor": "float64",  # lambda
        "predicted": "str",
        "is_right": "bool",
    }

    def curves(self, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Accuracy by factor: of the chosen layer with its 95 % bootstrap interval over clips, of random layers as the
        mean over seeds with their standard deviation."""
        found = []
        for (part, arm, factor), rows in self.frame.groupby(["split", "arm", "factor"]):
            by_clip, by_seed = (rows.groupby(name, dropna=False).is_right.mean() for name in ("sample", "seed"))
            low, high = interval(by_clip.to_numpy(), n_resamples, seed)
            its = {"split": part, "arm": arm, "factor": factor, "n": len(by_clip), "accuracy": by_clip.mean()}
            found.append({**its, "low": low, "high": high, "sd": by_seed.std() if len(by_seed) > 1 else np.nan})
        return pd.DataFrame(found)

    def summary(self, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """The relative gain (accuracy - accuracy at factor 0) / accuracy at factor 0 on the test clips, with the factor
        picked on them, as published, and on the probing clips; the smallest where several are best.

        The 95 % intervals are over test clips at that factor: that it was picked on the same clips is not in them.
        `random` is the accuracy of random layers at the factor, with `random_sd` over seeds."""
        chosen = self.frame[self.frame.arm == "chosen"]
        accuracy = chosen.groupby(["split", "factor"]).is_right.mean()
        return pd.DataFrame(
            {
                **{name: chosen[name].iloc[0] for name in ("attribute", "form", "label_space")},
                "layer": chosen.layer.iloc[0],
                "gap": chosen.gap.iloc[0],
                "picked_on": split,
                "factor": (best := float(accuracy[split].idxmax())),
                **gain(chosen[chosen.split == "test"], best, n_resamples, seed),
                **self.random_at(best),
            }
            for split in ("test", "probing")
        )

    def random_at(self, factor: float) -> dict[str, int | float]:
        rows = self.frame[(self.frame.arm == "random") & (self.frame.factor == factor)]
        by_seed = rows.groupby("seed").is_right.mean()
        return {"random": by_seed.mean(), "random_sd": by_seed.std()}

    def overview(self) -> pd.DataFrame:
        return self.summary().drop(columns=["attribute", "form", "label_space"])

    def plot(self) -> "Figure":
        """Accuracy on the test clips by factor, of the chosen layer and of random ones (Fig. 5)."""
        frame, rows = self.frame, self.curves()
        chosen = frame[frame.arm == "chosen"].iloc[0]
        title = (
            f"{chosen.model}: {chosen.attribute}, {chosen.form}, layer {chosen.layer} added to layer "
            f"{chosen.layer + chosen.gap}"
        )
        return plots_module("lens_plots").factor_curves(rows[rows.split == "test"], title)

    def __repr__(self) -> str:
        n = self.frame[self.frame.arm == "chosen"].groupby("split")["sample"].nunique()
        table = self.summary(n_resamples=100).to_string(index=False, float_format="{:.3f}".format)
        return f"Enrichment({self.frame.model.iloc[0]}, {n['probing']} probing and {n['test']} test clips)\n{table}"


def gain(rows: pd.DataFrame, factor: float, n_resamples: int, seed: int) -> dict[str, int | float]:
    rights = rows.pivot(index="sample", columns="factor", values="is_right")[[0.0, factor]].to_numpy(bool)

    def of(means: np.ndarray) -> np.ndarray:
        before, after = means[..., 0], means[..., 1]
        return np.divide(after - before, before, out=np.full(before.shape, np.nan), where=before > 0)

    means = rights.mean(0)[None]
    low, high = intervals(rights, of, n_resamples, seed)
    return {
        "n": len(rights),
        "accuracy_0": float(means[0, 0]),
        "accuracy": float(means[0, 1]),
        "gain": float(of(means)[0]),
        "low": float(low),
        "high": float(high),
    }


@dataclass(frozen=True)
class Settings:
    """What is the same for all clips."""

    question: Question
    gap: int
    factors: tuple[float, ...]
    engine: Engine
    token_budget: int | None


@dataclass(frozen=True)
class Clip:
    """What is enriched, and the layers that are added, by seed: the chosen one has none."""

    split: str
    sample: Sample
    layers: Mapping[int | None, int]


@typed
def enrich(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    form: Form = "P3",
    n_probing: int = 100,
    seed: int = 0,
    gap: int = 5,
    factors: Sequence[float | int] = FACTORS,
    n_seeds: int = 5,
    label_space: bool = False,
    engine: Engine = "auto",
    token_budget: int | None = None,
    n_together: int = 8,
    progress: bool = True,
) -> Enrichment:
    """Add the chosen layer's last state to that `gap` layers deeper, `factors` times (eq. 5); 0 is always among them.

    Of the clips, `n_probing` choose the layer, in the proportions of their labels; `seed` says which. All others are
    the test clips; on them `n_seeds` times a layer is drawn for every clip, evenly among those with one `gap` layers
    deeper. Where layers are equally good the first is chosen. `label_space` as in `information_score`, `engine` and
    `token_budget` as in `Plan`; `n_together` clips share a sweep.

    Raises `DataError` if a split would be empty or no probing clip is answered wrongly, `InputError` for a gap that
    leaves no layer; and what `information_score` raises.
    """
    refuse_seed(seed)
    attribute = attribute_named(attribute) if isinstance(attribute, str) else attribute
    n_layers, tried = model.decoder_cfg.n_layers, tuple(sorted({0.0, *map(float, factors)}))
    if not np.isfinite(tried).all():
        raise InputError(f"Factors are finite numbers; got {', '.join(map(str, factors))}.")
    if not 1 <= gap < n_layers:
        raise InputError(f"A gap is from 1 to {n_layers - 1}, one less than there are layers; got {gap}.")
    if n_together < 1 or n_seeds < 0:
        raise InputError(f"n_together is 1 or more and n_seeds 0 or more; got {n_together} and {n_seeds}.")
    check_asked(model, samples, attribute, [label_space])
    probing, test = split(samples, n_probing, seed)
    layer = chosen_layer(model, probing, attribute, form, label_space, gap, token_budget, progress)
    drawn = [drawing([seed, n]).integers(0, n_layers - gap, len(test)).tolist() for n in range(n_seeds)]
    clips = [Clip("probing", sample, {None: layer}) for sample in probing]
    clips += [
        Clip("test", sample, {None: layer, **{n: its[at] for n, its in enumerate(drawn)}})
        for at, sample in enumerate(test)
    ]
    settings = Settings(Question(model, attribute, form, label_space), gap, tried, engine, token_budget)
    frames = []
    with tqdm(total=len(clips), desc="enriching", unit="clip", disable=not progress) as bar:
        for start in range(0, len(clips), n_together):
            together = clips[start : start + n_together]
            frames.append(enriched(together, settings))
            bar.update(len(together))
    return Enrichment.concat(frames)


def chosen_layer(
    model: HookedLALM,
    probing: Sequence[Sample],
    attribute: Attribute,
    form: Form,
    label_space: bool,
    gap: int,
    token_budget: int | None,
    progress: bool,
) -> int:
    """The layer that is most often right about the clips that the last one gets wrong, of those with one to enrich."""
    how = {"label_spaces": (label_space,), "token_budget": token_budget, "progress": progress}
    frame = information_score(model, probing, attribute=attribute, forms=(form,), **how).to_frame()
    wrong = frame[(frame.place == "last") & ~frame.right_at_end]
    if not len(wrong):
        raise DataError(f"All {len(probing)} probing clips are answered rightly, so that no layer can be chosen.")
    scores = wrong.groupby("layer").is_right.mean().to_numpy()
    return int(np.argmax(scores[: model.decoder_cfg.n_layers - gap]))


def enriched(clips: Sequence[Clip], settings: Settings) -> pd.DataFrame:
    """What is answered about some clips, with each of their layers added by every factor."""
    question, branches, rows = settings.question, [], []
    for clip in clips:
        run = question.run(clip.sample)
        for (seed, layer), factor in product(clip.layers.items(), settings.factors):
            branches.append(Branch(run, (enrichment(layer, factor, settings.gap),)))
            arm = "chosen" if seed is None else "random"
            about = {"split": clip.split, "sample": clip.sample.name, "label": clip.sample.label}
            rows.append({**about, "arm": arm, "seed": seed, "layer": layer, "factor": factor})
    how = {"engine": settings.engine, "token_budget": settings.token_budget}
    outcome = Plan(question.model, branches, Logits(tokens=tuple(question.tokens)), **how).run()
    if not outcome.values.isfinite().all():
        raise InputError(f"Logits of an enriched run are not finite. Give smaller factors than {settings.factors[-1]}.")
    predicted = np.array(question.labels)[np.argmax(outcome.values[:, 0].float().cpu().numpy(), axis=-1)]
    frame = pd.DataFrame(rows).assign(predicted=predicted)
    return frame.assign(
        model=question.model.cfg.model_name,
        attribute=question.attribute.name,
        form=question.form,
        label_space=question.label_space,
        engine=outcome.engine,
        gap=settings.gap,
        is_right=frame.predicted == frame.label,
    )


def enrichment(layer: int, factor: float, gap: int) -> Add:
    """Eq. 5."""
    return Add("resid_post", layer + gap, (-1,), Source(OWN, layer=layer), factor=factor)
