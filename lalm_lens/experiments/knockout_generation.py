"""Attention knockout while a model writes: what it says without, and what it thinks of what it said with.

The last prompt position counts as generated: the first token is decided there. The place `generated` is that position
and every one behind it, so each of them is knocked out in its own step, over the whole generation. (A knockout that
begins with the first generated token, as in the released code of arXiv 2604.02605, leaves the first token untouched.)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from lalm_lens.attributes import Attribute, Form
from lalm_lens.datasets import Sample
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import Engine, Plan
from lalm_lens.errors import InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.attention_knockout import CELL, RUN_COLUMNS
from lalm_lens.experiments.changed import N_SHOWN, changes
from lalm_lens.experiments.cuts import Chain, Cut, Heads, LayerSets, cuts
from lalm_lens.generation import Generated
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import NamedHook, OnScores, ScaleAttention
from lalm_lens.model import HookedLALM
from lalm_lens.readouts import Score
from lalm_lens.results import QUESTION_COLUMNS
from lalm_lens.runs import Run
from lalm_lens.shapes import at_least_float32, typed
from lalm_lens.tables import Table


@typed
def knockout_generation(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    chains: Sequence[Chain] = (("audio", "generated"),),
    layers: Sequence[LayerSets] = ("all",),
    heads: Heads = "all",
    max_new_tokens: int = 20,
    form: Form = "P3",
    label_space: bool = True,
    engine: Engine = "auto",
    progress: bool = True,
) -> "KnockoutGeneration":
    """Cut attention from place to place at the prompt and at every generated token, and let the model write, greedily.

    `chains`, `layers` and `heads` are those of `attention_knockout`. Beside what the model writes instead stands what
    it thinks of what it wrote before: the log-probability of that text, each token after those before it, with the same
    attention cut. What is before goes the way of what is after, with explicit scores that are left as they were: else
    another kernel's rounding would count as a change. `engine` is that of `Plan`, for log-probabilities; writing has
    none. Raises what `attention_knockout` raises.
    """
    question = Question.about(model, samples, attribute, form, label_space)
    frames = []
    for sample in tqdm(samples, f"writing, {question.attribute.name}", unit="clip", disable=not progress):
        run = question.run(sample)
        its_cuts = cuts(model, run, chains, layers, heads, n_new=max_new_tokens - 1)
        before = model.generate(run.inputs, max_new_tokens, fwd_hooks=explicitly(model))
        rows = [written_row(question, sample, before, write(model, run, cut, max_new_tokens)) for cut in its_cuts]
        answer, uncut = before.tokens[before.is_token], [uncutting(cut) for cut in its_cuts]
        log_p = forced(model, run, answer, [*uncut, *its_cuts], engine).sum(-1).tolist()
        columns = pd.DataFrame([{**question.columns(sample), **cut.columns()} for cut in its_cuts])
        frames.append(columns.join(pd.DataFrame(rows)).assign(**log_p_columns(log_p)))
    return KnockoutGeneration.concat(frames)


def write(model: HookedLALM, run: Run, cut: Cut, max_new_tokens: int) -> Generated:
    """What the model writes with this attention cut in every step."""
    cutting = [hook for knockout in cut.knockouts for hook in knockout.hooks()]
    return model.generate(run.inputs, max_new_tokens, fwd_hooks=[*explicitly(model), *cutting])


def explicitly(model: HookedLALM) -> list[NamedHook]:
    """Hooks that change nothing, under which every layer makes its scores: the fused kernel rounds in another way, so
    that in bfloat16 a text would change where nothing is cut."""
    return [(f"blocks.{layer}.attn.hook_attn_scores", seen) for layer in range(model.decoder_cfg.n_layers)]


def seen(scores: Tensor, hook: HookPoint) -> None:
    """Nothing is changed."""


def uncutting(cut: Cut) -> Cut:
    """One that goes the same way, and leaves all scores as they were."""
    its = (ScaleAttention(each.layers, each.queries, each.keys, each.heads, factor=1.0) for each in cut.knockouts)
    return replace(cut, knockouts=tuple(its))


def log_p_columns(log_p: list[float]) -> dict[str, list[float]]:
    """Of the cuts that leave all as it was, and then of those that do not."""
    n = len(log_p) // 2
    return {"log_p_before": log_p[:n], "log_p_after": log_p[n:]}


def forced(
    model: HookedLALM, run: Run, tokens: Tensor, its_cuts: Sequence[Cut], engine: Engine = "auto"
) -> Float[Tensor, "cut new_pos"]:
    """Log-probabilities of an answer's tokens, each after those before it, in each of the cuts."""
    begun = continued(run, tokens[:-1])

    def read(logits: Float[Tensor, "branch at d_vocab"]) -> Float[Tensor, "branch at"]:
        log_p = at_least_float32(logits).log_softmax(-1)
        return log_p.gather(-1, tokens.to(logits.device).expand(len(logits), -1)[..., None])[..., 0]

    branches = [Branch(begun, tuple(within(each, begun.n_pos) for each in cut.knockouts)) for cut in its_cuts]
    return Plan(model, branches, Score(read, tuple(range(-len(tokens), 0))), engine=engine).run().values


