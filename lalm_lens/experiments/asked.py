"""What is asked about every clip of an experiment, and what a run says to it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lalm_lens.attributes import Attribute, Form, attribute_named
from lalm_lens.datasets import Sample, heard, refuse_repeated
from lalm_lens.experiments.causal_trace import (
    processor_of,
    prompt_about,
    question_columns,
    refuse_foreign_hooks,
    refuse_one_label,
    refuse_other_label,
)
from lalm_lens.metrics import METRICS, Answer, LogP, Predict, log_probabilities
from lalm_lens.model import HookedLALM
from lalm_lens.readouts import Score
from lalm_lens.runs import Run


@dataclass(frozen=True)
class Question:
    """One attribute in one form, about some clips."""

    model: HookedLALM
    attribute: Attribute
    form: Form
    label_space: bool

    @classmethod
    def about(
        cls, model: HookedLALM, samples: Sequence[Sample], attribute: str | Attribute, form: Form, label_space: bool
    ) -> "Question":
        """Raises as `causal_trace` does for all that can be known to be wrong before the work begins."""
        attribute = attribute_named(attribute) if isinstance(attribute, str) else attribute
        question = cls(model, attribute, form, label_space)
        question.check(samples)
        return question

    def check(self, samples: Sequence[Sample]) -> None:
        refuse_foreign_hooks(self.model)
        refuse_repeated(samples)
        processor = processor_of(self.model)
        refuse_one_label(self.attribute)
        processor.label_tokens(self.labels, self.label_space)
        for sample in samples:
            if sample.is_heard:
                processor.check_audible(sample.waveform, sample.name)
            refuse_other_label(sample, self.attribute)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.attribute.labels

    @property
    def tokens(self) -> list[int]:
        """The first token of each label."""
        return list(processor_of(self.model).label_tokens(self.labels, self.label_space).values())

    def run(self, sample: Sample) -> Run:
        processor = processor_of(self.model)
        prompt = prompt_about(processor, sample, self.attribute, self.form)
        return Run(processor.inputs([prompt], heard([sample])), prompt)

    def columns(self, sample: Sample) -> dict[str, str | bool | None]:
        """What says all of this in a table."""
        asked = question_columns(self.model, sample, self.attribute, self.form, self.label_space)
        return {**asked, **sample.columns}


@dataclass(frozen=True)
class Told:
    """What runs say at their last position: of each label, the log-probability of its first token over the whole
    vocabulary, and whether its logit is larger than every other token's."""

    log_p: LogP
    is_top: Bool[Tensor, "*batch at token"]

    @classmethod
    def readout(cls, tokens: Sequence[int]) -> Score:
        def read(logits: Float[Tensor, "branch at d_vocab"]) -> Float[Tensor, "branch at twice"]:
            second = logits.topk(2).values[..., 1:]
            is_top = logits[..., list(tokens)] > second
            return torch.cat([log_probabilities(logits, tokens), is_top.double().cpu()], dim=-1)

        return Score(read)

    @classmethod
    def of(cls, values: Float[Tensor, "*batch at twice"]) -> "Told":
        log_p, is_top = values.chunk(2, dim=-1)
        return cls(log_p, is_top.bool())

    def answer(self, label: int) -> Answer:
        """This label, and the others in the order in which the first of the runs would choose them."""
        others = tuple(n for n in range(self.log_p.shape[-1]) if n != label)
        return Answer((label,), others).against(self.log_p.flatten(0, -2)[0])

    def numbers(self, answer: Answer, predict: Predict) -> dict[str, Tensor]:
        """One of each for every run: the metrics, whether it is right, and the label that it would choose."""
        metrics = ("probability", "logit_difference", "label_probability")
        true, others = self.log_p[..., 0, answer.tokens[0]], self.log_p[..., 0, list(answer.others)]
        is_top = self.is_top[..., 0, answer.tokens[0]]
        return {
            **{name: METRICS[name](self.log_p, answer) for name in metrics},
            "right": (true > others.amax(-1)) if predict == "labels" else is_top,
            "answer": self.log_p[..., 0, :].argmax(-1),
        }
