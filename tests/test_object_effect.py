"""The effect of the options as a predictor of errors: patches by plain HF hooks, and AUROCs by counting pairs."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from reference import hf_patched, hf_states
from transformers import Qwen2AudioForConditionalGeneration

from lalm_lens.assets import TINY_LALM_RELAY
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.corrupt import OtherClip
from lalm_lens.datasets import read_folder
from lalm_lens.errors import AudioError, DataError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.object_effect import ObjectEffect, auroc, object_effect
from lalm_lens.loading import from_pretrained

N_LAYERS = 8
HOW = {"attribute": "animal", "progress": False}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Clips in noise, so that some answers are wrong."""
    clips = read_folder(write_clips(tmp_path_factory.mktemp("clips"), "animal", 6, seed=11))
    generator = torch.Generator().manual_seed(0)
    loud = (0, 0, 0, 0.05, 0.2, 0.2)
    return [
        replace(clip, waveform=clip.waveform + size * torch.randn(len(clip.waveform), generator=generator))
        for clip, size in zip(clips, loud, strict=True)
    ]


@pytest.fixture(scope="module")
def relay():
    """The options pass on what is heard."""
    return from_pretrained(TINY_LALM_RELAY)


@pytest.fixture(scope="module")
def effects(relay, samples):
    return object_effect(relay, samples, **HOW)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_effects_are_those_of_plain_hf_hooks(relay, samples, effects, direction):
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM_RELAY, dtype=torch.float32).eval()
    if direction == "noise":
        effects = object_effect(relay, samples[:5], direction="noise", metric="label_probability", **HOW)
    labels = ATTRIBUTES["animal"].labels
    question = Question.about(relay, samples, "animal", "P3", True)
    options = [relay.processor.tokenizer.encode(f" {label}")[0] for label in labels]

    def metric(logits: torch.Tensor, chosen: int) -> float:
        wide = logits.double().flatten()
        p = wide.softmax(-1) if direction == "denoise" else wide[options].softmax(-1)
        return float(p[options[chosen] if direction == "denoise" else chosen])

    for sample in (samples[1], samples[4]):
        rows = effects.frame[effects.frame["sample"] == sample.name]
        run = question.run(sample)
        clean, silent = (
            question.run(replace(sample, waveform=waveform)).inputs.to_hf("feature_attention_mask")
            for waveform in (sample.waveform, torch.zeros_like(sample.waveform))
        )
        taken, base = (clean, silent) if direction == "denoise" else (silent, clean)
        clean_logits, _ = hf_states(hf, clean)
        base_logits, _ = hf_states(hf, base)
        _, states = hf_states(hf, taken)
        chosen = int(clean_logits[0, -1, options].argmax())
        assert set(rows.chosen) == {labels[chosen]}
        assert set(rows.right) == {labels[chosen] == sample.label}
        p = clean_logits[0, -1].double().softmax(-1)
        assert rows.max_probability.iloc[0] == pytest.approx(float(p[options[chosen]]), rel=1e-4)
        assert rows.max_label_probability.iloc[0] == pytest.approx(
            float(p[options[chosen]] / p[options].sum()), rel=1e-4
        )
        m_base = metric(base_logits[0, -1], chosen)
        for row in rows.itertuples():
            where = torch.tensor(
                [
                    [
                        position.region == "object" and (row.part == "object" or position.label == labels[chosen])
                        for position in run.prompt.positions
                    ]
                ]
            )
            assert where.sum() == (9 if row.part == "object" else 1)
            patched = metric(hf_patched(hf, base, row.layer, where, states[f"decoder.{row.layer}"]), chosen)
            expected = patched - m_base if direction == "denoise" else m_base - patched
            assert row.effect == pytest.approx(expected, abs=2e-5)
        assert (rows.effect.abs() > 1e-3).any()
        assert (rows[rows.layer == N_LAYERS - 1].effect.abs() < 1e-6).all()  # the last position reads them no more


def test_every_clip_counts_right_or_wrong(effects, samples):
    frame = effects.frame
    assert len(frame) == len(samples) * 2 * N_LAYERS
    right = frame.drop_duplicates("sample").right
    assert 0 < right.sum() < len(samples)
    assert f"6 clips, {right.sum()} answered right" in repr(effects)


