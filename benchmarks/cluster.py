"""A study on Ray: two workers of one thread against one, and both against this process, bit for bit.

    python -m benchmarks.cluster                       # about a minute's work for one worker, three rounds
    python -m benchmarks.cluster --clips 16 --rounds 1

Needs two cores that have nothing else to do. Time counts from when all workers are ready: each has run a unit, and so
has its imports and its model behind it. The aim is 1.6 times the speed of one worker.
"""

import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import pandas as pd
import torch
import typer

from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips
from lalm_lens.planning import Planned, planned
from lalm_lens.ray_runner import Queue, cluster, drained, workers_of
from lalm_lens.runner import run_local, write_list
from lalm_lens.study import Study
from lalm_lens.study_results import load_results

STUDY = f"""
[[model]]
path = "{TINY_LALM}"

[[dataset]]
folder = "clips"
attributes = ["gender"]

[[experiment]]
name = "causal_trace"
shard = 4
"""
HERE, ONE, TWO = "this process", "one worker", "two workers"
AIM = 1.6


def prepared(folder: Path, n_clips: int) -> Planned:
    write_clips(folder / "clips", "gender", n_clips, seed=5)
    (folder / "study.toml").write_text(STUDY, encoding="utf-8")
    return planned(Study.read(folder / "study.toml"))


def locally(plan: Planned, out: Path) -> float:
    """Seconds. Warm as the workers are."""
    list(run_local(plan.units[:1], out / "warm"))
    start = time.perf_counter()
    list(run_local(plan.units, out))
    return time.perf_counter() - start


def on_ray(plan: Planned, out: Path, n_workers: int) -> float:
    """Seconds, from when all workers are ready."""
    with cluster() as ray:
        worker = workers_of(ray, "cpu")
        workers = [worker() for _ in range(n_workers)]
        ray.get([each.finish.remote(plan.units[0], out / f"warm{n}") for n, each in enumerate(workers)])
        start = time.perf_counter()
        outcomes = list(drained(ray, Queue(plan.units), out, workers, worker))
        taken = time.perf_counter() - start
    assert len(outcomes) == len(plan.units)
    assert not any(outcome.failure for outcome in outcomes)
    return taken


def trace_in(plan: Planned, out: Path) -> pd.DataFrame:
    write_list(plan, out)
    return load_results(out).table("causal_trace").frame


def compare(n_clips: int, rounds: int) -> str:
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {HERE: [], ONE: [], TWO: []}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        plan = prepared(Path(name), n_clips)
        for n in range(rounds):
            outs = {which: Path(name) / f"{n} {which}" for which in taken}
            taken[HERE].append(locally(plan, outs[HERE]))
            taken[ONE].append(on_ray(plan, outs[ONE], 1))
            taken[TWO].append(on_ray(plan, outs[TWO], 2))
            expected = trace_in(plan, outs[HERE])
            for which in (ONE, TWO):
                pd.testing.assert_frame_equal(trace_in(plan, outs[which]), expected, check_exact=True)
    ratios = {which: median(a / b for a, b in zip(taken[ONE], its, strict=True)) for which, its in taken.items()}
    rows = [
        f"| {which} | {median(its):.1f} | {min(its):.1f} to {max(its):.1f} | {ratios[which]:.2f} |"
        for which, its in taken.items()
    ]
    return "\n".join(
        [
            f"{n_clips} clips in {len(plan.units)} units, one thread each; median of {rounds} rounds, in which all "
            f"numbers are the same bit for bit. Load of the machine before: {load:.2f}. The aim is {AIM} times.",
            "",
            "| | seconds | from to | times as fast |",
            "|---|---:|---:|---:|",
            *rows,
        ]
    )


def run(clips: Annotated[int, typer.Option(min=1)] = 240, rounds: Annotated[int, typer.Option(min=1)] = 3) -> None:
    print(compare(clips, rounds))


if __name__ == "__main__":
    typer.run(run)
