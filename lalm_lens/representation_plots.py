"""Pictures of what states are like: what probes read from them, and how alike those of two modalities are."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lalm_lens.plots import layer_ticks

PROBED = {"audio_encoder": "audio encoder", "adapter": "adapter", "decoder": "decoder"}
PROBED |= {"vision_encoder": "vision encoder", "vision_adapter": "vision adapter"}


def probe_curves(layers: pd.DataFrame, about: str) -> Figure:
    """Accuracy of probes by layer with its interval, that of the control and chance; a panel per stack and place."""
    panels = list(layers[["stack", "place"]].drop_duplicates().itertuples(index=False))
    sizes = [
        max(2, len(layers[(layers["stack"] == stack) & (layers.place == place)])) ** 0.6 for stack, place in panels
    ]
    figure = Figure(figsize=(max(6, 2.2 * len(panels) + 2.5), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=sizes)
    for ax, (stack, place) in zip(axes[0], panels, strict=True):
        rows = layers[(layers["stack"] == stack) & (layers.place == place)]
        band(ax, rows, "accuracy", "#1f5fa8", "labels")
        ax.plot(rows.layer, rows.control, marker="o", ms=3, color="0.5", ls="--", label="shuffled labels")
        ax.axhline(rows.chance.iloc[0], color="0.5", lw=0.8, ls=":", label="largest class")
        ax.set_title(PROBED[stack] + (f":\n{place}" if stack == "decoder" else ""), fontsize=10)
        if stack.endswith("adapter"):
            ax.set_xticks([])
        else:
            layer_ticks(ax.set_xticks, rows)
            ax.set_xlabel("layer")
    axes[0, 0].set_ylim(-0.03, 1.03)
    axes[0, 0].set_ylabel("accuracy in cross-validation\n(band: 95 % bootstrap)")
    axes[0, -1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{about}, n = {layers.n.iloc[0]}", fontsize=10)
    return figure


def band(ax: Axes, rows: pd.DataFrame, value: str, colour: str, label: str, style: str = "-") -> None:
    """A curve by layer; its interval is in `low` and `high`."""
    ax.plot(rows.layer, rows[value], marker="o", ms=3, color=colour, ls=style, label=label)
    ax.fill_between(rows.layer, rows.low, rows.high, color=colour, alpha=0.15, lw=0)
    if len(rows) == 1:
        ax.vlines(rows.layer, rows.low, rows.high, color=colour, alpha=0.4)


PANELS = {  # what is drawn, and of it: column, name, colour, style
    "cosine": [("cosine", "twins", "#1f5fa8", "-"), ("mismatched", "other labels", "0.5", "--")],
    "cosine without the\nmean of each modality": [
        ("centred_cosine", "twins", "#1f5fa8", "-"),
        ("centred_mismatched", "other labels", "0.5", "--"),
    ],
}


def convergence_curves(layers: pd.DataFrame, about: str) -> Figure:
    """Cosines of twins and of mismatched pairs with their intervals, debiased CKA above its null, and the gap between
    the modalities in units of their spread, by layer; a row of panels per place."""
    places = list(layers.place.unique())
    figure = Figure(figsize=(14, 3.1 * len(places) + 0.9), layout="constrained")
    axes = figure.subplots(len(places), 4, sharex=True, squeeze=False)
    for row, place in zip(axes, places, strict=True):
        rows = layers[layers.place == place]
        for ax, (title, lines) in zip(row, PANELS.items(), strict=False):
            for value, label, colour, style in lines:
                its = rows.assign(low=rows[f"{value}_low"], high=rows[f"{value}_high"])
                band(ax, its, value, colour, label, style)
            ax.set_ylabel(title)
        row[2].plot(rows.layer, rows.cka, marker="o", ms=3, color="#3d8b37", label="twins")
        row[2].plot(rows.layer, rows.cka_null_95, color="0.5", ls="--", label="95 % of random pairings")
        row[2].set_ylabel("debiased CKA")
        row[3].plot(rows.layer, rows.relative_gap, marker="o", ms=3, color="#b03030")
        row[3].set_ylabel("distance of the means /\nspread of the items")
        row[3].set_ylim(0, 1.05 * rows.relative_gap.max())
        row[0].set_title(f"at {place}", fontsize=10)
        for ax in row[:3]:
            ax.axhline(0, color="0.8", lw=0.8, zorder=0)
            ax.legend(frameon=False, fontsize=8)
    for ax in axes[-1]:
        layer_ticks(ax.set_xticks, layers)
        ax.set_xlim(layers.layer.min() - 0.5, layers.layer.max() + 0.5)
        ax.set_xlabel("layer")
    figure.suptitle(f"{about}, n = {layers.n.iloc[0]} (bands: 95 % bootstrap)", fontsize=10)
    return figure
