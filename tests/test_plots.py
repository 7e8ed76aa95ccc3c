"""Pictures: what is drawn is what the table says, and the words around it say what that is."""

import zlib
from itertools import combinations

import pandas as pd
import pytest

from lalm_lens.errors import DataError
from lalm_lens.results import CausalTrace

VIEWS = ["layers", "segments", "tokens"]


@pytest.mark.parametrize("view", VIEWS)
def test_plots_show_every_attribute_with_its_n(traces, view):
    both = CausalTrace.concat([traces["gender"].frame, traces["animal"].frame])
    figure = both.plot(view)
    titles = " ".join(ax.get_title() for ax in figure.axes)
    for name in ("gender", "animal"):
        n = traces[name].kept["sample"].nunique()
        n_classes, n_all = (rows.label.nunique() for rows in (traces[name].kept, traces[name].frame))
        assert f"{name}\n(n = {n} kept of 4, {n_classes} of {n_all} classes)" in titles
    labels = {ax.get_xlabel() for ax in figure.axes} | {ax.get_ylabel() for ax in figure.axes}
    assert any(label.startswith("patched layer") for label in labels)
    assert any(f"noise floor {both.summary().noise_floor.iloc[0]:.0e}" in label for label in labels)
    assert any(label.startswith("recovery rate") and "of probability" in label for label in labels)


def test_the_curves_are_the_means_of_what_is_kept(traces):
    trace = traces["gender"]
    assert len(trace.kept) < len(trace.frame)
    (ax,) = trace.plot("layers").axes
    lines = {line.get_label(): line for line in ax.lines}
    for kind, label in (("layer", "text positions"), ("audio_layer", "audio positions")):
        mean = trace.kept[trace.kept.kind == kind].groupby("layer").recovery.mean()
        assert lines[label].get_xdata().tolist() == mean.index.tolist()
        assert lines[label].get_ydata().tolist() == pytest.approx(mean.tolist())


def test_the_map_is_the_mean_of_what_is_kept(traces):
    trace = traces["gender"]
    ax = trace.plot("tokens").axes[0]
    (image,) = ax.images
    assert image.origin == "lower"  # the embedding at the bottom
    tokens = trace.kept[trace.kept.kind == "token"]
    mean = tokens.pivot_table(index="layer", columns="text_index", values="recovery").to_numpy()
    assert image.get_array().ravel().tolist() == pytest.approx(mean.ravel().tolist())
    assert [label.get_text() for label in ax.get_xticklabels()][-2:] == ["\N{OPEN BOX}gender", "\N{OPEN BOX}is"]
    assert [text.get_text() for text in ax.texts] == ["early", "object", "late", "last"]
    assert len(ax.patches) == 4


def test_plots_of_a_trace_without_kept_samples_say_so(traces):
    frame = traces["gender"].to_frame().assign(status="clean_wrong")
    for view in VIEWS:
        title = CausalTrace(frame).plot(view).axes[0].get_title()
        assert title == "gender (n = 0 kept)\ndrawn though excluded:\n4 clean_wrong"


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("names", [["gender"], ["gender", "emotion", "animal"]])
def test_no_title_is_cut_off_or_overlaps(traces, view, names):
    frame = pd.concat([traces[name].frame for name in names], ignore_index=True)
    statuses = ["clean_wrong", "corrupted_right", "no_gap"]
    excluded = frame.assign(
        model="Somebody/Some-Audio-Model-7B-Instruct",
        status=[statuses[zlib.crc32(name.encode()) % 3] for name in frame["sample"]],
    )
    figure = CausalTrace(excluded).plot(view)
    figure.draw_without_rendering()
    boxes = [figure.get_suptitle() and figure._suptitle.get_window_extent()]
    boxes += [ax.title.get_window_extent() for ax in figure.axes if ax.get_title()]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
    assert all(not a.overlaps(b) for a, b in combinations(boxes, 2))


def test_a_trace_without_a_gap_is_drawn_empty(traces):
    frame = traces["gender"].to_frame().assign(recovery=float("nan"), status="no_gap")
    for view in VIEWS:
        assert "no_gap" in CausalTrace(frame).plot(view).axes[0].get_title()


def test_bands_are_bootstrap_intervals(traces):
    trace = traces["animal"]
    (ax,) = trace.plot("layers").axes
    rows = trace.aggregate().query("kind == 'layer'")
    edges = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert edges.min() == pytest.approx(rows.low.min())
    assert edges.max() == pytest.approx(rows.high.max())


def test_segments_are_means_over_positions_then_samples(traces):
    trace = traces["emotion"]
    lines = {line.get_label(): line for line in trace.plot("segments").axes[0].lines}
    tokens = trace.kept[trace.kept.kind == "token"]
    chosen = {
        **{name: tokens.segment == name for name in ("early", "object", "late", "last")},
        "object_correct": tokens.token == " " + tokens.label,
        "object_other": (tokens.region == "object") & (tokens.token != " " + tokens.label),
    }
    for name, mask in chosen.items():
        mean = tokens[mask].groupby(["layer", "sample"]).recovery.mean().groupby("layer").mean()
        assert lines[name].get_xdata().tolist() == mean.index.tolist()
        assert lines[name].get_ydata().tolist() == pytest.approx(mean.tolist())


def test_the_heading_tells_direction_corruption_metric_and_site(traces):
    frame = traces["gender"].to_frame()
    for corruption, direction, story in (
        ("silence", "denoise", "clean states patched into the silent run"),
        ("other_clip " + frame["sample"], "denoise", "clean states patched into a run that hears another clip"),
        ("white_noise 5 dB", "noise", "states from a run under white noise 5 dB patched into the clean run"),
    ):
        changed = frame.assign(corruption=corruption, direction=direction, metric="label_score")
        for view in VIEWS:
            figure = CausalTrace(changed[changed.layer >= 0].assign(site="mlp_out")).plot(view)
            heading = figure.get_suptitle().replace("\n", " ")
            assert story in heading
            assert "tiny_lalm: P3, mlp_out" in heading
            labels = [ax.get_ylabel() for ax in figure.axes]
            assert any("of label score" in label.replace("\n", " ") for label in labels)


def test_a_map_without_the_embedding_begins_at_block_0(traces):
    frame = traces["gender"].to_frame()
    ax = CausalTrace(frame[frame.layer >= 0]).plot("tokens").axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == [str(n) for n in range(8)]
    assert list(ax.get_yticks()) == list(range(8))


def test_several_models_are_counted_apart_and_not_drawn_together(traces):
    frame = traces["gender"].to_frame()
    both = CausalTrace(pd.concat([frame, frame.assign(model="another")], ignore_index=True))
    assert both.summary().clips.tolist() == [4, 4]
    with pytest.raises(DataError, match="more than one model: another; tiny_lalm"):
        both.plot()
    metrics = CausalTrace(pd.concat([frame, frame.assign(metric="label_score")], ignore_index=True))
    for mixed in (metrics.plot, metrics.summary):
        with pytest.raises(DataError, match="more than one metric: label_score; probability"):
            mixed()
