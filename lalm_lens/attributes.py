"""What is asked about a clip; AudioLens' four auditory attributes and three forms (arXiv 2506.05140, Table I)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lalm_lens.errors import PromptError

Form = Literal["P1", "P2", "P3"]  # the user says: nothing; the question; the question and the options


@dataclass(frozen=True)
class Attribute:
    """What is asked about a clip, and the words that answer it. Any question can be one.

    The answer is forced to begin with `prefix`: its last word is where the answer is read, the word before it names the
    attribute.
    """

    name: str
    question: str
    labels: tuple[str, ...]
    prefix: str

    def options(self, labels: Sequence[str] | None = None) -> str:
        """The user turn of AudioLens' P3: the question and the labels it may be answered with."""
        return f"{self.question} Possible options: {', '.join(labels or self.labels)}."


ATTRIBUTES = {
    attribute.name: attribute
    for attribute in (
        Attribute(
            "gender",
            "What is the gender of the speaker in the speech?",
            ("male", "female"),
            "The speaker's gender is",
        ),
        Attribute(
            "language",
            "What is the language spoken in the speech?",
            ("English", "German", "Spanish", "French", "Italian", "Chinese", "Japanese", "Korean"),
            "The speech's spoken language is",
        ),
        Attribute(
            "emotion",
            "What is the emotion of the speaker in the speech?",
            ("angry", "disgust", "fear", "happy", "sad"),
            "The speaker's emotion is",
        ),
        Attribute(
            "animal",
            "What animal makes the sound?",
            ("dog", "cat", "pig", "cow", "frog", "hen", "rooster", "sheep", "crow"),
            "The sound file's animal is",
        ),
    )
}


def attribute_named(name: str) -> Attribute:
    """The attribute of that name; raises `PromptError` with the names there are."""
    if name not in ATTRIBUTES:
        raise PromptError(f"There is no attribute {name!r}. Choose one of {', '.join(ATTRIBUTES)}.")
    return ATTRIBUTES[name]
