"""DeSTA's prompts: a turn of Llama 3's chat that holds the clip, and behind it what an ASR model heard in it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from lalm_lens.errors import ConversionError, PromptError
from lalm_lens.pieces import Piece, Turn, words_of
from lalm_lens.prompts.prompt import Prompt
from lalm_lens.prompts.templates import ChatTemplate, Picture, Transcript, refuse_marks, rendered, texts

NO_SPEECH = " "  # what DeSTA2.5 reads of a clip without speech
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # Llama 3.1's template has them, 3's not
_CLIP = "\ue002"  # a private-use character, as of the user and the answer

Quirks = Literal["published", "none"]


@dataclass(frozen=True)
class DestaTemplate(ChatTemplate):
    """A chat template of Llama 3 whose clip is followed by its transcript."""

    transcript: Transcript = NO_SPEECH
    has_transcript: ClassVar[bool] = True

    def saying(self, transcript: Transcript) -> "DestaTemplate":
        return replace(self, transcript=transcript)

    def expected(self, user: str, answer: str) -> tuple[str, ...]:
        """The texts that the chat template may make."""
        raise NotImplementedError

    def check_chat(self, hf: Any) -> None:
        """Raise `ConversionError` for a tokenizer with another chat template than the model was trained with."""
        text = self.render(hf, Turn((Piece("a", "early"),)), "b")
        if text not in self.expected("a", "b"):
            raise ConversionError(
                f"This tokenizer's chat template is not the one of Llama 3 that the model was trained with: {text!r}. "
                "Take the tokenizer of the model's own Llama."
            )

    def transcript_tokens(self, hf: Any) -> tuple[int, ...]:
        """Raises `PromptError` for words that would not stay by themselves."""
        if isinstance(self.transcript, tuple):
            if not all(0 <= token < len(hf.tokenizer) for token in self.transcript):
                raise PromptError(f"Tokens of a transcript are among {len(hf.tokenizer)}; got {self.transcript}.")
            return self.transcript
        if len(self.transcript.splitlines()) > 1:
            raise PromptError(f"A transcript is one line; this one breaks: {self.transcript!r}. Join its lines.")
        refuse_marks(self.transcript, self.marks(hf))
        return tuple(hf.tokenizer(self.transcript, add_special_tokens=False)["input_ids"])

    def insert_transcript(self, hf: Any, prompt: Prompt, at: int) -> Prompt:
        tokens = self.transcript_tokens(hf)
        return prompt.insert(at, tokens, [hf.tokenizer.decode([token]) for token in tokens], "transcript")


@dataclass(frozen=True)
class Desta25Template(DestaTemplate):
    """DeSTA2.5-Audio: `<start_audio>[clip][transcript]<end_audio>` and the question in the user's turn.

    The tags are plain text, so that `>` may be one token with the line break behind it. Follows kehanlu/DeSTA2.5-Audio,
    desta/models/modeling_desta25.py; its evaluation page says "instruction." in the system prompt.
    """

    placeholder: str = "<|reserved_special_token_87|>"
    before: str = "<start_audio>"
    after: str = "<end_audio>"
    system: str = "Focus on the audio clips and instructions."
    dates: str = DATES  # of the chat template; some copies of Llama 3.1 have none: ""

    @property
    def clip(self) -> str:
        return f"{self.before}{self.placeholder}{self.after}"

    def marks(self, hf: Any) -> set[str]:
        return super().marks(hf) | {"<|AUDIO|>"}  # the original puts a clip there

    def check(self, hf: Any, audio_token: int, n_audio: int) -> None:
        super().check(hf, audio_token, n_audio)
        self.check_chat(hf)

    def as_transcript(self, heard: str) -> str:
        return heard.strip()

    def expected(self, user: str, answer: str) -> tuple[str, ...]:
        said = turn("user", f"{self.clip}\n{user}") + header("assistant") + answer
        return (f"<|begin_of_text|>{turn('system', self.dates + self.system)}{said}",)

    def render(self, hf: Any, turn: Turn, answer: str, pictures: Sequence[Picture] = ()) -> str:
        before, behind = texts(turn)
        heard = [(before or "") + self.clip] if turn.has_clip else []
        messages = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": "\n".join([*heard, *([] if behind is None else [behind])])},
        ]
        return rendered(hf.tokenizer, messages, add_generation_prompt=True) + answer

    def write(self, hf: Any, turn: Turn, prefix: str, pictures: Sequence[Picture] = ()) -> Prompt:
        assert not pictures, "DeSTA does not see"
        prompt = self.tokenize(hf, self.pieces(hf, turn, prefix))
        if not turn.has_clip:
            return prompt
        clip = prompt.tokens.index(hf.tokenizer.convert_tokens_to_ids(self.placeholder))
        return self.insert_transcript(hf, prompt, clip + 1)


@dataclass(frozen=True)
class Desta2Template(DestaTemplate):
    """DeSTA2: a turn of the role `audio` holds clip and transcript, another one the question. What is said before the
    clip has a turn of its own.

    `quirks="published"` is what the original does (kehanlu/DeSTA2, desta/modeling_desta.py): a second token for the
    beginning of the text, which it forgets when it counts, so that the clip lands one token early, before the line
    breaks that end the header. `quirks="none"` is what was meant: one such token, and the clip behind the header. The
    clip's own token is one that no text makes: `audio_token`, the model's.
    """

    placeholder: str = _CLIP
    system: str | None = None
    quirks: Quirks = "published"
    audio_token: int | None = None
    between: ClassVar[str] = ""  # the template strips a turn

    def __post_init__(self) -> None:
        if self.quirks not in ("published", "none"):
            raise PromptError(f'quirks are "published" or "none"; got {self.quirks!r}.')

    def of(self, audio_token: int) -> "Desta2Template":
        return replace(self, audio_token=audio_token)

    def check(self, hf: Any, audio_token: int, n_audio: int) -> None:
        self.check_chat(hf)

    def expected(self, user: str, answer: str) -> tuple[str, ...]:
        system = "" if self.system is None else turn("system", self.system)
        return (f"<|begin_of_text|>{system}{turn('audio', _CLIP)}{turn('user', user)}{header('assistant')}{answer}",)

    def render(self, hf: Any, turn: Turn, answer: str, pictures: Sequence[Picture] = ()) -> str:
        before, behind = texts(turn)
        clip = _CLIP if turn.has_clip else None
        said = ("system", self.system), ("user", before), ("audio", clip), ("user", behind), ("assistant", answer)
        messages = [{"role": role, "content": text} for role, text in said if text is not None]
        return rendered(hf.tokenizer, messages, continue_final_message=True)

    def write(self, hf: Any, turn: Turn, prefix: str, pictures: Sequence[Picture] = ()) -> Prompt:
        assert not pictures, "DeSTA does not see"
        assert self.audio_token is not None, "the token of the clip is that of a model: Template.of"
        pieces = self.pieces(hf, turn, prefix)
        clip = next((n for n, piece in enumerate(pieces) if piece.region == "audio"), len(pieces))
        prompt = self.tokenize(hf, [*pieces[:clip], *pieces[clip + 1 :]])
        n_left = len(hf.tokenizer.tokenize(words_of(pieces[:clip])))
        if turn.has_clip:
            prompt = self.insert_transcript(hf, prompt, n_left)
        if self.quirks == "published":
            prompt = prompt.insert(0, prompt.tokens[:1], [hf.tokenizer.bos_token], "text_before")
        if not turn.has_clip:
            return prompt
        return relabelled(prompt.insert(n_left, [self.audio_token], [""], "audio"), n_left)


def relabelled(prompt: Prompt, clip: int) -> Prompt:
    """What was written before the clip and stands behind it is part of the template."""
    behind = (
        replace(its, region="template") if its.region == "text_before" else its for its in prompt.positions[clip:]
    )
    return replace(prompt, positions=(*prompt.positions[:clip], *behind))


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def turn(role: str, text: str) -> str:
    return f"{header(role)}{text}<|eot_id|>"
