"""Attention to some keys made stronger or weaker: what an answer gains where a model looks more at what it hears.

In the chosen layers and heads the weights of the queries of one place on the keys of another are multiplied, before the
softmax's normalisation or behind it:

    before    log(factor) is added to the scores: a row still sums to 1, and other keys lose what these gain
    behind    the weights are multiplied as they are: a row sums to 1 + (factor - 1) a, where these had a
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lalm_lens.attributes import Attribute, Form
from lalm_lens.conflict import CONFLICT_COLUMNS
from lalm_lens.datasets import Sample
from lalm_lens.engine.plan import Engine
from lalm_lens.errors import InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.changed import ANSWER_COLUMNS, Changed, Effect, How, Variant, answers
from lalm_lens.experiments.cuts import Heads, LayerSets, Place, place_name, positions, sets_of, spelled
from lalm_lens.interventions import Change, Scale, ScaleAttention
from lalm_lens.metrics import Predict
from lalm_lens.model import HookedLALM
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.runs import Run
from lalm_lens.shapes import typed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Where = Literal["before", "behind"]


@typed
def scale_attention(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    keys: Place = "audio_side",
    queries: Place = "last",
    factors: Sequence[float | int] = (0.5, 2.0, 4.0),
    layers: Sequence[LayerSets] = (1, "all"),
    heads: Heads = "all",
    normalisation: Where = "before",
    form: Form = "P3",
    predict: Predict = "labels",
    label_space: bool = True,
    engine: Engine = "auto",
    token_budget: int | None = None,
    n_together: int = 8,
    progress: bool = True,
) -> "ScaledAttention":
    """Multiply attention from `queries` to `keys`, and read the answer at the last position, before and after.

    Places, `layers` and `heads` are those of `attention_knockout`, which takes attention away where a factor of 0
    would. Both ways run on both engines. Raises what `attention_knockout` raises, and `InputError` for factors below 0,
    or of 0 before the normalisation.
    """
    question = Question.about(model, samples, attribute, form, label_space)
    sets = sets_of(model, layers, heads)
    if min(factors, default=0) < 0:
        raise InputError(f"Attention is multiplied by 0 or more: below 0 it would be none; got {min(factors)}.")

    def variants(sample: Sample, run: Run) -> list[Variant]:
        of, to = positions(run, queries), positions(run, keys)
        return [
            Variant(
                {
                    "queries": place_name(queries),
                    "keys": place_name(keys),
                    "factor": float(factor),
                    "normalisation": normalisation,
                    "kind": kind,
                    "layer": layer,
                    "layers": spelled(chosen),
                    "heads": "all" if its is None else spelled(its),
                },
                scaled(chosen, of, to, its, float(factor), normalisation),
            )
            for factor in factors
            for kind, layer, chosen, its in sets
        ]

    how = How(predict, engine, token_budget, n_together, progress)
    return ScaledAttention.concat([*answers(question, samples, variants, how, "scaling attention")])


def scaled(
    layers: Sequence[int],
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    heads: tuple[int, ...] | None,
    factor: float,
    normalisation: Where,
) -> tuple[Change, ...]:
    if normalisation == "before":
        return (ScaleAttention(layers, queries, keys, heads, factor=factor),)
    return tuple(Scale("pattern", layer, queries, keys=keys, heads=heads, factor=factor) for layer in layers)


@dataclass(frozen=True, repr=False)
class ScaledAttention(Changed):
    """Answers before and after attention was scaled, one row per clip, factor and set of layers and heads."""

    NAME: ClassVar[str] = "a table of scaled attention"
    BY_CLIP: ClassVar[bool] = True
    CELL: ClassVar[tuple[str, ...]] = ("factor", "queries", "keys", "normalisation", "kind", "layer", "layers", "heads")
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        **CONFLICT_COLUMNS,
        "predict": "str",
        "queries": "str",
        "keys": "str",
        "factor": "float64",
        "normalisation": "str",  # factors come before it, or behind
        "kind": "str",  # how the layers were chosen, as in `attention_knockout`
        "layer": "Int64",
        "layers": "str",
        "heads": "str",
        **ANSWER_COLUMNS,
    }

    @typed
    def plot(self, effect: Effect = "label_probability") -> "Figure":
        """The change by factor, a line for each set of layers, of all heads together."""
        effects = self.effects(effect)
        effects = effects[effects["heads"] == "all"]
        return plots_module("pair_plots").change_curves(
            effects.assign(line="layers " + effects["layers"]), "factor", 1.0, effect, self.frame
        )

    def about(self) -> str:
        first = self.frame.iloc[0]
        return (
            f"{first.queries} to {first['keys']}, factors {', '.join(f'{its:g}' for its in self.frame.factor.unique())}"
        )
