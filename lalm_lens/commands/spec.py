"""`lalm-lens spec`."""

from pathlib import Path
from typing import Annotated

import typer

from lalm_lens.attributes import ATTRIBUTES, attribute_named
from lalm_lens.commands.base import app, ready
from lalm_lens.commands.opening import opened
from lalm_lens.commands.options import Device, DeviceMap, Dtype, Model, Own, Part, TokenBudget, choice, one_of

EXAMPLES = """[bold]Examples[/bold]

lalm-lens spec ./checkpoint ./clips --attribute emotion --out specified

lalm-lens spec Qwen/Qwen2-Audio-7B-Instruct ./clips --attribute animal --out specified --device cuda --dtype bfloat16
"""


@app.command("spec", epilog=EXAMPLES)
def spec_command(
    model: Model,
    clips: Annotated[Path, typer.Argument(help="A folder with metadata.jsonl (file_name, label on each line).")],
    attribute: Annotated[str, typer.Option(help=f"What is asked: {', '.join(ATTRIBUTES)}.")],
    out: Annotated[Path, typer.Option(help="Folder for specification.parquet, .csv, .md and .png.")],
    form: Annotated[str, choice("form", "What the user says in the prompts that are traced")] = "P3",
    snr_db: Annotated[float, typer.Option(help="Clip over noise, in dB, where noise is what is heard instead.")] = 0.0,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples of the clips.")] = 200,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the noise, of the choice of other clips, and of the resamples.")
    ] = 0,
    device: Device = "cpu",
    device_map: DeviceMap = None,
    dtype: Dtype = "float32",
    token_budget: TokenBudget = None,
    part: Part = None,
    conversion: Own = None,
) -> None:
    """Do the papers' claims survive what they leave open? Every combination of those choices, and one picture."""
    from lalm_lens.datasets import read_folder

    asked, form = attribute_named(attribute), one_of("form", form)
    samples = read_folder(clips)
    ready(out)
    from lalm_lens.corrupt import OtherClip, Silence, WhiteNoise
    from lalm_lens.experiments.specification import specification_curve
    from lalm_lens.tables import write_tables

    lens = opened(model, part=part, conversion=conversion, device=device, device_map=device_map, dtype=dtype)
    corruptions = (Silence(), WhiteNoise(snr_db, seed), OtherClip(seed))
    settings = {"form": form, "corruptions": corruptions, "token_budget": token_budget}
    found = specification_curve(lens, samples, attribute=asked, **settings, n_resamples=resamples, seed=seed)
    print(found)
    for reason, n_rows in found.reasons().itertuples(index=False):
        print(f"not measured, {n_rows} rows: {reason}")
    paths = write_tables(out, {"specification": found.frame})
    found.plot().savefig(out / "specification.png", dpi=130)
    for path in (*paths, out / "specification.png"):
        print(path)
