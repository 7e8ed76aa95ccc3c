"""What commands have in common: the program, options, and what is read and written. Imports what is heavy late."""

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lalm_lens.attributes import ATTRIBUTES, Attribute, attribute_named
from lalm_lens.errors import DataError, InputError, PromptError

if TYPE_CHECKING:
    from lalm_lens.datasets import Sample
    from lalm_lens.model import HookedLALM
    from lalm_lens.weights import Conversion

EXAMPLES = """[bold]Examples[/bold]

lalm-lens trace Qwen/Qwen2-Audio-7B-Instruct clip.wav --attribute emotion --label happy --out traced

lalm-lens demo --out demo_out

lalm-lens trace ./checkpoint ./clips --attribute emotion --out traced --device cuda --dtype bfloat16

lalm-lens verify ./checkpoint

lalm-lens info Qwen/Qwen2-Audio-7B-Instruct

lalm-lens trace ./checkpoint ./clips --question "Is it calm?" --labels yes,no --prefix Answer: --out traced

lalm-lens trace ./checkpoint ./clips --attribute animal --form P2 --corrupt clip --metric logit_difference --out traced
"""

# Written out, because importing the types takes seconds; a test compares them.
CHOICES = {
    "form": ("P1", "P2", "P3"),
    "site": ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern", "post"),
    "kinds": ("layer", "audio_layer", "token", "audio_window", "encoder_window"),
    "metric": ("probability", "log_probability", "logit_difference", "label_probability", "label_score"),
    "predict": ("labels", "vocab"),
    "direction": ("denoise", "noise"),
    "audio": ("whole", "windows", "coarse-to-fine"),
    "corrupt": ("silence", "noise", "clip"),
    "transcript_is": ("audio", "text"),
    "engine": ("auto", "sweep", "hooks"),
}
OWN = "own"  # the name of a user's question, in tables and files

app = typer.Typer(
    name="lalm-lens",
    help="Look inside large audio language models.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)

Model = Annotated[str, typer.Argument(help="Folder of a checkpoint, or its id on the Hub.")]
Part = Annotated[
    list[str] | None, typer.Option(help="Where a part of the model is, as llm=FOLDER; repeat it for another part.")
]
Own = Annotated[
    str | None, typer.Option("--conversion", help="Your own conversion, as module:NAME, from here or installed.")
]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the weights.")]


def choice(option: str, says: str) -> Any:
    return typer.Option(help=f"{says}: {', '.join(CHOICES[option])}.")


def one_of(option: str, value: str) -> Any:
    """`value`, as the literal type that it is; raises `InputError` if it is no choice."""
    if value not in CHOICES[option]:
        raise InputError(f"--{option.replace('_', '-')} is {value!r}. Choose one of {', '.join(CHOICES[option])}.")
    return value


def parts_named(part: list[str] | None) -> dict[str, str]:
    """The parts of a model, as they are given: name=path."""
    parts = {name: path for name, _, path in (each.partition("=") for each in part or [])}
    if not all(name and path for name, path in parts.items()) or len(parts) < len(part or []):
        raise InputError(f"--part names each part once and where it is, as llm=FOLDER; got {', '.join(part or [])}.")
    return parts


def conversion_named(named: str | None) -> "Conversion | None":
    """A `Conversion` of the user's own, which is found as Python finds modules, and in this folder first."""
    if named is None:
        return None
    from lalm_lens.weights import Conversion

    module, _, name = named.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError) as error:
        raise InputError(f"--conversion {named} cannot be imported ({error}). Give it as module:NAME.") from error
    if not isinstance(found, Conversion):
        raise InputError(f"--conversion names a Conversion as module:NAME, as my_model:MINE; {named} is none.")
    return found


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


def ready(out: Path) -> None:
    """Find out before the long work whether its result can be drawn and kept; make nothing yet."""
    from lalm_lens.results import plots_module

    plots_module()
    writable(out)


def writable(out: Path) -> None:
    """Raise `DataError` for a folder that nothing can be written to."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DataError(f"Nothing can be written to {out}: {there} is no folder that you may write to.")
