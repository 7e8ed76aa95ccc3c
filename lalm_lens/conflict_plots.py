"""Pictures of text against audio."""

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

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
