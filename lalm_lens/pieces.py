"""The words of a prompt, cut into stretches that know what they are."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lalm_lens.attributes import Attribute, Form
from lalm_lens.errors import PromptError

Region = Literal[
    "text_before",
    "audio_tag",
    "audio",
    "image_tag",
    "image",
    "video_tag",
    "video",
    "transcript",
    "template",
    "statement",
    "early",
    "object",
    "object_sep",
    "late",
    "attribute",
    "last",
    "answer",
]
# The coarser parts of arXiv 2603.13768, section 3.3: objects include the commas between them.
Segment = Literal["early", "object", "late", "last", "none"]
Order = Literal["audio_first", "text_first"]  # whether the clip comes before what is stated of it, or behind


@dataclass(frozen=True)
class Piece:
    """A stretch of prompt text whose characters share one region."""

    text: str
    region: Region
    segment: Segment = "none"
    label: str | None = None


@dataclass(frozen=True)
class Statement:
    """What a text beside the question says of the clip. It may be wrong.

    `text` is the claim, and `label` the option that it states: its last mention there. `opening` and `closing` stand
    around the claim, `warning` behind it. The positions are of the region `statement` and of no segment: the paper's
    prompts state nothing. Where it `is_transcript`, a model whose prompt holds transcripts reads the claim in their
    place, and it is of the region `transcript`.
    """

    text: str
    label: str | None = None
    order: Order = "audio_first"
    opening: str = ""
    closing: str = ""
    warning: str = ""
    is_transcript: bool = False

    def __str__(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def claim(self) -> list[Piece]:
        """The text, cut where it names the option."""
        mentions = (
            [] if self.label is None else list(re.finditer(rf" ?(?<!\w){re.escape(self.label)}(?!\w)", self.text))
        )
        if not mentions:
            return [Piece(self.text, "statement")]
        start, end = mentions[-1].span()
        cut = (self.text[:start], None), (self.text[start:end], self.label), (self.text[end:], None)
        return [Piece(text, "statement", label=label) for text, label in cut]

    @property
    def pieces(self) -> list[Piece]:
        opening, behind = (Piece(text, "statement") for text in (self.opening, self.closing + self.warning))
        return nonempty([opening, *self.claim, behind])


@dataclass(frozen=True)
class Turn:
    """What the user says before the clip, and behind it; without a clip, all is said behind."""

    behind: tuple[Piece, ...] = ()
    before: tuple[Piece, ...] = ()
    has_clip: bool = True
    in_video: bool = False  # whether the clip is the sound of a video, which stands in its place

    @property
    def said(self) -> tuple[Piece, ...]:
        return (*self.before, *self.behind)


def words_of(pieces: Iterable[Piece]) -> str | None:
    """Their text; None where there are none."""
    return "".join(piece.text for piece in pieces) or None


def nonempty(pieces: Iterable[Piece]) -> list[Piece]:
    return [piece for piece in pieces if piece.text]


def turn_of(
    attribute: Attribute, form: Form, labels: Sequence[str], statement: Statement | None, has_clip: bool
) -> Turn:
    """The user's turn. What is stated stands before the clip, or between the clip and the question."""
    asked = user_pieces(attribute, form, labels)
    stated = [] if statement is None else statement.pieces
    if not (asked or stated or has_clip):
        raise PromptError("Without a clip, a question or a statement the user says nothing. Give one of them.")
    if statement is not None and statement.order == "text_first" and has_clip:
        return Turn(tuple(asked), tuple(stated))
    if stated and asked:
        asked = [replace(asked[0], text=f" {asked[0].text}"), *asked[1:]]
    return Turn((*stated, *asked), has_clip=has_clip)


def user_pieces(attribute: Attribute, form: Form, labels: Sequence[str]) -> list[Piece]:
    """What the user says beside the clip."""
    if form == "P1":
        return []
    if not attribute.question.strip():
        raise PromptError(f"The prompt {form} asks a question, and it is empty. Write one, or use P1, which has none.")
    if form == "P2":
        return [Piece(attribute.question, "early", "early")]
    if not labels:
        raise PromptError("The prompt P3 lists the options, and there are none. Give labels, or use P2.")
    return option_pieces(attribute, labels)


def option_pieces(attribute: Attribute, labels: Sequence[str]) -> list[Piece]:
    """The user turn of P3: question, options, separators. Its full stop is in no segment."""
    early = attribute.options(labels).removesuffix(f" {', '.join(labels)}.")
    pieces = [Piece(early, "early", "early")]
    for n, label in enumerate(labels):
        pieces += [Piece(",", "object_sep", "object")] * (n > 0) + [Piece(f" {label}", "object", "object", label)]
    return [*pieces, Piece(".", "object_sep")]


def prefix_pieces(prefix: str) -> list[Piece]:
    """The forced answer prefix: its last word is where the answer is read, the word before names the attribute."""
    words = re.findall(r"\s*\S+(?:\s+$)?", prefix)
    if not words:
        raise PromptError("The forced answer prefix is empty. Give at least one word, as in 'Answer:'.")
    return [
        Piece("".join(words[:-2]), "late", "late"),
        *(Piece(word, "attribute", "late") for word in words[-2:-1]),
        Piece(words[-1], "late", "late"),  # its final token alone is "last", see `tokenize`
    ]
