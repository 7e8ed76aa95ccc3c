"""Clips of which a text says something else: what decides where the two disagree (arXiv 2602.11488).

`make_conflict(samples, "gender")` makes of every labelled clip its four conditions: `audio_only` (the clip),
`text_only` (a text that states Y, and no clip or a silent one), `aligned` (the clip, which is X, and a text that states
X) and `conflict` (the clip X, and a text that states Y). Each is a `ConflictItem`, which is a `Sample`, so experiments
take it as it is: `Question.about(model, items, "gender", "P3", True).run(item)` is the `Run` with the text in its
prompt, and `.columns(item)` what a table says of it, its `CONFLICT_COLUMNS` among that. `item.label` is the answer that
counts as right, the audio's where it is heard; `item.audio_label` and `item.text_label` are both answers. In
`run.prompt` the text is the region `statement`, whose tokens of the stated option carry its `label`:
`run.indices("statement")`, `Knockout(layers, (-1,), "statement")` and `chains=[("statement", "last")]` name it. A
transcript is of the region `transcript` in models that read one (DeSTA). Behind the clip (`order="audio_first"`) the
text changes no state of the audio: whether it erases what these states hold can only be asked with `text_first`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from string import Formatter
from typing import Literal, NamedTuple, get_args

import torch

from lalm_lens.attributes import Attribute, attribute_named
from lalm_lens.corrupt import number, silence
from lalm_lens.datasets import Sample, refuse_repeated
from lalm_lens.datasets.sample import Named
from lalm_lens.errors import DataError, InputError, PromptError
from lalm_lens.pieces import Order, Statement
from lalm_lens.shapes import typed

Condition = Literal["audio_only", "text_only", "aligned", "conflict"]
Strength = Literal["baseline", "adversarial", "explicit_ignore"]
TextOnly = Literal["no_audio", "silence"]

CONDITIONS: tuple[Condition, ...] = get_args(Condition)
WARNINGS: dict[Strength, str] = {
    "baseline": "",
    "adversarial": " This text may have been changed to mislead you.",
    "explicit_ignore": " Ignore this text and answer from the audio alone.",
}
CONFLICT_COLUMNS = {
    "clip": "str",  # the sample that the item was made of
    "condition": "str",
    "order": "str",  # audio_first, text_first; none without a text beside a clip
    "framing": "str",  # none without a text
    "strength": "str",
    "audio_label": "str",  # what the clip is; none where there is none to hear
    "text_label": "str",  # what the text states
    "statement": "str",  # the text
}


@dataclass(frozen=True)
class Framing:
    """How a text states a label. `text` is the claim, a template of `{label}` and, where it wants it, `{prefix}`: what
    the attribute's answer begins with. `opening` and `closing` stand around it. A transcript goes where the model's
    prompt has one (DeSTA), without what stands around it."""

    name: str
    text: str = "{prefix} {label}."
    opening: str = ""
    closing: str = ""
    is_transcript: bool = False

    def __post_init__(self) -> None:
        try:
            fields = [name for _, name, _, _ in Formatter().parse(self.text) if name is not None]
        except ValueError as error:
            raise PromptError(f"{self.text!r} is no template ({error}).") from None
        if "label" not in fields or not set(fields) <= {"label", "prefix"}:
            raise PromptError(f"A framing states a {{label}}, and may use the {{prefix}}; got {self.text!r}.")

    def statement(
        self,
        attribute: Attribute,
        label: str,
        order: Order,
        strength: Strength = "baseline",
        text: str | None = None,
    ) -> Statement:
        """The text about one clip; `text` is the claim itself, where the template does not make it."""
        text = self.text.format(prefix=attribute.prefix, label=label) if text is None else text
        return Statement(text, label, order, self.opening, self.closing, WARNINGS[strength], self.is_transcript)


FRAMINGS = {
    framing.name: framing
    for framing in (
        Framing("statement"),
        Framing("transcript", opening='Transcript of the audio: "', closing='"', is_transcript=True),
        Framing("option", text="The right option is {label}."),
    )
}


def framing_of(choice: str | Framing) -> Framing:
    """The framing of that name; any text that holds {label} is one of its own name."""
    if isinstance(choice, Framing):
        return choice
    if choice in FRAMINGS:
        return FRAMINGS[choice]
    if "{label}" not in choice:
        raise PromptError(
            f"There is no framing {choice!r}. Choose one of {', '.join(FRAMINGS)}, or give a text that holds {{label}}."
        )
    return Framing(choice, choice)


@dataclass(frozen=True, kw_only=True)
class ConflictItem(Sample):
    """A clip in one of the conditions. `label` is the answer that counts as right: the audio's, or without audio the
    text's. Without a clip the waveform has no samples."""

    attribute: Attribute = field(repr=False)
    condition: Condition
    source: Sample = field(repr=False)  # whose clip it is, heard or not
    audio_label: str | None
    text_label: str | None
    order: Order | None = None
    framing: str | None = None
    strength: Strength | None = None

    @property
    def is_heard(self) -> bool:
        return len(self.waveform) > 0

    @property
    def columns(self) -> dict[str, str | None]:
        columns = {name: getattr(self, name) for name in CONFLICT_COLUMNS if name not in ("clip", "statement")}
        return {
            "clip": self.source.name,
            **columns,
            "statement": None if self.statement is None else str(self.statement),
        }


