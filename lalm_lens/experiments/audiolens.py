"""All that AudioLens shows of a model (arXiv 2506.05140): its figures 2 to 5 and its tables II and III, at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lalm_lens.attributes import Attribute, Form, attribute_named
from lalm_lens.datasets import Sample
from lalm_lens.errors import DataError, InputError, PromptError
from lalm_lens.experiments.asked import processor_of
from lalm_lens.experiments.enrich import FACTORS, Enrichment, enrich
from lalm_lens.experiments.information_score import InformationScore, information_score
from lalm_lens.experiments.resolution import resolution_correlation
from lalm_lens.interventions import Knockout
from lalm_lens.model import HookedLALM
from lalm_lens.results import plots_module
from lalm_lens.shapes import typed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMS: tuple[Form, ...] = ("P1", "P2", "P3")
SPACES = {False: "", True: "_with_space"}  # of first tokens of labels, in names of files


@dataclass(frozen=True, repr=False)
class AudioLens:
    """Scores of every layer, with and without the audio at the last position, and enrichment. `left_out` says what
    could not be done, and why."""

    scores: InformationScore
    enrichment: Enrichment | None
    left_out: tuple[str, ...] = ()

    @classmethod
    def concat(cls, parts: Sequence["AudioLens"]) -> "AudioLens":
        """Of its attributes."""
        scores = InformationScore.concat([part.scores.frame for part in parts])
        enriched = [part.enrichment.frame for part in parts if part.enrichment is not None]
        told = tuple(line for part in parts for line in part.left_out)
        return cls(scores, Enrichment.concat(enriched) if enriched else None, told)

    @typed
    def tables(
        self, alpha: float = 0.2, layer_base: int = 1, n_resamples: int = 1000, seed: int = 0
    ) -> dict[str, pd.DataFrame]:
        """By name: `table_2` (critical layer and accuracy, means over prompts), `points` (the same by prompt),
        `table_3` (their correlation, without each attribute too), `curves` (by layer), `outcomes` (of clips that the
        last layer gets right and wrong), and `enrichment`."""
        how: dict = {"n_resamples": n_resamples, "seed": seed}
        points = self.scores.points(alpha, layer_base, **how)
        of_last = heard(points)
        tables = {
            "table_2": self.scores.table(alpha, layer_base, **how),
            "points": points,
            "table_3": resolution_correlation(of_last, list(of_last.attribute.unique())),
            "curves": self.scores.curves(**how),
            "outcomes": self.scores.curves(by_outcome=True, **how),
        }
        if self.enrichment is not None:
            tables["enrichment"] = pd.concat([its.summary(**how) for its in self.enriched], ignore_index=True)
        return tables

    @property
    def enriched(self) -> list[Enrichment]:
        """One of each attribute."""
        if self.enrichment is None:
            return []
        return [Enrichment(rows) for _, rows in self.enrichment.frame.groupby("attribute", sort=False)]

    @typed
    def figures(self, alpha: float | int = 0.2, layer_base: int = 1) -> Iterator[tuple[str, "Figure"]]:
        """By name: `forms` (Fig. 2), `outcomes` (Fig. 3) and `places` (Fig. 4), for each way to score a label,
        `resolution` (Table III as points), and `enrichment_{attribute}` (Fig. 5)."""
        frame = self.scores.frame
        for space, ending in SPACES.items():
            scores = InformationScore(frame[frame.label_space == space])
            if not len(scores.frame):
                continue
            yield f"forms{ending}", scores.plot("forms")
            yield f"outcomes{ending}", scores.plot("outcomes")
            yield f"places{ending}", scores.plot("places")
            points = heard(scores.points(float(alpha), layer_base, n_resamples=100))
            (correlation,) = resolution_correlation(points).to_dict("records")
            yield f"resolution{ending}", plots_module("lens_plots").resolution(points, correlation)
        for its in self.enriched:
            yield f"enrichment_{its.frame.attribute.iloc[0]}", its.plot()

    def save(self, out: str | Path) -> list[Path]:
        """`scores.parquet` and `enrichment.parquet` in a folder, each whole or not at all."""
        found = [self.scores.save(Path(out) / "scores.parquet")]
        return found if self.enrichment is None else [*found, self.enrichment.save(Path(out) / "enrichment.parquet")]

    def __repr__(self) -> str:
        parts = [repr(self.scores), *map(repr, self.enriched), *(f"left out: {line}" for line in self.left_out)]
        return "\n".join(parts)


@typed
def audiolens(
    model: HookedLALM,
    samples: Mapping[str, Sequence[Sample]] | Mapping[Attribute, Sequence[Sample]],
    *,
    forms: Sequence[Form] = FORMS,
    label_spaces: Sequence[bool] = (False, True),
    n_probing: int | None = None,
    seed: int = 0,
    gap: int = 5,
    factors: Sequence[float | int] = FACTORS,
    n_seeds: int = 5,
    token_budget: int | None = None,
    progress: bool = True,
) -> AudioLens:
    """AudioLens' experiments with a model on clips of some attributes, which are given by name or as `Attribute`s.

    Scores are of all `forms`, and of the last of them once more with the audio, and its transcript where the model
    reads one, cut off from the last position in all layers. Enrichment is of that form too, its layer chosen on
    `n_probing` clips of an attribute, a fifth by default as in the paper (100 of 500). Labels that begin with the same
    token without the space before them are scored with it alone. What that leaves out is told, as is enrichment where
    no probing clip is answered wrongly. All else as in `information_score` and `enrich`.
    """
    if not samples:
        raise DataError("There is nothing to look at: give clips of at least one attribute.")
    n_layers = model.decoder_cfg.n_layers
    if not forms or len(set(forms)) < len(forms):
        raise InputError(f"Name one of the forms or more, each once; got {', '.join(forms) or 'none'}.")
    if not 1 <= gap < n_layers:
        raise InputError(f"A gap is from 1 to {n_layers - 1}, one less than there are layers; got {gap}.")
    parts = []
    for asked, clips in samples.items():
        attribute = attribute_named(asked) if isinstance(asked, str) else asked
        spaces, told = told_apart(model, attribute, label_spaces)
        how: dict = {"attribute": attribute, "token_budget": token_budget, "progress": progress}
        scores = [
            information_score(model, clips, forms=chosen, label_spaces=spaces, knockouts=cut, **how).frame
            for chosen, cut in ((forms, ()), (forms[-1:], deafness(model)))
        ]
        how |= {"form": forms[-1], "label_space": spaces[0], "gap": gap, "factors": factors, "n_seeds": n_seeds}
        n = max(1, len(clips) // 5) if n_probing is None else n_probing
        try:
            enriched = enrich(model, clips, n_probing=n, seed=seed, **how)
        except DataError as error:
            enriched, told = None, [*told, f"enrichment of {attribute.name}: {error}"]
        parts.append(AudioLens(InformationScore.concat(scores), enriched, tuple(told)))
    return AudioLens.concat(parts)


def heard(points: pd.DataFrame) -> pd.DataFrame:
    """Those of the last position, without knockouts."""
    return points[(points.knockout == "none") & (points.place == "last")]


def told_apart(
    model: HookedLALM, attribute: Attribute, label_spaces: Sequence[bool]
) -> tuple[tuple[bool, ...], list[str]]:
    """Those of the label spaces in which no two labels begin with the same token, and why others are left out."""
    possible, told = [], []
    for space in label_spaces:
        try:
            processor_of(model).label_tokens(attribute.labels, space)
        except PromptError as error:
            if space or True not in label_spaces:
                raise
            told.append(f"scores of {attribute.name} without the space before labels: {error}")
        else:
            possible.append(space)
    return tuple(possible), told


def deafness(model: HookedLALM) -> list[Knockout]:
    """The masking of auditory inputs, which are the transcript too (section VI-D, footnotes 4 and 5)."""
    heard = ("audio", "transcript") if processor_of(model).template.has_transcript else ("audio",)
    return [Knockout(range(model.decoder_cfg.n_layers), (-1,), keys) for keys in heard]
