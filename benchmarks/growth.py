"""How time, memory and arithmetic of a rival grow with audio, text and depth."""

from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.arithmetic import needed
from benchmarks.measure import Setting, map_seconds, peak_bytes
from benchmarks.rivals import RIVALS
from benchmarks.task import Shape

N_ROUNDS = 3
FACTORS = (0.25, 0.5, 1, 2)  # of the shape that is given
AXES = {"n_audio": "audio positions", "n_text": "text positions after the audio", "n_layers": "layers"}
QUANTITIES = ("seconds", "memory above the model, MB", "arithmetic needed, TFLOP")


def draw_growth(name: str, setting: Setting, path: Path) -> None:
    """One column for each size that grows, one row for each quantity."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    grid = figure.subplots(len(QUANTITIES), len(AXES), sharey="row", sharex="col", squeeze=False)
    for column, axis in enumerate(AXES):
        sizes = [max(1, round(factor * getattr(setting.shape, axis))) for factor in FACTORS]
        points = [measured(name, replace(setting, shape=replace(setting.shape, **{axis: size}))) for size in sizes]
        for quantity, ax in enumerate(grid[:, column]):
            draw(ax, sizes, [point[quantity] for point in points])
        grid[-1, column].set_xlabel(AXES[axis])
    for quantity, ax in zip(QUANTITIES, grid[:, 0], strict=True):
        ax.set_ylabel(quantity)
        ax.set_ylim(bottom=0)  # at the end: it fixes the top as well, for the whole row
    figure.suptitle(f"{RIVALS[name].title}, around {short(setting.shape)}")
    figure.savefig(path, dpi=120)


@torch.no_grad()
def measured(name: str, setting: Setting) -> tuple[float, float, float]:
    task, entry = setting.build(), RIVALS[name]
    rival = entry.build(task.hf)
    map_seconds(rival, task, setting, entry.whole)  # warms up
    taken = median(map_seconds(rival, task, setting, entry.whole) for _ in range(N_ROUNDS))
    return taken, peak_bytes(name, setting) / 1e6, needed(setting.shape) / 1e12


def draw(ax: Axes, sizes: list[int], values: list[float]) -> None:
    ax.plot(sizes, values, marker="o", color="tab:blue")
    ax.set_xticks(sizes)
    ax.grid(alpha=0.3)


def short(shape: Shape) -> str:
    return f"{shape.n_audio} audio and {shape.n_text} text positions, {shape.n_layers} layers of {shape.d_model}"
