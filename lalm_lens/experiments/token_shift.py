"""Token shift: which tokens of a model's answer a base model would have written too (arXiv 2604.02605).

Each token of an answer is given to the base behind the same prefix: the same words, and all of the answer before it.
Its rank there says how far training, or hearing, moved it: *unshifted* is the base's first choice, *marginal* its
second or third, *shifted* any other. Beside it stands KL(model || base) of the two distributions, in nats.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from lalm_lens.aggregates import intervals, refuse_columns
from lalm_lens.attributes import Attribute, Form
from lalm_lens.corrupt import silence
from lalm_lens.datasets import Sample, unheard
from lalm_lens.errors import DataError, InputError, PromptError
from lalm_lens.experiments.asked import Question, processor_of
from lalm_lens.inputs import Embedded, Inputs
from lalm_lens.model import HookedLALM
from lalm_lens.nn.kv_cache import KeyValueCache
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.shapes import at_least_float32, typed
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BaseHears = Literal["clip", "silence", "nothing"]
CATEGORIES = ("unshifted", "marginal", "shifted")
MARGINAL = 3  # the last rank that is
SETTINGS = ("model", "attribute", "form", "base", "base_hears", "is_given")


@typed
def token_shift(
    model: HookedLALM,
    base: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    base_hears: BaseHears = "nothing",
    texts: Mapping[str, str] | None = None,
    max_new_tokens: int = 20,
    form: Form = "P3",
    progress: bool = True,
) -> "TokenShift":
    """Rank each token of the model's answers under a base that has read the same, and compare what both expect.

    `base` is the same model, or another one with the same tokenizer. It hears the `clip`, `silence` in its place, or
    `nothing`: then no clip is in its prompt. Everything else of its prompt is the question as its own template writes
    it. The answers are what the model writes, greedily, its stop token included, or `texts` by the name of their clip,
    which are read as they stand behind the answer prefix, spaces too. Both models go through an answer one token at a
    time, as in generation, so that a model never differs from itself by rounding.

    Raises what `attention_knockout` raises; `InputError` for a base with another tokenizer or vocabulary, `DataError`
    for clips without a text, or that the prompt leaves out already.
    """
    questions = [Question.about(its, samples, attribute, form, True) for its in (model, base)]
    refuse_other_tokens(model, base)
    if texts is not None and (missing := [sample.name for sample in samples if sample.name not in texts]):
        raise DataError(f"There is no text of {missing[0]}. Give one for every clip, by its name.")
    asked, base_asked = questions
    frames = []
    for sample in tqdm(samples, f"writing, {asked.attribute.name}", unit="clip", disable=not progress):
        inputs = asked.run(sample).inputs
        answer = written(model, inputs, max_new_tokens) if texts is None else read(model, sample, texts[sample.name])
        ours = expected(model, inputs, answer)
        theirs = expected(base, base_asked.run(heard_by_base(sample, base_hears)).inputs, answer)
        frames.append(token_rows(asked, answer, ours, theirs).assign(**asked.columns(sample)))
    about = {"base": base.cfg.model_name, "base_hears": base_hears, "is_given": texts is not None}
    return TokenShift.concat([frame.assign(**about) for frame in frames])


def refuse_other_tokens(model: HookedLALM, base: HookedLALM) -> None:
    vocabularies = [processor_of(its).tokenizer.get_vocab() for its in (model, base)]
    sizes = [its.decoder_cfg.d_vocab for its in (model, base)]
    if vocabularies[0] != vocabularies[1] or sizes[0] != sizes[1]:
        raise InputError(
            f"Ranks are of the same tokens in both models: {base.cfg.model_name} has another tokenizer or vocabulary "
            f"({sizes[1]} tokens) than {model.cfg.model_name} ({sizes[0]}). Give a base with the same one."
        )


def heard_by_base(sample: Sample, base_hears: BaseHears) -> Sample:
    if base_hears == "clip":
        return sample
    if not sample.is_heard:
        raise DataError(f"No clip is in the prompt of {sample.name}, so none can be left out: give clips that are.")
    if base_hears == "nothing":
        return unheard(sample)
    return replace(sample, waveform=silence(sample.waveform), transcript=None)


def written(model: HookedLALM, inputs: Inputs | Embedded, max_new_tokens: int) -> Int[Tensor, " new_pos"]:
    generated = model.generate(inputs, max_new_tokens)
    return generated.tokens[generated.is_token].cpu()


def read(model: HookedLALM, sample: Sample, text: str) -> Int[Tensor, " new_pos"]:
    tokens = processor_of(model).tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise PromptError(f"The text of {sample.name} is empty. Give at least one word.")
    return torch.tensor(tokens)


@torch.no_grad()
def expected(
    model: HookedLALM, inputs: Inputs | Embedded, answer: Int[Tensor, " new_pos"]
) -> Float[Tensor, "new_pos d_vocab"]:
    """Log-probabilities of every token in the place of each of the answer's, after those before it."""
    kv_cache = KeyValueCache(n_more=len(answer) - 1)
    logits = [model.advance(inputs, kv_cache)]
    logits += [model.advance_by(token[None], kv_cache) for token in answer[:-1].to(model.device)]
    return at_least_float32(torch.cat(logits)).log_softmax(-1).double().cpu()


