"""What the runs of a clip read of it, where a model's prompt holds a transcript of the clip (DeSTA).

With silence in place of the clip, the transcript, and with it the length of the prompt, would change by itself; and a
transcript that stays tells the corrupted run what was said.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import ClassVar, Literal

from lalm_lens.audio import Waveform
from lalm_lens.corrupt import Corrupted
from lalm_lens.datasets import Sample
from lalm_lens.errors import PromptError
from lalm_lens.pieces import Region
from lalm_lens.prompts import Processor, Transcript
from lalm_lens.prompts.desta import NO_SPEECH
from lalm_lens.shapes import typed
from lalm_lens.transcribe import has_speech

Side = Literal["audio", "text"]  # what a transcript counts as
SIDES: dict[Side, tuple[Region, ...]] = {"audio": ("audio", "transcript"), "text": ("audio",)}


@dataclass(frozen=True)
class Listener:
    """Who says what a clip says: the clip's own transcript, or else the model's Whisper. With `voice_activity`, and
    only where Silero's detector hears somebody speak; otherwise it is " ", even of a clip with a transcript, as in
    DeSTA2.5."""

    processor: Processor
    voice_activity: bool = False

    def said(self, waveform: Waveform, given: str | None = None) -> str:
        if self.voice_activity and not has_speech(waveform):
            return NO_SPEECH
        return self.processor.transcribe(waveform) if given is None else given

    def tokens(self, sample: Sample) -> tuple[int, ...]:
        return self.processor.transcript_tokens(self.said(sample.waveform, sample.transcript))


@typed
def transcribed(
    processor: Processor, samples: Sequence[Sample], *, text: str | None = None, voice_activity: bool = False
) -> list[Sample]:
    """The clips with the transcripts that a model reads (DeSTA): `text` for all of them, as " ", or what is said in
    them, as by `Listener`. Analyses of a single run read a clip's transcript, and ask Whisper only where it has none.

    Raises `PromptError` for a model that reads no transcript.
    """
    if not processor.template.has_transcript:
        raise PromptError(f"The prompts of a {processor.cfg.model_type} model hold no transcript: leave it out.")
    listener = Listener(processor, voice_activity)
    said = (listener.said(sample.waveform, sample.transcript if text is None else text) for sample in samples)
    return [replace(sample, transcript=its) for sample, its in zip(samples, said, strict=True)]


Both = tuple[Transcript, Transcript]  # what the clean and the corrupted run read


@dataclass(frozen=True)
class Filler:
    """Both runs read a word, one token, as often as the clip's transcript has tokens: the length stays, and nothing of
    what was said is told."""

    word: str = "."

    @property
    def name(self) -> str:
        return "filler" if self.word == "." else f"filler {self.word!r}"

    def of(self, listener: Listener, sample: Sample, heard: Corrupted) -> Both:
        token = listener.processor.transcript_tokens(self.word)
        if len(token) != 1:
            raise PromptError(f"A filler is one token, and {self.word!r} is {len(token)}. Take another word.")
        filler = token * len(listener.tokens(sample))
        return filler, filler


@dataclass(frozen=True)
class Clean:
    """Both runs read what the clip says: its words, and its language, stay readable in the corrupted run."""

    name: ClassVar[str] = "clean"

    def of(self, listener: Listener, sample: Sample, heard: Corrupted) -> Both:
        said = listener.tokens(sample)
        return said, said


@dataclass(frozen=True)
class Fixed:
    """Both runs of all clips read this text; by default a placeholder, which is what DeSTA2.5 reads without speech."""

    text: str = NO_SPEECH

    @property
    def name(self) -> str:
        return "placeholder" if self.text == NO_SPEECH else f"text {self.text!r}"

    def of(self, listener: Listener, sample: Sample, heard: Corrupted) -> Both:
        return self.text, self.text


@dataclass(frozen=True)
class Own:
    """Each run reads what it hears, the corrupted one too, unless `corrupted` says what that reads.

    The prompts then differ in length. Text is aligned with text; states of a transcript have no counterpart.
    """

    corrupted: str | None = None

    @property
    def name(self) -> str:
        return "own" if self.corrupted is None else f"own, corrupted {self.corrupted!r}"

    def of(self, listener: Listener, sample: Sample, heard: Corrupted) -> Both:
        given = heard.transcript if self.corrupted is None else self.corrupted
        return listener.tokens(sample), listener.said(heard.waveform, given)


Reading = Filler | Clean | Fixed | Own
NAMED: dict[str, Reading] = {"filler": Filler(), "clean": Clean(), "placeholder": Fixed(), "own": Own()}


def reading(choice: str | Reading) -> Reading:
    """The choice of that name; any other text is itself what both runs read. Raises `PromptError` for a near miss."""
    if not isinstance(choice, str):
        return choice
    if choice not in NAMED and (near := get_close_matches(choice, NAMED)):
        raise PromptError(
            f"There is no transcript {choice!r}; did you mean {near[0]}? For that very text: Fixed(text)."
        )
    return NAMED.get(choice, Fixed(choice))
