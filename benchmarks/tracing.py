"""The token-wise causal map: ours against what users have today, on the same random weights and inputs, interleaved.

    python -m benchmarks.tracing                          # the reference shape; a table in benchmarks/README.md
    python -m benchmarks.tracing --shape layers-24        # another shape, and its table
    python -m benchmarks.tracing --growth --profile       # plots over sizes; time by part
    python -m benchmarks.tracing --shape 7b --device cuda --dtype bfloat16

Peers come with `pip install -c constraints.txt -e '.[dev,bench]'`. One that is missing is left out, and the table
says so.
"""

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
import typer

from benchmarks.arithmetic import needed
from benchmarks.growth import draw_growth
from benchmarks.hf import Rival
from benchmarks.measure import Setting, map_seconds, matmul_rate, peak_bytes
from benchmarks.parts import by_part
from benchmarks.rivals import RIVALS
from benchmarks.task import SHAPES, Patches, Task

README = Path(__file__).with_name("README.md")
PEERS = ("torch", "transformers", "transformer-lens", "nnsight", "pyvene")
HEAD = "| | seconds | min to max | plain hooks / this | this / sweep | largest difference | memory, MB | efficiency |"
Answers = dict[tuple[int, int], float]  # log-probability by patch


def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"Sizes, one or more: {', '.join(SHAPES)}.")] = None,
    rival: Annotated[list[str] | None, typer.Option(help=f"Who runs: {', '.join(RIVALS)}. All, if none.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    sample: Annotated[int, typer.Option(min=1, help="Patches that slow rivals are timed on.")] = 8,
    device: Annotated[str, typer.Option(help="Where it runs: cpu, cuda.")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the weights.")] = "float32",
    write: Annotated[bool, typer.Option(help="Put the results into benchmarks/README.md.")] = True,
    growth: Annotated[bool, typer.Option("--growth", help="Draw benchmarks/growth.png instead.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Print time by part instead.")] = False,
    of: Annotated[str, typer.Option(help="Whose growth and profile.")] = "ours-sweep",
) -> None:
    """Time the token-wise causal map: ours against what users have today."""
    known(shape or [], SHAPES, "shape")
    known([*(rival or []), of], RIVALS, "rival")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for name in shape or ["reference"]:
        setting = Setting(SHAPES[name], sample, device, dtype)
        section = f"{name}, {device}, {dtype}"
        if growth:
            draw_growth(of, setting, README.with_name("growth.png"))
        if profile:
            section, text = f"profile of {section}", profile_table(of, setting)
        elif not growth:
            text = compare(setting, rival or list(RIVALS), rounds)
        else:
            continue
        print(text)
        if write:
            write_section(README, section, text)


def known(names: list[str], choices: dict, what: str) -> None:
    for name in names:
        if name not in choices:
            raise typer.BadParameter(f"{name!r} is no {what}. Choose from {', '.join(choices)}.")


def compare(setting: Setting, names: list[str], rounds: int) -> str:
    """The table, and what has to be known to read it."""
    task = setting.build()
    rivals, missing = built(task, names)
    answers = {name: answer(rivals[name], task, patches_of(name, setting)) for name in rivals}  # warms up as well
    times: dict[str, list[float]] = {name: [] for name in rivals}
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    start = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        for name, each in rivals.items():
            rates[name].append(matmul_rate(setting))
            times[name].append(map_seconds(each, task, setting, RIVALS[name].whole))
    share = (time.process_time() - start[1]) / (time.perf_counter() - start[0])
    del rivals
    rows = [row(name, times, rates[name], answers, setting) for name in times]
    absent = [f"| {RIVALS[name].title} | not run: {why} | | | | | | |" for name, why in missing.items()]
    lines = [
        *caption(task, setting, answers, [rate for each in rates.values() for rate in each], rounds, share),
        "",
        HEAD,
        "|---|" + 7 * "---:|",
        *rows,
        *absent,
    ]
    return "\n".join(lines)


def built(task: Task, names: list[str]) -> tuple[dict[str, Rival], dict[str, str]]:
    """Those that can run here, and why the others cannot."""
    rivals, missing = {}, {}
    for name in names:
        try:
            rivals[name] = RIVALS[name].build(task.hf)
        except (ImportError, NotImplementedError) as error:
            missing[name] = str(error)
    return rivals, missing


def patches_of(name: str, setting: Setting) -> Patches:
    return setting.shape.patches if RIVALS[name].whole else setting.sample


def answer(rival: Rival, task: Task, patches: Patches) -> Answers:
    return dict(zip(patches, rival(task.clean, task.corrupt, patches, task.token).tolist(), strict=True))


def row(
    name: str, times: dict[str, list[float]], rates: list[float], answers: dict[str, Answers], setting: Setting
) -> str:
    """Ratios are taken within a round, where the machine is the same for both."""
    taken = times[name]
    sampled = "" if RIVALS[name].whole else " (sampled)"
    cells = [
        f"{RIVALS[name].title}{sampled}",
        f"{median(taken):,.2f}",
        f"{min(taken):,.2f} to {max(taken):,.2f}",
        f"{median_ratio(times['hooks'], taken):.2f}" if "hooks" in times else "",
        f"{median_ratio(taken, times['ours-sweep']):.2f}" if "ours-sweep" in times else "",
        f"{largest_difference(answers[name], answers['hooks'], setting):.1e}" if "hooks" in answers else "",
        f"{peak_bytes(name, setting) / 1e6:,.0f}",
        f"{needed(setting.shape) * median_ratio([1 / rate for rate in rates], taken):.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return median(one / other for one, other in zip(ours, theirs, strict=True))


def largest_difference(ours: Answers, theirs: Answers, setting: Setting) -> float:
    return max(abs(ours[patch] - theirs[patch]) for patch in setting.sample)


def caption(
    task: Task, setting: Setting, answers: dict[str, Answers], rates: list[float], rounds: int, share: float
) -> list[str]:
    clean, corrupt = task.log_probability
    mapped = max(answers.values(), key=len)
    effects = sorted(abs(each - corrupt) for each in mapped.values())
    rate, slowest, fastest = (each / 1e9 for each in (median(rates), min(rates), max(rates)))
    return [
        f"{setting.shape}. {setting.device}, {setting.dtype}, {torch.get_num_threads()} thread, {versions()}.",
        f"Median of {rounds} interleaved rounds. (sampled): timed on {len(setting.sample)} patches drawn evenly over "
        f"the layers and scaled to all {len(setting.shape.patches):,}; the two base runs are included, once. Ratios "
        f"and efficiency are medians of those within a round. The process had {share:.0%} of a core meanwhile: with "
        "much less than 100% on a CPU, other work was in the way.",
        f"Needed: {needed(setting.shape) / 1e9:,.1f} GFLOP. Matrix products in the same rounds: {rate:,.1f} GFLOP/s "
        f"({slowest:,.1f} to {fastest:,.1f}). Efficiency is needed / (seconds x that rate).",
        f"Log-probability of the token: clean {clean:.3f}, corrupt {corrupt:.3f}; a patch moves it by "
        f"{median(effects):.1e} (median) to {effects[-1]:.1e} (largest of {len(effects):,}). Differences are to plain "
        "hooks, on the sample. Memory: what the rival takes above the model, in a process of its own.",
    ]


def versions() -> str:
    return ", ".join([f"Python {platform.python_version()}", *(f"{peer} {version_of(peer)}" for peer in PEERS)])


def version_of(package: str) -> str:
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return "not installed"


def profile_table(of: str, setting: Setting) -> str:
    parts = by_part(of, setting)
    total = sum(parts.values())
    rows = [f"| {part} | {taken:.3f} | {taken / total:.1%} |" for part, taken in parts.items()]
    return "\n".join(
        [f"{RIVALS[of].title}: {setting.shape}", "", "| part | seconds | share |", "|---|---:|---:|", *rows]
    )


def write_section(readme: Path, name: str, text: str) -> None:
    """Put the text between the two markers of that name; at the end with new markers, if there are none."""
    start, end = f"<!-- tracing: {name} -->", f"<!-- end of {name} -->"
    before = readme.read_text() if readme.exists() else "# Benchmarks\n"
    if start not in before:
        before = f"{before.rstrip()}\n\n## Causal map: {name}\n\n{start}\n{end}\n"
    head, _, rest = before.partition(start)
    readme.write_text(f"{head}{start}\n\n{text}\n\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    typer.run(main)
