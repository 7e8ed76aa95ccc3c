"""Pictures of what layers know: scores by layer, words by layer and position, accuracy under enrichment."""

from collections.abc import Mapping
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lalm_lens.plots import layer_rows, layer_ticks, printable

STYLES = {  # of lines by name: colour and line
    "P1": ("#1f5fa8", "-"),
    "P2": ("#d1662a", "-"),
    "P3": ("#3d8b37", "-"),
    "right at the end": ("#3d8b37", "-"),
    "wrong at the end": ("#b03030", "-"),
    "last": ("#b03030", "-"),
    "penultimate": ("#1f5fa8", "-"),
}
KNOCKED_OUT = ("0.4", "--"), ("0.6", ":"), ("0.5", "-."), ("0.3", (0, (1, 3)))


def score_curves(curves: pd.DataFrame) -> Figure:
    """Information scores by layer, with their bootstrap intervals and what chance scores; a panel per attribute."""
    attributes = list(curves.attribute.unique())
    figure = Figure(figsize=(max(6, 3.6 * len(attributes) + 1.5), 4.2), layout="constrained")
    axes = figure.subplots(1, len(attributes), sharey=True, squeeze=False)
    others = dict(zip((name for name in curves.line.unique() if name not in STYLES), KNOCKED_OUT * 9, strict=False))
    for ax, attribute in zip(axes[0], attributes, strict=True):
        rows = curves[curves.attribute == attribute]
        for name, line in rows.groupby("line", sort=False):
            score_curve(ax, line.sort_values("layer"), str(name), *{**others, **STYLES}[str(name)])
        ax.axhline(1 / rows.n_labels.iloc[0], color="0.5", lw=0.8, ls=":", label="chance")
        layer_ticks(ax.set_xticks, rows)
        ax.set_xlabel("layer (the first is 0)")
        ax.set_title(f"{attribute}\n(n = {counts(rows)})", fontsize=10)
    axes[0, 0].set_ylabel("information score\n(band: 95 % bootstrap)")
    axes[0, 0].set_ylim(-0.03, 1.03)
    drawn = {str(line.get_label()): line for ax in axes[0] for line in ax.lines}  # in any of the panels
    drawn["chance"] = drawn.pop("chance")
    axes[0, -1].legend(handles=drawn.values(), frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    space = "with" if curves.label_space.iloc[0] else "without"
    norm = "" if curves.norm.iloc[0] else ", without the final norm"
    forms = ", ".join(sorted(curves.form.unique()))
    title = f"{curves.model.iloc[0]}: {forms}, first tokens of labels {space} the space before them{norm}"
    figure.suptitle(title, fontsize=10)
    return figure


def counts(rows: pd.DataFrame) -> str:
    """How many clips, by line where each is of others or of more."""
    by_line = rows.groupby("line", sort=False).n.first()
    if by_line.nunique() == 1 and "right_at_end" not in rows:
        return str(by_line.iloc[0])
    return ", ".join(f"{n} {name}" for name, n in by_line.items())


def score_curve(ax: Axes, rows: pd.DataFrame, label: str, colour: str, style: str) -> None:
    ax.plot(rows.layer, rows.score, marker="o", ms=3, color=colour, ls=style, label=fill(label, 24))
    ax.fill_between(rows.layer, rows.low, rows.high, color=colour, alpha=0.15, lw=0)


def word_map(top: pd.DataFrame) -> Figure:
    """The most probable token of each layer at each position of one clip, coloured by its probability."""
    grid = top.pivot(index="layer", columns="position", values="probability")
    said = top.pivot(index="layer", columns="position", values="word")
    width = max(5, 0.62 * grid.shape[1] + 2.5)
    figure = Figure(figsize=(width, max(3, 0.32 * len(grid) + 1.6)), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(grid, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1)
    for (y, x), probability in np.ndenumerate(grid.to_numpy()):
        colour = "white" if probability > 0.6 else "black"
        text = printable(str(said.iloc[y, x]))[:9]
        ax.text(x, y, text, ha="center", va="center", fontsize=6, color=colour, parse_math=False)
    places = top.drop_duplicates("position").set_index("position").loc[grid.columns]
    names = [place(row) for row in places.to_dict("records")]
    ax.set_xticks(range(len(names)), names, fontsize=7, rotation=45, ha="right", parse_math=False)
    layer_rows(ax, top, int(grid.index.min()))
    ax.set_ylabel("layer")
    first = top.iloc[0]
    about = "" if first.knockout == "none" else f", {first.knockout}"
    ax.set_title(f"{first.model}: {first['sample']} ({first.label}), {first.form}{about}", fontsize=9, parse_math=False)
    figure.colorbar(image, ax=ax, pad=0.01).set_label("probability of the\nmost probable token")
    return figure


def place(row: dict) -> str:
    """What stands at a position: of the audio, when."""
    return printable(row["token"] or row["region"]) if pd.isna(row["start_s"]) else f"{row['start_s']:.2f} s"


def factor_curves(rows: pd.DataFrame, title: str) -> Figure:
    """Accuracy on the test clips by factor: the chosen layer with a bootstrap interval, random ones with their
    standard deviation over seeds."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    chosen, drawn = (rows[rows.arm == arm] for arm in ("chosen", "random"))
    ax.plot(chosen.factor, chosen.accuracy, marker="o", ms=3, color="#b03030", label="chosen layer (95 % bootstrap)")
    ax.fill_between(chosen.factor, chosen.low, chosen.high, color="#b03030", alpha=0.15, lw=0)
    if len(drawn):
        label = "random layers (sd over seeds)"
        ax.errorbar(drawn.factor, drawn.accuracy, drawn.sd, marker="o", ms=3, capsize=3, color="0.4", label=label)
    ax.set_xlabel("factor")
    ax.set_ylabel("accuracy")
    ax.set_title(f"{title}\n(n = {chosen.n.iloc[0]} test clips)", fontsize=10)
    ax.legend(frameon=False, fontsize=9)
    return figure


def resolution(heard: pd.DataFrame, correlation: Mapping[str, Any]) -> Figure:
    """Accuracy over critical layer, a point for each attribute and prompt."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    ax = figure.subplots()
    for colour, (attribute, rows) in enumerate(heard.groupby("attribute", sort=False)):
        for marker, (form, row) in zip("os^Dv", rows.groupby("form"), strict=False):
            ax.scatter(row.critical_layer, row.accuracy, 34, f"C{colour}", marker=marker, label=f"{attribute}, {form}")
    ax.set_xlabel(f"critical layer (the first is {heard.layer_base.iloc[0]})")
    ax.set_ylabel("accuracy")
    ax.set_ylim(-0.06, 1.06)
    r, p, n, n_dropped = (correlation[name] for name in ("r", "p", "n", "n_dropped"))
    undefined = f", {n_dropped} without a critical layer" if n_dropped else ""
    space = "with" if heard.label_space.iloc[0] else "without"
    about = f"{heard.model.iloc[0]}, labels {space} the space before them"
    ax.set_title(f"{about}\nr = {r:.2f}, p = {p:.2g} (n = {n}{undefined})", fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
