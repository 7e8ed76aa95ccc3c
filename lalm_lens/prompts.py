"""A question about a clip in a model's own chat template, with a label for every position.

The template is rendered once with marks in place of the user's text and the forced answer prefix, so that every
character, and then every token, knows which part of the prompt it comes from.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool
from jinja2 import TemplateError
from torch import Tensor

from lalm_lens.attributes import Attribute, Form
from lalm_lens.audio import Waveform, Waveforms, mel_features
from lalm_lens.config import LALMConfig
from lalm_lens.errors import InputError, PromptError
from lalm_lens.inputs import Inputs
from lalm_lens.pieces import Piece, Region, Segment, prefix_pieces, user_pieces

_USER, _ANSWER = "\ue000", "\ue001"  # private-use characters that no template and no prompt contains


@dataclass(frozen=True)
class AudioMarks:
    """The text that stands for a clip in a model's own chat template."""

    placeholder: str
    before: str
    after: str


@dataclass(frozen=True)
class Position:
    """What one position of the merged sequence is."""

    token: str
    region: Region
    segment: Segment = "none"
    label: str | None = None  # of an object token: the option it belongs to
    is_correct: bool = False  # and whether that option is the answer


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids with `Position`s beside them, unpadded, audio placeholders expanded."""

    tokens: tuple[int, ...]
    positions: tuple[Position, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def is_region(self, *regions: Region) -> Bool[Tensor, " pos"]:
        return torch.tensor([position.region in regions for position in self.positions])


@dataclass(frozen=True)
class Processor:
    """A model's own tokenizer, feature extractor and chat template, and what its conversion knows about them."""

    hf: Any
    marks: AudioMarks
    cfg: LALMConfig
    n_audio: Callable[[int], int] = field(repr=False)  # audio tokens of so many mel frames

    @property
    def tokenizer(self) -> Any:
        return self.hf.tokenizer

    def prompt(
        self,
        attribute: Attribute,
        n_frames: int,
        form: Form = "P3",
        labels: Sequence[str] | None = None,
        answer: str | None = None,
    ) -> Prompt:
        """AudioLens' P1 (no text), P2 (question) or P3 (question, options), up to the end of the forced answer prefix.

        The clip has `n_frames` mel frames (10 ms). `labels` are the options, the attribute's own by default; tokens of
        the option `answer` are marked as correct. Raises `PromptError` if what the form needs is empty, or if the
        model's chat template does more than to put the texts in their places.
        """
        pieces = self.pieces(attribute, form, labels or attribute.labels)
        prompt = self.expand(self.tokenize(pieces), self.n_audio(n_frames))
        marked = (replace(p, is_correct=p.label is not None and p.label == answer) for p in prompt.positions)
        return replace(prompt, positions=tuple(marked))

    def pieces(self, attribute: Attribute, form: Form, labels: Sequence[str]) -> list[Piece]:
        """The rendered prompt, cut where the region changes."""
        asked = user_pieces(attribute, form, labels)
        self.refuse_marks("".join(piece.text for piece in asked) + attribute.prefix)
        head, _, rest = self.render(_USER if asked else None, _ANSWER).removesuffix(_ANSWER).partition(_USER)
        pieces = [
            *self.clip_pieces(head),
            *asked,
            Piece(rest, "template"),
            *prefix_pieces(attribute.prefix),
        ]
        rendered = self.render("".join(piece.text for piece in asked) or None, attribute.prefix)
        if rendered != "".join(piece.text for piece in pieces):
            raise PromptError(
                f"This chat template does more than to put question and answer prefix in their places, so the parts of "
                f"the prompt cannot be told apart: {rendered!r}"
            )
        return pieces

    def refuse_marks(self, words: str) -> None:
        """Words that mean something to the template would end a turn, or begin one."""
        for mark in (*self.tokenizer.all_special_tokens, _USER, _ANSWER):
            if mark in words:
                raise PromptError(f"{mark!r} is a mark of the chat template and no word. Leave it out of the prompt.")

    def render(self, user: str | None, answer: str) -> str:
        """The chat template's text; with no user text, the clip alone is the user's turn."""
        text = [] if user is None else [{"type": "text", "text": user}]
        messages = [
            {"role": "user", "content": [{"type": "audio", "audio_url": "clip"}, *text]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        try:
            return self.hf.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        except (TemplateError, ValueError) as error:
            raise PromptError(f"This model's chat template cannot be used: {str(error).splitlines()[0]}") from error

    def clip_pieces(self, head: str) -> list[Piece]:
        before, placeholder, after = head.partition(self.marks.placeholder)
        if not placeholder or self.marks.placeholder in after:
            raise PromptError(
                f"The chat template must hold {self.marks.placeholder} once before the question: {head!r}"
            )
        return [
            Piece(before.removesuffix(self.marks.before), "text_before"),
            Piece(self.marks.before, "audio_tag"),
            Piece(placeholder, "audio"),
            Piece(self.marks.after, "audio_tag"),
            Piece(after.removeprefix(self.marks.after), "template"),
        ]

    def tokenize(self, pieces: Sequence[Piece]) -> Prompt:
        """A token belongs to the piece of its last character: " male" begins with the space before the option."""
        owner = [piece for piece in pieces for _ in piece.text]
        encoding = self.tokenizer(
            "".join(piece.text for piece in pieces), add_special_tokens=False, return_offsets_mapping=True
        )
        positions = []
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            piece = owner[max(end - 1, start)]
            text = self.tokenizer.decode([token])
            positions.append(Position(text, piece.region, piece.segment, piece.label))
        positions[-1] = replace(positions[-1], region="last", segment="last")
        return Prompt(tuple(encoding["input_ids"]), tuple(positions))

    def expand(self, prompt: Prompt, n_audio: int) -> Prompt:
        """The one placeholder, `n_audio` times."""
        if prompt.tokens.count(self.cfg.audio_token) != 1:
            raise PromptError(
                f"{self.marks.placeholder} is not token {self.cfg.audio_token} of this tokenizer, exactly once in the "
                "prompt. The tokenizer belongs to another model, or the prompt contains the placeholder."
            )
        at = prompt.tokens.index(self.cfg.audio_token)
        times = [n_audio if pos == at else 1 for pos in range(len(prompt))]
        return Prompt(
            tuple(token for token, n in zip(prompt.tokens, times, strict=True) for _ in range(n)),
            tuple(position for position, n in zip(prompt.positions, times, strict=True) for _ in range(n)),
        )

    def begun(self, prompt: Prompt, tokens: Sequence[int]) -> Prompt:
        """The prompt, and an answer to it that has begun with `tokens`."""
        answer = (Position(self.tokenizer.decode([token]), "answer") for token in tokens)
        return Prompt((*prompt.tokens, *tokens), (*prompt.positions, *answer))

    def inputs(self, prompts: Sequence[Prompt], waveforms: Waveforms) -> Inputs:
        """One left-padded batch; each prompt holds one clip."""
        mel, n_frames = mel_features(self.hf.feature_extractor, waveforms)
        return Inputs(*self.pad(prompts), mel=mel, n_frames=n_frames)

    def pad(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Bool[Tensor, "batch pos"]]:
        n_pos = max(len(prompt) for prompt in prompts)
        tokens = torch.full((len(prompts), n_pos), self.tokenizer.pad_token_id or 0)
        is_token = torch.zeros(len(prompts), n_pos, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens[row, n_pos - len(prompt) :] = torch.tensor(prompt.tokens)
            is_token[row, n_pos - len(prompt) :] = True
        if n_pos > self.cfg.decoder.n_ctx:
            raise InputError(f"The prompt has {n_pos} positions; this model has {self.cfg.decoder.n_ctx}.")
        return tokens, is_token

    def n_frames(self, waveform: Waveform) -> int:
        """Mel frames (10 ms) of a clip, the last one possibly begun only."""
        return -(-len(waveform) // self.hf.feature_extractor.hop_length)

    def label_tokens(self, labels: Sequence[str], label_space: bool = True) -> dict[str, int]:
        """The first token of each label, as the model would emit it after the prefix: with a leading space.

        `label_space=False` is what AudioLens' released code scores. Raises `PromptError` if two labels begin with
        the same token, because then no argmax can tell them apart.
        """
        for label, n in Counter(labels).items():
            if n > 1:
                raise PromptError(f"The label {label!r} is given {n} times. Give every label once.")
        tokens = {label: self.answer_tokens(label, label_space)[0] for label in labels}
        for token in tokens.values():
            twins = [other for other, its in tokens.items() if its == token]
            if len(twins) > 1:
                raise PromptError(
                    f"The labels {twins} begin with the same token {self.tokenizer.decode([token])!r}, so their first "
                    "token cannot tell them apart. Use other words."
                )
        return tokens

    def answer_tokens(self, label: str, label_space: bool = True) -> tuple[int, ...]:
        """All tokens of a label, as the model would emit it after the prefix."""
        tokens = self.tokenizer(" " * label_space + label, add_special_tokens=False)["input_ids"]
        if not label.strip() or not tokens:
            raise PromptError(f"The label {label!r} has no tokens. Leave out empty labels.")
        return tuple(tokens)
