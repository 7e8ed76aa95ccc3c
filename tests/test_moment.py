"""Which moment decided: on clips whose cue sits in one known 0.3 s."""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lalm_lens.assets.animals import ANIMALS, animal
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.audio import RATE_HZ
from lalm_lens.datasets import Sample
from lalm_lens.errors import InputError
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.experiments.cells import Grid, cells
from lalm_lens.experiments.moment import Search, find_moments
from lalm_lens.experiments.recovery import Case, recover
from lalm_lens.metrics import Answer
from lalm_lens.results import CausalTrace, outermost
from lalm_lens.runs import Run
from lalm_lens.windows import position_s

pytestmark = pytest.mark.numbers

CUE_S = 0.3
CLIP_S = 2.0
N_CLIPS = 45


@cache
def clips() -> tuple[tuple[Sample, float], ...]:
    """The loudest 0.3 s of an animal's call somewhere in faint noise, and where."""
    found = []
    for index in range(N_CLIPS):
        rng = np.random.default_rng([7, index])
        name = list(ANIMALS)[index % len(ANIMALS)]
        call, n_cue = animal(rng, name, CLIP_S), int(CUE_S * RATE_HZ)
        loudest = int(np.convolve(call**2, np.ones(n_cue), "valid").argmax())
        start = int(rng.integers(0, len(call) - n_cue))
        samples = 1e-3 * rng.standard_normal(len(call))
        samples[start : start + n_cue] += call[loudest : loudest + n_cue]
        waveform = torch.from_numpy(samples.astype(np.float32))
        found.append((Sample(f"{name}_{index}.wav", name, waveform), start / RATE_HZ))
    return tuple(found)


def search(model, direction: str, n_clips: int = N_CLIPS):
    samples = [sample for sample, _ in clips()[:n_clips]]
    settings = {"attribute": "animal", "kinds": (), "audio": "coarse-to-fine", "metric": "log_probability"}
    return causal_trace(model, samples, **settings, direction=direction, progress=False)


@pytest.fixture(scope="module")
def searched(tiny_lalm):
    return search(tiny_lalm, "noise")


@pytest.mark.parametrize(
    ("direction", "at_least"), [("noise", 0.7), pytest.param("denoise", 0.6, marks=pytest.mark.stress)]
)
def test_the_moment_is_found_where_the_cue_is(tiny_lalm, searched, direction, at_least):
    starts = {sample.name: start_s for sample, start_s in clips()}
    moments = (searched if direction == "noise" else search(tiny_lalm, direction, 24)).moments()
    assert len(moments) > 12
    middle = (moments.start_s + moments.end_s) / 2
    start_s = moments["sample"].map(starts)
    found = ((middle > start_s - 0.02) & (middle < start_s + CUE_S + 0.02)).mean()
    print(f"{direction}: inside of the cue in {found:.0%} of {len(moments)} clips; by chance in {CUE_S / CLIP_S:.0%}")
    assert found > at_least
    assert (moments.end_s - moments.start_s).max() == pytest.approx(0.04)


def test_windows_become_halves_down_to_one_position(searched):
    frame = searched.to_frame()
    for _, rows in frame[frame.kind == "moment"].groupby("sample"):
        sizes = ((rows.end_s - rows.start_s) / 0.04).round().astype(int)
        assert sizes.iloc[0] == 25
        assert sizes.min() == 1
        whole = rows[sizes >= 24].sort_values("start_s")
        assert whole.start_s.tolist() == pytest.approx([0, 1])
        for row, size in zip(rows.itertuples(), sizes, strict=True):
            around = (rows.start_s <= row.start_s + 1e-6) & (rows.end_s >= row.end_s - 1e-6)
            assert size == 25 or (abs(sizes[around] - 2 * size) <= 1).any(), "half of none that was tried"
    assert (frame[frame.kind == "moment"].site == "embed").all()


def test_a_search_costs_what_was_said_before(tiny_lalm, searched):
    run, silent = runs_of(tiny_lalm)
    each_s, n_pos = position_s(tiny_lalm), len(run.indices("audio"))
    for search in (Search(), Search(0.5, n_best=1), Search(0.3, n_best=3), Search(0.04)):
        recovery = find_moments(tiny_lalm, [Case(run, silent, Answer((5,)), ())], search)[0]
        most = search.n_most(n_pos, each_s)
        assert 0.6 * most <= len(recovery.cells) <= most, search
        assert recovery.cost.forwards <= most + 1
        print(f"{search}: {len(recovery.cells)} windows of at most {most}: {recovery.cost}")


def runs_of(model) -> tuple[Run, Run]:
    sample = clips()[0][0]
    processor = model.processor
    prompt = processor.prompt(ATTRIBUTES["animal"], processor.n_frames(sample.waveform))
    return tuple(
        Run(processor.inputs([prompt], [waveform]), prompt)
        for waveform in (sample.waveform, torch.zeros_like(sample.waveform))
    )


