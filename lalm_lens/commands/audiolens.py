"""`lalm-lens audiolens`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lalm_lens.attributes import ATTRIBUTES, Attribute, attribute_named
from lalm_lens.commands.base import (
    Device,
    Dtype,
    Model,
    Own,
    Part,
    app,
    asked_about,
    conversion_named,
    cut_to_hearing,
    one_of,
    parts_named,
    ready,
)
from lalm_lens.errors import DataError, InputError

if TYPE_CHECKING:
    from lalm_lens.datasets import Sample
    from lalm_lens.experiments.audiolens import AudioLens
    from lalm_lens.model import HookedLALM

EXAMPLES = """[bold]Examples[/bold]

lalm-lens audiolens Qwen/Qwen2-Audio-7B-Instruct ./sakura --out lens --device cuda --dtype bfloat16

lalm-lens audiolens ./checkpoint ./clips --attribute emotion --forms P3 --out lens

lalm-lens audiolens DeSTA-ntu/DeSTA2-8B-beta ./sakura --layer-base 0 --out lens
"""


@app.command("audiolens", epilog=EXAMPLES)
def audiolens_command(
    model: Model,
    data: Annotated[
        Path,
        typer.Argument(
            help="A folder with metadata.jsonl (file_name, label on each line) and --attribute, or with a folder like "
            f"that for each attribute, by its name: {', '.join(ATTRIBUTES)}."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures and audiolens.md.")],
    attribute: Annotated[
        str | None, typer.Option(help="What is asked; of a folder of attributes some, with commas between.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="Your own question, in place of --attribute.")] = None,
    labels: Annotated[str | None, typer.Option(help="Its answers, with commas between.")] = None,
    prefix: Annotated[str | None, typer.Option(help="How its answer is forced to begin, as 'The animal is'.")] = None,
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
    cut: Annotated[bool, typer.Option("--cut", help="Cut clips that are longer than the model hears.")] = False,
    transcript: Annotated[str | None, typer.Option(help="What DeSTA reads of every clip; else what it says.")] = None,
    voice_activity: Annotated[bool, typer.Option("--voice-activity", help="No speech, no transcript.")] = False,
    device: Device = "cpu",
    device_map: Annotated[str | None, typer.Option(help="auto: spread over GPUs, CPU and disk, as it fits.")] = None,
    dtype: Dtype = "float32",
    token_budget: Annotated[int | None, typer.Option(min=1, help="Tokens that share a block.")] = None,
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
    own = (question, labels, prefix) != (None, None, None)
    study = read_study(data, asked_about(attribute, question, labels, prefix) if own else attribute)
    parts = parts_named(part)
    ready(out)
    import torch

    from lalm_lens.experiments.audiolens import AudioLens, audiolens
    from lalm_lens.loading import from_pretrained

    loading = {"parts": parts, "conversion": conversion_named(conversion), "dtype": getattr(torch, dtype)}
    lens = from_pretrained(model, device=device, device_map=device_map, **loading)
    study = {asked: heard(lens, samples, cut, transcript, voice_activity) for asked, samples in study.items()}
    found: list[AudioLens] = []
    for asked, samples in study.items():
        found.append(audiolens(lens, {asked: samples}, token_budget=token_budget, **how))
        AudioLens.concat(found).save(out)  # what is done stays if what comes is interrupted
    show(AudioLens.concat(found), alpha, layer_base, seed, out)


def numbers(option: str, listed: str) -> list[float]:
    try:
        return [float(each) for each in listed.split(",") if each.strip()]
    except ValueError:
        raise InputError(f"--{option} are numbers with commas between; got {listed!r}.") from None


def read_study(data: Path, asked: Attribute | str | None) -> "dict[Attribute, list[Sample]]":
    """Clips by what is asked about them."""
    from lalm_lens.datasets import read_attributes, read_folder

    if not data.is_dir():
        raise DataError(f"{data} is no folder. Give one with metadata.jsonl, or with a folder for each attribute.")
    if isinstance(asked, Attribute):
        return {asked: read_folder(data)}
    names = list(ATTRIBUTES) if asked is None else [attribute_named(name.strip()).name for name in asked.split(",")]
    if (data / "metadata.jsonl").is_file():
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
