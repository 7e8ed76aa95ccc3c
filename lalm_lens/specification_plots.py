"""The specification curve: effects of all specifications in order, and beneath them what each has chosen."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Options = list[tuple[str, object]]  # choice and value, from above

HOLDS, FAILS, NUMBER = "#3d8b37", "#b03030", "0.35"
WORDS = {
    "label_space": {True: "with space", False: "without"},
    "norm": {True: "final norm", False: "none"},
    "template": {"text": "is text", "no text": "is none"},
    "average": {"mean": "mean of rates", "ratio_of_means": "ratio of means"},
}
WIDTH, CURVE, OPTION = 4.2, 1.9, 0.17  # inches
MANY = 20  # specifications: panels of fewer are narrower


def specification_curves(rows: pd.DataFrame, choices: Sequence[str]) -> Figure:
    """A panel for each claim: the effects in order with their 95 % intervals, green where the claim holds, and the
    choices that each specification has made."""
    blocks = [line for group in groups(rows) for line in in_lines(group)]
    tables = [options_of(block, choices) for block in blocks]
    n_columns = max(block.claim.nunique() for block in blocks)
    heights = [height for options in tables for height in (CURVE, 0.3 + OPTION * len(options))]
    figure = Figure(figsize=(max(7.0, WIDTH * min(4, n_columns) + 1.6), sum(heights) + 0.75 * len(blocks)))
    figure.set_layout_engine("constrained")
    parts = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=[0.75 + sum(its) for its in pairs(heights)])
    for part, block, options, ratios in zip(parts[:, 0], blocks, tables, pairs(heights), strict=True):
        claims = list(block.claim.unique())
        axes = part.subplots(2, len(claims), sharex="col", squeeze=False, height_ratios=ratios)
        for column, claim in zip(axes.T, claims, strict=True):
            its = block[block.claim == claim].sort_values("effect", kind="stable")
            effects(column[0], its)
            matrix(column[1], its.dropna(subset="effect"), options)
        for ax in axes[1, 1:]:
            ax.set_yticklabels([])
        axes[0, 0].set_ylabel("effect")
    first = rows.iloc[0]
    figure.suptitle(
        f"{first.model}: {first.attribute}. What the papers leave open, in every combination; "
        "a column is a specification (bars: 95 % bootstrap; dashed: the claim's bound)",
        fontsize=11,
    )
    return figure


def groups(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """Claims about traces, and about scores, which have other choices."""
    is_trace = rows.corruption.notna()
    return [its for its in (rows[is_trace], rows[~is_trace]) if its.effect.notna().any()]


def in_lines(group: pd.DataFrame) -> list[pd.DataFrame]:
    """At most four panels beside each other, and seven of those that hold little; lines of about the same length."""
    claims = list(group.dropna(subset="effect").claim.unique())
    most = group.groupby("claim").size().max()
    n_lines = -(-len(claims) // (4 if most > MANY else 7))
    return [group[group.claim.isin(list(its))] for its in np.array_split(claims, n_lines)]


def pairs(heights: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(heights[::2], heights[1::2], strict=True))


def options_of(rows: pd.DataFrame, choices: Sequence[str]) -> Options:
    """The values of every choice that was made in more than one way."""
    found = []
    for choice in choices:
        values = list(dict.fromkeys(rows[choice].dropna()))
        found += [(choice, value) for value in values] if len(values) > 1 else []
    return found


def colours(rows: pd.DataFrame) -> list[str]:
    return [NUMBER if pd.isna(holds) else HOLDS if holds else FAILS for holds in rows.holds]


def effects(ax: Axes, rows: pd.DataFrame) -> None:
    measured = rows.dropna(subset="effect")
    at = np.arange(len(measured))
    size = 14 if len(measured) <= MANY else 5
    ax.vlines(at, measured.low, measured.high, color=colours(measured), alpha=0.3, lw=1)
    ax.scatter(at, measured.effect, s=size, color=colours(measured), zorder=3)
    if rows.condition.notna().any():
        ax.axhline(float(rows.condition.iloc[0].split()[1]), color="black", ls="--", lw=0.8)
    ax.set_title(heading(rows), fontsize=8)
    ax.tick_params(labelsize=7, bottom=False)
    ax.set_xlim(-0.8, max(len(at) - 0.2, 0.8))


def heading(rows: pd.DataFrame) -> str:
    """The claim's words, its measure with its bound, and in how many specifications it holds."""
    first, n_measured = rows.iloc[0], int(rows.effect.notna().sum())
    missing = f", {len(rows) - n_measured} not measured" if n_measured < len(rows) else ""
    name = first.claim.replace("_", " ")
    if pd.isna(first.condition):
        return f"{name}\n({n_measured} specifications{missing})"
    words = fill(first.words, 34 if len(rows) <= MANY else 56)
    return f"{words}\n{name} {first.condition}:\nholds in {int(rows.holds.sum())} of {n_measured}{missing}"


def matrix(ax: Axes, rows: pd.DataFrame, options: Options) -> None:
    """A mark where a specification (across) has chosen a value (down); values of one choice share a band."""
    order = list(dict.fromkeys(choice for choice, _ in options))
    for n, (choice, value) in enumerate(options):
        if order.index(choice) % 2 == 0:
            ax.axhspan(n - 0.5, n + 0.5, color="0.94", lw=0, zorder=0)
        chosen = (rows[choice] == value).fillna(False).to_numpy(bool)
        colour = [its for its, here in zip(colours(rows), chosen, strict=True) if here]
        ax.scatter(np.flatnonzero(chosen), np.full(chosen.sum(), n), marker="|", s=28, lw=0.9, color=colour or "0.5")
    ax.set_yticks(range(len(options)), [named(*option, options, n) for n, option in enumerate(options)], fontsize=7)
    ax.set_ylim(len(options) - 0.5, -0.5)
    ax.set_xticks([])
    ax.spines[["top", "right", "bottom"]].set_visible(False)


def named(choice: str, value: object, options: Options, n: int) -> str:
    """The choice before the first of its values."""
    words: Mapping = WORDS.get(choice, {})
    said = str(words.get(value, value)).replace("_", " ")
    return f"{choice.replace('_', ' ')}: {said}" if n == 0 or options[n - 1][0] != choice else said
