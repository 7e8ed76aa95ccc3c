"""The command `lalm-lens`. What takes seconds to import is imported by the command that needs it."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lalm_lens.attributes import ATTRIBUTES, attribute_named
from lalm_lens.errors import DataError, LensError

if TYPE_CHECKING:
    from lalm_lens.attributes import Attribute
    from lalm_lens.datasets import Sample
    from lalm_lens.results import CausalTrace

EXAMPLES = """[bold]Examples[/bold]

lalm-lens trace Qwen/Qwen2-Audio-7B-Instruct clip.wav --attribute gender --label male --out traced

lalm-lens demo --out demo_out

lalm-lens trace ./checkpoint ./clips --attribute emotion --out traced --device cuda --dtype bfloat16
"""

app = typer.Typer(
    name="lalm-lens",
    help="Look inside large audio language models.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)

Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the weights.")]


def main() -> None:
    """Run the command line; what a user can mend ends in one line and exit code 2."""
    try:
        app()
    except (LensError, OSError) as error:  # OSError: a full disk, a folder that has gone
        print(f"lalm-lens: {error}", file=sys.stderr)
        sys.exit(2)


@app.command(epilog=EXAMPLES)
def trace(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or its id on the Hub.")],
    clips: Annotated[
        Path, typer.Argument(help="A sound file, or a folder with metadata.jsonl (file_name, label on each line).")
    ],
    attribute: Annotated[str, typer.Option(help=f"What is asked: {', '.join(ATTRIBUTES)}.")],
    out: Annotated[Path, typer.Option(help="Folder for trace.parquet, the pictures and report.html.")],
    label: Annotated[str | None, typer.Option(help="The true answer, for a single sound file.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Patched runs that share a forward.")] = 32,
) -> None:
    """Trace when and where a model fuses what it hears with what it reads."""
    asked = attribute_named(attribute)
    samples = read_samples(clips, asked, label)
    ready(out)
    import torch

    from lalm_lens.experiments.causal_trace import causal_trace
    from lalm_lens.loading import from_pretrained

    lens = from_pretrained(model, device=device, dtype=getattr(torch, dtype))
    show(causal_trace(lens, samples, attribute=asked, batch_size=batch_size), out)


@app.command(epilog=EXAMPLES)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the clips, the table and the pictures.")] = Path("demo_out"),
    clips: Annotated[int, typer.Option(min=2, help="Sound files to make for each attribute.")] = 10,
) -> None:
    """Make sound files, let the tiny model that ships with lalm_lens hear them, and trace all four attributes."""
    ready(out)
    from lalm_lens.assets import TINY_LALM
    from lalm_lens.assets.clips import write_clips
    from lalm_lens.datasets import read_folder
    from lalm_lens.experiments.causal_trace import causal_trace
    from lalm_lens.loading import from_pretrained
    from lalm_lens.results import CausalTrace

    lens = from_pretrained(TINY_LALM)
    print(lens)
    traces = [
        causal_trace(lens, read_folder(write_clips(out / "clips" / name, name, clips, seed=1)), attribute=name)
        for name in ATTRIBUTES
    ]
    show(CausalTrace.concat([each.frame for each in traces]), out)


def read_samples(clips: Path, attribute: "Attribute", label: str | None) -> "list[Sample]":
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
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DataError(f"Nothing can be written to {out}: {there} is no folder that you may write to.")


def show(trace: "CausalTrace", out: Path) -> None:
    """Write table, pictures and report into `out`, print the summary and where things lie."""
    from lalm_lens.report import write_report

    data = trace.save(out / "trace.parquet")
    pictures = [out / "layers.png"]
    trace.plot("layers").savefig(pictures[0], dpi=150)
    for name in trace.frame.attribute.unique():
        pictures.append(out / f"tokens_{name}.png")
        trace.only(name).plot("tokens").savefig(pictures[-1], dpi=150)
    report = write_report(trace, data, pictures)
    print(trace.summary().to_string(index=False, float_format="{:.3f}".format, na_rep="-"))
    if not len(trace.kept):
        print("No clip was kept, so the pictures show the excluded ones. docs/causal_tracing.md says what excludes.")
    for path in (data, *pictures, report):
        print(path)
