"""Attention shares: against the patterns that plain HF returns."""

import numpy as np
import pandas as pd
import pytest
import torch
from reference import hf_cut
from torch.testing import assert_close
from transformers import Qwen2AudioForConditionalGeneration

from lalm_lens.assets import TINY_LALM, TINY_LALM_PLANTED, TINY_LALM_RELAY
from lalm_lens.assets.clips import write_clips
from lalm_lens.datasets import read_folder
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.attention_share import AttentionShare, attention_share
from lalm_lens.loading import from_pretrained

N_LAYERS, N_HEADS = 8, 4
HOW = {"attribute": "animal", "progress": False}


@pytest.fixture(scope="module")
def hf():
    return Qwen2AudioForConditionalGeneration.from_pretrained(
        TINY_LALM, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return read_folder(write_clips(tmp_path_factory.mktemp("clips"), "animal", 2, seed=11))


@pytest.fixture(scope="module")
def asked(tiny_lalm, samples):
    """One prompt: what HF takes, and the region of each position."""
    run = Question.about(tiny_lalm, samples, "animal", "P3", True).run(samples[0])
    return run.inputs.to_hf("feature_attention_mask"), np.array([position.region for position in run.prompt.positions])


def expected(patterns: list, region: np.ndarray, queries: list[list[int]], n_sink: int) -> pd.DataFrame:
    """By layer, head and region, from [head, query_pos, key_pos] of each run and the queries looked at in it."""
    found = []
    for pattern, rows in zip(patterns, queries, strict=True):
        for layer in range(N_LAYERS):
            for query in rows:
                weights = pattern[layer][:, query].double().numpy().copy()
                weights[:, :n_sink] = 0
                weights /= weights.sum(1, keepdims=True)
                for name in dict.fromkeys(region[n_sink:]):
                    at = [n for n in np.flatnonzero(region == name) if n_sink <= n <= query]
                    for head in range(N_HEADS):
                        share = weights[head, at].sum()
                        per_token = weights[head, at].mean() if at else np.nan
                        found.append((layer, head, name, share, per_token))
    rows = pd.DataFrame(found, columns=["layer", "head", "region", "share", "per_token"])
    return rows.groupby(["layer", "head", "region"]).mean().reset_index()  # NaN is left out


def assert_same(ours: AttentionShare, theirs: pd.DataFrame, sample: str) -> None:
    rows = ours.frame[ours.frame["sample"] == sample]
    both = rows.merge(theirs, on=["layer", "head", "region"], suffixes=("", "_hf"))
    assert len(both) == len(rows) == len(theirs)
    for name in ("share", "per_token"):
        mine, hfs = (torch.tensor(both[column].to_numpy()) for column in (name, f"{name}_hf"))
        assert_close(mine, hfs, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("n_sink", [0, 1, 4])
@pytest.mark.parametrize("queries", ["last", "object", ("early", "late")], ids=str)
def test_shares_are_those_of_hfs_patterns(hf, tiny_lalm, samples, asked, queries, n_sink):
    batch, region = asked
    names = [queries] if isinstance(queries, str) else queries
    at = np.flatnonzero(np.isin(region, names)).tolist()
    shares = attention_share(tiny_lalm, samples[:1], queries=queries, exclude_sink=n_sink, **HOW)
    theirs = expected([hf_cut(hf, batch, {})[1]], region, [at], n_sink)
    assert_same(shares, theirs, samples[0].name)
    sums = shares.frame.groupby(["layer", "head"]).share.sum()
    assert len(sums) == N_LAYERS * N_HEADS
    assert sums.to_numpy() == pytest.approx(1)
    assert (shares.frame.n_queries == len(at)).all()


def test_shares_in_generation_are_those_of_hfs_patterns(hf, tiny_lalm, samples, asked):
    """Averaged over the positions that decide on a token, from the last of the prompt on: for each a run of its own."""
    batch, region = asked
    shares = attention_share(tiny_lalm, samples[:1], max_new_tokens=4, exclude_sink=1, **HOW)
    tokens = tiny_lalm.generate(
        Question.about(tiny_lalm, samples, "animal", "P3", True).run(samples[0]).inputs, 4
    ).tokens
    assert 2 <= tokens.shape[1] <= 4
    patterns, queries = [], []
    for n in range(tokens.shape[1]):
        begun = torch.cat([batch["input_ids"], tokens[:, :n]], 1)
        longer = batch | {"input_ids": begun, "attention_mask": torch.ones_like(begun)}
        patterns.append(hf_cut(hf, longer, {})[1])
        queries.append([begun.shape[1] - 1])
    padded = [
        {layer: torch.nn.functional.pad(its, (0, tokens.shape[1] - n)) for layer, its in pattern.items()}
        for n, pattern in enumerate(patterns)
    ]
    theirs = expected(padded, np.append(region, ["generated"] * tokens.shape[1]), queries, 1)
    assert_same(shares, theirs, samples[0].name)
    assert (shares.frame.n_queries == tokens.shape[1]).all()
    assert set(shares.frame[shares.frame.region == "generated"].n_keys) == {tokens.shape[1] - 1}


def test_where_windows_are_closed_nothing_is_seen(samples):
    """In the planted model, blocks but one see one position, the query itself."""
    planted = from_pretrained(TINY_LALM_PLANTED)
    frame = attention_share(planted, samples, **HOW).frame
    closed, opened = frame[frame.layer != 4], frame[frame.layer == 4]
    assert (closed[closed.region == "last"].share == 1).all()
    assert (closed[closed.region != "last"].share == 0).all()
    assert (opened[opened.region == "audio"].share > 0).all()
    blind = attention_share(planted, samples[:1], queries=(0,), exclude_sink=1, **HOW).frame
    assert blind.share.isna().all(), "the first position sees itself alone"


def test_per_token_counts_the_keys_of_a_window_alone(samples):
    """In the relay model every position sees 20, so that the last sees some of the options and none of the audio."""
    relay = from_pretrained(TINY_LALM_RELAY)
    run = Question.about(relay, samples, "animal", "P3", True).run(samples[0])
    region = np.array([its.region for its in run.prompt.positions])
    shares = attention_share(relay, samples[:1], **HOW)
    heard, options = (shares.frame[shares.frame.region == name] for name in ("audio", "object"))
    n_seen = int((region[-20:] == "object").sum())
    assert 0 < n_seen < (region == "object").sum()
    assert set(options.n_keys) == {n_seen}
    assert options.per_token.to_numpy() == pytest.approx(options.share.to_numpy() / n_seen)
    assert set(heard.n_keys) == {0}
    assert heard.per_token.isna().all()
    shares.plot("per_token").canvas.draw()


def test_no_pattern_is_kept(tiny_lalm, samples, monkeypatch):
    """Of all patterns that are made, one is alive when the next comes."""
    import weakref

    from lalm_lens.experiments.attention_share import Shares

    alive, add = [], Shares.add

    def watched(self, pattern, hook):
        assert not any(seen() is not None for seen in alive), "an earlier pattern is still there"
        add(self, pattern, hook)
        alive.append(weakref.ref(pattern))

    monkeypatch.setattr(Shares, "add", watched)
    attention_share(tiny_lalm, samples[:1], **HOW)
    assert len(alive) == N_LAYERS


def test_the_table_and_its_picture(tiny_lalm, samples, tmp_path):
    shares = attention_share(tiny_lalm, samples, **HOW)
    path = shares.save(tmp_path / "shares.parquet")
    pd.testing.assert_frame_equal(AttentionShare.load(path).to_frame(), shares.to_frame())
    means = shares.means()
    assert set(means.n) == {2}
    audio = means[means.region == "audio"].set_index("layer")
    rows = shares.frame[(shares.frame.region == "audio") & (shares.frame.layer == 3)]
    assert audio.share[3] == pytest.approx(rows.share.mean())
    assert repr(shares).startswith("AttentionShare(2 clips, from last: audio 0.")
    for value in ("share", "per_token"):
        (ax,) = shares.plot(value).axes
        lines = {line.get_label(): line for line in ax.lines}
        assert set(lines) == set(means.region)
        assert lines["audio"].get_ydata().tolist() == audio[value].tolist()
        assert ax.get_ylim()[1] > means[value].max()
    both = AttentionShare.concat(
        [shares.frame, attention_share(tiny_lalm, samples, queries="penultimate", **HOW).frame]
    )
    with pytest.raises(DataError, match="more than one queries: last; penultimate"):
        both.means()


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"queries": "noise"}, "There is no place 'noise'"),
        ({"queries": "image"}, "No position of this prompt is 'image'"),
        ({"exclude_sink": -1}, "are 0 or more"),
        ({"exclude_sink": 1000}, "exclude_sink leaves none of"),
        ({"queries": "object", "max_new_tokens": 3}, "In generation the queries are"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(tiny_lalm, samples, what, says):
    with pytest.raises(InputError, match=says):
        attention_share(tiny_lalm, samples, **HOW, **what)
