"""`lalm-lens run`."""

import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lalm_lens.commands.base import app
from lalm_lens.commands.opening import conversion_named
from lalm_lens.commands.options import Device
from lalm_lens.errors import LensError

if TYPE_CHECKING:
    from lalm_lens.datasets import Clip
    from lalm_lens.planning import Planned
    from lalm_lens.runner import Outcome
    from lalm_lens.study import Study
    from lalm_lens.units import Unit

EXAMPLES = """[bold]Examples[/bold]

lalm-lens run study.toml --dry-run

lalm-lens run study.toml --device cuda --report

lalm-lens run study.toml --engine ray
"""
INTERRUPTED = 130


@app.command("run", epilog=EXAMPLES)
def run_command(
    config: Annotated[Path, typer.Argument(help="The study, as TOML: models, datasets, prompts, experiments.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the results, in place of the one in the file.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count, and measure on a clip of each what the whole will take.")
    ] = False,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Here, or on all GPUs of a Ray cluster.")] = "local",
    device: Device = "cpu",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of Ray; else one for each GPU, or one where there is none.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Write report.html into the folder at the end.")] = False,
) -> None:
    """Run a whole study, or go on with it: what is finished is not run again."""
    from lalm_lens.planning import planned
    from lalm_lens.runner import unfinished, write_list
    from lalm_lens.study import Study

    study = Study.read(config, out)
    if report:
        from lalm_lens.report.page import plotly_js

        plotly_js()  # before the work, where it is missing
    try:
        make_clips(study)
        plan = planned(study, conversion_named)
        out = plan.study.out
        missing = unfinished(plan.units, out)
        show_counts(plan, missing)
        if dry_run:
            show_cost(missing, out, plan, device)
            raise typer.Exit(1 if plan.failed else 0)
    except KeyboardInterrupt:
        print("Interrupted before anything was run.", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    write_list(plan, out)
    done: list[Outcome] = []
    try:
        with no_interrupt_lost() as heed:
            for outcome in shown(outcomes(missing, out, engine, device, workers), missing):
                done.append(outcome)
                heed()
    except KeyboardInterrupt:
        left = len(unfinished(plan.units, out))
        write_list(plan, out, done)
        print(f"Interrupted; {left} of {len(plan.units)} units are left. The same command goes on.", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    write_list(plan, out, done)
    show_summary(plan, done)
    if report:
        from lalm_lens.report import write_report

        print(write_report(out))
    raise typer.Exit(1 if plan.failed or any(outcome.failure for outcome in done) else 0)


def make_clips(study: "Study") -> None:
    """What a dataset asks for and is not there yet."""
    from lalm_lens.assets.clips import write_clips
    from lalm_lens.datasets.folder import LISTS

    for dataset in study.datasets:
        for name in dataset.attributes if dataset.made else ():
            folder = dataset.at(study.path.parent, name)
            if not any((folder / each).is_file() for each in LISTS):
                write_clips(folder, name, dataset.made, dataset.seed)


@contextmanager
def no_interrupt_lost() -> Iterator[Callable[[], None]]:
    """Gives what raises the `KeyboardInterrupt` of a Ctrl-C that has come: Python drops those in a `__del__`."""
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def heed() -> None:
        if came:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield heed
    finally:
        signal.signal(signal.SIGINT, before)


def outcomes(units: "Sequence[Unit]", out: Path, engine: str, device: str, workers: int | None) -> "Iterator[Outcome]":
    if engine == "local":
        from lalm_lens.runner import run_local

        return run_local(units, out, device)
    from lalm_lens.ray_runner import run_ray

    return run_ray(units, out, workers, device)


def shown(outcomes: "Iterator[Outcome]", units: "Sequence[Unit]") -> "Iterator[Outcome]":
    """With a bar that counts clips, and tells how fast they go and how long it takes."""
    from tqdm import tqdm

    with tqdm(total=sum(len(unit.clips) for unit in units), unit="clip", smoothing=0.1, disable=not units) as bar:
        for outcome in outcomes:
            unit = outcome.unit
            bar.set_description(" ".join(filter(None, (unit.experiment.name, unit.attribute.name, unit.form))))
            bar.update(len(unit.clips))
            if outcome.failure:
                bar.write(f"Failed: {unit.called}: {outcome.failure}", file=sys.stderr)
            yield outcome


def show_counts(plan: "Planned", missing: "Sequence[Unit]") -> None:
    import pandas as pd

    left = {unit.hash for unit in missing}
    rows = [
        {"model": unit.model_name, "experiment": unit.experiment.name, "attribute": unit.attribute.name}
        | {"units": 1, "clips": len(unit.clips), "finished": unit.hash not in left}
        for unit in plan.units
    ]
    counts = pd.DataFrame(rows).groupby(["model", "experiment", "attribute"], sort=False).sum().reset_index()
    print(counts.to_string(index=False))
    show_balance(plan)
    print(f"{len(plan.units)} units in {plan.study.out}, {len(plan.units) - len(missing)} of them finished.")
    show_excluded(plan)


def show_balance(plan: "Planned") -> None:
    """How many clips have each label, and how many speakers say it, where they are known."""
    from lalm_lens.datasets import balance

    clips: dict[tuple[str, str], dict[str, Clip]] = {}
    for unit in plan.units:
        of_its = clips.setdefault((unit.dataset, unit.attribute.name), {})
        of_its |= {listed.clip.name: listed.clip for listed in unit.clips}
    for (dataset, attribute), its in clips.items():
        print(f"{dataset}, {attribute}, {len(its)} clips:\n{balance([*its.values()]).round(3).to_string(index=False)}")


def show_excluded(plan: "Planned") -> None:
    for what, why in plan.failed.items():
        print(f"Left out, {what}: {why}")
    for row in plan.excluded.drop_duplicates(["dataset", "attribute", "sample", "reason"]).to_dict("records"):
        print(f"Left out of {row['dataset']}, {row['attribute']}: {row['sample']}: {row['reason']}")


def show_cost(missing: "Sequence[Unit]", out: Path, plan: "Planned", device: str) -> None:
    """What the whole will take, from finished units of the same kind, or one clip of the others."""
    from lalm_lens.runner import Models, measured

    models, total_s, unknown = Models(device), 0.0, 0
    for kind, units in by_kind(missing).items():
        n_clips = sum(len(unit.clips) for unit in units)
        shown = ", ".join([*filter(None, kind[:4]), *changed(units[0])])
        try:
            clip_s = measured(units[0], [unit for unit in plan.units if kind_of(unit) == kind], out, models)
        except LensError as error:
            unknown += n_clips
            print(f"{shown}: {n_clips} clips, not measured: {error}")
            continue
        if clip_s is None:
            unknown += n_clips
            print(f"{shown}: {n_clips} clips, which need each other: not measured")
        else:
            total_s += clip_s * n_clips
            print(f"{shown}: {n_clips} clips, {clip_s:.2f} s each, {duration(clip_s * n_clips)}")
    print(f"Still to do: about {duration(total_s)}" + (f", and {unknown} clips not measured." if unknown else "."))


def kind_of(unit: "Unit") -> tuple:
    asked = unit.dataset, unit.model_name, unit.experiment.name, unit.form
    return *asked, unit.model.dtype, tuple(unit.told.items())


def changed(unit: "Unit") -> list[str]:
    """The settings that are not those by default."""
    default = {name: repr(value) for name, value in unit.experiment.settings({}).items()}
    return [f"{name}={value}" for name, value in unit.told.items() if value != default.get(name)]


def by_kind(units: "Sequence[Unit]") -> "dict[tuple, list[Unit]]":
    kinds: dict[tuple, list[Unit]] = {}
    for unit in units:
        kinds.setdefault(kind_of(unit), []).append(unit)
    return kinds


def duration(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"


def show_summary(plan: "Planned", done: "Sequence[Outcome]") -> None:
    failed = [outcome for outcome in done if outcome.failure]
    finished = len(plan.units) - len(failed)
    print(f"{finished} of {len(plan.units)} units are finished in {plan.study.out}.")
    show_excluded(plan)
    for outcome in done:
        for sample, why in outcome.excluded.items():
            print(f"Left out of {outcome.unit.called}: {sample}: {why}")
    for reason, n in Counter(outcome.failure for outcome in failed).items():
        first = next(outcome.unit for outcome in failed if outcome.failure == reason)
        print(f"Failed, {n} units, as {first.called}: {reason}")
