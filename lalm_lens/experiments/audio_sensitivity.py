"""Whether answers hang on what is heard (arXiv 2609.04637).

    S = A_original - (A_silence + A_mismatched) / 2

with A the accuracy against the original clip's label: of the clips, of silence in their place, and of another clip of a
different label, cut or followed by zeros to the same length. 0 is an answer that does not listen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from tqdm import tqdm

from lalm_lens.aggregates import intervals, refuse_columns
from lalm_lens.attributes import Attribute, Form
from lalm_lens.conflict import CONFLICT_COLUMNS
from lalm_lens.corrupt import OtherClip, Silence
from lalm_lens.datasets import Sample
from lalm_lens.errors import DataError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.text_dominance import ANSWER_COLUMNS, answer_of, answers
from lalm_lens.metrics import Predict
from lalm_lens.model import HookedLALM
from lalm_lens.proportions import share
from lalm_lens.results import QUESTION_COLUMNS
from lalm_lens.shapes import typed
from lalm_lens.tables import Table

HEARD = ("original", "silence", "mismatched")
SETTINGS = ("model", "form", "label_space", "predict", "condition", "framing", "strength", "order")


@dataclass(frozen=True, repr=False)
class AudioSensitivity(Table):
    """What is answered to each clip, to silence and to another clip: three rows per sample."""

    NAME: ClassVar[str] = "a table of audio sensitivity"
    HEADLINE: ClassVar[tuple[str, str] | None] = (
        "sensitivity",
        "Accuracy with the clip, less the mean of silence and another clip",
    )
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        **CONFLICT_COLUMNS,  # of conflict items: what is stated of the clip
        **ANSWER_COLUMNS,
        "heard": "str",  # original, silence, mismatched
        "heard_clip": "str",  # which one
        "p": "float64",  # of the label's first token, over the whole vocabulary
        "label_p": "float64",  # among the labels
        "seed": "int64",  # of the choice of the other clip
    }

    @typed
    def summary(self, by: Sequence[str] = ("attribute",), n_resamples: int = 10_000, seed: int = 0) -> pd.DataFrame:
        """`sensitivity` with its 95 % bootstrap interval over clips, all three runs of one together, and the accuracies
        with their 95 % Wilson intervals; one row per group of `by`. Raises `DataError` if other settings vary, and for
        a clip without its three runs."""
        refuse_columns(self.frame, by)
        self.refuse_mixed(SETTINGS, by)
        groups = self.frame.groupby(list(by), sort=False, dropna=False)
        found = [{**dict(zip(by, key, strict=True)), **summarised(rows, n_resamples, seed)} for key, rows in groups]
        return pd.DataFrame(found).astype({name: self.frame[name].dtype for name in by})

    def overview(self) -> pd.DataFrame:
        return self.summary().drop(columns="attribute")

    def __repr__(self) -> str:
        table = self.summary(["attribute"], n_resamples=1000)
        columns = ["attribute", "n", *(f"a_{name}" for name in HEARD), "sensitivity", "low", "high"]
        shown = table[columns].to_string(index=False, float_format="{:.3f}".format)
        return f"AudioSensitivity({self.frame.model.iloc[0]}, {table.n.sum()} clips)\n{shown}"


def summarised(rows: pd.DataFrame, n_resamples: int, seed: int) -> dict[str, int | float]:
    runs = rows.pivot_table(index=["attribute", "sample"], columns="heard", values="right", aggfunc="size")
    if set(runs) != set(HEARD) or (runs != 1).any(axis=None):
        raise DataError("Some clips lack one of their three runs, or have one twice. Ask all of them at once.")
    right = rows.pivot(index=["attribute", "sample"], columns="heard", values="right")[list(HEARD)].to_numpy(float)

    def sensitivity(means: Float[np.ndarray, "resample 3"]) -> Float[np.ndarray, " resample"]:
        return means[:, 0] - means[:, 1:].mean(-1)

    low, high = intervals(right, sensitivity, n_resamples, seed)
    accuracies = [share(f"a_{name}", int(its.sum()), len(its)) for name, its in zip(HEARD, right.T, strict=True)]
    return {
        "n": len(right),
        "sensitivity": float(sensitivity(right.mean(0)[None])[0]),
        "low": float(low),
        "high": float(high),
        **{name: value for its in accuracies for name, value in its.items()},
    }


@typed
def audio_sensitivity(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    form: Form = "P3",
    predict: Predict = "labels",
    label_space: bool = True,
    seed: int = 0,
    token_budget: int | None = None,
    progress: bool = True,
) -> AudioSensitivity:
    """Ask about every clip, about silence in its place, and about another clip.

    Which other clip depends on `seed` and the names of the clips. Items of `make_conflict` keep the text that is stated
    of them, so that S says whether it leaves the audio any say. A prediction is as in `text_dominance`.

    Raises as `causal_trace`; `DataError` for clips of one label alone.
    """
    question = Question.about(model, samples, attribute, form, label_space)
    if absent := [sample.name for sample in samples if not sample.is_heard]:
        raise DataError(f"There is no clip to replace in {absent[0]}. Leave out what is not heard.")
    asked = [each for sample in samples for each in replaced(sample, samples, seed)]
    with tqdm(total=len(asked), desc=f"replacing the audio, {question.attribute.name}", disable=not progress) as bar:
        read = answers([(question, sample) for _, _, sample in asked], (), token_budget, bar)
    rows = []
    for (heard, clip, sample), words in zip(asked, read, strict=True):
        at, answer = question.labels.index(sample.label), answer_of(question, words, predict)
        log_p = words.log_prob.double()
        rows.append(
            {
                **question.columns(sample),
                "heard": heard,
                "heard_clip": clip,
                "answer": answer,
                "right": answer == sample.label,
                "p": float(log_p.exp()[at]),
                "label_p": float(log_p.softmax(-1)[at]),
            }
        )
    return AudioSensitivity.concat([pd.DataFrame(rows).assign(predict=predict, seed=seed)])


def replaced(sample: Sample, samples: Sequence[Sample], seed: int) -> list[tuple[str, str, Sample]]:
    """What is heard, which clip that is, and the question about it."""
    silent, other = (corruption.of(sample, samples) for corruption in (Silence(), OtherClip(seed)))
    return [
        ("original", sample.name, sample),
        ("silence", silent.name, replace(sample, waveform=silent.waveform, transcript=silent.transcript)),
        (
            "mismatched",
            other.name.removeprefix("other_clip "),
            replace(sample, waveform=other.waveform, transcript=other.transcript),
        ),
    ]
