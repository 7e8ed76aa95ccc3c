"""The specification curve: do published claims survive the choices that the papers leave open?

Every combination of choices is a specification; in each, every claim of `lalm_lens.experiments.claims` that traces and
scores of one model and one attribute can decide is measured (after Simonsohn, Simmons and Nelson 2020,
doi 10.1038/s41562-020-0912-z). Choices that only read what was run, as the metric, do not run the model again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pandas as pd

from lalm_lens.attributes import Attribute, Form, attribute_named
from lalm_lens.corrupt import Corruption, OtherClip, Silence, WhiteNoise
from lalm_lens.datasets import Sample
from lalm_lens.engine.plan import Engine
from lalm_lens.errors import DataError, PromptError
from lalm_lens.experiments.asked import processor_of
from lalm_lens.experiments.choices import Average, Choices, Objects, Template
from lalm_lens.experiments.specified_scores import score_rows, scored
from lalm_lens.experiments.specified_traces import trace_rows, traced
from lalm_lens.metrics import Metric, Predict
from lalm_lens.model import HookedLALM
from lalm_lens.results import plots_module
from lalm_lens.shapes import typed
from lalm_lens.tables import Table
from lalm_lens.transcripts import Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRACE_CHOICES = (
    "corruption",
    "transcript",
    "template",
    "label_space",
    "metric",
    "predict",
    "average",
    "object",
    "layer_base",
)
SCORE_CHOICES = ("norm", "label_space", "layer_base")
CHOICES = tuple(dict.fromkeys((*TRACE_CHOICES, *SCORE_CHOICES)))


@dataclass(frozen=True, repr=False)
class Specification(Table):
    """One row for each specification and claim. A column of a choice that a claim does not depend on is empty."""

    NAME: ClassVar[str] = "a specification curve"
    COLUMNS: ClassVar[dict[str, str]] = {
        "model": "str",
        "attribute": "str",
        "form": "str",  # of the prompts that are traced
        "claim": "str",  # the name of its measure
        "words": "str",
        "source": "str",
        "condition": "str",  # on which side of which bound it holds; none of a number without a claim
        "corruption": "str",  # silence, noise, clip
        "transcript": "str",  # what both runs read of a clip, where the prompt holds it
        "template": "str",  # what tokens of the chat template are: text, no text
        "label_space": "boolean",  # labels are scored with or without the space before them
        "metric": "str",
        "predict": "str",
        "average": "str",  # over clips: mean of rates, or ratio of mean differences
        "object": "str",  # option tokens: all, or of the correct one
        "layer_base": "Int64",  # number of the first layer
        "norm": "boolean",  # whether the lens applies the final norm
        "effect": "float64",  # the measure
        "low": "float64",  # 95 % bootstrap over clips
        "high": "float64",
        "n": "Int64",  # clips
        "holds": "boolean",
        "reason": "str",  # why it was not measured
    }

    def survival(self) -> pd.DataFrame:
        """Of each claim: in how many specifications it was measured and holds, and how far its effects spread."""
        groups = self.frame.groupby(["model", "attribute", "claim"], sort=False)
        return pd.DataFrame(
            {
                "attribute": attribute,
                "claim": claim,
                "condition": rows.condition.iloc[0],
                "specifications": len(rows),
                "measured": int(rows.effect.notna().sum()),
                "holds": int(rows.holds.sum()) if rows.condition.notna().any() else pd.NA,
                "smallest": rows.effect.min(),
                "median": rows.effect.median(),
                "largest": rows.effect.max(),
            }
            for (_, attribute, claim), rows in groups
        ).astype({"holds": "Int64"})

    def reasons(self) -> pd.DataFrame:
        """Why specifications were not measured, and how many rows that are."""
        missing = self.frame.dropna(subset="reason")
        return missing.groupby("reason", sort=False).size().rename("rows").reset_index()

    def overview(self) -> pd.DataFrame:
        return self.survival().drop(columns="attribute")

    def plot(self, claims: Sequence[str] | None = None) -> "Figure":
        """The curve of each claim: effects in order with their intervals and the claim's bound, and beneath them which
        choices each specification has made. Raises `DataError` for several models or attributes in one table, for
        claims that it does not have or has not measured, and without matplotlib."""
        self.refuse_mixed(("model", "attribute"))
        there = list(dict.fromkeys(self.frame.dropna(subset="effect").claim))
        if unknown := [name for name in claims or () if name not in there]:
            raise DataError(f"The table has no effect of {unknown[0]}, only of {', '.join(there)}.")
        if not there:
            raise DataError(f"Nothing was measured: {'; '.join(self.reasons().reason)}.")
        rows = self.frame[self.frame.claim.isin(there if claims is None else list(claims))]
        return plots_module("specification_plots").specification_curves(rows, CHOICES)

    def __repr__(self) -> str:
        frame, shown = self.frame, self.survival().drop(columns="attribute")
        table = shown.to_string(index=False, float_format="{:.3f}".format, na_rep="-")
        return f"Specification({frame.model.iloc[0]}, {', '.join(frame.attribute.unique())})\n{table}"


@typed
def specification_curve(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    form: Form = "P3",
    corruptions: Sequence[Corruption] = (Silence(), WhiteNoise(), OtherClip()),
    transcripts: Sequence[Reading | str] | None = None,
    templates: Sequence[Template] = ("text", "no text"),
    label_spaces: Sequence[bool] = (True, False),
    metrics: Sequence[Metric] = ("probability", "logit_difference"),
    predicts: Sequence[Predict] = ("labels", "vocab"),
    averages: Sequence[Average] = ("mean", "ratio_of_means"),
    objects: Sequence[Objects] = ("all", "correct"),
    layer_bases: Sequence[int] = (0, 1),
    norms: Sequence[bool] = (True, False),
    engine: Engine = "auto",
    token_budget: int | None = None,
    n_together: int = 4,
    n_resamples: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> Specification:
    """Measure the claims of causal tracing and AudioLens about these clips under every combination of choices.

    The model runs for each corruption, transcript (of models that read one; by default filler, clean, placeholder and
    own) and norm; tokens of the template are patched once more as text that is left out. All other choices read these
    runs again. Intervals are bootstraps over clips, the same resamples in all specifications of one number of clips.
    A choice that cannot be made about these clips, as labels that begin alike without a space, or a claim for which no
    clip is left, is a row with a `reason`.

    Raises what `causal_trace` and `information_score` raise for the clips and the question themselves.
    """
    attribute = attribute_named(attribute) if isinstance(attribute, str) else attribute
    chosen: Sequence[Reading | str | None] = transcripts or (None,)
    if transcripts is None and processor_of(model).template.has_transcript:
        chosen = ("filler", "clean", "placeholder", "own")
    choices = Choices(
        tuple(corruptions),
        tuple(chosen),
        tuple(templates),
        tuple(label_spaces),
        tuple(metrics),
        tuple(predicts),
        tuple(averages),
        tuple(objects),
        tuple(layer_bases),
        tuple(norms),
    )
    choices.check()
    spaces, unresolved = resolvable(model, attribute, choices.label_spaces)
    how = {"engine": engine, "token_budget": token_budget, "n_together": n_together, "progress": progress}
    clips, impossible = traced(model, samples, attribute, form, choices, spaces, how)
    tables = scored(model, samples, attribute, spaces, choices.norms, token_budget, progress)
    resampled = {"n_resamples": n_resamples, "seed": seed}
    rows = trace_rows(clips, choices, {**impossible, **unresolved}, resampled, progress)
    found = [{**row, "form": form} for row in rows]
    found += score_rows(tables, attribute, choices, unresolved, resampled)
    about = {"model": model.cfg.model_name, "attribute": attribute.name}
    return Specification.concat([pd.DataFrame(found).assign(**about)])


def resolvable(
    model: HookedLALM, attribute: Attribute, label_spaces: Sequence[bool]
) -> tuple[list[bool], dict[object, str]]:
    """The label spaces in which first tokens tell the labels apart, and why the others do not. Raises `PromptError` if
    there is none."""
    reasons: dict[object, str] = {}
    for space in label_spaces:
        try:
            processor_of(model).label_tokens(attribute.labels, space)
        except PromptError as error:
            reasons[space] = str(error)
            if len(reasons) == len(label_spaces):
                raise
    return [space for space in label_spaces if space not in reasons], reasons