GRIDS = [
    Grid("z"),
    Grid("k", ("layer", "token")),
    Grid("pattern", ("audio_layer",)),
    Grid("post", n_neurons=100),
    Grid("resid_post", ("audio_window",), window_s=0.5),
    Grid("resid_pre", ("encoder_window",), window_s=0.7),
    Grid("attn_out", ("encoder_window", "layer")),
    Grid("v", ("encoder_window",)),
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.site} {' '.join(grid.chosen)}")
def test_every_kind_of_cell_is_the_same_on_both_engines(tiny_lalm, grid):
    run, silent = runs_of(tiny_lalm)
    where = cells(tiny_lalm, grid, run)
    chosen = where[:: max(1, len(where) // 40)]
    assert {cell.kind for cell in chosen} == set(grid.chosen)
    fast, plain = (
        recover(tiny_lalm, [Case(run, silent, Answer((5,)), chosen)], metric="log_probability", engine=engine)[0]
        for engine in ("sweep", "hooks")
    )
    torch.testing.assert_close(fast.m_patched, plain.m_patched, rtol=1e-5, atol=2e-5)
    assert (plain.m_patched - plain.m_corrupted).abs().max() > 1e-3


def test_windows_and_units_cover_everything_once(tiny_lalm):
    run, _ = runs_of(tiny_lalm)
    cfg = tiny_lalm.lalm_cfg
    audio = cells(tiny_lalm, Grid("resid_post", ("audio_window",), window_s=0.3), run)
    first = [cell for cell in audio if cell.layer == -1]
    assert [pos for cell in first for pos in cell.positions] == list(run.indices("audio"))
    assert first[-1].span_s[1] == pytest.approx(0.04 * len(run.indices("audio")))
    heard = cells(tiny_lalm, Grid("resid_post", ("encoder_window",)), run)
    of_block = [cell for cell in heard if cell.layer == 0]
    assert [pos for cell in of_block for pos in cell.positions] == list(range(100))  # 2 s, 20 ms each
    assert len(heard) == len(of_block) * cfg.encoder.n_layers
    heads = cells(tiny_lalm, Grid("v", ("layer",)), run)
    assert {cell.heads for cell in heads} == {(head,) for head in range(cfg.decoder.n_kv_heads)}
    neurons = cells(tiny_lalm, Grid("post", ("layer",), n_neurons=100), run)
    assert [n for cell in neurons if cell.layer == 0 for n in cell.neurons] == list(range(cfg.decoder.d_mlp))


def test_grids_and_searches_that_hold_nothing_are_refused():
    for settings in ({"window_s": 0.0}, {"n_neurons": 0}):
        with pytest.raises(InputError, match=r"longer than 0 s|hold nothing"):
            Grid(**settings)
    for settings in ({"window_s": -1.0}, {"n_best": 0}):
        with pytest.raises(InputError, match="A search needs"):
            Search(**settings)


def test_the_examples_in_the_docs_run(tiny_lalm):
    text = (Path(__file__).parent.parent / "docs" / "engine.md").read_text(encoding="utf-8")
    branches, moments = (block.split("```")[0] for block in text.split("```python")[1:])
    samples = [sample for sample, _ in clips()[:3]]
    processor, n_layers = tiny_lalm.processor, tiny_lalm.cfg.n_layers
    names = {"model": tiny_lalm, "processor": processor, "n_layers": n_layers, "samples": samples, "target": 9}
    names["waveform"] = samples[0].waveform
    names["silence"] = torch.zeros_like(samples[0].waveform)
    names["prompt"] = processor.prompt(ATTRIBUTES["animal"], processor.n_frames(samples[0].waveform))
    names["causal_trace"] = causal_trace
    exec(branches, names)
    assert names["values"].shape == (n_layers + 5, 1, 1)
    exec(moments, names)
    assert (names["trace"].frame.kind == "moment").any()


@pytest.mark.parametrize(
    "settings",
    [{"kinds": ("layer",)}, {"kinds": ("layer",), "audio": "coarse-to-fine"}, {"audio": Search(n_best=1), "kinds": ()}],
    ids=["map", "map and search", "search alone"],
)
def test_silence_of_one_length_is_heard_once(tiny_lalm, settings):
    """By the whole trace, though clips go through the model two at a time; and each clip once."""
    heard, samples = [], [sample for sample, _ in clips()[:3]]
    handle = tiny_lalm.audio_encoder.register_forward_hook(lambda *_: heard.append(1))
    try:
        trace = causal_trace(tiny_lalm, samples, attribute="animal", n_together=2, progress=False, **settings)
    finally:
        handle.remove()
    assert len(heard) == 3 + 1
    assert trace.frame["sample"].nunique() == 3
    alone = causal_trace(tiny_lalm, samples[2:], attribute="animal", progress=False, **settings).frame
    together = trace.frame[trace.frame["sample"] == samples[2].name].reset_index(drop=True)
    pd.testing.assert_frame_equal(together, alone, rtol=1e-4, atol=1e-5)


def test_a_search_alone_is_a_trace(tiny_lalm, searched):
    samples = [sample for sample, _ in clips()[:3]]
    search = {"audio": Search(), "kinds": (), "direction": "noise", "metric": "log_probability"}
    trace = causal_trace(tiny_lalm, samples, attribute="animal", progress=False, **search)
    assert (trace.views, set(trace.frame.kind)) == (["moments"], {"moment"})
    names = [sample.name for sample in samples]
    both = searched.frame[(searched.frame.kind == "moment") & searched.frame["sample"].isin(names)]
    assert trace.frame.recovery.tolist() == pytest.approx(both.recovery.tolist(), abs=1e-4)
    assert len(trace.summary()) == 1
    with pytest.raises(InputError, match="Nothing is traced"):
        causal_trace(tiny_lalm, samples, attribute="animal", kinds=(), progress=False)


def test_the_windows_that_a_search_began_with_are_those_in_no_other():
    spans = [(0, 1), (1, 1.6), (1, 1.32), (1.32, 1.6), (0, 0.52), (0.52, 1), (1.32, 1.48), (1.0, 1.16)]
    windows = pd.DataFrame(spans, columns=["start_s", "end_s"])
    assert outermost(windows).index.tolist() == [0, 1]


def test_a_moment_says_how_much_the_widest_windows_did(tiny_lalm):
    """The last of the first windows is shorter: what it holds counts as well."""
    name, cue = "dog", animal(np.random.default_rng(0), "dog", 0.6)
    samples = np.concatenate([1e-3 * np.random.default_rng(1).standard_normal(RATE_HZ), cue]).astype(np.float32)
    sample = Sample("late.wav", name, torch.from_numpy(samples))
    settings = {"attribute": "animal", "kinds": (), "audio": "coarse-to-fine", "progress": False}
    trace = causal_trace(tiny_lalm, [sample], **settings)
    frame = trace.frame.assign(status="kept")
    first = frame.iloc[:2]
    assert first.end_s.tolist() == pytest.approx([1.0, 1.6])
    assert first.recovery.idxmax() == 1
    (row,) = CausalTrace(frame).moments().itertuples()
    assert row.widest == first.recovery.max()
    assert row.start_s >= 1.0


@pytest.mark.parametrize(
    ("settings", "view", "labels"),
    [
        (
            {"kinds": ("audio_window", "encoder_window"), "window_s": 0.5},
            "windows",
            [f"start of the window in the clip, s ({of})" for of in ("audio positions", "states of the audio encoder")],
        ),
        (
            {"site": "z", "kinds": ("layer", "audio_layer")},
            "heads",
            ["head (text positions)", "head (audio positions)"],
        ),
    ],
)
def test_a_map_is_drawn_of_every_kind(tiny_lalm, settings, view, labels):
    samples = [sample for sample, _ in clips()[:2]]
    trace = causal_trace(tiny_lalm, samples, attribute="animal", progress=False, **settings)
    figure = trace.plot(view)
    maps = [ax for ax in figure.axes if ax.images and ax.get_ylabel() == "patched layer"]
    assert [ax.get_xlabel() for ax in maps] == labels
    rows = trace.kept if len(trace.kept) else trace.frame
    for ax, kind in zip(maps, settings["kinds"], strict=True):
        across = "start_s" if view == "windows" else "head"
        mean = rows[rows.kind == kind].pivot_table(index="layer", columns=across, values="recovery").to_numpy()
        assert ax.images[0].get_array().ravel().tolist() == pytest.approx(mean.ravel().tolist())


@pytest.mark.parametrize(
    ("says", "settings"),
    {
        "site is one of .* got 'resid'": {"site": "resid"},
        "metric is one of .* got 'prob'": {"metric": "prob"},
        "form is one of P1, P2, P3; got 'P4'": {"form": "P4"},
        "kinds is one of .* got 'word'": {"kinds": ("layer", "word")},
        "kinds is a list of .* got 'layer'": {"kinds": "layer"},
        "audio is one of whole, windows, coarse-to-fine; got 'fine'": {"audio": "fine"},
        "engine is one of auto, sweep, hooks; got 'fast'": {"engine": "fast"},
    }.items(),
)
def test_a_wrong_word_is_answered_with_the_right_ones(tiny_lalm, says, settings):
    with pytest.raises(InputError, match=says):
        causal_trace(tiny_lalm, [clips()[0][0]], attribute="animal", progress=False, **settings)
