"""How a model family writes a question about a clip.

A chat template is rendered once with marks in place of the user's text and the forced answer prefix, so that every
character, and then every token, knows which part of the prompt it comes from.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from jinja2 import TemplateError

from lalm_lens.errors import ConversionError, PromptError
from lalm_lens.pieces import Piece, Region, Turn, prefix_pieces, words_of
from lalm_lens.prompts.prompt import Prompt

Picture = Literal["image", "video"]
_USER, _ANSWER, _BEFORE = "\ue000", "\ue001", "\ue003"  # private-use characters that no template and no prompt contains

Transcript = str | tuple[int, ...]  # what a clip says, as words or as their tokens


class Template(ABC):
    """Words about a clip become the tokens that the model was trained on. `hf` is the model's own processor."""

    has_transcript: ClassVar[bool] = False  # whether what the clip says stands in the prompt

    def of(self, audio_token: int) -> "Template":
        """The template of a model that hears where this token is."""
        return self

    def saying(self, transcript: Transcript) -> "Template":
        """The template of a clip that says this. Raises `PromptError` where no prompt holds what a clip says."""
        raise PromptError("The prompts of this model hold no transcript: leave it out.")

    def as_transcript(self, heard: str) -> str:
        """What the ASR model wrote, as the model reads it."""
        return heard

    def transcript_tokens(self, hf: Any) -> tuple[int, ...]:
        """Of what the clip says."""
        return ()

    @abstractmethod
    def check(self, hf: Any, audio_token: int, n_audio: int) -> None:
        """Raise `ConversionError` for the processor of another model: `audio_token` is the model's placeholder, and a
        window of its encoder makes `n_audio` of them."""

    def check_sight(self, hf: Any, image_token: int, video_token: int) -> None:
        """The same for the placeholders of images and videos, where a model sees them."""
        raise NotImplementedError

    @abstractmethod
    def write(self, hf: Any, turn: Turn, prefix: str, pictures: Sequence[Picture] = ()) -> Prompt:
        """The prompt up to the end of the forced answer prefix, with one placeholder for the clip, if there is one, and
        one for each of the pictures, which come first where a model sees any.

        `turn` is what the user says beside the clip; it may be nothing. Raises `PromptError` for words that the
        template would change, or take for its own marks.
        """


@dataclass(frozen=True)
class Mark:
    """The texts that stand for something seen, and around it."""

    placeholder: str
    before: str
    after: str


