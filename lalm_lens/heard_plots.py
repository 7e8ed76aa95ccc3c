"""Pictures of what an answer owes to what is heard, and of what states name."""

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lalm_lens.plots import layer_ticks

COLOURS = {"unshifted": "#8fb8de", "marginal": "#f2c46d", "shifted": "#e08a8a"}
HEARD = {"clip": "the same clip", "silence": "silence", "nothing": "nothing"}


def token_shifts(steps: pd.DataFrame, totals: pd.DataFrame, frame: pd.DataFrame) -> Figure:
    """Shares of the categories over all tokens and by step, and KL by step; a row per attribute."""
    attributes = list(totals.attribute.unique())
    figure = Figure(figsize=(10.5, 2.9 * len(attributes) + 0.9), layout="constrained")
    axes = figure.subplots(len(attributes), 3, squeeze=False, width_ratios=(1, 2, 2))
    for (whole, by_step, kl), attribute in zip(axes, attributes, strict=True):
        rows, total = steps[steps.attribute == attribute].sort_values("step"), totals[totals.attribute == attribute]
        categories(whole, total.iloc[0])
        whole.set_title(f"{attribute}: {total.n.iloc[0]} clips,\n{total.n_tokens.iloc[0]} tokens", fontsize=10)
        stacked(by_step, rows)
        kl.plot(rows.step, rows.kl, marker="o", ms=3, color="#1f5fa8")
        kl.fill_between(rows.step, rows.kl_low, rows.kl_high, color="#1f5fa8", alpha=0.15, lw=0)
        kl.set_ylim(bottom=0)
        kl.set_ylabel("KL(model || base), nats\n(band: 95 % bootstrap)")
        for ax in (by_step, kl):
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            ax.set_xlabel("token of the answer")
    handles = axes[0, 1].containers
    figure.legend(handles, list(COLOURS), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    one = frame.iloc[0]
    hears = f"{one.base}, which hears {HEARD[one.base_hears]}"
    figure.suptitle(f"{one.model}'s tokens under {hears}: {one.form}", fontsize=10)
    return figure


def categories(ax: Axes, total: pd.Series) -> None:
    """Over all tokens."""
    for n, (name, colour) in enumerate(COLOURS.items()):
        ax.bar(n, total[name], color=colour)
        ax.vlines(n, total[f"{name}_low"], total[f"{name}_high"], color="0.2", lw=1.2)
    ax.set_xticks([])
    ax.set_ylim(0, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_ylabel("tokens\n(line: 95 % bootstrap)")


def stacked(ax: Axes, rows: pd.DataFrame) -> None:
    bottom = 0 * rows.unshifted
    for name, colour in COLOURS.items():
        ax.bar(rows.step, rows[name], bottom=bottom, color=colour, label=name)
        bottom = bottom + rows[name]
    ax.set_ylim(0, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_ylabel("tokens")


def understanding(curves: pd.DataFrame, totals: pd.DataFrame, frame: pd.DataFrame) -> Figure:
    """How many clips' states name their label, and how many another clip's, by layer; a panel per place."""
    places = list(curves.place.unique())
    figure = Figure(figsize=(max(6.5, 3.6 * len(places) + 2.2), 4), layout="constrained")
    axes = figure.subplots(1, len(places), sharey=True, squeeze=False)
    for ax, place in zip(axes[0], places, strict=True):
        rows, total = curves[curves.place == place], totals[totals.place == place].iloc[0]
        for name, colour, label in (("score", "#3d8b37", "its own label"), ("control", "0.5", "another clip's")):
            ax.plot(rows.layer, rows[name], marker="o", ms=3, color=colour, label=label)
            ax.fill_between(rows.layer, rows[f"{name}_low"], rows[f"{name}_high"], color=colour, alpha=0.15, lw=0)
        layer_ticks(ax.set_xticks, curves)
        ax.set_xlabel("layer")
        any_layer = f"in any layer {total.score:.0%}, another's {total.control:.0%}"
        ax.set_title(f"{place} (n = {total.n})\n{any_layer}", fontsize=10)
    axes[0, 0].set_ylim(-0.03, 1.03)
    axes[0, 0].set_ylabel("clips of which a position names\n(band: 95 % bootstrap)")
    axes[0, -1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    one = frame.iloc[0]
    norm = "" if one.norm else ", without the final norm"
    about = f"{one.model}: {one.attribute}, {one.rule}, among the {one.top_k} largest tokens{norm}"
    figure.suptitle(fill(about, 100), fontsize=10)
    return figure


SIDES = {"audio": ("what is heard", "#1f5fa8"), "video": ("what is seen", "#d1662a")}
STYLES = ("-", "--", "-.", ":")  # of ways to choose layers


def fidelity(effects: pd.DataFrame, frame: pd.DataFrame, what: str) -> Figure:
    """How true texts are to what is heard and seen, before a change and after it: by layer, and beside the layers what
    has none; a panel per change."""
    edges = list(effects.edge.unique())
    figure = Figure(figsize=(max(6.5, 3.3 * len(edges) + 2), 4.6), layout="constrained")
    axes = figure.subplots(1, len(edges), sharey=True, squeeze=False)[0]
    for ax, edge in zip(axes, edges, strict=True):
        rows = effects[effects.edge == edge]
        for (side, (label, colour)), off in zip(SIDES.items(), (-0.08, 0.08), strict=True):
            changed(ax, rows[rows.side == side], label, colour, off)
        ax.set_title(f"{edge} (n = {rows.n.max()})", fontsize=10)
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].set_ylabel(f"{what}\n(bars, band: 95 % bootstrap of the change)")
    handles = {label: its for ax in axes for its, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    about = f"{frame.model.iloc[0]}: {frame.attribute.iloc[0]}, {frame.form.iloc[0]}"
    figure.suptitle(f"{about}, queries (right) that cannot look at keys (left)", fontsize=10)
    return figure


def changed(ax: Axes, rows: pd.DataFrame, label: str, colour: str, off: float) -> None:
    """One side of a panel. What a change has no layer of its own for stands to the right."""
    ax.axhline(rows.before.iloc[0], color=colour, lw=1, ls=":", label=f"{label}, before")
    layered, whole = rows[rows.layer.notna()], rows[rows.layer.isna()]
    for (kind, its), style in zip(layered.groupby("kind", sort=False), STYLES, strict=False):
        layer, about = its.layer.astype(int), f"{label}, {kind}"
        ax.plot(layer, its.after, marker="o", ms=3, color=colour, ls=style, label=about)
        ax.fill_between(layer, its.before + its.low, its.before + its.high, color=colour, alpha=0.12, lw=0)
    ticks = {n: str(n) for n in layered.layer.dropna().astype(int).unique()}
    begin = max(ticks, default=-1) + 1
    for at, (_, its) in enumerate(whole.iterrows(), start=begin):
        ticks[at] = f"layers {its['layers']}" if its.kind == "chosen" else "all" if its.kind == "all" else f"{its.edge}"
        ax.vlines(at + off, its.before + its.low, its.before + its.high, color=colour, alpha=0.5, lw=1.5)
        together = f"{label}, layers together"
        ax.plot(at + off, its.after, marker="s", ms=6, color=colour, ls="", mfc="none", label=together)
    step = -(-len(ticks) // 12)
    shown = {at: tick for n, (at, tick) in enumerate(ticks.items()) if n % step == 0 or at >= begin}
    ax.set_xticks(list(shown), list(shown.values()))
    ax.set_xlim(min(ticks) - 0.5, max(ticks) + 0.5)
    ax.set_xlabel("layer in which attention is cut" if len(layered) else "layers")


def pair_map(effects: pd.DataFrame, places: list[str], frame: pd.DataFrame) -> Figure:
    """What texts lose in log-probability where one place cannot look at another, keys x queries."""
    change = effects.set_index("edge").change.to_dict()
    grid = np.array([[change.get(f"{keys} -> {queries}", np.nan) for queries in places] for keys in places])
    most = max(0.01, float(np.nanmax(np.abs(grid))))
    figure = Figure(figsize=(1.15 * len(places) + 2.6, 0.8 * len(places) + 2), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(grid, cmap="RdBu_r", vmin=-most, vmax=most)
    for (row, column), value in np.ndenumerate(grid):
        shown = "-" if np.isnan(value) else "0" if value == 0 else f"{value:.2f}".replace("-0.00", "0.00")
        ax.text(column, row, shown, ha="center", va="center", color="w" if abs(value) > 0.6 * most else "k", fontsize=9)
    ax.set_xticks(range(len(places)), places)
    ax.set_yticks(range(len(places)), places)
    ax.set_xlabel("queries, which look")
    ax.set_ylabel("keys, which are not seen")
    figure.colorbar(image, ax=ax, pad=0.02).set_label("change of the log-probability\nof what was written before")
    one, n = frame.iloc[0], frame["sample"].nunique()
    about = f"attention cut in layers {one['layers']}, mean over {n} clips"
    figure.suptitle(f"{one.model}: {one.attribute}, {one.form}\n{about}", fontsize=10)
    return figure