def test_aurocs_count_pairs(effects):
    """With ties, of which the last block is full: half a pair each."""
    table, scores = effects.aurocs().set_index("score"), effects.scores()
    is_right = scores.right.to_numpy()
    assert list(table.index) == list(scores.columns[3:])
    assert {"max_probability", "object max", "object_chosen mean", "object 0", f"object_chosen {N_LAYERS - 1}"} <= set(
        table.index
    )
    by_pairs = {}
    for name, row in table.iterrows():
        values = scores[name].to_numpy()
        pairs = [(a > b) + 0.5 * (a == b) for a in values[is_right] for b in values[~is_right]]
        by_pairs[name] = np.mean(pairs)
        assert row.auroc == pytest.approx(by_pairs[name])
        assert row.low <= row.auroc <= row.high
        assert (row.n_right, row.n_wrong) == (is_right.sum(), (~is_right).sum())
    assert table.above_max_probability["max_probability"] == 0
    above = table.above_max_probability["object max"]
    assert above == pytest.approx(by_pairs["object max"] - by_pairs["max_probability"])
    clip = effects.frame[effects.frame["sample"] == scores["sample"][2]]
    of_all = clip[clip.part == "object"].effect
    assert scores["object max"][2] == of_all.max()
    assert scores["object mean"][2] == pytest.approx(of_all.mean())
    assert scores["object 3"][2] == of_all.iloc[3]


def test_what_is_known_of_an_auroc():
    rng = np.random.default_rng(0)
    right, wrong = rng.normal(1, 1, 400), rng.normal(0, 1, 300)
    assert auroc(right, wrong) == pytest.approx(0.760, abs=0.03)  # Phi(1 / sqrt 2)
    assert auroc(wrong, right) == pytest.approx(1 - auroc(right, wrong))
    assert auroc(right, right) == 0.5
    assert auroc(right + 100, wrong) == 1
    assert auroc(np.exp(right), np.exp(wrong)) == auroc(right, wrong)
    assert auroc(np.stack([right, wrong[:1].repeat(400)]), np.stack([wrong, wrong])).shape == (2,)


def planted(n: int, of_effect: float, seed: int = 0) -> ObjectEffect:
    """A table in which the effect tells right from wrong by `of_effect` standard deviations, and its rival nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for clip in range(n):
        right, sure = bool(clip % 3), rng.random()
        for part in ("object", "object_chosen"):
            for layer in range(2):
                effect = rng.normal() + of_effect * right
                rows.append({"sample": str(clip), "right": right, "part": part, "layer": layer, "effect": effect})
                rows[-1] |= {"max_probability": sure, "max_label_probability": sure, "attribute": "animal"}
    same = {"model": "m", "form": "P3", "label_space": True, "metric": "probability", "direction": "denoise"}
    return ObjectEffect(pd.DataFrame(rows).assign(**same))


def test_the_intervals_hold_what_they_should():
    better = planted(300, 1.5).aurocs().set_index("score")
    assert better.above_low["object 0"] > 0
    assert better.above_low["object 0"] < better.above_max_probability["object 0"] < better.above_high["object 0"]
    for rival in ("max_probability", "max_label_probability"):  # here the same, so no draw tells them apart
        assert better.above_low[rival] == better.above_high[rival] == 0
    assert better.low["object 0"] < 0.856 < better.high["object 0"]  # Phi(1.5 / sqrt 2)
    nothing = [planted(60, 0.0, seed).aurocs(n_resamples=200).set_index("score") for seed in range(10)]
    hits = [its.low["object 1"] <= 0.5 <= its.high["object 1"] for its in nothing]
    assert np.mean(hits) >= 0.8
    fewer = planted(4, 0.0).aurocs()
    assert (fewer.n_wrong == 2).all()
    assert planted(3, 0.0).aurocs().low.isna().all(), "one wrong clip says nothing about how they vary"


def test_what_has_no_auroc_is_refused(effects, relay, samples):
    right = ObjectEffect(effects.frame[effects.frame.right])
    with pytest.raises(DataError, match="needs both kinds"):
        right.aurocs()
    mixed = pd.concat([effects.frame, effects.frame.assign(metric="log_probability")])
    with pytest.raises(DataError, match="more than one metric"):
        ObjectEffect(mixed).aurocs()
    quiet = replace(samples[0], waveform=torch.zeros(16_000))
    with pytest.raises(AudioError, match="is digital silence"):
        object_effect(relay, [quiet], **HOW)


def test_another_clip_may_be_the_corruption(relay, samples):
    other = object_effect(relay, samples[:2], corruption=OtherClip(), **HOW).frame
    assert other.corruption.str.startswith("other_clip").all()
    assert (other.m_corrupted != other.m_clean).all()
