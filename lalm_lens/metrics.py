"""What a run says about the true answer, as one number.

A metric reads log-probabilities of the tokens of an answer, over the whole vocabulary, at the prompt's last position
(`at` 0) and, where a label of several tokens is forced, at its tokens after that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Metric = Literal["probability", "log_probability", "logit_difference", "label_probability", "label_score"]
Predict = Literal["labels", "vocab"]

LogP = Float[Tensor, "*batch at token"]
Score = Float[Tensor, "*batch"]


@dataclass(frozen=True)
class Answer:
    """The tokens of the true label that are read, and the first token of every other label."""

    tokens: tuple[int, ...]
    others: tuple[int, ...] = ()

    def against(self, logits: Float[Tensor, " d_vocab"]) -> "Answer":
        """With the other labels in the order in which a run with these logits would choose them."""
        return replace(self, others=tuple(sorted(self.others, key=lambda token: -float(logits[token]))))


def log_probabilities(logits: Float[Tensor, "*batch at d_vocab"], tokens: Sequence[int]) -> LogP:
    """Of some tokens, over the whole vocabulary.

    In float64: a recovery rate divides differences of probabilities, which may both be close to 1. An Apple GPU has
    none, so its logits go to the CPU as they are.
    """
    wide = (logits.cpu() if logits.device.type == "mps" else logits).double()
    return (wide[..., list(tokens)] - wide.logsumexp(-1, keepdim=True)).cpu()


def probability(log_p: LogP, answer: Answer) -> Score:
    """Of the label's first token, over the whole vocabulary: the paper's."""
    return log_probability(log_p, answer).exp()


def log_probability(log_p: LogP, answer: Answer) -> Score:
    return log_p[..., 0, answer.tokens[0]]


def logit_difference(log_p: LogP, answer: Answer) -> Score:
    """The true label's logit minus that of the first of the others: log-probabilities differ as logits do."""
    return log_p[..., 0, answer.tokens[0]] - log_p[..., 0, answer.others[0]]


def label_probability(log_p: LogP, answer: Answer) -> Score:
    """Of the label's first token, among the labels' first tokens."""
    return log_p[..., 0, [answer.tokens[0], *answer.others]].softmax(-1)[..., 0]


def label_score(log_p: LogP, answer: Answer) -> Score:
    """Log-probability of the whole label: the sum over its tokens, each after those before it."""
    return log_p[..., range(len(answer.tokens)), answer.tokens].sum(-1)


METRICS: dict[Metric, Callable[[LogP, Answer], Score]] = {
    "probability": probability,
    "log_probability": log_probability,
    "logit_difference": logit_difference,
    "label_probability": label_probability,
    "label_score": label_score,
}


def is_right(logits: Float[Tensor, " d_vocab"], answer: Answer, predict: Predict) -> bool:
    """Whether the largest logit, among the labels or in the whole vocabulary, is the true label's; a tie is not."""
    others = logits.clone()
    others[answer.tokens[0]] = -torch.inf
    rivals = others[list(answer.others)] if predict == "labels" else others
    return bool(logits[answer.tokens[0]] > rivals.max())