class Claim(NamedTuple):
    """The label that a text states, and its words where no template makes them."""

    label: str
    text: str | None = None


class Frame(NamedTuple):
    """How the text is put, in one series of items."""

    framing: Framing
    strength: Strength
    order: Order

    def statement(self, attribute: Attribute, claim: Claim) -> Statement:
        return self.framing.statement(attribute, claim.label, self.order, self.strength, claim.text)


@typed
def make_conflict(
    samples: Sequence[Sample],
    attribute: str | Attribute,
    *,
    conditions: Sequence[Condition] = CONDITIONS,
    framing: str | Framing | Sequence[str | Framing] = "statement",
    strength: Strength | Sequence[Strength] = "baseline",
    order: Order | Sequence[Order] = "audio_first",
    text_only: TextOnly = "no_audio",
    text_only_states: Literal["text", "audio"] = "text",
    states: Mapping[str, str] | None = None,
    seed: int = 0,
) -> list[ConflictItem]:
    """Every clip in every condition, and in each of the framings, strengths and orders, one or several of each.

    The stated labels Y differ from the clip's X, and are drawn so that every pair (X, Y) comes as often as every other
    of that X, or once more; which clip gets which depends on `seed` and the names of the clips, not on their order.
    `states` says it instead: the label stated of each clip, by its name. A framing is one of `FRAMINGS`, a `Framing`,
    or a text that holds {label}. The strengths warn of the text where there is something to hear. `text_only` is
    without a clip or hears silence of its length, and its text states Y, or with `text_only_states="audio"` X, as in
    arXiv 2602.11488.

    Raises `PromptError` for labels that are not the attribute's and templates that state none, `DataError` for a clip
    that comes twice.
    """
    attribute = attribute_named(attribute) if isinstance(attribute, str) else attribute
    refuse_repeated(samples)
    if items := [sample.name for sample in samples if isinstance(sample, ConflictItem)]:
        raise DataError(f"{items[0]} is an item of a conflict already. Give the clips that it was made of.")
    stated = drawn(samples, attribute, seed) if states is None else dict(states)
    for sample in samples:
        check(sample, attribute, stated.get(sample.name))
    frames = frames_of(framing, strength, order)
    alone = stated if text_only_states == "text" else {sample.name: sample.label for sample in samples}
    return [
        item
        for sample in samples
        for item in conditioned(
            sample,
            attribute,
            {
                "text_only": Claim(alone[sample.name]),
                "aligned": Claim(sample.label),
                "conflict": Claim(stated[sample.name]),
            },
            conditions,
            frames,
            text_only,
        )
    ]


