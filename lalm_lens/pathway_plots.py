"""Pictures of pathways: causal maps of two modalities, what heads and MLPs do in them, what their circuits share."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lalm_lens.plots import layer_rows

MODALITIES = {"text": "the answer is read", "audio": "the answer is heard"}
COLOURS = {"text": "#1f5fa8", "audio": "#d1662a", "random": "0.5"}


def pathway_maps(recovered: pd.DataFrame, about: str) -> Figure:
    """Recovery by patched layer and region, a map per modality."""
    named = recovered.assign(unit=recovered.region.str.replace("_", " "), value=recovered.recovery)
    return maps(named, about, "recovery", most=1.0)


def node_maps(nodes: pd.DataFrame, about: str, ig_steps: int) -> Figure:
    """Mean attribution by layer and head, with that of the MLP behind them; of several regions their sum."""
    ordered = nodes.assign(unit=nodes["head"].astype("string").fillna("MLP")).sort_values("head", na_position="last")
    by_unit = ordered.groupby(["modality", "layer", "unit"], sort=False)
    summed = by_unit.agg(value=("attribution", "sum"), n=("n", "max")).reset_index()
    steps = "1 gradient" if ig_steps == 1 else f"{ig_steps} gradients"
    return maps(summed, f"{about}; heads and MLPs, {steps}", "attributed change of the logit difference", most=None)


def maps(rows: pd.DataFrame, about: str, what: str, most: float | None) -> Figure:
    """By layer and unit. Colours end at `most`, or at what is largest in each map."""
    width, n_layers = rows.groupby("modality").unit.nunique().max(), rows.layer.nunique()
    figure = Figure(figsize=(max(9, 0.75 * min(width, 25) + 4), max(3.8, 0.16 * n_layers + 2.6)), layout="constrained")
    for ax, (modality, name) in zip(figure.subplots(1, 2, sharey=True), MODALITIES.items(), strict=True):
        its = rows[rows.modality == modality]
        grid = its.pivot(index="layer", columns="unit", values="value")[list(its.unit.unique())]
        end = float(grid.abs().max().max()) if most is None else most
        image = ax.imshow(grid, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-end, vmax=end)
        unit_ticks(ax, list(grid.columns))
        layer_rows(ax, its, int(grid.index.min()))
        ax.set_ylabel("layer" if modality == "text" else "")
        ax.set_title(f"{name} (n = {its.n.max()})", fontsize=10)
        figure.colorbar(image, ax=ax, pad=0.01, extend="neither" if most is None else "both").set_label(what)
    figure.suptitle(about, fontsize=10)
    return figure


def unit_ticks(ax: Axes, units: list[str]) -> None:
    """At most 25 of them, and the last."""
    step = -(-len(units) // 24)
    shown = sorted({*range(0, len(units), step), len(units) - 1})
    is_wide = max(map(len, units)) > 3
    ax.set_xticks(
        shown, [units[n] for n in shown], fontsize=8, rotation=45 * is_wide, ha="right" if is_wide else "center"
    )
    if not is_wide:
        ax.set_xlabel("head")


def overlap_curves(overlaps: pd.DataFrame, about: str) -> Figure:
    """The Jaccard index of the circuits of both modalities by their size."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    ax.plot(overlaps.k, overlaps.jaccard, color="#1f5fa8", label="text and audio")
    ax.plot(overlaps.k, overlaps.expected, color="0.5", ls="--", label="two random circuits")
    ax.set_xlabel(f"nodes in each circuit (of {overlaps.n_nodes.iloc[0]})")
    ax.set_ylabel("Jaccard index")
    ax.set_ylim(-0.03, 1.03)
    ax.legend(frameon=False, fontsize=9)
    ax.set_title(about, fontsize=10)
    return figure


def faithfulness_curves(rows: pd.DataFrame, about: str) -> Figure:
    """Faithfulness by size; a panel per task, a line per circuit."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, (task, name) in zip(axes, MODALITIES.items(), strict=True):
        its = rows[rows.task == task]
        for circuit, line in its.groupby("circuit", sort=False):
            faithful_curve(ax, line, str(circuit), "random" if circuit == "random" else f"circuit of {circuit}")
        ax.set_title(f"{name} (n = {its.n.max()})", fontsize=10)
        ax.set_xlabel("nodes in the circuit")
        for level in (0, 1):
            ax.axhline(level, color="0.8", lw=0.8, zorder=0)
    axes[0].set_ylabel("faithfulness\n(band: 95 % bootstrap)")
    axes[1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(about, fontsize=10)
    return figure


def faithful_curve(ax: Axes, line: pd.DataFrame, circuit: str, label: str) -> None:
    colour, style = COLOURS[circuit], "--" if circuit == "random" else "-"
    ax.plot(line.k, line.faithfulness, marker="o", ms=3, color=colour, ls=style, label=label)
    ax.fill_between(line.k, line.low, line.high, color=colour, alpha=0.15, lw=0)
