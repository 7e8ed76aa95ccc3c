"""Pictures of pairs of layers: what changes when states go from one to the other."""

from collections.abc import Mapping

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lalm_lens.plots import CHANGES

NAMES = {
    "accuracy": "change of accuracy",
    "label_probability": "change of the true label's\nprobability among the labels",
    "tdr": "change of the\ntext dominance ratio",
}


def pair_maps(
    frame: pd.DataFrame,
    scores: pd.DataFrame,
    before: float,
    by: str,
    best: Mapping[str, Mapping[str, int]],
) -> Figure:
    """The change of a score by source and target layer: a row for each place, a column for each window. One scale of
    colours for all; a frame around the best pair of each place."""
    places, windows = list(best), sorted(scores.window.unique())
    sources, targets = (sorted(scores[name].unique()) for name in ("source", "target"))
    change = scores.assign(change=scores[by] - before)
    limit = max(float(change.change.abs().max()), 1e-9)
    size = (max(6, (0.3 * len(targets) + 1.3) * len(windows) + 1.6), (0.3 * len(sources) + 1.1) * len(places) + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(places), len(windows), squeeze=False, sharex=True, sharey=True)
    for row, place in zip(axes, places, strict=True):
        for ax, window in zip(row, windows, strict=True):
            its = change[(change.place == place) & (change.window == window)]
            grid = its.pivot(index="source", columns="target", values="change").reindex(index=sources, columns=targets)
            ax.set_facecolor("0.75")
            colours = "RdBu" if by == "tdr" else "RdBu_r"  # red is better
            ax.imshow(grid, origin="lower", cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
            ax.set_xticks(range(len(targets)), targets, fontsize=8)
            ax.set_yticks(range(len(sources)), sources, fontsize=8)
            ax.set_title(f"{place}, {window} layer{'s' if window > 1 else ''}", fontsize=10)
            if best[place]["window"] == window:
                mark(ax, targets.index(best[place]["target"]), sources.index(best[place]["source"]))
        row[0].set_ylabel("source layer")
    for ax in axes[-1]:
        ax.set_xlabel("target layer")
    figure.colorbar(axes[0, 0].images[0], ax=axes, pad=0.01).set_label(f"{NAMES[by]}\n(before: {before:.3f})")
    first = frame.iloc[0]
    figure.suptitle(
        f"{first.model}: {first.attribute}, {first.form}, behind the target {first.later}, n = {scores.n.max()}\n"
        f"frame: the best pair of a place; grey: not tried{', or too few clear answers' * (by == 'tdr')}",
        fontsize=10,
    )
    return figure


def mark(ax: Axes, x: int, y: int) -> None:
    ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", lw=2.5, clip_on=False))


def change_curves(effects: pd.DataFrame, across: str, neutral: float, effect: str, frame: pd.DataFrame) -> Figure:
    """The change by a factor, with bootstrap intervals over clips; `line` names the lines. At `neutral` nothing is
    changed."""
    unchanged = effects.drop_duplicates("line").assign(**{across: neutral, "change": 0.0, "low": 0.0, "high": 0.0})
    effects = pd.concat([effects, unchanged]).drop_duplicates(["line", across])
    lines = list(effects.line.unique())
    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    ax = figure.subplots()
    for n, (line, rows) in enumerate((name, effects[effects.line == name].sort_values(across)) for name in lines):
        colour = colormaps["viridis"](n / max(1, len(lines) - 1) * 0.9)
        ax.plot(rows[across], rows.change, marker="o", ms=3, color=colour, label=line)
        ax.fill_between(rows[across], rows.low, rows.high, color=colour, alpha=0.12, lw=0)
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    ax.set_xlabel(across)
    ax.set_ylabel(f"{CHANGES[effect]}\n(mean, band: 95 % bootstrap)")
    ax.set_title(heading(effects, frame), fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def unit_map(effects: pd.DataFrame, effect: str, frame: pd.DataFrame) -> Figure:
    """The change by layer and what was taken out of it."""
    units = list(effects.units.unique())
    grid = effects.pivot(index="layer", columns="units", values="change").reindex(columns=units)
    limit = max(float(grid.abs().max().max()), 1e-9)
    figure = Figure(figsize=(max(5, 0.42 * len(units) + 2.6), max(3, 0.3 * len(grid) + 1.5)), layout="constrained")
    ax = figure.subplots()
    ax.set_facecolor("0.75")
    image = ax.imshow(grid, origin="lower", aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    step = max(1, -(-len(units) // 24))
    ax.set_xticks(range(0, len(units), step), units[::step], fontsize=8, rotation=90 if len(units) > 8 else 0)
    ax.set_yticks(range(len(grid)), grid.index, fontsize=8)
    ax.set_xlabel(f"{frame.of.iloc[0]} taken out ({frame.method.iloc[0]}) at {frame.place.iloc[0]}")
    ax.set_ylabel("layer")
    ax.set_title(heading(effects, frame), fontsize=10)
    figure.colorbar(image, ax=ax, pad=0.01).set_label(CHANGES[effect])
    return figure


def heading(effects: pd.DataFrame, frame: pd.DataFrame) -> str:
    first = frame.iloc[0]
    return f"{first.model}: {first.attribute}, {first.form} (n = {effects.n.max()})"
