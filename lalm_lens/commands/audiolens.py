"""`lalm-lens audiolens`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lalm_lens.commands.base import app, ready
from lalm_lens.commands.clips import heard, read_study
from lalm_lens.commands.opening import opened
from lalm_lens.commands.options import (
    AttributeNames,
    Cut,
    Data,
    Device,
    DeviceMap,
    Dtype,
    Labels,
    Model,
    Own,
    Part,
    Prefix,
    Question,
    TokenBudget,
    Transcript,
    VoiceActivity,
    numbers,
    one_of,
)

if TYPE_CHECKING:
    from lalm_lens.experiments.audiolens import AudioLens

EXAMPLES = """[bold]Examples[/bold]

lalm-lens audiolens Qwen/Qwen2-Audio-7B-Instruct ./sakura --out lens --device cuda --dtype bfloat16

lalm-lens audiolens ./checkpoint ./clips --attribute emotion --forms P3 --out lens

lalm-lens audiolens DeSTA-ntu/DeSTA2-8B-beta ./sakura --layer-base 0 --out lens
"""


@app.command("audiolens", epilog=EXAMPLES)
def audiolens_command(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures and audiolens.md.")],
    attribute: AttributeNames = None,
    question: Question = None,
    labels: Labels = None,
    prefix: Prefix = None,
    forms: Annotated[
        str, typer.Option(help="Prompts, with commas between; the last also for knockout and enrichment.")
    ] = "P1,P2,P3",
    label_space: Annotated[
        bool, typer.Option(help="Enrichment scores labels with the space before them; all else is scored both ways.")
    ] = False,
    alpha: Annotated[float, typer.Option(min=0, help="Critical layers weigh scores above (1 + alpha) / labels.")] = 0.2,
    layer_base: Annotated[int, typer.Option(min=0, max=1, help="Number of the first layer.")] = 1,
    gap: Annotated[int, typer.Option(min=1, help="Layers from what is added to where it is added.")] = 5,
    factors: Annotated[str | None, typer.Option(help="Factors of enrichment, with commas between.")] = None,
    n_probing: Annotated[int | None, typer.Option(min=1, help="Clips that choose its layer; else a fifth.")] = None,
    n_seeds: Annotated[int, typer.Option(min=0, help="Draws of random layers for every clip.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, of what is drawn and of bootstraps.")] = 0,
    cut: Cut = False,
    transcript: Transcript = None,
    voice_activity: VoiceActivity = False,
    device: Device = "cpu",
    device_map: DeviceMap = None,
    dtype: Dtype = "float32",
    token_budget: TokenBudget = None,
    part: Part = None,
    conversion: Own = None,
) -> None:
    """Find out in which layer a model knows what it hears: all of AudioLens (arXiv 2506.05140), its figures and
    tables."""
    asked_in = [one_of("form", form.strip()) for form in forms.split(",") if form.strip()]
    how: dict = {"forms": asked_in, "n_probing": n_probing, "seed": seed, "gap": gap, "n_seeds": n_seeds}
    how["label_spaces"] = (label_space, not label_space)
    if factors is not None:
        how["factors"] = numbers("factors", factors)
    study = read_study(data, attribute, question, labels, prefix)
    ready(out)
    from lalm_lens.experiments.audiolens import AudioLens, audiolens

    lens = opened(model, part=part, conversion=conversion, device=device, device_map=device_map, dtype=dtype)
    study = {asked: heard(lens, samples, cut, transcript, voice_activity) for asked, samples in study.items()}
    found: list[AudioLens] = []
    for asked, samples in study.items():
        found.append(audiolens(lens, {asked: samples}, token_budget=token_budget, **how))
        AudioLens.concat(found).save(out)  # what is done stays if what comes is interrupted
    show(AudioLens.concat(found), alpha, layer_base, seed, out)


def show(found: "AudioLens", alpha: float, layer_base: int, seed: int, out: Path) -> None:
    """Write tables and figures into `out`, and a page that shows them; print what the paper tells."""
    from lalm_lens.tables import markdown, write_tables

    tables = found.tables(alpha, layer_base, seed=seed)
    write_tables(out / "tables", tables)
    pictures = []
    for name, figure in found.figures(alpha, layer_base):
        pictures.append(out / f"{name}.png")
        figure.savefig(pictures[-1], dpi=150)
    shown = {
        "Critical layers and accuracies, means over prompts (Table II)": tables["table_2"],
        "Their correlation over attributes and prompts (Table III)": tables["table_3"],
        "Enrichment": tables.get("enrichment"),
    }
    page = [f"# AudioLens of {found.scores.frame.model.iloc[0]}"]
    page += [f"## {title}\n\n{markdown(table)}" for title, table in shown.items() if table is not None]
    page += [f"![{path.stem}]({path.name})" for path in pictures]
    page += ["\n".join(f"- Left out: {line}" for line in found.left_out)] if found.left_out else []
    (out / "audiolens.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    for title, table in shown.items():
        if table is not None:
            varying = table.drop(columns=[name for name in ("model", "norm", "n_labels") if name in table])
            print(f"{title}\n{varying.to_string(index=False, float_format='{:.3f}'.format, na_rep='-')}\n")
    for line in found.left_out:
        print(f"Left out: {line}")
    for path in (out / "scores.parquet", out / "tables", *pictures, out / "audiolens.md"):
        print(path)
