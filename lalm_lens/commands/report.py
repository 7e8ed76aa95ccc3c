"""`lalm-lens report`."""

from pathlib import Path
from typing import Annotated

import typer

from lalm_lens.commands.base import app, writable

EXAMPLES = """[bold]Examples[/bold]

lalm-lens report study

lalm-lens report traced --clips clips

lalm-lens report lens --clips sakura --samples 40 --out lens.html
"""


@app.command("report", epilog=EXAMPLES)
def report_command(
    folder: Annotated[
        Path, typer.Argument(help="Where Parquet tables lie: the results of a study, of a trace, or what was saved.")
    ],
    clips: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder with metadata.jsonl, or with one for each attribute; repeat it for another. A study knows "
            "its own."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="How many clips are shown one by one.")] = 20,
    out: Annotated[Path | None, typer.Option(help="The HTML file; else report.html in the folder.")] = None,
) -> None:
    """Make one HTML file of results, with maps to point at and clips to listen to. It needs no network."""
    writable((out or folder / "report.html").parent)
    from lalm_lens.report import write_report

    path = write_report(folder, clips=clips or (), n_samples=samples, out=out)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