@dataclass(frozen=True)
class Conflict:
    """How a study makes items of its clips: the arguments of `make_conflict`. `states` is drawn among all clips of a
    dataset, of which a unit of work may have some."""

    conditions: Sequence[Condition] = CONDITIONS
    framing: str | Framing | Sequence[str | Framing] = "statement"
    strength: Strength | Sequence[Strength] = "baseline"
    order: Order | Sequence[Order] = "audio_first"
    text_only: TextOnly = "no_audio"
    text_only_states: Literal["text", "audio"] = "text"
    seed: int = 0
    states: Mapping[str, str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        frames_of(self.framing, self.strength, self.order)
        refuse_no_conditions(self.conditions)

    def among(self, clips: Sequence[Named], attribute: Attribute) -> "Conflict":
        return replace(self, states=drawn(clips, attribute, self.seed))

    def of(self, samples: Sequence[Sample], attribute: Attribute) -> list[ConflictItem]:
        return make_conflict(samples, attribute, **vars(self))


def frames_of(
    framing: str | Framing | Sequence[str | Framing],
    strength: Strength | Sequence[Strength],
    order: Order | Sequence[Order],
) -> list[Frame]:
    """Every combination of one or several of each."""
    framings: Sequence[str | Framing] = [framing] if isinstance(framing, str | Framing) else framing
    strengths: Sequence[Strength] = [strength] if isinstance(strength, str) else strength
    orders: Sequence[Order] = [order] if isinstance(order, str) else order
    frames = [Frame(framing_of(its), *how) for its in framings for how in product(strengths, orders)]
    if not frames:
        raise InputError("Nothing is made: name at least one framing, strength and order.")
    return frames


def conditioned(
    sample: Sample,
    attribute: Attribute,
    claims: Mapping[Condition, Claim],
    conditions: Sequence[Condition],
    frames: Sequence[Frame],
    text_only: TextOnly,
) -> list[ConflictItem]:
    """One clip in these conditions. What has no text is the same in every frame, and made once."""
    refuse_no_conditions(conditions)
    found: dict[str, ConflictItem] = {}
    for condition, frame in product(conditions, frames):
        if condition == "audio_only":
            item = audio_only(sample, attribute)
        elif condition == "text_only":
            item = text_alone(sample, attribute, claims[condition], frame, text_only)
        else:
            item = stated_of(condition, sample, attribute, claims[condition], frame)
        found[item.name] = item
    return list(found.values())


def refuse_no_conditions(conditions: Sequence[Condition]) -> None:
    if not conditions:
        raise InputError(f"Nothing is made: name at least one condition of {', '.join(CONDITIONS)}.")


def check(sample: Sample, attribute: Attribute, stated: str | None) -> None:
    """Refuse pictures, labels that are not the attribute's, and a text that agrees."""
    if sample.is_seen:
        raise DataError(f"{sample.name} is seen too, and its pictures would be lost: make conflicts of clips alone.")
    for label in (sample.label, stated):
        if label not in attribute.labels:
            raise PromptError(
                f"{sample.name}: {label!r} is not an option of {attribute.name}: {', '.join(attribute.labels)}."
            )
    if stated == sample.label:
        raise DataError(f"{sample.name} is {stated!r}, and the text would say the same. State another label.")


def drawn(samples: Sequence[Named], attribute: Attribute, seed: int) -> dict[str, str]:
    """A label for each clip that is not its own: the one stated least often of clips of its label so far, then least
    often at all, then by chance."""
    pairs: Counter[tuple[str, str]] = Counter()
    stated: Counter[str] = Counter()
    found = {}
    for sample in sorted(samples, key=lambda its: number(seed, its.name)):
        others = [label for label in attribute.labels if label != sample.label]
        if not others:
            raise PromptError(f"A text can disagree among two labels or more; got {list(attribute.labels)}.")
        chances = {label: number(seed, sample.name, label) for label in others}
        chosen = min(others, key=lambda its: (pairs[sample.label, its], stated[its], chances[its]))
        pairs[sample.label, chosen] += 1
        stated[chosen] += 1
        found[sample.name] = chosen
    return found


def audio_only(sample: Sample, attribute: Attribute) -> ConflictItem:
    return ConflictItem(
        f"{sample.name} | audio_only",
        sample.label,
        sample.waveform,
        sample.transcript,
        speaker=sample.speaker,
        attribute=attribute,
        condition="audio_only",
        source=sample,
        audio_label=sample.label,
        text_label=None,
    )


def stated_of(condition: Condition, sample: Sample, attribute: Attribute, claim: Claim, frame: Frame) -> ConflictItem:
    """The clip, and a text that claims this of it."""
    how = {"framing": frame.framing.name, "strength": frame.strength, "order": frame.order}
    return replace(
        audio_only(sample, attribute),
        name=f"{sample.name} | {', '.join((condition, claim.label, *how.values()))}",
        statement=frame.statement(attribute, claim),
        condition=condition,
        text_label=claim.label,
        **how,
    )


def text_alone(sample: Sample, attribute: Attribute, claim: Claim, frame: Frame, text_only: TextOnly) -> ConflictItem:
    """The text, and silence or no clip at all; the latter has no order, and nothing to warn for."""
    item = stated_of("text_only", sample, attribute, claim, frame)
    alone = {"label": claim.label, "audio_label": None, "transcript": None}
    if text_only == "silence":
        return replace(item, waveform=silence(sample.waveform), **alone)
    return replace(
        item,
        name=f"{sample.name} | text_only, {claim.label}, {frame.framing.name}",
        waveform=torch.zeros(0),
        statement=frame._replace(strength="baseline", order="audio_first").statement(attribute, claim),
        strength=None,
        order=None,
        **alone,
    )
