"""The logit lens on prompts with audio: what every layer would answer, and what each stretch of sound decodes to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from tqdm import tqdm

from lalm_lens.attributes import Attribute, Form, attribute_named
from lalm_lens.datasets import Sample, refuse_repeated
from lalm_lens.errors import DataError
from lalm_lens.experiments.asked import processor_of, refuse_foreign_hooks
from lalm_lens.experiments.lens import Asked, Reading, Words, read_all, told
from lalm_lens.interventions import Knockout
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import Prompt
from lalm_lens.results import plots_module
from lalm_lens.runs import Positions
from lalm_lens.shapes import typed
from lalm_lens.tables import Table
from lalm_lens.windows import span_s

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class LogitLens(Table):
    """What layers say, one row per clip, layer, position and token that is read."""

    NAME: ClassVar[str] = "a logit lens"
    BY_CLIP: ClassVar[bool] = True
    COLUMNS: ClassVar[dict[str, str]] = {
        "model": "str",
        "attribute": "str",
        "form": "str",
        "sample": "str",
        "label": "str",  # what is true of the clip
        "norm": "bool",  # whether the final norm was applied
        "knockout": "str",  # what could not look at what, in words
        "layer": "int64",  # 0-based block; -1 is the merged embedding
        "position": "int64",  # absolute, without padding
        "text_index": "int64",  # from the end: -1 is the last position
        "token": "str",  # what stands there
        "region": "str",
        "segment": "str",
        "start_s": "float64",  # of an audio position: the stretch of the clip that it holds
        "end_s": "float64",
        "kind": "str",  # label, or top
        "option": "str",  # the label whose first token is read
        "token_id": "int64",  # what is read
        "word": "str",
        "rank": "int64",  # in the vocabulary: 0 is the largest logit
        "logit": "float64",
        "log_prob": "float64",  # over the whole vocabulary
        "probability": "float64",
    }

    def top(self) -> pd.DataFrame:
        """The most probable token of every state: one row per clip, layer and position."""
        rows = self.frame[(self.frame.kind == "top") & (self.frame["rank"] == 0)]
        if not len(rows):
            raise DataError("No largest tokens were read: give top_k=1 or more.")
        return rows.drop_duplicates(["model", "attribute", "form", "knockout", "norm", "sample", "layer", "position"])

    def plot(self, sample: str | None = None) -> "Figure":
        """A map of layers and positions of one clip, the first by default: the most probable token of every state,
        coloured by its probability."""
        rows = self.top()
        names = list(rows["sample"].unique())
        if sample is not None and sample not in names:
            raise DataError(f"The table has no clip {sample!r}, only {', '.join(names)}.")
        chosen = LogitLens(rows[rows["sample"] == (sample or names[0])])
        chosen.refuse_mixed(("model", "attribute", "form", "norm", "knockout"))
        return plots_module("lens_plots").word_map(chosen.frame)

    def __repr__(self) -> str:
        frame = self.frame
        layers, states = sorted(frame.layer.unique()), frame[["attribute", "form", "sample", "position"]]
        about = (
            f"LogitLens({len(frame)} words; {frame.model.iloc[0]}, {frame['sample'].nunique()} clips, layers "
            f"{layers[0]} to {layers[-1]}, {len(states.drop_duplicates())} positions)"
        )
        if not (frame.kind == "top").any():
            return about
        last = self.top()
        last = last[last.layer == layers[-1]].head(8)
        shown = last[["sample", "label", "form", "position", "token", "word", "probability"]]
        return f"{about}\nat the last layer:\n{shown.to_string(index=False, float_format='{:.3f}'.format)}"


@typed
def logit_lens(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    form: Form = "P3",
    positions: Positions = (-1,),
    labels: Sequence[str] | None = None,
    label_space: bool = True,
    top_k: int = 5,
    norm: bool = True,
    embed: bool = False,
    knockouts: Sequence[Knockout] = (),
    token_budget: int | None = None,
    progress: bool = True,
) -> LogitLens:
    """Read the states of every layer through the final norm and the unembedding (eq. 1 of arXiv 2506.05140).

    `positions` are indices of the prompt, from the end if negative, or a region of it: at "audio", what each stretch of
    the clip decodes to. `labels` are the words whose first token is read, the attribute's by default; without them, and
    with a `top_k`, as many of the largest. Without `norm` states are unembedded as they are. Layer l is the state after
    block l, from 0 on, so the last one is the model's own prediction; `embed` adds the merged embedding, as -1.
    `knockouts` are made in the run that is read. One forward for as many clips as `token_budget` lets through together.

    Raises `PromptError` for a prompt or labels that cannot be made, `AudioError` for a clip that the model cannot hear,
    `DataError` for a clip that comes twice, `InputError` for positions that a prompt does not have.
    """
    refuse_foreign_hooks(model)
    refuse_repeated(samples)
    attribute = attribute_named(attribute) if isinstance(attribute, str) else attribute
    processor = processor_of(model)
    labels = attribute.labels if labels is None else labels
    options = processor.label_tokens(labels, label_space) if labels else {}
    reading = Reading(tuple(options.values()), top_k, norm, embed)
    asked = [Asked.of(processor, sample, attribute, form, positions) for sample in samples]
    about = {
        "model": model.cfg.model_name,
        "attribute": attribute.name,
        "form": form,
        "norm": norm,
        "knockout": told(knockouts),
    }
    with tqdm(total=len(asked), desc=f"reading {attribute.name}", unit="clip", disable=not progress) as bar:
        read = read_all(model, processor, asked, reading, knockouts, token_budget, bar)
    frames = [rows_of(model, each, list(options), its, embed) for each, its in zip(asked, read, strict=True)]
    return LogitLens.concat([frame.assign(**about) for frame in frames])


def rows_of(model: HookedLALM, asked: Asked, options: list[str], read: Words, embed: bool) -> pd.DataFrame:
    n_layers, n_at, n_words = read.token.shape
    layer, at, word = (axis.ravel() for axis in np.indices(read.token.shape))
    decoded = {token: processor_of(model).tokenizer.decode([token]) for token in read.token.unique().tolist()}
    ids = read.token.numpy().ravel()
    places = positions_frame(asked.prompt, asked.at, span_s(model)).iloc[at].reset_index(drop=True)
    said_of = pd.DataFrame(
        {
            "sample": asked.sample.name,
            "label": asked.sample.label,
            "layer": layer - embed,
            "kind": np.where(word < len(options), "label", "top"),
            "option": np.array([*options, *[None] * (n_words - len(options))], dtype=object)[word],
            "token_id": ids,
            "word": [decoded[token] for token in ids],
            "rank": read.rank.numpy().ravel(),
            "logit": read.logit.double().numpy().ravel(),
            "log_prob": read.log_prob.double().numpy().ravel(),
            "probability": read.log_prob.double().exp().numpy().ravel(),
        }
    )
    assert len(said_of) == n_layers * n_at * n_words
    return pd.concat([places, said_of], axis="columns")


def positions_frame(prompt: Prompt, at: Sequence[int], each_s: float | None) -> pd.DataFrame:
    """What stands at some positions, and the stretch of the clip that those of the audio hold, if they hold one."""
    audio = np.flatnonzero(prompt.is_region("audio").numpy())
    spans = (
        {} if each_s is None else {int(position): (n * each_s, (n + 1) * each_s) for n, position in enumerate(audio)}
    )
    return pd.DataFrame(
        {
            "position": position,
            "text_index": position - len(prompt),
            "token": prompt.positions[position].token,
            "region": prompt.positions[position].region,
            "segment": prompt.positions[position].segment,
            "start_s": spans.get(position, (None, None))[0],
            "end_s": spans.get(position, (None, None))[1],
        }
        for position in at
    )
