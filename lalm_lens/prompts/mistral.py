"""Voxtral's prompts: tokens by mistral-common, which has no text between a conversation and its tokens."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import soundfile

from lalm_lens.audio import MIN_SAMPLES, RATE_HZ
from lalm_lens.errors import ConversionError, PromptError
from lalm_lens.pieces import Piece, Turn, prefix_pieces, words_of
from lalm_lens.prompts.prompt import Prompt
from lalm_lens.prompts.templates import Picture, Template, refuse_marks, texts


@dataclass(frozen=True)
class MistralTemplate(Template):
    """`<s>[INST][BEGIN_AUDIO][AUDIO]...question[/INST]answer`: marks are tokens, and text never makes one."""

    placeholder: str = "[AUDIO]"
    before: str = "[BEGIN_AUDIO]"

    def check(self, hf: Any, audio_token: int, n_audio: int) -> None:
        from transformers.tokenization_mistral_common import MistralCommonBackend

        if not isinstance(hf.tokenizer, MistralCommonBackend):
            raise ConversionError(
                f"This {type(hf).__name__} belongs to another model: its tokenizer is a {type(hf.tokenizer).__name__}, "
                "and this model's tokens come from mistral-common (tekken.json)."
            )
        special = set(hf.tokenizer.all_special_tokens)
        if vocabulary_of(hf).audio is None or not {self.placeholder, self.before} <= special:
            raise ConversionError(
                f"The tekken.json of this model hears nothing: it has no audio section, or no {self.placeholder} and "
                f"{self.before} among its special tokens. Take the one that belongs to the model."
            )
        token, n_made = self.mark(hf, self.placeholder), encode(hf, Turn(), ".").count(self.mark(hf, self.placeholder))
        if (token, n_made) != (audio_token, n_audio):
            raise ConversionError(
                f"The tekken.json belongs to another model: it has {n_made} times token {token} for a clip, and the "
                f"model hears {n_audio} times token {audio_token}."
            )

    def write(self, hf: Any, turn: Turn, prefix: str, pictures: Sequence[Picture] = ()) -> Prompt:
        assert not pictures, "no model of Mistral's here sees"
        refuse_marks((words_of(turn.said) or "") + prefix, hf.tokenizer.all_special_tokens)
        tokens = encode(hf, turn, prefix)
        if turn.has_clip:
            tokens = self.one_placeholder(hf, tokens)
        said = [*turn.said, *prefix_pieces(prefix)]
        return Prompt.of(tokens, self.owners(hf, tokens, said, turn.has_clip), hf.tokenizer.decode)

    def mark(self, hf: Any, mark: str) -> int:
        return hf.tokenizer.convert_tokens_to_ids(mark)

    def one_placeholder(self, hf: Any, tokens: Sequence[int]) -> list[int]:
        audio = self.mark(hf, self.placeholder)
        first = tokens.index(audio)
        return [*tokens[: first + 1], *(token for token in tokens[first:] if token != audio)]

    def owners(self, hf: Any, tokens: Sequence[int], said: Sequence[Piece], has_clip: bool) -> list[Piece]:
        """The piece of each token: of a mark by what it is, of words by their bytes.

        A token may hold part of a character alone, so characters would not do. Raises `PromptError` where
        mistral-common has changed the words, as it does with a space at the end of a prefix.
        """
        special, audio = set(hf.tokenizer.all_special_ids), self.mark(hf, self.placeholder)
        marks = {audio: Piece("", "audio"), self.mark(hf, self.before): Piece("", "audio_tag")}
        by_byte = [piece for piece in said for _ in piece.text.encode()]
        written, owners = b"", []
        for n, token in enumerate(tokens):
            if token in special:
                is_behind = audio in tokens[:n] if has_clip else bool(written)
                owners.append(marks.get(token, Piece("", "template" if is_behind else "text_before")))
                continue
            written += vocabulary_of(hf).id_to_byte_piece(token)
            owners.append(by_byte[min(len(written), len(by_byte)) - 1])
        if written != (wanted := "".join(piece.text for piece in said).encode()):
            raise PromptError(
                f"mistral-common writes {written.decode(errors='replace')!r} for {wanted.decode()!r}. Leave out what "
                "it changes, such as a space at the end of the prefix."
            )
        return owners


def vocabulary_of(hf: Any) -> Any:
    """mistral-common's own tokenizer, which knows the bytes of a token."""
    return hf.tokenizer.tokenizer.instruct_tokenizer.tokenizer


def encode(hf: Any, turn: Turn, prefix: str) -> list[int]:
    """The tokens of a turn that hears one short clip, or none, and of the answer that it begins."""
    clip = [{"type": "audio", "base64": silent_wav()}] if turn.has_clip else []
    before, behind = ([{"type": "text", "text": text}] if text else [] for text in texts(turn))
    turns = [
        {"role": "user", "content": [*before, *clip, *behind]},
        {"role": "assistant", "content": prefix},
    ]
    # Not the processor's own method of that name: in transformers 5.23 it takes continue_final_message and forgets it.
    return hf.tokenizer.apply_chat_template(turns, continue_final_message=True, tokenize=True)["input_ids"]


@cache
def silent_wav() -> str:
    """30 ms of silence as a wav file in base64: mistral-common counts the tokens of a clip by its length alone."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(MIN_SAMPLES, np.float32), RATE_HZ, format="WAV")
    return base64.b64encode(file.getvalue()).decode()
