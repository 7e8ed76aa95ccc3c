"""What the demo says must come out, by the reach of attention, against what does."""

import pytest
import torch

from lalm_lens.assets import TINY_LALM, TINY_LALM_PLANTED, TINY_LALM_RELAY
from lalm_lens.assets.clips import write_clips
from lalm_lens.datasets import read_folder
from lalm_lens.demo import known_answers, what_is_known
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.loading import from_pretrained

MUST_BE = {TINY_LALM: {-1: 0.0, 7: 1.0}, TINY_LALM_PLANTED: {n: float(n >= 4) for n in range(-1, 8)}}


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> list:
    samples = read_folder(write_clips(tmp_path_factory.mktemp("clips"), "gender", 2, seed=4))
    models = [from_pretrained(folder) for folder in (TINY_LALM, TINY_LALM_PLANTED, TINY_LALM_RELAY)]
    traces = [causal_trace(model, samples, attribute="gender", progress=False) for model in models]
    return [what_is_known(model, trace, "gender", samples[0]) for model, trace in zip(models, traces, strict=True)]


def test_what_must_come_out_does(known):
    for each in known:
        must = each.text_recovery().dropna()
        assert {-1, 7} <= set(must.index)
        rows = each.trace.kept[each.trace.kept.kind == "layer"]
        mean = rows.groupby("layer").recovery.mean()
        assert ((mean - must).dropna().abs() < 1e-4).all()
    for each, must in zip(known, MUST_BE.values(), strict=False):
        assert each.text_recovery().dropna().to_dict() == must


def test_cells_out_of_reach_are_exactly_0(known):
    for each in known:
        rows = each.trace.frame[each.trace.frame.kind == "token"]
        reached = torch.tensor([bool(each.after_audio[row.layer + 1, row.text_index]) for row in rows.itertuples()])
        assert (rows.recovery[~reached.numpy()] == 0).all()
        assert (rows.recovery[reached.numpy()] != 0).any()


def test_each_model_has_its_curves_and_its_map(known):
    figure = known_answers(known, "gender")
    titles = [ax.get_title() for ax in figure.axes]
    assert sum("kept of 2" in title for title in titles) == 3
    for name in ("tiny_lalm:", "tiny_lalm_planted:", "tiny_lalm_relay:"):
        assert sum(title.startswith(name) for title in titles) == 1
