"""What is asked about every clip of an experiment, and what a run says to it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lalm_lens.attributes import Attribute, Form, attribute_named
from lalm_lens.conflict import ConflictItem
from lalm_lens.corrupt import Corrupted
from lalm_lens.datasets import Sample, heard, refuse_repeated, seen
from lalm_lens.errors import HookError, InputError, PromptError
from lalm_lens.metrics import METRICS, Answer, LogP, Predict, log_probabilities
from lalm_lens.model import HookedLALM
from lalm_lens.pieces import user_pieces
from lalm_lens.prompts import Processor, Prompt, Transcript
from lalm_lens.readouts import Score
from lalm_lens.runs import Run
from lalm_lens.transcripts import Listener, Reading, Side, reading


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
        check_asked(model, samples, attribute, [label_space])
        return cls(model, attribute, form, label_space)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.attribute.labels

    @property
    def tokens(self) -> list[int]:
        """The first token of each label."""
        return list(processor_of(self.model).label_tokens(self.labels, self.label_space).values())

    def run(self, sample: Sample) -> Run:
        prompt = prompt_of(processor_of(self.model), sample, self.attribute, self.form)
        return Run(processor_of(self.model).inputs([prompt], heard([sample]), **seen([sample])), prompt)

    def both(self, sample: Sample, instead: Corrupted, read: Reading | None) -> tuple[Run, Run]:
        """The clip, and what is heard in its place, with the transcripts that they read (`read_of`)."""
        processor = processor_of(self.model)
        prompts = both_prompts(processor, sample, instead, self.attribute, self.form, read)
        waveforms = sample.waveform, instead.waveform
        clean, corrupted = (
            Run(processor.inputs([prompt], [waveform], **seen([sample])), prompt)
            for prompt, waveform in zip(prompts, waveforms, strict=True)
        )
        return clean, corrupted

    def columns(self, sample: Sample) -> dict[str, str | bool | None]:
        """What says all of this in a table."""
        asked = question_columns(self.model, sample, self.attribute, self.form, self.label_space)
        return {**asked, **sample.columns}


def questions(
    model: HookedLALM, samples: Sequence[Sample], attribute: str | Attribute | None, form: Form, label_space: bool
) -> list[tuple[Question, list[Sample]]]:
    """What is asked about which samples: of all the `attribute`, or without one, of each item of a conflict its own
    (`make_conflict`, `read_alme`). Raises `InputError` for samples that have none, else as `Question.about`."""
    if attribute is not None:
        return [(Question.about(model, samples, attribute, form, label_space), list(samples))]
    refuse_repeated(samples)
    groups = by_attribute(own_items(samples))
    return [(Question.about(model, its, about, form, label_space), [*its]) for about, its in groups.items()]


def own_items(samples: Sequence[Sample]) -> list[ConflictItem]:
    """Items alone, which know what is asked about them."""
    items = [sample for sample in samples if isinstance(sample, ConflictItem)]
    if len(items) != len(samples) or not items:
        raise InputError("What is asked about these clips? Name an attribute, or give items of make_conflict.")
    return items


def by_attribute(items: Sequence[ConflictItem]) -> dict[Attribute, list[ConflictItem]]:
    found: dict[Attribute, list[ConflictItem]] = {}
    for item in items:
        found.setdefault(item.attribute, []).append(item)
    return found


def names_of(asked: Sequence[tuple[Question, Sequence[Sample]]]) -> str:
    """The attributes, for what is of all of them together."""
    return ", ".join(dict.fromkeys(question.attribute.name for question, _ in asked))


def check_asked(
    model: HookedLALM, samples: Sequence[Sample], attribute: Attribute, label_spaces: Sequence[bool]
) -> None:
    """Everything of a question and the clips it is about that can be known to be wrong before the work begins."""
    refuse_foreign_hooks(model)
    refuse_repeated(samples)
    processor = processor_of(model)
    refuse_one_label(attribute)
    for label_space in label_spaces:
        processor.label_tokens(attribute.labels, label_space)
    for sample in samples:
        if sample.is_heard:
            processor.check_audible(sample.waveform, sample.name)
        refuse_other_label(sample, attribute)


def refuse_foreign_hooks(model: HookedLALM) -> None:
    attached = model.list_hooks()
    if attached:
        raise HookError(
            f"A hook on {min(attached)} would be part of every run. `model.reset_hooks(including_permanent=True)` "
            "removes it."
        )


def refuse_one_label(attribute: Attribute) -> None:
    if len(attribute.labels) < 2:
        raise PromptError(f"An answer is right or wrong among two labels or more; got {list(attribute.labels)}.")


def refuse_other_label(sample: Sample, attribute: Attribute) -> None:
    if sample.label not in attribute.labels:
        raise PromptError(
            f"{sample.name} is labelled {sample.label!r}, which is not an option of {attribute.name}: "
            f"{', '.join(attribute.labels)}."
        )


def processor_of(model: HookedLALM) -> Processor:
    if model.processor is None:
        raise InputError(
            "This checkpoint came without tokenizer and feature extractor, so no prompt can be made: save the "
            "processor of the model into the same folder."
        )
    return model.processor


def question_columns(
    model: HookedLALM, sample: Sample, attribute: Attribute, form: Form, label_space: bool
) -> dict[str, str | bool]:
    """What a table says of what was asked: its `QUESTION_COLUMNS`."""
    attribute = attribute if sample.question is None else replace(attribute, question=sample.question)
    return {
        "model": model.cfg.model_name,
        "attribute": attribute.name,
        "sample": sample.name,
        "label": sample.label,
        "form": form,
        "question": "".join(piece.text for piece in user_pieces(attribute, form, attribute.labels)),
        "labels": ", ".join(attribute.labels),
        "prefix": attribute.prefix,
        "label_space": label_space,
    }


def read_of(
    model: HookedLALM,
    transcript: Reading | str | None,
    transcript_is: Side | None = None,
    voice_activity: bool = False,
) -> Reading | None:
    """What transcripts are read; None for a model that reads none, of which none may be asked."""
    processor = processor_of(model)
    if processor.template.has_transcript:
        return reading("filler" if transcript is None else transcript)
    if (transcript, transcript_is, voice_activity) != (None, None, False):
        raise PromptError(
            f"The prompts of a {processor.cfg.model_type} model hold no transcript: leave out transcript, "
            "transcript_is and voice_activity."
        )
    return None


def both_prompts(
    processor: Processor,
    sample: Sample,
    instead: Corrupted,
    attribute: Attribute,
    form: Form,
    read: Reading | None,
    voice_activity: bool = False,
) -> tuple[Prompt, Prompt]:
    """What is asked about a clip and about what is heard in its place, each with the transcript that it reads."""
    both = (None, None) if read is None else read.of(Listener(processor, voice_activity), sample, instead)
    clean, corrupted = (prompt_about(processor, sample, attribute, form, its) for its in both)
    return clean, corrupted


def prompt_of(processor: Processor, sample: Sample, attribute: Attribute, form: Form) -> Prompt:
    """What is asked about a clip alone. Where the model reads a transcript (DeSTA), it is the sample's, else Whisper's:
    `transcribed` may say otherwise."""
    is_stated = sample.statement is not None and sample.statement.is_transcript
    reads = processor.template.has_transcript and sample.is_heard and not is_stated
    read = Listener(processor).tokens(sample) if reads else None
    return prompt_about(processor, sample, attribute, form, read)


def prompt_about(
    processor: Processor, sample: Sample, attribute: Attribute, form: Form, transcript: Transcript | None = None
) -> Prompt:
    """The question about one clip, its own if it has one, with what is stated of it."""
    attribute = attribute if sample.question is None else replace(attribute, question=sample.question)
    n_frames = processor.n_frames(sample.waveform) if sample.is_heard else None
    its = {"answer": sample.label, "statement": sample.statement, "images": sample.images, "videos": sample.videos}
    return processor.prompt(attribute, n_frames, form, transcript=transcript, **its)


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
