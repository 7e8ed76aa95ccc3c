"""A clip with the label that is true of it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Protocol, TypedDict, runtime_checkable

from lalm_lens.audio import Waveform, read_audio
from lalm_lens.errors import DataError, InputError
from lalm_lens.inputs import Images, Videos, joined
from lalm_lens.pieces import Statement


@dataclass(frozen=True)
class Sample:
    """A clip and the label that is true of it; what it says too, where that is known and a model reads it; what the
    prompt states of it beside the question, true or not; who speaks; its own question, if it has one; and what is seen
    with it, before the clip in the prompt: images, from `Processor.see`, and then silent videos, or one `HeardVideo`,
    whose sound the clip is."""

    name: str
    label: str
    waveform: Waveform = field(repr=False)
    transcript: str | None = None
    statement: Statement | None = None
    speaker: str | None = None
    question: str | None = None  # in place of the attribute's
    images: Images | None = field(default=None, repr=False)
    videos: Videos | None = field(default=None, repr=False)

    @property
    def is_heard(self) -> bool:
        """Whether the clip is in the prompt at all."""
        return True

    @property
    def is_seen(self) -> bool:
        """Whether pictures are in the prompt too."""
        return not (self.images is None and self.videos is None)

    @property
    def digest(self) -> str:
        """A hash of all that a model is given of it, and its label."""
        told = (self.label, self.transcript, self.statement, self.question)
        pictures = [its for its in (self.images, self.videos) if its is not None]
        pixels = [tensor.numpy().tobytes() for its in pictures for tensor in vars(its).values()]
        seen = [type(its).__name__.encode() for its in pictures] + pixels
        return digest(self.waveform.numpy().tobytes(), *(repr(each).encode() for each in told), *seen)

    @property
    def columns(self) -> dict[str, str | None]:
        """What a table says of it, beside its name and label."""
        return {}


@dataclass(frozen=True)
class Unheard(Sample):
    """A clip that is left out of its prompt, of which all else stays."""

    @property
    def is_heard(self) -> bool:
        return False


def unheard(sample: Sample) -> Unheard:
    """The same question and statement, and no clip."""
    return Unheard(**{its.name: getattr(sample, its.name) for its in fields(Sample)})


def digest(*parts: bytes) -> str:
    """A stable hash of some bytes, each with its length."""
    whole = sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()


def read_sample(path: str | Path, label: str, transcript: str | None = None) -> Sample:
    return Sample(name=Path(path).name, label=label, waveform=read_audio(path), transcript=transcript)


def cut_to(samples: Sequence[Sample], n_samples: int) -> list[Sample]:
    """The clips without what is behind their first `n_samples` (16 kHz) samples, and then without the transcript of the
    whole; shorter ones are as they were. Raises `InputError` for less than one sample."""
    if n_samples < 1:
        raise InputError(f"Clips are cut to a number of samples, 1 or more; got {n_samples}.")
    return [
        replace(sample, waveform=sample.waveform[:n_samples], transcript=None)
        if len(sample.waveform) > n_samples
        else sample
        for sample in samples
    ]


def heard(samples: Sequence[Sample]) -> list[Waveform]:
    """The clips of those that have one in their prompt."""
    return [sample.waveform for sample in samples if sample.is_heard]


class Seen(TypedDict):
    """What is seen, as `Processor.inputs` takes it."""

    images: Images | None
    videos: Videos | None


def seen(samples: Sequence[Sample]) -> Seen:
    """The pictures of some samples, in their order."""
    images = joined([sample.images for sample in samples if sample.images is not None])
    videos = [Videos(**vars(sample.videos)) for sample in samples if sample.videos is not None]
    return {"images": images, "videos": joined(videos)}


@runtime_checkable
class Named(Protocol):
    """What is listed: a clip, read or not."""

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str: ...


def refuse_repeated(samples: Sequence[Named]) -> None:
    """A clip listed twice would count twice, or contradict itself. Raises `DataError`; also if there are no clips."""
    if not samples:
        raise DataError("There is nothing to trace: no clip is listed.")
    name, n = Counter(sample.name for sample in samples).most_common(1)[0]
    if n > 1:
        raise DataError(repeated([sample for sample in samples if sample.name == name]))


def repeated(samples: Sequence[Named]) -> str:
    """What is wrong with samples of one name."""
    labels = ", ".join(sorted({sample.label for sample in samples}))
    return f"{samples[0].name} is listed {len(samples)} times, labelled {labels}. Name every clip once."