@dataclass(frozen=True)
class ChatTemplate(Template):
    """The chat template of the tokenizer, in which these texts stand for a clip, and for an image or a video."""

    placeholder: str
    before: str = ""
    after: str = ""
    image: Mark | None = None
    video: Mark | None = None
    between: ClassVar[str] = "\n"  # what is said before the clip, and the clip

    def check(self, hf: Any, audio_token: int, n_audio: int) -> None:
        same_token(hf, self.placeholder, audio_token, "hears")

    def check_sight(self, hf: Any, image_token: int, video_token: int) -> None:
        assert self.image is not None
        assert self.video is not None
        same_token(hf, self.image.placeholder, image_token, "sees images")
        same_token(hf, self.video.placeholder, video_token, "sees videos")

    def write(self, hf: Any, turn: Turn, prefix: str, pictures: Sequence[Picture] = ()) -> Prompt:
        return self.tokenize(hf, self.pieces(hf, turn, prefix, pictures))

    def pieces(self, hf: Any, turn: Turn, prefix: str, pictures: Sequence[Picture] = ()) -> list[Piece]:
        """The rendered prompt, cut where the region changes."""
        refuse_marks((words_of(turn.said) or "") + prefix, self.marks(hf))
        if turn.before:
            turn = replace(turn, before=(*turn.before, replace(turn.before[-1], text=self.between, label=None)))
        marked = self.render(hf, marked_turn(turn), _ANSWER, pictures)
        head, _, rest = marked.removesuffix(_ANSWER).partition(_USER)
        before = self.clip_pieces(head, turn) if turn.has_clip else self.picture_pieces(head)
        pieces = [*before, *turn.behind, Piece(rest, "template"), *prefix_pieces(prefix)]
        text = self.render(hf, turn, prefix, pictures)
        if text != "".join(piece.text for piece in pieces):
            raise PromptError(
                f"This chat template does more than to put question and answer prefix in their places, so the parts of "
                f"the prompt cannot be told apart: {text!r}"
            )
        return pieces

    def marks(self, hf: Any) -> set[str]:
        """What no word may contain."""
        return special_texts(hf.tokenizer) | {self.placeholder, _USER, _ANSWER, _BEFORE}

    def render(self, hf: Any, turn: Turn, answer: str, pictures: Sequence[Picture] = ()) -> str:
        """The chat template's text; where nothing is said, the user's turn is the clip, and pictures before it."""
        seen = [{"type": picture, picture: picture} for picture in pictures]
        messages = [
            {"role": "user", "content": [*seen, *self.parts(turn)]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        text = rendered(hf, messages, continue_final_message=True)
        return text.replace(*self.heard(self.video)) if turn.in_video and self.video is not None else text

    def heard(self, video: Mark) -> tuple[str, str]:
        """The placeholder of a video, and that of one with its sound."""
        return video.placeholder, f"{self.before}{video.placeholder}{self.placeholder}{self.after}"

    def parts(self, turn: Turn) -> list[dict[str, str]]:
        """The clip and the words of the user's turn, as a chat template takes them."""
        kind = {"type": "video", "video": "clip"} if turn.in_video else {"type": "audio", "audio_url": "clip"}
        clip = [kind] if turn.has_clip else []
        before, behind = ([{"type": "text", "text": text}] if text else [] for text in texts(turn))
        return [*before, *clip, *behind]

    def clip_pieces(self, head: str, turn: Turn) -> list[Piece]:
        """What comes up to the question."""
        said = turn.before
        before, placeholder, after = head.partition(self.placeholder)
        if not placeholder or self.placeholder in after:
            raise PromptError(f"The chat template must hold {self.placeholder} once before the question: {head!r}")
        first, mark, before = before.partition(_BEFORE) if said else ("", "", before)
        if said and not mark:
            raise PromptError('This chat template writes the clip before all text, so there is no order "text_first".')
        opening, closing = [Piece(self.before, "audio_tag")], [Piece(self.after, "audio_tag")]
        if turn.in_video and self.video is not None:
            opening = [Piece(self.video.before, "video_tag"), *opening, Piece(self.video.placeholder, "video")]
            closing += [Piece(self.video.after, "video_tag")]
        return [
            *(self.picture_pieces(first) if said else []),
            *said,
            *self.picture_pieces(before.removesuffix(words_of(opening) or "")),
            *opening,
            Piece(placeholder, "audio"),
            *closing,
            Piece(after.removeprefix(words_of(closing) or ""), "template"),
        ]

    def picture_pieces(self, text: str) -> list[Piece]:
        """What comes before the clip, cut at the images and videos in it."""
        marks: list[tuple[Mark, Region, Region]] = []
        if self.image is not None and self.image.placeholder in text:
            marks.append((self.image, "image", "image_tag"))
        if self.video is not None and self.video.placeholder in text:
            marks.append((self.video, "video", "video_tag"))
        if not marks:
            return [Piece(text, "text_before")]
        mark, picture, tag = min(marks, key=lambda its: text.index(its[0].placeholder))
        before, _, after = text.partition(mark.placeholder)
        return [
            Piece(before.removesuffix(mark.before), "text_before"),
            Piece(mark.before, tag),
            Piece(mark.placeholder, picture),
            Piece(mark.after, tag),
            *self.picture_pieces(after.removeprefix(mark.after)),
        ]

    def tokenize(self, hf: Any, pieces: Sequence[Piece]) -> Prompt:
        """A token belongs to the piece of its last character: " male" begins with the space before the option."""
        owner = [piece for piece in pieces for _ in piece.text]
        encoding = hf.tokenizer(
            "".join(piece.text for piece in pieces), add_special_tokens=False, return_offsets_mapping=True
        )
        owners = [owner[max(end - 1, start)] for start, end in encoding["offset_mapping"]]
        return Prompt.of(encoding["input_ids"], owners, hf.tokenizer.decode)


@dataclass(frozen=True)
class ClipFirstTemplate(ChatTemplate):
    """A chat template that writes the clip before all text of its turn (Audio Flamingo 3). Where text comes first, the
    placeholder is part of the text."""

    def parts(self, turn: Turn) -> list[dict[str, str]]:
        if not turn.before:
            return super().parts(turn)
        return [{"type": "text", "text": self.placeholder.join(text or "" for text in texts(turn))}]


def texts(turn: Turn) -> tuple[str | None, str | None]:
    return words_of(turn.before), words_of(turn.behind)


def marked_turn(turn: Turn) -> Turn:
    """With marks in place of its words."""
    before, behind = (
        (Piece(mark, "template"),) if pieces else () for mark, pieces in ((_BEFORE, turn.before), (_USER, turn.behind))
    )
    return replace(turn, before=before, behind=behind)


def same_token(hf: Any, placeholder: str, wanted: int, does: str) -> None:
    token = hf.tokenizer.get_vocab().get(placeholder)
    if token != wanted:
        is_what = "no token" if token is None else f"token {token}"
        raise ConversionError(
            f"This {type(hf).__name__} belongs to another model: {placeholder} is {is_what} of its tokenizer, and the "
            f"model {does} where token {wanted} is."
        )


def refuse_marks(words: str, marks: Iterable[str]) -> None:
    """Words that mean something to the template would end a turn, or begin one."""
    for mark in sorted(marks):
        if mark in words:
            raise PromptError(f"{mark!r} is a mark of the chat template and no word. Leave it out of the prompt.")


def special_texts(tokenizer: Any) -> set[str]:
    """The texts that become special tokens; transformers 5 counts those that have a role alone."""
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)


def rendered(renderer: Any, messages: Sequence[dict], **how: bool) -> str:
    """The text of the chat template of a processor or tokenizer."""
    try:
        return renderer.apply_chat_template(messages, tokenize=False, **how)
    except (TemplateError, ValueError) as error:
        raise PromptError(f"This model's chat template cannot be used: {str(error).splitlines()[0]}") from error
