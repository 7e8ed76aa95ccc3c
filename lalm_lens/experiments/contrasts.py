"""What makes an answer come from the clip, or from a text: for each item two runs that differ in that alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lalm_lens.attributes import Attribute, Form, attribute_named
from lalm_lens.attribution import Contrast
from lalm_lens.conflict import Condition, ConflictItem, Framing, framing_of, make_conflict
from lalm_lens.corrupt import Corruption, number
from lalm_lens.datasets import Sample
from lalm_lens.errors import DataError
from lalm_lens.experiments.asked import Question, processor_of, prompt_about
from lalm_lens.model import HookedLALM
from lalm_lens.pieces import Order
from lalm_lens.runs import Run
from lalm_lens.shapes import at_least_float32

Modality = Literal["text", "audio"]
Within = Literal["alone", "conflict"]
MODALITIES: tuple[Modality, ...] = ("text", "audio")
STATUS = ("kept", "clean_wrong", "corrupted_right")


@dataclass(frozen=True)
class Task:
    """One item, and where its answer comes from."""

    sample: Sample
    modality: Modality
    answer: str
    rival: str
    corrupted_by: str
    status: str
    m_clean: float
    m_corrupted: float
    contrast: Contrast


@dataclass(frozen=True)
class Contrasts:
    """How items are made and what is asked: the same for all."""

    attribute: Attribute
    form: Form
    within: Within
    framing: Framing
    order: Order
    corruption: Corruption
    label_space: bool
    states: Mapping[str, str] | None
    seed: int

    @classmethod
    def of(cls, attribute: str | Attribute, framing: str | Framing, **rest: Any) -> "Contrasts":
        attribute = attribute_named(attribute) if isinstance(attribute, str) else attribute
        return cls(attribute, framing=framing_of(framing), **rest)

    def columns(self, model: HookedLALM) -> dict[str, str | bool | None]:
        return {
            "model": model.cfg.model_name,
            "attribute": self.attribute.name,
            "form": self.form,
            "label_space": self.label_space,
            "within": self.within,
            "framing": self.framing.name,
            "order": self.order if self.within == "conflict" else None,
        }

    def tasks(self, model: HookedLALM, samples: Sequence[Sample]) -> Iterator[Task]:
        """Of each clip two: its text-sourced answer, and its audio-sourced one. Raises as `make_conflict` and
        `causal_trace` do, and `DataError` for a text that no other of as many tokens can stand for."""
        items = self.items(samples)
        question = Question.about(
            model,
            list({item.name: item for item in items.values()}.values()),
            self.attribute,
            self.form,
            self.label_space,
        )
        for (_, modality), item in items.items():
            item_corrupted, name = self.corrupted(model, item, modality, samples)
            answer = item.audio_label if modality == "audio" else item.text_label
            assert answer is not None
            runs = question.run(item), question.run(item_corrupted)
            yield task_of(question, item.source, modality, answer, name, *runs)

    def items(self, samples: Sequence[Sample]) -> dict[tuple[str, Modality], ConflictItem]:
        """What is asked in the clean run of each clip and modality."""
        if items := [sample.name for sample in samples if isinstance(sample, ConflictItem)]:
            raise DataError(
                f"{items[0]} has a text of its own, and pathways need texts that state each label in the same words: "
                "give plain clips and an attribute. Stimuli of read_alme have no pathways."
            )
        conditions: tuple[Condition, Condition] = ("text_only", "audio_only")
        if self.within == "conflict":
            conditions = ("conflict", "conflict")
        how = {
            "conditions": conditions,
            **{name: getattr(self, name) for name in ("framing", "order", "states", "seed")},
        }
        made = {(item.source.name, item.condition): item for item in make_conflict(samples, self.attribute, **how)}
        pairs = list(zip(MODALITIES, conditions, strict=True))
        return {(its.name, modality): made[its.name, condition] for its in samples for modality, condition in pairs}

    def corrupted(
        self, model: HookedLALM, item: ConflictItem, modality: Modality, samples: Sequence[Sample]
    ) -> tuple[ConflictItem, str]:
        """The same item with another sound, or with another label stated, and what that is."""
        if modality == "audio":
            heard = self.corruption.of(item.source, samples)
            return replace(item, waveform=heard.waveform, transcript=heard.transcript), heard.name
        states = {label: self.stating(item, label) for label in self.attribute.labels if label != item.text_label}
        # Any but the clip's own, if there is one.
        chances = {label: (label == item.source.label, number(self.seed, item.source.name, label)) for label in states}
        regions = self.regions(model, item)
        for label in sorted(states, key=lambda label: chances[label]):
            if self.regions(model, states[label]) == regions:
                return states[label], f"stated {label}"
        raise DataError(
            f"No other label of {self.attribute.name} has as many tokens as {item.text_label!r} where it is stated, so "
            "that positions could stand for each other: leave out clips with such texts, or take another framing."
        )

    def stating(self, item: ConflictItem, label: str) -> ConflictItem:
        assert item.statement is not None
        statement = self.framing.statement(self.attribute, label, item.statement.order, item.strength or "baseline")
        return replace(item, statement=statement)

    def regions(self, model: HookedLALM, item: ConflictItem) -> list[str]:
        prompt = prompt_about(processor_of(model), item, self.attribute, self.form)
        return [position.region for position in prompt.positions]


def task_of(
    question: Question, sample: Sample, modality: Modality, answer: str, name: str, clean: Run, corrupted: Run
) -> Task:
    """The rival is the label that the corrupted run chooses, or its second where that is the answer."""
    logits = [label_logits(question, run) for run in (clean, corrupted)]
    place = question.labels.index(answer)
    others = logits[1].clone()
    others[place] = -torch.inf
    rival = int(others.argmax())
    m_clean, m_corrupted = (float(its[place] - its[rival]) for its in logits)
    is_right = [int(its.argmax()) == place for its in logits]
    status = "clean_wrong" if not is_right[0] else "corrupted_right" if is_right[1] else "kept"
    contrast = Contrast(clean, corrupted, question.tokens[place], question.tokens[rival])
    return Task(sample, modality, answer, question.labels[rival], name, status, m_clean, m_corrupted, contrast)


@torch.no_grad()
def label_logits(question: Question, run: Run) -> Float[Tensor, " label"]:
    logits = question.model(run.inputs.to(question.model.device), logits_at=-1)[0, -1]
    return at_least_float32(logits[question.tokens]).cpu()
