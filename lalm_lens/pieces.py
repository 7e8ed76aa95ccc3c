"""The words of a prompt, cut into stretches that know what they are."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Piece:
    """A stretch of prompt text whose characters share one region."""

    text: str
    region: Region
    segment: Segment = "none"
    label: str | None = None


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
