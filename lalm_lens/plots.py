"""Pictures of tidy tables. Only samples that are kept are averaged, and every picture says how many they are.

Figures are made without pyplot: they need no screen, leave a notebook's backend alone and are freed when unused.
"""

from collections.abc import Callable
from itertools import pairwise
from textwrap import fill

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LABELS = {"layer": "text positions", "audio_layer": "audio positions"}
COLOURS = {"layer": "#1f5fa8", "audio_layer": "#d1662a"}
BANDS = {"early": "#8fb8de", "object": "#f2c46d", "late": "#a8d5a2", "last": "#e08a8a"}


def layer_curves(frame: pd.DataFrame) -> Figure:
    """Mean recovery by patched layer with one standard error, text against audio; a panel per attribute."""
    attributes = list(frame.attribute.unique())
    figure = Figure(figsize=(max(5.5, 3.6 * len(attributes) + 0.6), 3.8), layout="constrained")
    axes = figure.subplots(1, len(attributes), sharey=True, squeeze=False)
    for ax, attribute in zip(axes[0], attributes, strict=True):
        layer_panel(ax, frame[frame.attribute == attribute])
        ax.set_title(title(frame, attribute), fontsize=10)
    axes[0, 0].set_ylabel("recovery rate (mean, band: 1 s.e.)")
    axes[0, -1].legend(frameon=False, fontsize=9, loc="center right")
    figure.suptitle(f"{frame.model.iloc[0]}\nclean states of one layer patched into the silent run", fontsize=10)
    return figure


def layer_panel(ax: Axes, frame: pd.DataFrame) -> None:
    ax.axhline(0, color="0.8", lw=0.8)
    ax.axhline(1, color="0.8", lw=0.8)
    rows = shown(frame)
    for kind, label in LABELS.items():
        by_layer = rows[rows.kind == kind].groupby("layer").recovery
        mean, error = by_layer.mean(), by_layer.sem().fillna(0)
        ax.plot(mean.index, mean, marker="o", ms=3.5, color=COLOURS[kind], label=label)
        ax.fill_between(mean.index, mean - error, mean + error, color=COLOURS[kind], alpha=0.2, lw=0)
    layer_ticks(ax.set_xticks, frame)
    ax.set_xlabel("patched layer")


def layer_ticks(set_ticks: Callable, frame: pd.DataFrame) -> None:
    """The embedding and at most ten blocks."""
    layers = sorted(frame.layer.unique())
    blocks = [layer for layer in layers if layer >= 0]
    step = max(1, -(-len(blocks) // 10))
    shown = [layer for layer in layers if layer < 0 or layer % step == 0]
    set_ticks(shown, ["embed" if layer < 0 else str(layer) for layer in shown], fontsize=8)


def token_maps(frame: pd.DataFrame) -> Figure:
    """Mean recovery by patched layer and text position after the audio, aligned at the last; a map per attribute."""
    attributes = list(frame.attribute.unique())
    tokens = frame[frame.kind == "token"]
    width = tokens.groupby("attribute").text_index.nunique().max()
    figure = Figure(figsize=(max(6, 0.24 * width + 2.5), 4.0 * len(attributes)), layout="constrained")
    axes = figure.subplots(len(attributes), 1, squeeze=False)
    for ax, attribute in zip(axes[:, 0], attributes, strict=True):
        token_panel(ax, tokens[tokens.attribute == attribute])
        ax.set_title(title(frame, attribute), fontsize=10, pad=24)
    figure.suptitle(f"{frame.model.iloc[0]}\none clean state patched into the silent run", fontsize=10)
    return figure


def token_panel(ax: Axes, frame: pd.DataFrame) -> None:
    grid = shown(frame).pivot_table(index="layer", columns="text_index", values="recovery", dropna=False)
    words = frame.drop_duplicates("text_index").set_index("text_index").loc[grid.columns]
    image = ax.imshow(grid, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set_xticks(range(len(words)), [printable(token) for token in words.token], rotation=90, fontsize=7)
    layer_ticks(lambda layers, names, **style: ax.set_yticks([layer + 1 for layer in layers], names, **style), frame)
    ax.set_ylabel("patched layer")
    elsewhere = grid.drop(columns=-1).abs().max().max()
    ax.set_xlabel(f"text position after the audio (largest |recovery| before the last: {elsewhere:.3f})")
    segment_bands(ax, list(words.segment))
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, extend="both")
    bar.set_label("recovery rate")


def segment_bands(ax: Axes, segments: list[str]) -> None:
    """The paper's segments as a coloured strip above the map."""
    axes_x = ax.get_xaxis_transform()
    edges = [0, *(n for n in range(1, len(segments)) if segments[n] != segments[n - 1]), len(segments)]
    for start, end in pairwise(edges):
        if segments[start] in BANDS:
            colour = BANDS[segments[start]]
            ax.axvspan(start - 0.5, end - 0.5, 1.01, 1.05, color=colour, clip_on=False, lw=0)
            ax.text(
                (start + end - 1) / 2, 1.06, segments[start], transform=axes_x, ha="center", va="bottom", fontsize=7
            )


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """The kept samples; if there are none, the excluded ones, as `title` then says."""
    kept = frame[frame.status == "kept"]
    return kept if len(kept) else frame


def title(frame: pd.DataFrame, attribute: str) -> str:
    statuses = frame[frame.attribute == attribute].drop_duplicates("sample").status.value_counts()
    n_kept = statuses.get("kept", 0)
    if n_kept:
        return f"{attribute} (n = {n_kept} kept of {statuses.sum()})"
    reasons = ", ".join(f"{n} {status}" for status, n in statuses.items())
    return f"{attribute} (n = 0 kept)\ndrawn though excluded:\n" + fill(reasons, 40)


def printable(token: str) -> str:
    """A token on one line, its leading space visible."""
    return token.replace("\n", "\\n").replace(" ", "\N{OPEN BOX}")
