"""Pictures of text against audio."""

from collections.abc import Mapping
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lalm_lens.plots import layer_ticks

ORDERS = {"audio_first": ("#1f5fa8", "o"), "text_first": ("#d1662a", "s")}
FOLLOWS = {"audio": "#8fb8de", "text": "#e08a8a", "other": "#d9d9d9"}


def dominance(table: pd.DataFrame, frame: pd.DataFrame) -> Figure:
    """TDR and shares of answers by framing and order; a row per attribute."""
    attributes = list(table.attribute.unique())
    n_bars = max(table.groupby("attribute", sort=False).size())
    height = 1.3 + len(attributes) * (0.9 + 0.42 * n_bars)
    figure = Figure(figsize=(10.5, height), layout="constrained")
    axes = figure.subplots(len(attributes), 2, squeeze=False, sharey="row")
    for (left, right), attribute in zip(axes, attributes, strict=True):
        rows = table[table.attribute == attribute].reset_index(drop=True)
        ratios(left, rows)
        shares(right, rows)
        left.set_yticks(range(len(rows)), [name_of(row, table) for row in rows.itertuples()], fontsize=9)
        left.set_ylim(len(rows) - 0.5, -0.5)
        left.set_title(f"{attribute} (n = {spread(rows.n)} in conflict)", fontsize=10)
    axes[-1, 0].set_xlabel("text / (text + audio), 95 % Wilson interval")
    axes[-1, 1].set_xlabel("answers")
    handles = {
        label: handle for ax in axes[:, 0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        [*handles.values(), *axes[0, 1].containers],
        [*(name.replace("_", " ") for name in handles), *FOLLOWS],
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=9,
    )
    knockout = frame.knockout.iloc[0]
    cut = "" if knockout == "none" else f"; knocked out: {knockout}"
    where = {"labels": "among the labels", "vocab": "in the vocabulary"}[frame.predict.iloc[0]]
    figure.suptitle(
        fill(f"{frame.model.iloc[0]}: {frame.form.iloc[0]}, answers by the largest logit {where}{cut}", 110),
        fontsize=10,
    )
    return figure


def name_of(row: object, table: pd.DataFrame) -> str:
    """What varies, and the framing always."""
    names = [row.framing]  # pyright: ignore[reportAttributeAccessIssue]
    names += [getattr(row, name) for name in ("strength", "order") if table[name].nunique() > 1]
    return fill(", ".join(names).replace("_", " "), 34)


def spread(n: pd.Series) -> str:
    return str(n.iloc[0]) if n.nunique() == 1 else f"{n.min()} to {n.max()}"


def ratios(ax: Axes, rows: pd.DataFrame) -> None:
    ax.axvline(0.5, color="0.6", lw=0.8, ls=":")
    for order, (colour, marker) in ORDERS.items():
        its = rows[rows.order == order]
        if len(its):
            reach = np.abs(its[["tdr_low", "tdr_high"]].to_numpy().T - its.tdr.to_numpy())
            ax.errorbar(
                its.tdr, its.index, xerr=reach, color=colour, marker=marker, ms=5, ls="", capsize=3, label=order
            )
    for at in rows.index[rows.tdr.isna()]:
        ax.text(
            0.5, at, "neither text nor audio", ha="center", va="center", fontsize=8, color="0.4", backgroundcolor="w"
        )
    ax.set_xlim(-0.03, 1.03)


def shares(ax: Axes, rows: pd.DataFrame) -> None:
    start = np.zeros(len(rows))
    for name, colour in FOLLOWS.items():
        rate = rows[f"{name}_rate"].to_numpy()
        ax.barh(rows.index, rate, left=start, color=colour, height=0.7, label=name)
        for at, (left, width) in enumerate(zip(start, rate, strict=True)):
            if width > 0.06:
                ax.text(left + width / 2, at, f"{width:.0%}", ha="center", va="center", fontsize=8)
        start += rate
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1))


SIDES = {"audio": ("#1f5fa8", "-"), "text": ("#b03030", "-")}
RUNS = {
    "audio_only": "without the text",
    "conflict": "the text disagrees",
    "cut": "the text disagrees, out of\nsight of the last position",
    "hidden": "the text disagrees, out of\nsight of all behind it",
}


def suppression(curves: pd.DataFrame, probes: Mapping[str, pd.DataFrame], about: str) -> Figure:
    """How often layers say the audio's label and the text's; a row per place, a column per run, and one of probes."""
    places, runs = list(curves.place.unique()), list(curves.run.unique())
    n_columns = len(runs) + bool(probes)
    figure = Figure(figsize=(3.1 * n_columns + 1.2, 2.9 * len(places) + 1.1), layout="constrained")
    axes = figure.subplots(len(places), n_columns, sharex=True, sharey=True, squeeze=False)
    for panels, place in zip(axes, places, strict=True):
        for ax, run in zip(panels, runs, strict=False):
            rows = curves[(curves.place == place) & (curves.run == run)]
            for side, its in rows.groupby("side", sort=False):
                by_layer(ax, its.layer, its.rate, its.low, its.high, str(side))
            ax.set_title(RUNS[run], fontsize=9)
        for side, layers in probes.items():
            its = layers[layers.place == place]
            by_layer(panels[-1], its.layer, its.accuracy, its.low, its.high, side)
            panels[-1].plot(its.layer, its.control, color=SIDES[side][0], ls=":", lw=1)
            panels[-1].set_title("linear probes, any label stated\n(dotted: shuffled labels)", fontsize=9)
        where = {"last": "last position", "object": "options"}[place]
        panels[0].set_ylabel(f"{where}:\nshare of clips (band: 95 % bootstrap)", fontsize=9)
        panels[0].set_ylim(-0.03, 1.03)
    for ax in axes[-1]:
        layer_ticks(ax.set_xticks, curves)
        ax.set_xlabel("layer")
    axes[0, -1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), title="label of the")
    figure.suptitle(f"{about} (n = {curves.n.iloc[0]})", fontsize=10)
    return figure


def by_layer(ax: Axes, layer: pd.Series, rate: pd.Series, low: pd.Series, high: pd.Series, side: str) -> None:
    colour, style = SIDES[side]
    ax.plot(layer, rate, marker="o", ms=3, color=colour, ls=style, label=side)
    ax.fill_between(layer, low, high, color=colour, alpha=0.15, lw=0)
