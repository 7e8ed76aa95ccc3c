"""`lalm-lens verify` and `lalm-lens info`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from lalm_lens.commands.base import EXAMPLES, app
from lalm_lens.commands.opening import conversion_named, parts_named
from lalm_lens.commands.options import Device, Dtype, Model, Own, Part
from lalm_lens.errors import InputError

if TYPE_CHECKING:
    from lalm_lens.verify import Verification


@app.command("verify", epilog=EXAMPLES)
def verify_command(
    model: Model,
    clip: Annotated[list[Path] | None, typer.Option(help="Your own sound file; repeat it for a batch.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    golden: Annotated[
        Path | None, typer.Option(help="Compare with what the original computed, stored in this folder, instead.")
    ] = None,
    part: Part = None,
    conversion: Own = None,
) -> None:
    """Run a checkpoint here and in transformers, and compare logits and every block. Exit code 1 if they differ."""
    parts = parts_named(part)
    if golden is not None:
        if clip or dtype != "float32":
            raise InputError("A golden set has its own clips, and is of float32: leave out --clip and --dtype.")
        from lalm_lens.golden import verify_golden

        own = conversion_named(conversion)
        report(verify_golden(model, golden, device=device, parts=parts, conversion=own))
    if parts:
        raise InputError("transformers has no class for a model of parts: compare with --golden.")
    from lalm_lens.audio import read_audio

    waveforms = [read_audio(path) for path in clip or []] or None
    import torch

    from lalm_lens.verify import verify

    own = conversion_named(conversion)
    report(verify(model, dtype=getattr(torch, dtype), device=device, waveforms=waveforms, conversion=own))


def report(verification: "Verification") -> NoReturn:
    print(verification)
    raise typer.Exit(0 if verification.passed else 1)


@app.command("info", epilog=EXAMPLES)
def info_command(model: Model, part: Part = None, conversion: Own = None) -> None:
    """Describe a checkpoint from its config.json: sizes, memory, what it hears, hook points. Reads no weights."""
    from lalm_lens.info import info

    print(info(model, parts=parts_named(part), conversion=conversion_named(conversion)))
