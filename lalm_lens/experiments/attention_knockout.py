"""Attention knockout: what an answer loses when some positions may not look at some others (arXiv 2304.14767).

In the chosen layers and heads, the scores of the queries of one place on the keys of another are -infinity before the
softmax; all else is as it was. An edge "audio -> last" is the way from the audio (keys) to the last position (queries).
AudioLens masks the audio for the last position in all layers and heads (arXiv 2506.05140, section VI-D).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lalm_lens.attributes import Attribute, Form
from lalm_lens.datasets import Sample
from lalm_lens.engine.plan import Engine
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.changed import ANSWER_COLUMNS, Changed, Effect, How, Variant, answers
from lalm_lens.experiments.cuts import Chain, Heads, LayerSets, cuts
from lalm_lens.metrics import Predict
from lalm_lens.model import HookedLALM
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.runs import Run
from lalm_lens.shapes import typed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = ("edge", "kind", "layer", "layers", "heads")
RUN_COLUMNS = {
    "edge": "str",  # from keys to queries
    "kind": "str",  # how the layers were chosen
    "layer": "Int64",  # of a window the one in its middle, of `up_to` the last, of `from` the first; none of `all`
    "layers": "str",  # those that are cut, as "2-5"
    "heads": "str",
}


@typed
def attention_knockout(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    chains: Sequence[Chain] = (("audio", "last"),),
    layers: Sequence[LayerSets] = (1, "all"),
    heads: Heads = "all",
    form: Form = "P3",
    predict: Predict = "labels",
    label_space: bool = True,
    engine: Engine = "auto",
    token_budget: int | None = None,
    n_together: int = 8,
    progress: bool = True,
) -> "AttentionKnockout":
    """Cut attention from place to place, and read the answer at the last position, before and after.

    A chain of two places is an edge, from keys to queries; of a longer one, ("audio", "object", "last"), every edge is
    cut by itself, and all of them at once. A place is a region of the prompt, a tuple of regions (those that the prompt
    has), `audio_side`, `text`, `penultimate`, `generated` (here the last position), or positions. `layers` are windows
    by their odd size (1: every single layer), `up_to` and `from` each layer, `all`, or a tuple of layers; `heads` are
    `all` of them together, `each`, or a tuple. `engine` and `token_budget` are those of `Plan`; `n_together` clips go
    through the model in one sweep.

    Raises `InputError` for places, layers and heads that there are not, and for a query that would be left with no key
    to look at; for samples and prompts as `causal_trace` does.
    """
    question = Question.about(model, samples, attribute, form, label_space)

    def variants(sample: Sample, run: Run) -> list[Variant]:
        return [Variant(cut.columns(), cut.knockouts) for cut in cuts(model, run, chains, layers, heads)]

    how = How(predict, engine, token_budget, n_together, progress)
    return AttentionKnockout.concat([*answers(question, samples, variants, how, "knocking out")])


@typed
def audio_knockout(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    queries: Sequence[Literal["last", "penultimate"]] = ("last", "penultimate"),
    form: Form = "P3",
    predict: Predict = "labels",
    label_space: bool = True,
    engine: Engine = "auto",
    progress: bool = True,
) -> "AttentionKnockout":
    """AudioLens' knockout: in all layers and heads, the last position cannot look at the audio, nor at its transcript
    where the prompt has one (section VI-D, footnotes 4 and 5). The position before it is knocked out too, by itself.

    It is `attention_knockout` of those edges, and raises what that raises.
    """
    return attention_knockout(
        model,
        samples,
        attribute=attribute,
        chains=[("audio_side", query) for query in queries],
        layers=["all"],
        form=form,
        predict=predict,
        label_space=label_space,
        engine=engine,
        progress=progress,
    )


@dataclass(frozen=True, repr=False)
class AttentionKnockout(Changed):
    """Answers before and after a knockout, one row per clip and knocked-out run. Arxiv 2304.14767 looks at those that
    are `right`."""

    NAME: ClassVar[str] = "a table of attention knockout"
    BY_CLIP: ClassVar[bool] = True
    CELL: ClassVar[tuple[str, ...]] = CELL
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        "predict": "str",  # a prediction is the largest logit among the labels, or in the vocabulary
        **RUN_COLUMNS,
        "n_pairs": "int64",  # of a query and a key, those that could not see each other included
        **ANSWER_COLUMNS,
    }

    @typed
    def plot(self, effect: Effect = "probability") -> "Figure":
        """The change by layer, a line for each way to choose the layers, `all` as a level; a panel per attribute and
        edge. Raises `DataError` for several models or other settings in one table, and without matplotlib."""
        return plots_module().knockout_curves(self.effects(effect), effect, self.frame)
