"""`lalm-lens reproduce`."""

from pathlib import Path
from typing import Annotated

import typer

from lalm_lens.commands.base import app, writable
from lalm_lens.errors import InputError

EXAMPLES = """[bold]Examples[/bold]

lalm-lens reproduce ./scored ./traced --as checkpoint=Qwen2-Audio-Instruct --out reproduced

lalm-lens reproduce ./scored --claims
"""


@app.command("reproduce", epilog=EXAMPLES)
def reproduce_command(
    folders: Annotated[list[Path], typer.Argument(help="Folders with result tables (.parquet), in any depth.")],
    named: Annotated[
        list[str] | None,
        typer.Option("--as", help="Which published model a table's model is, as FOLDER=Qwen2-Audio-Instruct; repeat."),
    ] = None,
    claims: Annotated[
        bool, typer.Option("--claims", help="Evaluate the papers' claims on any model; this reproduces nothing.")
    ] = False,
    layer_base: Annotated[
        int | None,
        typer.Option(min=0, max=1, help="Number of the first layer; else 1 for AudioLens, 0 for causal tracing."),
    ] = None,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples of the clips.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the table as Parquet, CSV and Markdown.")] = None,
) -> None:
    """Compare result tables with the numbers and claims of AudioLens and of Causal Tracing."""
    names = names_given(named or [])
    if claims and names:
        raise InputError("--claims evaluates every model as what it is: leave out --as.")
    if out is not None:
        writable(out)
    from lalm_lens.reproduce import evaluate_claims, reproduce, show_reproduction

    how = {"layer_base": layer_base, "n_resamples": resamples, "seed": seed}
    found = evaluate_claims(folders, **how) if claims else reproduce(folders, named=names, **how)
    show_reproduction(found, out)


def names_given(named: list[str]) -> dict[str, str]:
    """name=published, of each."""
    pairs = {name: its for name, _, its in (each.rpartition("=") for each in named)}
    if not all(name and its for name, its in pairs.items()) or len(pairs) < len(named):
        raise InputError(f"--as names each model once, as FOLDER=Qwen2-Audio-Instruct; got {', '.join(named)}.")
    return pairs
