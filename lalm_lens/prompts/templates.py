"""How a model family writes a question about a clip.

A chat template is rendered once with marks in place of the user's text and the forced answer prefix, so that every
character, and then every token, knows which part of the prompt it comes from.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from lalm_lens.errors import ConversionError, PromptError
from lalm_lens.pieces import Piece, prefix_pieces
from lalm_lens.prompts.prompt import Prompt

_USER, _ANSWER = "\ue000", "\ue001"  # private-use characters that no template and no prompt contains


class Template(ABC):
    """Words about a clip become the tokens that the model was trained on. `hf` is the model's own processor."""

    @abstractmethod
    def check(self, hf: Any, audio_token: int, n_audio: int) -> None:
        """Raise `ConversionError` for the processor of another model: `audio_token` is the model's placeholder, and a
        window of its encoder makes `n_audio` of them."""

    @abstractmethod
    def write(self, hf: Any, asked: Sequence[Piece], prefix: str) -> Prompt:
        """The prompt up to the end of the forced answer prefix, with one placeholder for the clip.

        `asked` is what the user says beside the clip; it may be nothing. Raises `PromptError` for words that the
        template would change, or take for its own marks.
        """


@dataclass(frozen=True)
class ChatTemplate(Template):
    """The chat template of the tokenizer, in which these texts stand for a clip."""

    placeholder: str
    before: str = ""
    after: str = ""

    def check(self, hf: Any, audio_token: int, n_audio: int) -> None:
        token = hf.tokenizer.get_vocab().get(self.placeholder)
        if token != audio_token:
            is_what = "no token" if token is None else f"token {token}"
            raise ConversionError(
                f"This {type(hf).__name__} belongs to another model: {self.placeholder} is {is_what} of its tokenizer, "
                f"and the model hears where token {audio_token} is."
            )

    def write(self, hf: Any, asked: Sequence[Piece], prefix: str) -> Prompt:
        return self.tokenize(hf, self.pieces(hf, asked, prefix))

    def pieces(self, hf: Any, asked: Sequence[Piece], prefix: str) -> list[Piece]:
        """The rendered prompt, cut where the region changes."""
        words = "".join(piece.text for piece in asked)
        refuse_marks(words + prefix, (*hf.tokenizer.all_special_tokens, _USER, _ANSWER))
        head, _, rest = render(hf, _USER if asked else None, _ANSWER).removesuffix(_ANSWER).partition(_USER)
        pieces = [*self.clip_pieces(head), *asked, Piece(rest, "template"), *prefix_pieces(prefix)]
        rendered = render(hf, words or None, prefix)
        if rendered != "".join(piece.text for piece in pieces):
            raise PromptError(
                f"This chat template does more than to put question and answer prefix in their places, so the parts of "
                f"the prompt cannot be told apart: {rendered!r}"
            )
        return pieces

    def clip_pieces(self, head: str) -> list[Piece]:
        before, placeholder, after = head.partition(self.placeholder)
        if not placeholder or self.placeholder in after:
            raise PromptError(f"The chat template must hold {self.placeholder} once before the question: {head!r}")
        return [
            Piece(before.removesuffix(self.before), "text_before"),
            Piece(self.before, "audio_tag"),
            Piece(placeholder, "audio"),
            Piece(self.after, "audio_tag"),
            Piece(after.removeprefix(self.after), "template"),
        ]

    def tokenize(self, hf: Any, pieces: Sequence[Piece]) -> Prompt:
        """A token belongs to the piece of its last character: " male" begins with the space before the option."""
        owner = [piece for piece in pieces for _ in piece.text]
        encoding = hf.tokenizer(
            "".join(piece.text for piece in pieces), add_special_tokens=False, return_offsets_mapping=True
        )
        owners = [owner[max(end - 1, start)] for start, end in encoding["offset_mapping"]]
        return Prompt.of(encoding["input_ids"], owners, hf.tokenizer.decode)


def refuse_marks(words: str, marks: Sequence[str]) -> None:
    """Words that mean something to the template would end a turn, or begin one."""
    for mark in marks:
        if mark in words:
            raise PromptError(f"{mark!r} is a mark of the chat template and no word. Leave it out of the prompt.")


def render(hf: Any, user: str | None, answer: str) -> str:
    """The chat template's text; with no user text, the clip alone is the user's turn."""
    text = [] if user is None else [{"type": "text", "text": user}]
    messages = [
        {"role": "user", "content": [{"type": "audio", "audio_url": "clip"}, *text]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    try:
        return hf.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    except (TemplateError, ValueError) as error:
        raise PromptError(f"This model's chat template cannot be used: {str(error).splitlines()[0]}") from error
