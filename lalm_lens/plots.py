"""Pictures of tidy tables. Only samples that are kept are averaged, and every picture says how many they are.

Figures are made without pyplot: they need no screen, leave a notebook's backend alone and are freed when unused.
"""

from collections.abc import Callable
from itertools import pairwise
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lalm_lens.aggregates import aggregate, corruption_kinds

Line = tuple[pd.Series, str, str]  # which rows, colour, style

LABELS = {"layer": "text positions", "audio_layer": "audio positions"}
COLOURS = {"layer": "#1f5fa8", "audio_layer": "#d1662a"}
BANDS = {"early": "#8fb8de", "object": "#f2c46d", "late": "#a8d5a2", "last": "#e08a8a"}
SEGMENTS = {  # of the paper, and the options apart: colour and line
    "early": ("#1f5fa8", "-"),
    "object": ("#c98a10", "-"),
    "object_correct": ("#c98a10", "--"),
    "object_other": ("#c98a10", ":"),
    "late": ("#3d8b37", "-"),
    "last": ("#b03030", "-"),
}
PARTS = {
    **LABELS,
    "token": "single words, their mean",
    "audio_window": "windows of audio positions, their mean",
    "encoder_window": "windows of the audio encoder, their mean",
}
WINDOWS = {"audio_window": "audio positions", "encoder_window": "states of the audio encoder"}
KNOCKED = {  # a window of layers, or all up to one or from one on: colour and line
    "window 1": ("#1f5fa8", "-"),
    "window 3": ("#4c9a8a", "-"),
    "window 5": ("#3d8b37", "-"),
    "window 9": ("#c98a10", "-"),
    "window 13": ("#b03030", "-"),
    "up_to": ("#7a4fa3", "--"),
    "from": ("#d1662a", "--"),
    "all": ("0.3", ":"),
}
CHANGES = {
    "probability": "change of the true label's probability",
    "relative_probability": "relative change of the\ntrue label's probability",
    "logit_difference": "change of the logit difference\nof true label and second",
    "label_probability": "change of the true label's\nprobability among the labels",
    "accuracy": "change of accuracy",
}
HEARD = {"silence": "the silent run", "other_clip": "a run that hears another clip"}


def layer_curves(frame: pd.DataFrame) -> Figure:
    """Mean recovery by patched layer with a bootstrap interval, text against audio; a panel per attribute."""
    rows = frame[frame.kind.isin(list(LABELS))]
    lines = {label: (rows.kind == kind, COLOURS[kind], "-") for kind, label in LABELS.items()}
    return curves(frame, rows, lines, "one layer's")


def segment_curves(frame: pd.DataFrame) -> Figure:
    """Mean recovery by patched layer of single positions, by the paper's segments; options right and wrong apart."""
    rows = frame[frame.kind == "token"]
    is_option = rows.region == "object"
    chosen = {name: rows.segment == name for name in BANDS}
    chosen |= {"object_correct": is_option & rows.is_correct, "object_other": is_option & ~rows.is_correct}
    lines = {name: (chosen[name], *style) for name, style in SEGMENTS.items() if chosen[name].any()}
    return curves(frame, rows, lines, "one position's")


