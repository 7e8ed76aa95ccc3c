"""The clips of a command, and what is asked about them."""

from pathlib import Path
from typing import TYPE_CHECKING

from lalm_lens.attributes import ATTRIBUTES, Attribute, attribute_named
from lalm_lens.errors import DataError, PromptError

if TYPE_CHECKING:
    from lalm_lens.datasets import Sample
    from lalm_lens.model import HookedLALM

OWN = "own"  # the name of a user's question, in tables and files


def asked_about(attribute: str | None, question: str | None, labels: str | None, prefix: str | None) -> Attribute:
    """The attribute of that name, or the user's own question."""
    own = (question, labels, prefix)
    if attribute is not None:
        if own != (None, None, None):
            raise PromptError("--question, --labels and --prefix stand in place of --attribute: give one or the other.")
        return attribute_named(attribute)
    if labels is None or prefix is None:
        raise PromptError(
            f"Say what is asked: --attribute {'|'.join(ATTRIBUTES)}, or your own --question with --labels and --prefix."
        )
    words = tuple(label.strip() for label in labels.split(",")) if labels.strip() else ()
    return Attribute(OWN, question or "", words, prefix)


def read_samples(clips: Path, attribute: Attribute, label: str | None) -> "list[Sample]":
    from lalm_lens.datasets import read_folder, read_sample

    if not clips.exists():
        raise DataError(f"There is nothing at {clips}. Give a sound file, or a folder with metadata.jsonl.")
    if clips.is_dir():
        if label is not None:
            raise DataError("--label is for a single sound file; a folder has its labels in metadata.jsonl.")
        return read_folder(clips)
    if label is None:
        raise DataError(f"Say what is true of {clips} with --label: {', '.join(attribute.labels)}.")
    return [read_sample(clips, label)]


def read_study(
    data: Path, attribute: str | None, question: str | None, labels: str | None, prefix: str | None
) -> "dict[Attribute, list[Sample]]":
    """Clips by what is asked about them: of one folder, or of a folder for each attribute."""
    from lalm_lens.datasets import read_attributes, read_folder
    from lalm_lens.datasets.folder import is_listed

    if not data.is_dir():
        raise DataError(f"{data} is no folder. Give one with metadata.jsonl, or with a folder for each attribute.")
    if (question, labels, prefix) != (None, None, None):
        return {asked_about(attribute, question, labels, prefix): read_folder(data)}
    listed = list(ATTRIBUTES) if attribute is None else attribute.split(",")
    names = [attribute_named(name.strip()).name for name in listed]
    if is_listed(data):
        if len(names) > 1:
            raise DataError(f"{data} holds the clips of one attribute. Say which: --attribute {'|'.join(ATTRIBUTES)}.")
        return {attribute_named(names[0]): read_folder(data)}
    return {attribute_named(name): samples for name, samples in read_attributes(data, names).items()}


def heard(
    lens: "HookedLALM", samples: "list[Sample]", cut: bool, transcript: str | None, voice_activity: bool
) -> "list[Sample]":
    """The clips, cut and with the transcripts that are wanted."""
    from lalm_lens.experiments.asked import processor_of
    from lalm_lens.transcripts import transcribed

    samples = cut_to_hearing(lens, samples) if cut else samples
    if transcript is None and not voice_activity:
        return samples
    return transcribed(processor_of(lens), samples, text=transcript, voice_activity=voice_activity)


def cut_to_hearing(lens: "HookedLALM", samples: "list[Sample]") -> "list[Sample]":
    """The clips as far as the model hears them; a line for each that is cut."""
    from lalm_lens.audio import RATE_HZ
    from lalm_lens.datasets import cut_to
    from lalm_lens.experiments.asked import processor_of

    heard = cut_to(samples, processor_of(lens).n_samples)
    for before, after in zip(samples, heard, strict=True):
        if len(after.waveform) < len(before.waveform):
            lengths_s = [len(each.waveform) / RATE_HZ for each in (before, after)]
            print(
                f"{before.name} is cut from {lengths_s[0]:.2f} s to {lengths_s[1]:.2f} s, which is all the model hears."
            )
    return heard
