"""Caption fidelity: captions against plain HF under a mask made by hand, and a judge whose numbers are known."""

import numpy as np
import pandas as pd
import pytest
import torch
from reference import hf_cut
from test_attention_knockout import closed
from test_audio_in_video import samples, seeing  # noqa: F401

from lalm_lens.counterfactual import swap_audio
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.caption_fidelity import DESCRIPTION, CaptionFidelity, caption_fidelity

N_NEW, N_LAYERS = 4, 3
CHAINS = (("audio", "generated"), ("video", "generated"))
HOW = {"chains": CHAINS, "layers": (1, "all"), "max_new_tokens": N_NEW, "progress": False}


def judge(caption: str, sample) -> tuple[float, float]:
    """Of some letters, so that captions differ."""
    return caption.count("e") % 5 / 4, len(caption) % 7 / 7


@pytest.fixture(scope="module")
def judged(seeing, samples):  # noqa: F811
    seeing[1].stop_tokens = ()
    pair = swap_audio(samples[:2])[0]
    quiet = "blocks.1.hook_attn_out", lambda out, hook: 0 * out
    return caption_fidelity(seeing[1], [samples[2], pair], judge=judge, hooks={"no attention": [quiet]}, **HOW)


def test_captions_are_hfs_under_a_mask_and_judged_as_they_stand(seeing, samples, judged):  # noqa: F811
    """The beginning that is forced is part of them."""
    hf, model = seeing
    hf.set_attn_implementation("eager")
    run = Question(model, DESCRIPTION, "P2", True).run(samples[2])
    region = np.array([position.region for position in run.prompt.positions])
    rows = judged.frame[(judged.frame["sample"] == "c") & (judged.frame.kind != "hooks")]
    assert len(rows) == 2 * (N_LAYERS + 1)
    for row in rows.itertuples():
        keys, layers = row.edge.split(" -> ")[0], range(N_LAYERS) if row.kind == "all" else [row.layer]
        for when, its in (("before", ()), ("after", layers)):
            tokens: list[int] = []
            for _ in range(N_NEW):
                batch = run.inputs.to_hf("feature_attention_mask")
                ids = torch.cat([batch["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
                batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_audio_in_video": True}
                queries = list(range(run.n_pos - 1, ids.shape[1]))
                shut = closed(ids.shape[1], [(np.flatnonzero(region == keys).tolist(), queries)])
                tokens.append(int(hf_cut(hf, batch, dict.fromkeys(its, shut))[0][-1].argmax()))
            text = DESCRIPTION.prefix + model.processor.tokenizer.decode(tokens, skip_special_tokens=True)
            assert getattr(row, f"text_{when}") == text
            assert (getattr(row, f"audio_{when}"), getattr(row, f"video_{when}")) == judge(text, samples[2])
    assert (judged.frame.text_after != judged.frame.text_before).mean() > 0.5
    hooked = judged.frame[judged.frame.kind == "hooks"]
    assert (hooked.text_after != hooked.text_before).any()


def test_effects_are_means_over_clips(judged, tmp_path):
    effects, frame = judged.effects(), judged.frame
    assert len(effects) == 2 * (2 * (N_LAYERS + 1) + 1)
    for row in effects.itertuples():
        mine = frame[(frame.edge == row.edge) & (frame.kind == row.kind) & (frame.layers == row.layers)]
        before, after = mine[f"{row.side}_before"].mean(), mine[f"{row.side}_after"].mean()
        assert (row.n, row.before, row.after) == (2, pytest.approx(before), pytest.approx(after))
        assert row.low - 1e-9 <= row.change <= row.high + 1e-9
        assert np.isnan(row.relative) if not before else row.relative == pytest.approx(after / before - 1)
    false = judged.counterfactual.frame
    assert set(false["sample"]) == {"a | b"}
    assert (false.seen_label != false.label).all()
    path = judged.save(tmp_path / "captions.parquet")
    pd.testing.assert_frame_equal(CaptionFidelity.load(path).frame, frame)
    assert repr(judged).startswith("CaptionFidelity(")


def test_the_picture_shows_before_and_after(judged):
    effects, figure = judged.effects(n_resamples=9), judged.plot()
    assert [ax.get_title() for ax in figure.axes] == [f"{edge} (n = 2)" for edge in effects.edge.unique()]
    (rows,) = [its for key, its in effects.groupby(["edge", "side"]) if key == ("audio -> generated", "audio")]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["what is heard, window 1"].get_ydata().tolist() == rows.after[rows.kind == "window 1"].tolist()
    assert set(lines["what is heard, before"].get_ydata()) == set(rows.before)
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0", "1", "2", "all"]


@pytest.mark.parametrize(
    "wrong", [lambda *_: 0.5, lambda *_: (0.5, 1.2), lambda *_: (0.5, float("nan")), lambda *_: "a"]
)
def test_a_judge_gives_two_numbers_from_0_to_1(seeing, samples, wrong):  # noqa: F811
    with pytest.raises(DataError, match="A judge gives"):
        caption_fidelity(seeing[1], samples[:1], judge=wrong, max_new_tokens=1, progress=False)


def test_an_error_of_a_judge_is_its_own(seeing, samples):  # noqa: F811
    def judge(caption, sample):
        return len(caption) + sample.label, 0.5

    with pytest.raises(TypeError, match="unsupported operand"):
        caption_fidelity(seeing[1], samples[:1], judge=judge, max_new_tokens=1, progress=False)


def test_what_is_not_changed_or_not_to_be_heard_is_refused(seeing, samples):  # noqa: F811
    with pytest.raises(InputError, match="Nothing is changed"):
        caption_fidelity(seeing[1], samples[:1], judge=judge, chains=(), progress=False)
    with pytest.raises(DataError, match="is listed 2 times"):
        caption_fidelity(seeing[1], [samples[0]] * 2, judge=judge, progress=False)
    factual = caption_fidelity(seeing[1], samples[:1], judge=judge, max_new_tokens=1, progress=False)
    with pytest.raises(DataError, match="No clip is left"):
        factual.counterfactual.effects()