def curves(frame: pd.DataFrame, rows: pd.DataFrame, lines: dict[str, Line], whose: str) -> Figure:
    attributes = list(frame.attribute.unique())
    figure = Figure(figsize=(max(6, 3.6 * len(attributes) + 0.6), 4.2), layout="constrained")
    axes = figure.subplots(1, len(attributes), sharey=True, squeeze=False)
    for ax, attribute in zip(axes[0], attributes, strict=True):
        of_attribute = shown(rows[rows.attribute == attribute])
        for label, (chosen, colour, style) in lines.items():
            curve(ax, of_attribute[chosen[of_attribute.index]], label, colour, style)
        furnish(ax, frame[frame.attribute == attribute])
        ax.set_title(title(frame, attribute), fontsize=10)
    axes[0, 0].set_ylabel(f"{rate(frame)}\n(mean, band: 95 % bootstrap)")
    axes[0, -1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(heading(frame, whose, figure), fontsize=10)
    return figure


def curve(ax: Axes, rows: pd.DataFrame, label: str, colour: str, style: str) -> None:
    by_layer = aggregate(rows.assign(kind=label), ["layer"])
    ax.plot(by_layer.layer, by_layer["mean"], marker="o", ms=3, color=colour, ls=style, label=label)
    ax.fill_between(by_layer.layer, by_layer.low, by_layer.high, color=colour, alpha=0.15, lw=0)


def furnish(ax: Axes, frame: pd.DataFrame) -> None:
    """What a curve is read against: nothing, all, and what is noise."""
    noise = shown(frame).noise.max()
    ax.axhspan(-noise, noise, color="0.6", alpha=0.5, lw=0)
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    ax.axhline(1, color="0.8", lw=0.8, zorder=0)
    layer_ticks(ax.set_xticks, frame)
    ax.set_xlabel(f"patched layer\n(noise floor {noise:.0e})")


def site(frame: pd.DataFrame) -> str:
    return next((name for name in frame.site.unique() if name != "embed"), "embed")


def rate(frame: pd.DataFrame) -> str:
    return f"recovery rate of {frame.metric.iloc[0].replace('_', ' ')}"


def in_two_lines(frame: pd.DataFrame) -> str:
    return rate(frame).replace(" of ", "\nof ")


def heading(frame: pd.DataFrame, whose: str, figure: Figure) -> str:
    corruption = corruption_kinds(frame).iloc[0]
    corrupted = HEARD.get(corruption, f"a run under {corruption.replace('_', ' ')}")
    story = (
        f"{whose} clean states patched into {corrupted}"
        if frame.direction.iloc[0] == "denoise"
        else f"{whose} states from {corrupted} patched into the clean run"
    )
    width = int(11 * figure.get_figwidth())
    return f"{frame.model.iloc[0]}: {frame.form.iloc[0]}, {site(frame)}\n{fill(story, width)}"


def layer_ticks(set_ticks: Callable, frame: pd.DataFrame) -> None:
    """The embedding and at most ten blocks."""
    layers = sorted(frame.layer.unique())
    blocks = [layer for layer in layers if layer >= 0]
    step = max(1, -(-len(blocks) // 10))
    shown = [layer for layer in layers if layer < 0 or layer % step == 0]
    set_ticks(shown, ["embed" if layer < 0 else str(layer) for layer in shown], fontsize=8)


def layer_rows(ax: Axes, frame: pd.DataFrame, lowest: int) -> None:
    """Ticks of a map whose first row is layer `lowest`: the embedding, or block 0."""
    layer_ticks(lambda at, names, **style: ax.set_yticks([layer - lowest for layer in at], names, **style), frame)


def token_maps(frame: pd.DataFrame) -> Figure:
    """Mean recovery by patched layer and text position after the audio, aligned at the last; a map per attribute."""
    attributes = list(frame.attribute.unique())
    tokens = frame[(frame.kind == "token") & (frame.region != "transcript")]  # every clip has its own words there
    width = tokens.groupby("attribute").text_index.nunique().max()
    figure = Figure(figsize=(max(6, 0.24 * width + 2.5), 4.0 * len(attributes)), layout="constrained")
    axes = figure.subplots(len(attributes), 1, squeeze=False)
    for ax, attribute in zip(axes[:, 0], attributes, strict=True):
        token_panel(ax, tokens[tokens.attribute == attribute])
        ax.set_title(title(frame, attribute), fontsize=10, pad=24)
    figure.suptitle(heading(frame, "one position's", figure), fontsize=10)
    return figure


def token_panel(ax: Axes, frame: pd.DataFrame) -> None:
    grid = shown(frame).pivot_table(index="layer", columns="text_index", values="recovery", dropna=False)
    words = frame.drop_duplicates("text_index").set_index("text_index").loc[grid.columns]
    image = ax.imshow(grid, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set_xticks(range(len(words)), [printable(token) for token in words.token], rotation=90, fontsize=7)
    layer_rows(ax, frame, int(grid.index.min()))
    ax.set_ylabel("patched layer")
    elsewhere = grid.drop(columns=-1).abs().max().max()
    ax.set_xlabel(
        f"text position after the audio (largest |recovery| before the last: {elsewhere:.3f}; "
        f"noise floor {shown(frame).noise.max():.0e})"
    )
    segment_bands(ax, list(words.segment))
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, extend="both")
    bar.set_label(in_two_lines(frame))


def head_maps(frame: pd.DataFrame) -> Figure:
    """Mean recovery by patched layer and head, or group of neurons; a map per attribute and kind."""
    rows = frame[frame.kind.isin(list(PARTS)) & (frame["head"].notna() | frame.neurons.notna())]
    is_head = bool(rows["head"].notna().any())
    named = rows.assign(unit=rows["head"] if is_head else rows.neurons.str.partition("-")[0].astype("Int64"))
    what = "head" if is_head else "first of the neurons"
    return grids(frame, named, "unit", {kind: f"{what} ({label})" for kind, label in PARTS.items()}, "one part's")


def window_maps(frame: pd.DataFrame) -> Figure:
    """Mean recovery by patched layer and window of the clip; a map per attribute and kind of window."""
    rows = frame[frame.kind.isin(list(WINDOWS)) & frame["head"].isna() & frame.neurons.isna()]
    labels = {kind: f"start of the window in the clip, s ({label})" for kind, label in WINDOWS.items()}
    return grids(frame, rows, "start_s", labels, "one window's")


def moment_maps(frame: pd.DataFrame) -> Figure:
    """For each clip and moment, the recovery per second of the finest window around it that was tried, so that a wide
    window is not darker than a short one for its width alone; a ring around the moment that was found."""
    rows = shown(frame[frame.kind == "moment"])
    attributes = list(rows.attribute.unique())
    n_clips = rows.groupby("attribute")["sample"].nunique().max()
    figure = Figure(figsize=(8, len(attributes) * (2.6 + 0.16 * n_clips)), layout="constrained")
    axes = figure.subplots(len(attributes), 1, squeeze=False)
    for ax, attribute in zip(axes[:, 0], attributes, strict=True):
        moment_panel(ax, rows[rows.attribute == attribute], in_two_lines(frame) + "\nper second")
        ax.set_title(title(frame, attribute), fontsize=10)
    figure.suptitle(heading(rows, "one window's", figure), fontsize=10)
    return figure


def moment_panel(ax: Axes, rows: pd.DataFrame, label: str) -> None:
    each_s = float((rows.end_s - rows.start_s).min())
    names, n_columns = list(rows["sample"].unique()), round(float(rows.end_s.max()) / each_s)
    grid = np.full((len(names), n_columns), np.nan)
    for row in rows.assign(length=rows.end_s - rows.start_s).sort_values("length", ascending=False).to_dict("records"):
        columns = slice(round(row["start_s"] / each_s), round(row["end_s"] / each_s))
        grid[names.index(row["sample"]), columns] = row["recovery"] / row["length"]
    edges = (0, n_columns * each_s, len(names) - 0.5, -0.5)
    most = max(1e-9, float(np.nanmax(np.abs(grid))))
    image = ax.imshow(grid, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most, extent=edges, interpolation="nearest")
    finest = rows[(rows.end_s - rows.start_s) < 1.5 * each_s]
    found = finest.loc[finest.groupby("sample").recovery.idxmax()]
    middle = (found.start_s + found.end_s) / 2
    ax.scatter(middle, [names.index(name) for name in found["sample"]], s=40, facecolors="none", edgecolors="black")
    ax.set_yticks(range(len(names)), names, fontsize=6)
    ax.set_xlabel("time in the clip, s")
    ax.figure.colorbar(image, ax=ax, pad=0.01).set_label(label)


def largest(grid: np.ndarray) -> float:
    """Where the colours of a map of small parts end: at what is largest in it, and at most at 1."""
    return min(1.0, max(0.01, float(np.nanmax(np.abs(grid)))))


def grids(frame: pd.DataFrame, rows: pd.DataFrame, across: str, labels: dict[str, str], whose: str) -> Figure:
    """Layer x something maps of mean recovery, a panel per attribute and kind; `labels` of the axis are by kind."""
    panels = rows[["attribute", "kind"]].drop_duplicates().to_numpy().tolist()
    figure = Figure(figsize=(max(6, 0.3 * rows[across].nunique() + 3), 3.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)
    for ax, (attribute, kind) in zip(axes[:, 0], panels, strict=True):
        of_attribute = rows[(rows.attribute == attribute) & (rows.kind == kind)]
        grid = shown(of_attribute).pivot_table(index="layer", columns=across, values="recovery", dropna=False)
        most = largest(grid.to_numpy())
        image = ax.imshow(grid, aspect="auto", origin="lower", cmap="RdBu_r", vmin=-most, vmax=most)
        step = -(-grid.shape[1] // 16)
        ax.set_xticks(range(0, grid.shape[1], step), [f"{name:g}" for name in grid.columns[::step]], fontsize=8)
        ax.set_xlabel(labels[kind])
        layer_rows(ax, of_attribute, int(grid.index.min()))
        ax.set_ylabel("patched layer")
        ax.set_title(title(frame, attribute), fontsize=10)
        ax.figure.colorbar(image, ax=ax, pad=0.01, extend="both").set_label(in_two_lines(frame))
    figure.suptitle(heading(frame, whose, figure), fontsize=10)
    return figure


def knockout_curves(effects: pd.DataFrame, effect: str, frame: pd.DataFrame) -> Figure:
    """Mean change by knocked-out layers with a bootstrap interval, a line for each way to choose them; a panel per
    attribute and edge. `effects` are of heads all together."""
    drawn = effects[effects["heads"] == "all"]
    attributes, edges = list(drawn.attribute.unique()), list(drawn.edge.unique())
    size = (max(6, 3.0 * len(edges) + 1.4), 2.9 * len(attributes) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(attributes), len(edges), sharex=True, sharey="row", squeeze=False)
    for row, attribute in zip(axes, attributes, strict=True):
        for ax, edge in zip(row, edges, strict=True):
            for kind, rows in drawn[(drawn.attribute == attribute) & (drawn.edge == edge)].groupby("kind", sort=False):
                knockout_curve(ax, rows, str(kind))
            ax.axhline(0, color="0.8", lw=0.8, zorder=0)
            n = frame[frame.attribute == attribute]["sample"].nunique()
            ax.set_title(f"{attribute} (n = {n})\n{edge}", fontsize=10)
        row[0].set_ylabel(CHANGES[effect])
    layers = drawn.assign(layer=drawn.layer.fillna(0)).astype({"layer": int})
    for ax in axes[-1]:
        layer_ticks(ax.set_xticks, layers)
        ax.set_xlabel("layer")
    kinds = {label: line for ax in axes.flat for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(kinds.values(), kinds.keys(), frameon=False, fontsize=9, loc="outside right center")
    noise = frame.noise.max()
    figure.suptitle(
        f"{frame.model.iloc[0]}: {frame.form.iloc[0]}, queries (right) that cannot look at keys (left)\n"
        f"mean over clips, band: 95 % bootstrap; noise floor of probability {noise:.0e}",
        fontsize=10,
    )
    return figure


def knockout_curve(ax: Axes, rows: pd.DataFrame, kind: str) -> None:
    colour, style = KNOCKED.get(kind, ("0.6", "-."))
    if rows.layer.isna().all():
        for change, layers in zip(rows.change, rows["layers"], strict=True):
            ax.axhline(change, color=colour, ls=style, label=kind if kind == "all" else f"layers {layers}")
        return
    layer = rows.layer.astype(int)
    ax.plot(layer, rows.change, marker="o", ms=3, color=colour, ls=style, label=kind)
    ax.fill_between(layer, rows.low, rows.high, color=colour, alpha=0.12, lw=0)


def share_curves(means: pd.DataFrame, value: str, frame: pd.DataFrame) -> Figure:
    """Mean attention by layer, a line for each region; a panel per attribute."""
    attributes = list(means.attribute.unique())
    figure = Figure(figsize=(max(6, 3.6 * len(attributes) + 1.4), 4.2), layout="constrained")
    axes = figure.subplots(1, len(attributes), sharey=True, squeeze=False)
    for ax, attribute in zip(axes[0], attributes, strict=True):
        for n, (region, rows) in enumerate(means[means.attribute == attribute].groupby("region", sort=False)):
            ax.plot(
                rows.layer, rows[value], marker="o", ms=3, color=f"C{n % 10}", ls="-" if n < 10 else "--", label=region
            )
        layer_ticks(ax.set_xticks, means)
        ax.set_xlabel("layer")
        ax.set_title(f"{attribute} (n = {means[means.attribute == attribute].n.max()})", fontsize=10)
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("attention to a region" if value == "share" else "attention to one key of a region")
    axes[0, -1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    sink = int(frame.exclude_sink.iloc[0])
    left_out = f" to all positions from {sink} on" if sink else ""
    heads = f"{frame.model.iloc[0]}: {frame.form.iloc[0]}, attention from {frame.queries.iloc[0]}{left_out}"
    figure.suptitle(f"{heads}\n(mean over clips and heads)", fontsize=10)
    return figure


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
    samples = frame[frame.attribute == attribute].drop_duplicates("sample")
    kept = samples[samples.status == "kept"]
    if len(kept):
        classes = f"{kept.label.nunique()} of {samples.label.nunique()} classes"
        return f"{attribute}\n(n = {len(kept)} kept of {len(samples)}, {classes})"
    reasons = ", ".join(f"{n} {status}" for status, n in samples.status.value_counts().items())
    return f"{attribute} (n = 0 kept)\ndrawn though excluded:\n" + fill(reasons, 40)


def printable(token: str) -> str:
    """A token on one line, its leading space visible."""
    return token.replace("\n", "\\n").replace(" ", "\N{OPEN BOX}")
