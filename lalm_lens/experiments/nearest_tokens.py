"""The words that are nearest to what is heard: of each state of the audio, by the embedding and by the unembedding.

`cosine`: the tokens whose input embedding has the largest cosine with the state. `lens`: those with the largest logit,
through the final norm and the unembedding. The first asks whether what is heard looks like words on their way in, the
second whether it is on its way to become words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from lalm_lens.aggregates import interval
from lalm_lens.attributes import Attribute, Form
from lalm_lens.datasets import Sample
from lalm_lens.errors import InputError
from lalm_lens.experiments.asked import Question, processor_of
from lalm_lens.experiments.lens import Asked, Reading, read_all
from lalm_lens.experiments.logit_lens import rows_of
from lalm_lens.model import HookedLALM
from lalm_lens.runs import Positions
from lalm_lens.shapes import at_least_float32, typed
from lalm_lens.tables import Table
from lalm_lens.transformer import HookedTransformer

Measure = Literal["cosine", "lens"]


@dataclass(frozen=True)
class Embedding(Reading):
    """Cosines with the input embeddings of all tokens; one of length 0 is near to nothing."""

    def scores(self, model: HookedTransformer, states: Float[Tensor, "at d_model"]) -> Float[Tensor, "at d_vocab"]:
        words = normalize(at_least_float32(model.embed.table.weight), dim=-1)
        return normalize(at_least_float32(states), dim=-1) @ words.T


READINGS: dict[Measure, type[Reading]] = {"cosine": Embedding, "lens": Reading}


@dataclass(frozen=True, repr=False)
class NearestTokens(Table):
    """The nearest tokens of states: one row per clip, layer, position, measure and token."""

    NAME: ClassVar[str] = "a table of nearest tokens"
    BY_CLIP: ClassVar[bool] = True
    COLUMNS: ClassVar[dict[str, str]] = {
        "model": "str",
        "attribute": "str",
        "form": "str",
        "sample": "str",
        "label": "str",
        "layer": "int64",  # 0-based block; -1 is the merged embedding
        "position": "int64",  # absolute, without padding
        "region": "str",
        "start_s": "float64",  # the stretch of the clip that it holds
        "end_s": "float64",
        "measure": "str",  # cosine, or lens
        "rank": "int64",  # 0 is the nearest
        "token_id": "int64",
        "word": "str",
        "score": "float64",  # cosine, or log-probability
        "label_space": "bool",  # whether options are read with the space before them
        "n_options": "int64",
        "option": "str",  # the option whose first token it is
        "is_label": "bool",  # whether that is what is heard
    }

    def layers(self, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """One row per measure and layer: the mean score of the nearest token, with its 95 % bootstrap interval over
        clips; the share of clips of which some position has the label among the tokens that were read (`label`), and
        for comparison the mean share of each of the other options (`other_option`)."""
        self.refuse_mixed(("model", "attribute", "form", "label_space"))
        found = []
        for (measure, layer), rows in self.frame.groupby(["measure", "layer"], sort=True):
            nearest = rows[rows["rank"] == 0].groupby("sample").score.mean().to_numpy()
            low, high = interval(nearest, n_resamples, seed)
            said = rows.dropna(subset="option").drop_duplicates(["sample", "option"])
            of_label, n = said.is_label.sum(), len(nearest)
            others = (len(said) - of_label) / (rows.n_options.iloc[0] - 1)
            its = {"measure": measure, "layer": layer, "n": n, "score": nearest.mean(), "low": low, "high": high}
            found.append({**its, "label": of_label / n, "other_option": others / n})
        return pd.DataFrame(found)

    def overview(self) -> pd.DataFrame:
        """Of each measure the layer at which most clips have their label among the nearest tokens."""
        layers = self.layers()
        return layers.loc[layers.groupby("measure", sort=False).label.idxmax()]

    def lines(self) -> pd.DataFrame:
        return self.layers().rename(columns={"measure": "line"})[["line", "layer", "label"]]

    def __repr__(self) -> str:
        frame, layers = self.frame, self.layers(n_resamples=100)
        shown = layers[["measure", "layer", "score", "label", "other_option"]]
        return (
            f"NearestTokens({frame.model.iloc[0]}, {frame['sample'].nunique()} clips, the nearest "
            f"{frame['rank'].max() + 1})\n{shown.to_string(index=False, float_format='{:.3f}'.format)}"
        )


@typed
def nearest_tokens(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    form: Form = "P3",
    positions: Positions = "audio",
    measures: Sequence[Measure] = ("cosine", "lens"),
    top_k: int = 3,
    label_space: bool = True,
    token_budget: int | None = None,
    progress: bool = True,
) -> NearestTokens:
    """The `top_k` tokens that are nearest to the state of every layer at some positions, those of the audio by default.

    One forward for each measure and for as many clips as `token_budget` lets through together. Raises as `logit_lens`
    does, and `InputError` for no measure.
    """
    if not measures or top_k < 1:
        raise InputError(f"Name a measure or more, and a top_k of 1 or more; got {list(measures)} and {top_k}.")
    question = Question.about(model, samples, attribute, form, label_space)
    processor = processor_of(model)
    asked = [Asked.of(processor, sample, question.attribute, form, positions) for sample in samples]
    frames = []
    for measure in measures:
        reading = READINGS[measure](top_k=top_k, embed=True)
        with tqdm(total=len(asked), desc=f"reading by {measure}", unit="clip", disable=not progress) as bar:
            read = read_all(model, processor, asked, reading, (), token_budget, bar)
        for each, its in zip(asked, read, strict=True):
            frame = rows_of(model, each, [], its, embed=True)
            score = frame.logit if measure == "cosine" else frame.log_prob
            frames.append(frame.assign(measure=measure, score=score))
    return NearestTokens.concat([about(frame, question) for frame in frames])


def about(frame: pd.DataFrame, question: Question) -> pd.DataFrame:
    option = frame.token_id.map(dict(zip(question.tokens, question.labels, strict=True)))
    return frame.assign(
        model=question.model.cfg.model_name,
        attribute=question.attribute.name,
        form=question.form,
        label_space=question.label_space,
        n_options=len(question.labels),
        option=option,
        is_label=option == frame.label,
    )
