"""Averages: against numbers worked out by hand on a small made-up table."""

import warnings

import numpy as np
import pandas as pd
import pytest

from lalm_lens.errors import DataError
from lalm_lens.results import COLUMNS, CausalTrace

# sample, label, status, m_clean, m_corrupted, and the recovery of (segment, option, is_correct) per position
SAMPLES = [
    ("a", "dog", "kept", 0.9, 0.1, [0.2, 0.4, 0.9]),
    ("b", "dog", "kept", 0.8, 0.4, [0.0, 0.2, 0.7]),
    ("c", "cat", "kept", 0.6, 0.5, [0.5, 1.5, 3.0]),
    ("d", "cat", "corrupted_right", 0.9, 0.8, [9.0, 9.0, 9.0]),
    ("e", "pig", "corrupted_right", 0.9, 0.8, [9.0, 9.0, 9.0]),
]
PLACES = [("early", None, False), ("early", "dog", True), ("last", None, False)]


def made_up() -> CausalTrace:
    rows = [
        {
            **dict.fromkeys(COLUMNS),
            "model": "m",
            "attribute": "animal",
            "sample": name,
            "label": label,
            "status": status,
            "form": "P3",
            "corruption": f"other_clip {name}2",
            "metric": "probability",
            "predict": "labels",
            "direction": "denoise",
            "kind": "token",
            "site": "resid_post",
            "layer": 0,
            "position": 7 + place,
            "segment": segment,
            "option": option,
            "is_correct": is_correct,
            "m_clean": m_clean,
            "m_corrupted": m_corrupted,
            "recovery": rate,
            "noise": 1e-7 * max(rates),
            "p_clean": m_clean,
            "p_corrupted": m_corrupted,
            "clean_right": True,
            "corrupted_right": status != "kept",
            "has_gap": True,
        }
        for name, label, status, m_clean, m_corrupted, rates in SAMPLES
        for place, (rate, (segment, option, is_correct)) in enumerate(zip(rates, PLACES, strict=True))
    ]
    return CausalTrace.concat([pd.DataFrame(rows)])


def test_positions_are_averaged_in_a_sample_then_samples():
    table = made_up().aggregate(by=["segment"]).set_index("segment")
    early, last = table.loc["early"], table.loc["last"]  # per sample: 0.3, 0.1, 1.0 and 0.9, 0.7, 3.0
    assert early.n == 3
    assert early["mean"] == pytest.approx(1.4 / 3)
    assert early.macro_mean == pytest.approx((0.2 + 1.0) / 2)
    assert early.n_classes == 2
    assert early["median"] == pytest.approx(0.3)
    assert early.ratio_of_means == pytest.approx((0.3 * 0.8 + 0.1 * 0.4 + 1.0 * 0.1) / (0.8 + 0.4 + 0.1))
    assert last["mean"] == pytest.approx(4.6 / 3)
    assert last.ratio_of_means == pytest.approx((0.9 * 0.8 + 0.7 * 0.4 + 3.0 * 0.1) / 1.3)


def test_the_interval_is_where_95_percent_of_resampled_means_lie():
    row = made_up().aggregate(by=["segment"], n_resamples=20_000, seed=3).set_index("segment").loc["early"]
    values = np.array([0.3, 0.1, 1.0])
    means = np.sort([values[[i, j, k]].mean() for i in range(3) for j in range(3) for k in range(3)])  # all 27
    assert row.low == pytest.approx(means[0], abs=1e-9)  # 1 of 27 is more than 2.5 %
    assert row.high == pytest.approx(means[-1], abs=1e-9)
    again = made_up().aggregate(by=["segment"], n_resamples=20_000, seed=3).set_index("segment").loc["early"]
    assert (again.low, again.high) == (row.low, row.high)


def test_small_gaps_are_left_out_on_demand():
    row = made_up().aggregate(by=["segment"], min_gap=0.2).set_index("segment").loc["early"]
    assert (row.n, row.n_classes) == (2, 1)
    assert row["mean"] == pytest.approx(0.2)


def test_one_sample_has_no_interval_and_no_sample_no_row():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = made_up().aggregate(by=["segment"], min_gap=0.5)
        none = made_up().aggregate(by=["segment"], min_gap=5.0)
        same = CausalTrace(made_up().frame.assign(recovery=1.0)).aggregate(by=["segment"])
    assert one.n.tolist() == [1, 1]
    assert one[["low", "high"]].isna().all(axis=None)
    assert one["mean"].tolist() == pytest.approx([0.3, 0.9])
    assert len(none) == 0
    assert list(none.columns) == list(one.columns)
    assert same[["low", "high"]].to_numpy().tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_groups_are_any_columns():
    trace = made_up()
    assert trace.aggregate(by=["kind", "layer"])["mean"].tolist() == pytest.approx([(0.5 + 0.3 + 5 / 3) / 3])
    assert trace.aggregate(by=["option", "is_correct"])["mean"].tolist() == pytest.approx([(0.4 + 0.2 + 1.5) / 3])
    assert trace.aggregate(by=["label", "segment"]).n.tolist() == [1, 1, 2, 2]
    assert trace.aggregate(by=["sample", "segment"]).n.tolist() == [1] * 6


def test_classes_that_lost_all_their_samples_are_counted():
    table = made_up().classes().loc["m", "animal"]
    assert table.kept.to_dict() == {"cat": 1, "dog": 2, "pig": 0}
    assert table.corrupted_right.to_dict() == {"cat": 1, "dog": 0, "pig": 1}
    assert table.columns.tolist() == ["kept", "clean_wrong", "corrupted_right", "no_gap"]
    assert (table.no_gap == 0).all()


def test_the_summary_has_the_largest_noise_of_what_is_kept():
    row = made_up().summary().iloc[0]
    assert row.noise_floor == pytest.approx(3e-7)
    assert row.metric == "probability"


def test_what_has_no_common_mean_is_refused():
    frame = made_up().frame
    for name, other in (("direction", "noise"), ("corruption", "silence"), ("site", "attn_out"), ("kind", "layer")):
        both = CausalTrace(pd.concat([frame, frame.assign(**{name: other})], ignore_index=True))
        with pytest.raises(DataError, match=f"more than one {name}: .*{other}"):
            both.aggregate(by=["layer"])
        assert len(both.aggregate(by=["layer", name])) == (2 if name != "corruption" else 4)
    other = frame.assign(form="P2", question="And now?")
    both = CausalTrace(pd.concat([frame, other], ignore_index=True))
    with pytest.raises(DataError, match="more than one form"):
        both.aggregate(by=["attribute", "layer"])
    assert len(both.aggregate(by=["attribute", "form", "layer"])) == 2 * len(
        made_up().aggregate(by=["attribute", "layer"])
    )
    with pytest.raises(DataError, match=r"not by \['colour'\]: model, attribute"):
        made_up().aggregate(by=["layer", "colour"])
