"""Options that commands have in common."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.errors import InputError

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

Model = Annotated[str, typer.Argument(help="Folder of a checkpoint, or its id on the Hub.")]
Part = Annotated[
    list[str] | None, typer.Option(help="Where a part of the model is, as llm=FOLDER; repeat it for another part.")
]
Own = Annotated[
    str | None, typer.Option("--conversion", help="Your own conversion, as module:NAME, from here or installed.")
]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the weights.")]

DeviceMap = Annotated[str | None, typer.Option(help="auto: spread over GPUs, CPU and disk, as it fits.")]
TokenBudget = Annotated[int | None, typer.Option(min=1, help="Tokens that share a block: less needs less memory.")]
Data = Annotated[
    Path,
    typer.Argument(
        help="A folder with metadata.jsonl (file_name, label on each line) and --attribute, or with a folder like "
        f"that for each attribute, by its name: {', '.join(ATTRIBUTES)}."
    ),
]
AttributeNames = Annotated[
    str | None, typer.Option("--attribute", help="What is asked; of a folder of attributes some, with commas between.")
]
Question = Annotated[str | None, typer.Option(help="Your own question, in place of --attribute.")]
Labels = Annotated[str | None, typer.Option(help="Its answers, with commas between.")]
Prefix = Annotated[str | None, typer.Option(help="How its answer is forced to begin, as 'The animal is'.")]
Cut = Annotated[bool, typer.Option("--cut", help="Cut clips that are longer than the model hears.")]
NControls = Annotated[int, typer.Option(min=0, help="Draws of shuffled labels for probes.")]
Transcript = Annotated[str | None, typer.Option(help="What DeSTA reads of every clip; else what it says.")]
VoiceActivity = Annotated[bool, typer.Option("--voice-activity", help="No speech, no transcript.")]


def choice(option: str, says: str) -> Any:
    return typer.Option(help=f"{says}: {', '.join(CHOICES[option])}.")


def one_of(option: str, value: str) -> Any:
    """`value`, as the literal type that it is; raises `InputError` if it is no choice."""
    if value not in CHOICES[option]:
        raise InputError(f"--{option.replace('_', '-')} is {value!r}. Choose one of {', '.join(CHOICES[option])}.")
    return value


def numbers(option: str, listed: str) -> list[float]:
    try:
        return [float(each) for each in listed.split(",") if each.strip()]
    except ValueError:
        raise InputError(f"--{option.replace('_', '-')} are numbers with commas between; got {listed!r}.") from None
