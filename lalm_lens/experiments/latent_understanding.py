"""Latent understanding: do the states of what is heard or seen name it, whether or not the answer does?

After arXiv 2604.02605: the logit lens reads every layer at the positions of the clip (or picture), and a clip counts as
understood where some position's largest tokens, in some of the layers, name its label. The paper does not say when a
token names a concept: here the rule is an argument. Among 750 positions of 28 layers much is named, so that beside the
score stands what other clips' labels score in the same states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from tqdm import tqdm

from lalm_lens.aggregates import intervals
from lalm_lens.attributes import Attribute, Form
from lalm_lens.datasets import Sample
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question, processor_of
from lalm_lens.experiments.concepts import FirstToken, Named, Rule
from lalm_lens.experiments.lens import Asked, Reading, Words, read_all
from lalm_lens.model import HookedLALM
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.shapes import typed
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = ("model", "attribute", "form", "rule", "norm", "top_k")


@typed
def latent_understanding(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    rule: Rule | None = None,
    places: Sequence[str] = ("audio",),
    top_k: int = 1,
    norm: bool = True,
    form: Form = "P3",
    token_budget: int | None = None,
    progress: bool = True,
) -> "LatentUnderstanding":
    """Count the positions whose `top_k` largest tokens name a label, for every label, layer and place.

    `rule` says which tokens name a label: `FirstToken()` by default, `ExactWord()`, or `AnyOf(words)`. `places` are
    regions of the prompt: `audio`, `image`, `video`, ... `norm` applies the final norm; the released code of arXiv
    2604.02605 does not. What stands behind the clip changes nothing of what is read there.

    Raises what `logit_lens` raises, `PromptError` for labels that the rule cannot find, and `DataError` for clips of
    one label alone, which nothing could be compared with.
    """
    question = Question.about(model, samples, attribute, form, True)
    if top_k < 1:
        raise InputError(f"top_k is 1 or more; got {top_k}.")
    if len({sample.label for sample in samples}) < 2:
        raise DataError("All clips are of one label, so nothing says what another's would score: give clips of two.")
    rule = FirstToken() if rule is None else rule
    processor = processor_of(model)
    named = rule.tokens(processor, question.labels)
    asked = [Asked.of(processor, sample, question.attribute, form, *places) for sample in samples]
    with tqdm(total=len(asked), desc=f"reading {question.attribute.name}", unit="clip", disable=not progress) as bar:
        read = read_all(model, processor, asked, Reading(top_k=top_k, norm=norm), (), token_budget, bar)
    frames = [
        counted(named, each, words).assign(**question.columns(each.sample))
        for each, words in zip(asked, read, strict=True)
    ]
    about = {"rule": str(rule), "top_k": top_k, "norm": norm}
    return LatentUnderstanding.concat([frame.assign(**about) for frame in frames])


def counted(named: Named, asked: Asked, words: Words) -> pd.DataFrame:
    """How many positions of each place name each label, layer by layer."""
    region = np.array([asked.prompt.positions[n].region for n in asked.at])
    hits = {
        label: torch.isin(words.token, torch.tensor(sorted(tokens))).any(-1).numpy() for label, tokens in named.items()
    }  # [layer, at]
    return pd.DataFrame(
        {"place": place, "layer": layer, "option": label, "n_at": len(its), "n_named": int(its.sum())}
        for label, hit in hits.items()
        for place in dict.fromkeys(region.tolist())
        for layer, its in enumerate(hit[:, region == place])
    )


@dataclass(frozen=True, repr=False)
class LatentUnderstanding(Table):
    """What states of a clip name, one row per clip, place, layer and label."""

    NAME: ClassVar[str] = "a table of latent understanding"
    HEADLINE: ClassVar[tuple[str, str] | None] = "score", "Share of clips whose states name their label"
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        "seen_label": "str",  # of a counterfactual pair, another one than `label`
        "rule": "str",  # which tokens name a label
        "norm": "bool",  # whether the final norm was applied
        "top_k": "int64",
        "place": "str",
        "layer": "int64",  # 0-based block
        "option": "str",  # the label that is looked for
        "n_at": "int64",  # positions of the place
        "n_named": "int64",  # those of them that name it
    }

    @typed
    def scores(
        self, layers: Sequence[int] | None = None, min_positions: int = 1, n_resamples: int = 1000, seed: int = 0
    ) -> pd.DataFrame:
        """The share of clips that are understood, by place, with 95 % bootstrap intervals over clips.

        A clip counts where at least `min_positions` positions of one of `layers` (all by default) name its label.
        `control` is the same of the labels of other clips: for each clip, the mean over all clips of other labels.
        `difference` is score - control, paired by clip. Raises `DataError` for mixed settings, and layers that there
        are not.
        """
        chosen = sorted(self.frame.layer.unique()) if layers is None else list(layers)
        if unknown := set(chosen) - set(self.frame.layer):
            raise DataError(f"The table has no layer {min(unknown)}, only 0 to {self.frame.layer.max()}.")
        if not chosen or min_positions < 1:
            raise DataError("A score is of one layer or more, and of one position or more.")
        return self.scored(self.frame[self.frame.layer.isin(chosen)], ["place"], min_positions, n_resamples, seed)

    @typed
    def by_layer(self, min_positions: int = 1, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """The same of every layer by itself."""
        return self.scored(self.frame, ["place", "layer"], min_positions, n_resamples, seed)

    def scored(
        self, frame: pd.DataFrame, by: list[str], min_positions: int, n_resamples: int, seed: int
    ) -> pd.DataFrame:
        self.refuse_mixed(SETTINGS)
        found = []
        for key, rows in frame.groupby(by, sort=False):
            most = rows.groupby(["sample", "label", "option"], sort=False).n_named.max().unstack("option")
            hits, label = most >= min_positions, most.index.get_level_values("label")
            pairs = np.stack([of_itself(hits, label), of_others(hits, label)], axis=-1)
            found.append({**dict(zip(by, key, strict=True)), "n": len(pairs), **compared(pairs, n_resamples, seed)})
        return pd.DataFrame(found)

    def overview(self) -> pd.DataFrame:
        return self.scores()

    def lines(self) -> pd.DataFrame:
        layers = self.by_layer().rename(columns={"place": "line", "score_low": "low", "score_high": "high"})
        return layers[["line", "layer", "score", "low", "high"]]

    def plot(self) -> "Figure":
        """The score of every layer and its control; a panel per place."""
        return plots_module("heard_plots").understanding(self.by_layer(), self.scores(), self.frame)

    def __repr__(self) -> str:
        one = self.frame.iloc[0]
        shown = self.scores().to_string(index=False, float_format="{:.3f}".format)
        return f"LatentUnderstanding({one.model}, {one.attribute}, {one.rule}, top {one.top_k})\n{shown}"


def of_itself(hits: pd.DataFrame, label: pd.Index) -> Float[np.ndarray, " clip"]:
    """Whether each clip's states name its label."""
    return hits.to_numpy(float)[np.arange(len(hits)), hits.columns.get_indexer(label)]


def of_others(hits: pd.DataFrame, label: pd.Index) -> Float[np.ndarray, " clip"]:
    """How many of the labels of clips of other labels each clip's states name."""
    times = label.value_counts().reindex(hits.columns, fill_value=0).to_numpy(float)
    weights = np.where(hits.columns.to_numpy() == label.to_numpy()[:, None], 0.0, times)
    return (hits.to_numpy(float) * weights).sum(1) / weights.sum(1)


def compared(pairs: Float[np.ndarray, "clip 2"], n_resamples: int, seed: int) -> dict[str, float]:
    def of(means: Float[np.ndarray, "resample 2"]) -> Float[np.ndarray, "resample 3"]:
        return np.concatenate([means, means[:, :1] - means[:, 1:]], axis=-1)

    low, high = intervals(pairs, of, n_resamples, seed)
    told = {}
    for n, (name, mean) in enumerate(zip(("score", "control", "difference"), of(pairs.mean(0)[None])[0], strict=True)):
        told |= {name: float(mean), f"{name}_low": float(low[n]), f"{name}_high": float(high[n])}
    return told