def token_rows(
    question: Question,
    answer: Int[Tensor, " new_pos"],
    ours: Float[Tensor, "new_pos d_vocab"],
    theirs: Float[Tensor, "new_pos d_vocab"],
) -> pd.DataFrame:
    decode, tokens = processor_of(question.model).tokenizer.decode, answer.tolist()
    at = answer[:, None]
    rank, rank_model = (1 + (its > its.gather(-1, at)).sum(-1) for its in (theirs, ours))
    return pd.DataFrame(
        {
            "step": range(len(tokens)),
            "token_id": tokens,
            "token": [decode([token]) for token in tokens],
            "option": named(decode, tokens, question.labels),
            "base_token": [decode([token]) for token in theirs.argmax(-1).tolist()],
            "rank": rank.tolist(),
            "rank_model": rank_model.tolist(),
            "category": [category(each) for each in rank.tolist()],
            "kl": (ours.exp() * (ours - theirs)).sum(-1).tolist(),
            "log_p_model": ours.gather(-1, at)[:, 0].tolist(),
            "log_p_base": theirs.gather(-1, at)[:, 0].tolist(),
        }
    )


def category(rank: int) -> str:
    """Of a rank from 1 on."""
    return CATEGORIES[(rank > 1) + (rank > MARGINAL)]


def named(decode: Callable[[Sequence[int]], str], answer: Sequence[int], labels: Sequence[str]) -> list[str | None]:
    """The label that each token of an answer is part of, as a whole word of any case."""
    ends = [len(decode(answer[: n + 1])) for n in range(len(answer))]
    words = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    found: list[str | None] = [None] * len(answer)
    for hit in re.finditer(rf"(?<!\w)({words})(?!\w)", decode(answer), re.IGNORECASE):
        label = next(each for each in labels if each.lower() == hit[1].lower())
        for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if start < hit.end() and end > hit.start():
                found[n] = label
    return found


@dataclass(frozen=True, repr=False)
class TokenShift(Table):
    """Answers under a base model, one row per clip and token."""

    NAME: ClassVar[str] = "a table of token shifts"
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        "seen_label": "str",  # of a counterfactual pair, another one than `label`
        "base": "str",
        "base_hears": "str",  # clip, silence, nothing
        "is_given": "bool",  # whether the text was given, not written by the model
        "step": "int64",  # of the token in the answer, from 0 on
        "token_id": "int64",
        "token": "str",
        "option": "str",  # the label that it names, or is part of
        "base_token": "str",  # what the base would have written
        "rank": "int64",  # of the token under the base: 1 is the largest
        "rank_model": "int64",  # under the model itself
        "category": "str",  # unshifted (rank 1), marginal (2 and 3), shifted
        "kl": "float64",  # KL(model || base) of the next token, in nats
        "log_p_model": "float64",
        "log_p_base": "float64",
    }

    @property
    def named(self) -> "TokenShift":
        """The rows of tokens that name a label: what is heard, in the model's words."""
        return TokenShift(self.frame[self.frame.option.notna()])

    @typed
    def shares(self, by: Sequence[str] = ("attribute",), n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """The shares of tokens that are `unshifted`, `marginal` and `shifted`, and the mean `kl` over tokens, one row
        per group of `by`; `_low` and `_high` are 95 % bootstrap intervals over clips, all tokens of one
        together. Raises `DataError` if other settings vary, and where there is no token."""
        refuse_columns(self.frame, by)
        if not len(self.frame):
            raise DataError("No token is left, so there are no shares.")
        self.refuse_mixed(SETTINGS, by)
        rows = self.frame.assign(**{name: self.frame.category == name for name in CATEGORIES}, n_tokens=1)
        groups = rows.groupby(list(by), sort=False, dropna=False)
        found = [{**dict(zip(by, key, strict=True)), **shared(group, n_resamples, seed)} for key, group in groups]
        return pd.DataFrame(found).astype({name: self.frame[name].dtype for name in by})

    def plot(self) -> "Figure":
        """Shares of the three categories and KL by the token's place in the answer; a row per attribute."""
        return plots_module("heard_plots").token_shifts(self.shares(["attribute", "step"]), self.shares(), self.frame)

    def __repr__(self) -> str:
        one, groups = self.frame.iloc[0], [name for name in SETTINGS if self.frame[name].nunique() > 1]
        clips = self.frame["sample"].nunique()
        shown = self.shares([*groups, "attribute"] if "attribute" not in groups else groups)
        columns = [*groups, *("n_tokens", *CATEGORIES, "kl")]
        table = shown[columns].to_string(index=False, float_format="{:.3f}".format)
        return f"TokenShift({one.model} against {one.base}, {clips} clips)\n{table}"


def shared(rows: pd.DataFrame, n_resamples: int, seed: int) -> dict[str, int | float]:
    """Sums of clips are drawn again, and their ratios taken: a long answer counts for all of its tokens."""
    names = [*CATEGORIES, "kl"]
    sums = rows.groupby(["attribute", "sample"])[[*names, "n_tokens"]].sum().to_numpy(float)

    def ratios(means: Float[np.ndarray, "resample 5"]) -> Float[np.ndarray, "resample 4"]:
        return means[:, :4] / means[:, 4:]

    low, high = intervals(sums, ratios, n_resamples, seed)
    told: dict[str, int | float] = {"n": len(sums), "n_tokens": len(rows)}
    for name, its in zip(names, zip(ratios(sums.mean(0)[None])[0], low, high, strict=True), strict=True):
        told |= dict(zip((name, f"{name}_low", f"{name}_high"), map(float, its), strict=True))
    return told
