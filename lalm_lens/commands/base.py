"""The program, of which each command is a part, and what they find out before long work."""

import os
from pathlib import Path

import typer

from lalm_lens.errors import DataError

EXAMPLES = """[bold]Examples[/bold]

lalm-lens trace Qwen/Qwen2-Audio-7B-Instruct clip.wav --attribute emotion --label happy --out traced

lalm-lens demo --out demo_out

lalm-lens trace ./checkpoint ./clips --attribute emotion --out traced --device cuda --dtype bfloat16

lalm-lens verify ./checkpoint

lalm-lens info Qwen/Qwen2-Audio-7B-Instruct

lalm-lens trace ./checkpoint ./clips --question "Is it calm?" --labels yes,no --prefix Answer: --out traced

lalm-lens trace ./checkpoint ./clips --attribute animal --form P2 --corrupt clip --metric logit_difference --out traced
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