def within(knockout: OnScores, n_pos: int) -> OnScores:
    """The part of a knockout that a run of so many positions has."""
    queries, keys = (tuple(n for n in at if n < n_pos) for at in (knockout.queries_at, knockout.keys_at))
    return replace(knockout, queries=queries, keys=keys)


def continued(run: Run, tokens: Tensor) -> Run:
    """The run with an answer that has begun."""
    inputs = run.inputs
    if not isinstance(inputs, Inputs) or inputs.positions is not None:
        raise InputError("An answer goes on from a run of `Inputs` whose positions are the model's own.")
    new = tokens[None].to(inputs.tokens)
    is_token = torch.ones_like(new, dtype=torch.bool)
    return Run(
        replace(
            inputs,
            tokens=torch.cat([inputs.tokens, new], dim=1),
            attention_mask=torch.cat([inputs.attention_mask, is_token], dim=1),
        )
    )


def written_row(question: Question, sample: Sample, before: Generated, after: Generated) -> dict:
    row: dict = {}
    for when, its in (("before", before), ("after", after)):
        text = its.texts[0] if its.texts else ""
        said = first_named(text, question.labels)
        row |= {f"text_{when}": text, f"answer_{when}": said, f"right_{when}": said == sample.label}
        row |= {f"n_tokens_{when}": int(its.is_token.sum())}
    return row


def first_named(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text names first, as a whole word of any case; None where it names none."""
    words = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    found = re.search(rf"(?<!\w)({words})(?!\w)", text, re.IGNORECASE)
    return next((label for label in labels if found and label.lower() == found[1].lower()), None)


@dataclass(frozen=True, repr=False)
class KnockoutGeneration(Table):
    """What was written before and after a knockout, one row per clip and knocked-out run."""

    NAME: ClassVar[str] = "a table of knockout in generation"
    BY_CLIP: ClassVar[bool] = True
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        "seen_label": "str",  # of a counterfactual pair, another one than `label`
        **RUN_COLUMNS,
        **{f"text_{when}": "str" for when in ("before", "after")},
        **{f"n_tokens_{when}": "int64" for when in ("before", "after")},
        **{f"answer_{when}": "str" for when in ("before", "after")},  # the label that the text names first
        **{f"right_{when}": "bool" for when in ("before", "after")},
        **{f"log_p_{when}": "float64" for when in ("before", "after")},  # of `text_before`, all of its tokens
    }

    @typed
    def effects(
        self,
        effect: Literal["log_probability", "accuracy"] = "accuracy",
        by: Sequence[str] = ("attribute", *CELL),
        n_resamples: int = 1000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """As those of `AttentionKnockout`: of the text written before, or of how often a text names the true label."""
        column = {"log_probability": "log_p", "accuracy": "right"}[effect]
        before, after = (self.frame[f"{column}_{when}"].astype(float) for when in ("before", "after"))
        self.refuse_mixed(("model", "attribute", "form", "label_space", *CELL), by)
        return changes(
            self.frame.assign(before=before, after=after, change=after - before), by, CELL, n_resamples, seed
        )

    def overview(self) -> pd.DataFrame:
        """What changes most how often a text names the true label."""
        effects = self.effects("accuracy", CELL).sort_values("change", key=abs, ascending=False, kind="stable")
        return effects.head(N_SHOWN)

    def __repr__(self) -> str:
        changed = int((self.frame.text_before != self.frame.text_after).sum())
        return f"KnockoutGeneration({len(self.frame)} texts, {changed} of them changed)"
