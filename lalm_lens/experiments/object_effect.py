"""Does the causal effect of the option tokens tell which answers are wrong? (arXiv 2603.13768, section 5.3)

The paper suggests it: where the options fail to fetch what is heard, a model guesses. Here every clip is traced, right
or wrong, and nothing is used that is not known when a model answers: the effect is that on the label which the model
itself chooses. Its rival is what needs no tracing at all, the probability of that label.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import bootstrap, rankdata
from tqdm import tqdm

from lalm_lens.attributes import Attribute
from lalm_lens.audio import check_sounding
from lalm_lens.corrupt import Corruption, Silence
from lalm_lens.datasets import Sample
from lalm_lens.draws import drawing_again
from lalm_lens.engine.plan import Engine
from lalm_lens.engine.recorded import Recorded
from lalm_lens.errors import DataError
from lalm_lens.experiments.asked import Question, Told, read_of
from lalm_lens.experiments.cells import Cell
from lalm_lens.experiments.recovery import Case, Direction, Recovery, recover
from lalm_lens.interventions import hook_name
from lalm_lens.metrics import Answer
from lalm_lens.model import HookedLALM
from lalm_lens.results import QUESTION_COLUMNS
from lalm_lens.runs import Run
from lalm_lens.shapes import typed
from lalm_lens.tables import Table
from lalm_lens.transcripts import Reading

PARTS = ("object", "object_chosen")  # the tokens of all options; of the one that the model chooses


@typed
def object_effect(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    corruption: Corruption = Silence(),  # noqa: B008  it is frozen
    metric: Literal["probability", "log_probability", "logit_difference", "label_probability"] = "probability",
    direction: Direction = "denoise",
    label_space: bool = True,
    engine: Engine = "auto",
    transcript: Reading | str | None = None,
    progress: bool = True,
) -> "ObjectEffect":
    """What the clean states of the option tokens, at one layer, bring to the corrupted run (`denoise`), or their
    corrupted states take from the clean run (`noise`), of the label that the model chooses: m(patched) - m(corrupted),
    or m(clean) - m(patched).

    All tokens of the part are patched together, at `resid_post` of each layer, in P3 prompts, which name the options.
    No clip is excluded. `transcript` is what both runs read where the model reads one. Raises as `causal_trace` does.
    """
    question = Question.about(model, samples, attribute, "P3", label_space)
    read = read_of(model, transcript)
    for sample in samples:
        if isinstance(corruption, Silence):
            check_sounding(sample.waveform, sample.name)
    frames = []
    how: dict = {"metric": metric, "direction": direction}
    for sample in tqdm(samples, f"tracing options, {question.attribute.name}", unit="clip", disable=not progress):
        heard, recorded = corruption.of(sample, samples), Recorded(model)
        clean, corrupted = question.both(sample, heard, read)
        chosen = choice(question, sample, clean, recorded)
        case = case_of(question, clean, corrupted, str(chosen["chosen"]))
        (recovery,) = recover(model, [case], **how, engine=engine, recorded=recorded)
        told = {**question.columns(sample), **chosen, **how, "corruption": heard.name, "noise": recovery.noise}
        frames.append(pd.DataFrame(list(rows_of(recovery, direction))).assign(**told))
    return ObjectEffect.concat(frames)


def choice(question: Question, sample: Sample, clean: Run, recorded: Recorded) -> dict[str, str | float | bool]:
    """What the model chooses, and how sure of it it is. Of two labels that are equal the first is chosen."""
    readout, model = Told.readout(question.tokens), question.model
    states = {hook_name("resid_post", layer) for layer in range(model.decoder_cfg.n_layers)}  # read for the patches too
    told = Told.of(readout(recorded.of(clean, states, readout)[0]))
    place = int(told.log_p[0, 0].argmax())
    chosen = question.labels[place]
    numbers = told.numbers(told.answer(place), "labels")
    return {
        "chosen": chosen,
        "right": chosen == sample.label,
        "max_probability": float(numbers["probability"]),
        "max_label_probability": float(numbers["label_probability"]),
    }


def case_of(question: Question, clean: Run, corrupted: Run, chosen: str) -> Case:
    """Patches of the options at every layer, and their effect on the label that the model chooses."""
    assert clean.prompt is not None
    at = {"object": clean.indices("object")}
    at["object_chosen"] = tuple(n for n in at["object"] if clean.prompt.positions[n].label == chosen)
    tokens = dict(zip(question.labels, question.tokens, strict=True))
    answer = Answer((tokens.pop(chosen),), tuple(tokens.values()))
    layers = range(question.model.decoder_cfg.n_layers)
    cells = [Cell("token", "resid_post", layer, positions) for positions in at.values() for layer in layers]
    return Case(clean, corrupted, answer, cells)


def rows_of(recovery: Recovery, direction: Direction) -> Iterator[dict]:
    n_layers = len(recovery.cells) // len(PARTS)
    for n, (cell, m_patched) in enumerate(zip(recovery.cells, recovery.m_patched.tolist(), strict=True)):
        effect = m_patched - recovery.m_corrupted if direction == "denoise" else recovery.m_clean - m_patched
        m = {"m_clean": recovery.m_clean, "m_corrupted": recovery.m_corrupted, "m_patched": m_patched}
        yield {"part": PARTS[n // n_layers], "layer": cell.layer, **m, "effect": effect}


@dataclass(frozen=True, repr=False)
class ObjectEffect(Table):
    """The effect of the option tokens on what a model chooses, one row per clip, part and layer."""

    NAME: ClassVar[str] = "a table of object effects"
    BY_CLIP: ClassVar[bool] = True
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        "corruption": "str",  # what the corrupted run heard
        "metric": "str",
        "direction": "str",
        "chosen": "str",  # the label with the largest logit in the clean run
        "right": "bool",  # whether that is the true one
        "max_probability": "float64",  # of its first token, over the whole vocabulary
        "max_label_probability": "float64",  # of its first token, among the labels'
        "part": "str",  # what is patched: object, the tokens of all options, or object_chosen, those of the chosen one
        "layer": "int64",
        "m_clean": "float64",  # the metric, of the chosen label
        "m_corrupted": "float64",
        "m_patched": "float64",
        "effect": "float64",
        "noise": "float64",  # of the recovery rate, where nothing is patched
    }

    def scores(self) -> pd.DataFrame:
        """One row per clip: `right`, and everything that may tell it, larger where the model should be right. Effects
        of each layer (`object 5`), their largest and their mean over layers, and the two rivals."""
        clip = ["attribute", "sample"]
        rivals = self.frame.groupby(clip, sort=False)[["right", "max_probability", "max_label_probability"]].first()
        over_layers = self.frame.groupby([*clip, "part"]).effect
        largest, mean = (its.unstack("part") for its in (over_layers.max(), over_layers.mean()))
        named = self.frame.assign(score=self.frame.part + " " + self.frame.layer.astype(str))
        each = named.pivot(index=clip, columns="score", values="effect")[list(named.score.unique())]
        return rivals.join(largest.add_suffix(" max")).join(mean.add_suffix(" mean")).join(each).reset_index()

    def aurocs(self, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """How well each score tells right answers from wrong ones: the probability that it is larger for a right one
        than for a wrong one, ties counting half; .5 is chance.

        Beside its 95 % bootstrap interval (right and wrong clips are drawn again, each among themselves), how far it is
        above `max_probability`, with an interval of its own. Of the scores by layer, the best was chosen after the
        fact. Raises `DataError` without right or without wrong answers, and if settings vary.
        """
        self.refuse_mixed(["model", "attribute", "form", "label_space", "metric", "direction"])
        scores = self.scores()
        is_right = scores.right.to_numpy()
        if is_right.all() or not is_right.any():
            raise DataError(f"Of {len(scores)} clips {is_right.sum()} are answered right; an AUROC needs both kinds.")
        rival = scores.max_probability.to_numpy()
        found = []
        for name in scores.columns.drop(["attribute", "sample", "right"]):
            values = scores[name].to_numpy(dtype=float)
            low, high = auroc_interval(values, None, is_right, n_resamples, seed)
            above = auroc(values[is_right], values[~is_right]) - auroc(rival[is_right], rival[~is_right])
            above_low, above_high = auroc_interval(values, rival, is_right, n_resamples, seed)
            found.append(
                {
                    "score": name,
                    "n_right": int(is_right.sum()),
                    "n_wrong": int((~is_right).sum()),
                    "auroc": float(auroc(values[is_right], values[~is_right])),
                    "low": low,
                    "high": high,
                    "above_max_probability": float(above),
                    "above_low": above_low,
                    "above_high": above_high,
                }
            )
        return pd.DataFrame(found)

    def overview(self) -> pd.DataFrame:
        names = {f"above_{end}": f"above_max_probability_{end}" for end in ("low", "high")}
        return self.aurocs().rename(columns=names)

    def __repr__(self) -> str:
        clips = self.frame.drop_duplicates(["attribute", "sample"])
        return f"ObjectEffect({len(clips)} clips, {clips.right.sum()} answered right; {len(self.frame)} patched runs)"


def auroc(
    right: Float[np.ndarray, "*batch right"], wrong: Float[np.ndarray, "*batch wrong"]
) -> Float[np.ndarray, "*batch"]:
    """The share of pairs, along the last axis, of which the right one is larger; a tie is half a pair."""
    n_right, n_wrong = right.shape[-1], wrong.shape[-1]
    ranks = rankdata(np.concatenate([right, wrong], axis=-1), axis=-1)[..., :n_right]
    return np.asarray((ranks.sum(-1) - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def auroc_interval(
    values: np.ndarray, rival: np.ndarray | None, is_right: np.ndarray, n_resamples: int, seed: int
) -> tuple[float, float]:
    """95 % of the AUROC of clips drawn again, or of what it has above a rival's on the same clips."""

    def statistic(right: np.ndarray, wrong: np.ndarray, axis: int) -> np.ndarray:
        found = auroc(values[right], values[wrong])
        return found if rival is None else found - auroc(rival[right], rival[wrong])

    clips = np.flatnonzero(is_right), np.flatnonzero(~is_right)
    rng = drawing_again(n_resamples, seed)
    if min(map(len, clips)) < 2:
        return float("nan"), float("nan")
    found = bootstrap(clips, statistic, n_resamples=n_resamples, method="percentile", vectorized=True, rng=rng)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
