"""Ablation, steering, scaled attention, multiplied neurons and patchscopes: against plain HF hooks."""

from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from reference import hf_cut, hf_edited, hf_states_at
from torch.testing import assert_close

from lalm_lens import (
    Ablation,
    NeuronGain,
    Patchscope,
    ScaledAttention,
    Steering,
    ablate,
    audio_minus_silence,
    from_hf,
    logit_lens,
    mean_difference,
    neuron_gain,
    neuron_scores,
    patchscope,
    prompt_contrast,
    scale_attention,
    steer,
)
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES, Attribute
from lalm_lens.corrupt import OtherClip
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.changed import N_SHOWN
from lalm_lens.experiments.enrich import split
from lalm_lens.experiments.neurons import by_layer, largest
from lalm_lens.inputs import Inputs
from lalm_lens.runs import Run

N_LAYERS, N_HEADS, D_HEAD = 8, 4, 32
QUIET = {"progress": False, "attribute": "emotion"}


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    """Two of each label but one; one of them is longer."""
    its = read_folder(write_clips(tmp_path_factory.mktemp("clips"), "emotion", 6, seed=5))
    longer = Sample(its[0].name, its[0].label, torch.cat([its[0].waveform, its[1].waveform[:6000]]))
    return [longer, *its[1:]]


@pytest.fixture(scope="module")
def asked(random_pair, samples):
    """What HF takes for each clip, and where its parts are."""
    question = Question.about(random_pair[1], samples, "emotion", "P3", True)
    runs = [question.run(sample) for sample in samples]
    batches = [run.inputs.to_hf("feature_attention_mask") for run in runs]
    regions = [np.array([its.region for its in run.prompt.positions]) for run in runs]
    return question, runs, batches, regions


def assert_row(row, question: Question, base: torch.Tensor, changed: torch.Tensor) -> float:
    """Compare the numbers of a row with the logits of two runs of HF. Returns how far the logits moved."""
    options = question.tokens
    true = question.labels.index(row.label)
    for when, logits in (("before", base), ("after", changed)):
        log_p = logits.double().log_softmax(-1)
        assert_close(getattr(row, f"p_{when}"), float(log_p[options[true]].exp()), rtol=3e-4, atol=1e-7)
        assert_close(getattr(row, f"label_p_{when}"), float(log_p[options].softmax(-1)[true]), rtol=3e-4, atol=1e-6)
        assert getattr(row, f"answer_{when}") == question.labels[int(log_p[options].argmax())]
        assert getattr(row, f"right_{when}") == (int(log_p[options].argmax()) == true)
    return float((base - changed).abs().max())


def picked(table, n: int):
    """Some rows of the first two clips."""
    names = table.frame["sample"].unique()[:2]
    return table.frame[table.frame["sample"].isin(names)].sample(n, random_state=2).itertuples()


# --- ablation -------------------------------------------------------------------------------------------------------


@pytest.mark.numbers
@pytest.mark.parametrize(("of", "method"), [("heads", "zero"), ("heads", "resample"), ("neurons", "mean")])
def test_ablation_is_plain_hf_with_hooks(random_pair, asked, samples, method, of):
    hf, model = random_pair
    question, _, batches, regions = asked
    n_units, site = (N_HEADS, "z") if of == "heads" else (model.decoder_cfg.d_mlp, "post")
    group = (3, 0) if of == "heads" else tuple(range(0, n_units, 2))
    place = ("audio_side", "text") if of == "heads" else "audio"
    units, samples, batches = [(layer, group) for layer in (1, 5)], samples[:3], batches[:3]
    table = ablate(model, samples, of=of, units=units, method=method, place=place, seed=3, **QUIET)
    assert len(table.frame) == len(samples) * len(units)
    states = [hf_states_at(hf, batch, site) for batch in batches] if method == "mean" else []
    words = {}  # the states of each word, the same in every prompt, and of all audio together
    for its, of_clip in zip(states, regions, strict=False):
        seen: dict[str, int] = {}
        for pos, region in enumerate(of_clip):
            key = region if region == "audio" else (region, seen.setdefault(region, 0))
            seen[region] = seen.get(region, 0) + 1
            words.setdefault(key, []).append(its[:, pos])
    moved = []
    for row in picked(table, 3):
        n = [sample.name for sample in samples].index(row.sample)
        here = [pos for pos, region in enumerate(regions[n]) if place != "audio" or region == "audio"]
        if method == "mean":
            keys, seen = [], {}
            for region in regions[n]:
                keys.append(region if region == "audio" else (region, seen.setdefault(region, 0)))
                seen[region] = seen.get(region, 0) + 1
            value = torch.stack([torch.stack(words[key]).mean(0)[row.layer] for key in keys])
        elif method == "resample":
            other = OtherClip(3).of(samples[n], samples).waveform
            changed = Sample("other", samples[n].label, other)
            value = hf_states_at(hf, question.run(changed).inputs.to_hf("feature_attention_mask"), site)[row.layer]
        else:
            value = torch.zeros(len(regions[n]), n_units * (D_HEAD if of == "heads" else 1))

        def edit(state, here=here, value=value):
            for unit in group:
                part = slice(unit * D_HEAD, (unit + 1) * D_HEAD) if of == "heads" else unit
                state[here, part] = value[here, part]

        logits = hf_edited(hf, batches[n], {(site, row.layer): edit})
        moved.append(assert_row(row, question, hf_edited(hf, batches[n], {})[-1], logits[-1]))
    assert max(moved) > 1e-2


def test_every_head_and_group_of_neurons_is_taken_out_by_default(tiny_lalm, samples):
    heads = ablate(tiny_lalm, samples[1:3], method="zero", place="last", **QUIET)
    assert heads.frame.groupby("sample").size().tolist() == [N_LAYERS * N_HEADS] * 2
    assert heads.frame.drop_duplicates("units").units.tolist() == ["0", "1", "2", "3"]
    neurons = ablate(tiny_lalm, samples[1:2], of="neurons", method="zero", place="last", n_neurons=100, **QUIET)
    d_mlp = tiny_lalm.decoder_cfg.d_mlp
    assert neurons.frame.units.unique()[-1].endswith(str(d_mlp - 1))
    image = heads.plot("accuracy").axes[0].images[0]
    assert image.get_array().shape == (N_LAYERS, N_HEADS)
    change = heads.effects("accuracy").set_index(["layer", "units"]).change
    assert image.get_array()[5, 2] == change[5, "2"]
    of_probability = heads.effects("label_probability").change
    assert heads.overview().change.tolist() == sorted(of_probability, key=abs)[: -N_SHOWN - 1 : -1]
    lines = heads.lines()
    assert lines["change of label_p"].tolist() == pytest.approx(of_probability.groupby(np.arange(64 // 2) // 4).mean())
    assert lines.low.isna().all()  # of several heads there is no one interval
    assert repr(heads) == "Ablation(64 runs, clips: 2 of emotion; heads at last, zero)"
    with pytest.raises(InputError, match="Nothing is taken out"):
        ablate(tiny_lalm, samples, units=[], **QUIET)


# --- scaled attention -----------------------------------------------------------------------------------------------


@pytest.mark.numbers
@pytest.mark.parametrize(("normalisation", "engine"), [("before", "sweep"), ("behind", "sweep"), ("behind", "hooks")])
def test_scaled_attention_is_plain_hf(random_pair, asked, samples, normalisation, engine):
    """Before the softmax, as an additive mask in HF. Behind it, z gets (factor - 1) times what those keys gave it."""
    hf, model = random_pair
    question, _, batches, regions = asked
    how = {"factors": (0.3, 4), "layers": [3, (2, 5)], "heads": (0, 3), "engine": engine, "keys": "audio"}
    table = scale_attention(model, samples[:1], queries=("late", "last"), normalisation=normalisation, **how, **QUIET)
    assert len(table.frame) == 2 * (N_LAYERS + 1)
    assert set(table.frame.engine) == {engine}
    queries = np.flatnonzero(np.isin(regions[0], ["late", "last"]))
    keys = np.flatnonzero(regions[0] == "audio")
    n_pos, moved = len(regions[0]), []
    base = hf_edited(hf, batches[0], {})[-1]
    for row in picked(table, 4):
        layers = [n for part in row.layers.split(",") for n in range(int(part[0]), int(part[-1]) + 1)]
        if normalisation == "before":
            added = torch.zeros(N_HEADS, n_pos, n_pos)
            for head in (0, 3):
                added[head, queries[:, None], keys] = log(row.factor)
            changed = hf_cut(hf, batches[0], dict.fromkeys(layers, added))[0][-1]
        else:
            changed = behind(hf, batches[0], layers, queries, keys, row.factor)
        moved.append(assert_row(row, question, base, changed))
    assert max(moved) > 1e-2


@torch.no_grad()
def behind(hf, batch, layers, queries, keys, factor: float) -> torch.Tensor:
    """HF, with z made from a pattern that was multiplied: layer by layer, because each sees what the others did."""
    edits = {}
    for layer in sorted(layers):
        seen = {}

        def take(module, args, out, seen=seen):
            seen["v"] = out[0]

        handle = hf.model.language_model.layers[layer].self_attn.v_proj.register_forward_hook(take)
        with handle:
            pattern = hf_patterns(hf, batch, edits)[layer]
        v = seen["v"].unflatten(-1, (-1, D_HEAD)).repeat_interleave(2, dim=1)

        def edit(z, pattern=pattern, v=v):
            for head in (0, 3):
                more = pattern[head][queries][:, keys] @ v[keys, head]
                z[queries, head * D_HEAD : (head + 1) * D_HEAD] += (factor - 1) * more

        edits["z", layer] = edit
    return hf_edited(hf, batch, edits)[-1]


def hf_patterns(hf, batch, edits) -> list[torch.Tensor]:
    found = {}
    handles = [
        block.self_attn.register_forward_hook(lambda module, args, out, n=n: found.update({n: out[1][0]}))
        for n, block in enumerate(hf.model.language_model.layers)
    ]
    hf_edited(hf, batch, edits)
    for handle in handles:
        handle.remove()
    return [found[n] for n in range(N_LAYERS)]


def test_a_factor_of_1_changes_nothing_and_more_is_more(tiny_lalm, samples):
    table = scale_attention(tiny_lalm, samples[:2], factors=(1, 8), layers=["all"], **QUIET)
    same = table.frame[table.frame.factor == 1]
    assert (same.p_before == same.p_after).all(), "to the bit"
    assert (table.frame[table.frame.factor == 8].p_before != table.frame[table.frame.factor == 8].p_after).all()
    lines = table.plot().axes[0].lines
    assert lines[0].get_xdata().tolist() == [1, 8]
    assert lines[0].get_ydata().tolist() == [0, table.effects("label_probability").change.iloc[1]]
    assert repr(table).endswith("last to audio_side, factors 1, 8)")
    with pytest.raises(InputError, match="by a factor above 0"):
        scale_attention(tiny_lalm, samples[:1], factors=(0,), **QUIET)


# --- steering -------------------------------------------------------------------------------------------------------


@pytest.mark.numbers
def test_steering_is_plain_hf_with_hooks(random_pair, asked, samples, tmp_path):
    hf, model = random_pair
    question, runs, batches, regions = asked
    direction = audio_minus_silence(model, samples[2:4], attribute="emotion", place="late")
    means = []
    for heard in (lambda its: its, torch.zeros_like):
        silent = [Sample(its.name, its.label, heard(its.waveform)) for its in samples[2:4]]
        states = [
            hf_states_at(hf, question.run(its).inputs.to_hf("feature_attention_mask"), "resid_post") for its in silent
        ]
        here = [np.flatnonzero(regions[n] == "late") for n in (2, 3)]
        means.append(torch.stack([its[:, at].mean(1) for its, at in zip(states, here, strict=True)]).mean(0))
    assert_close(direction.vectors, means[0] - means[1], rtol=1e-3, atol=1e-4)
    assert_close(direction.norms, (means[0] - means[1]).norm(dim=-1), rtol=1e-3, atol=1e-4)
    table = steer(model, samples[:2], direction=direction, layers=(1, 4), factors=(-3, 2), **QUIET)
    assert len(table.frame) == 8
    moved = []
    for row in table.frame.itertuples():
        n = [sample.name for sample in samples].index(row.sample)

        def edit(state, row=row):
            state[-1] += row.factor * direction.vectors[row.layer]

        base, changed = (hf_edited(hf, batches[n], its)[-1] for its in ({}, {("resid_post", row.layer): edit}))
        moved.append(assert_row(row, question, base, changed))
        assert row.norm == pytest.approx(float(direction.norms[row.layer]))
    assert min(moved) > 1e-3
    hook = direction.hook(4, range(runs[0].n_pos - 1, runs[0].n_pos + 2), -30.0)
    written, plain = (model.generate(runs[0].inputs, 3, fwd_hooks=its).tokens[0].tolist() for its in ([hook], []))
    assert written != plain
    batch, tokens = dict(batches[0]), []
    for _ in range(3):

        def push(state):
            state[len(regions[0]) - 1 :] -= 30 * direction.vectors[4]

        tokens.append(int(hf_edited(hf, batch, {("resid_post", 4): push})[-1].argmax()))
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([tokens[-1:]])], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert written == tokens
    lines = table.plot().axes[0].lines
    assert [line.get_label() for line in lines[:2]] == ["layer 1", "layer 4"]
    assert lines[1].get_xdata().tolist() == [-3, 0, 2]
    assert "audio - silence" in repr(table)


def test_a_direction_of_other_weights_is_refused(random_pair, tiny_lalm, samples):
    of_random = audio_minus_silence(random_pair[1], samples[:1], attribute="emotion")
    with pytest.raises(InputError, match=r"The direction is of .*, and tiny_lalm has other weights.* Make one of this"):
        steer(tiny_lalm, samples[:1], direction=of_random, **QUIET)


def test_directions_of_two_sets_and_of_two_prompts(tiny_lalm, samples, asked):
    runs = [Question.about(tiny_lalm, samples, "emotion", "P3", True).run(sample) for sample in samples]
    there, back = (mean_difference(tiny_lalm, *its) for its in ((runs[:2], runs[2:]), (runs[2:], runs[:2])))
    assert_close(there.vectors, -back.vectors)
    assert there.n_runs == (2, 4)
    emotion = ATTRIBUTES["emotion"]
    other = Attribute("emotion", "Which of these is it?", emotion.labels, emotion.prefix)
    contrast = prompt_contrast(tiny_lalm, samples[:2], attribute=emotion, minus=other)
    assert contrast.name == f"{emotion.question} - Which of these is it?"
    assert contrast.norms.min() > 0
    same = prompt_contrast(tiny_lalm, samples[:1], attribute=emotion, minus=emotion)
    assert same.norms.max() == 0
    still = steer(tiny_lalm, samples[:1], direction=same, layers=(3,), **QUIET).frame
    assert (still.p_before == still.p_after).all()
    with pytest.raises(InputError, match="A difference of means needs one run or more"):
        mean_difference(tiny_lalm, runs, [])
    narrow = replace(same, vectors=same.vectors[:, :5])
    with pytest.raises(InputError, match="The direction has 8 x 5 numbers, and this model 8 layers x 128"):
        steer(tiny_lalm, samples[:1], direction=narrow, **QUIET)


# --- neurons --------------------------------------------------------------------------------------------------------


@pytest.mark.numbers
def test_neurons_are_those_of_plain_hf(random_pair, asked, samples):
    hf, model = random_pair
    question, _, batches, _ = asked
    table = neuron_gain(model, samples, k=300, gains=(0, 3), n_choosing=4, n_seeds=1, labels=["angry"], **QUIET)
    choosing, test = split(samples, 4, 0)
    numbers = [[its.name for its in samples].index(sample.name) for sample in choosing]
    active = torch.stack([hf_states_at(hf, batches[n], "post")[:, -1] for n in numbers])
    is_angry = np.array([sample.label == "angry" for sample in choosing])
    score = (active[is_angry].mean(0) - active[~is_angry].mean(0)).abs()
    ours = neuron_scores(model, choosing, attribute="emotion", label="angry", progress=False)
    assert_close(ours, score, rtol=1e-3, atol=1e-5)
    chosen = sorted(((float(its), n) for n, its in enumerate(score.flatten())), reverse=True)[:300]
    by_hand: dict[int, list[int]] = {}
    for _, number in chosen:
        by_hand.setdefault(number // score.shape[1], []).append(number % score.shape[1])
    assert {layer: tuple(sorted(its)) for layer, its in by_hand.items()} == largest(ours, 300)
    assert sorted(table.frame["sample"].unique()) == sorted(sample.name for sample in test)
    rows = table.frame[(table.frame.arm == "chosen")]
    assert (rows.side == np.where(rows.label == "angry", "own", "other")).all()
    moved = []
    for row in rows.itertuples():
        n = [sample.name for sample in samples].index(row.sample)

        def multiplied(layer, gain=row.gain):
            def edit(state):
                state[-1, by_hand[layer]] *= gain

            return edit

        edits = {("post", layer): multiplied(layer) for layer in by_hand}
        moved.append(assert_row(row, question, hf_edited(hf, batches[n], {})[-1], hf_edited(hf, batches[n], edits)[-1]))
    assert max(moved) > 1e-2
    means = table.mean_over_clips()
    assert set(means.line) <= {"neurons of the clip's label", "neurons of other labels", "random neurons"}
    own = rows[(rows.side == "other") & (rows.gain == 3)]
    there = means[(means.side == "other") & (means.gain == 3)].iloc[0]
    assert there.change == pytest.approx((own.label_p_after - own.label_p_before).mean())
    assert len(table.plot().axes[0].lines) == len(set(means.line)) + 1


def test_neurons_that_cannot_be_chosen(tiny_lalm, samples):
    assert by_layer([3, 12, 11, 25], 10) == {0: (3,), 1: (1, 2), 2: (5,)}
    with pytest.raises(DataError, match="0 of 6 clips are 'purple'"):
        neuron_scores(tiny_lalm, samples, attribute="emotion", label="purple", progress=False)
    with pytest.raises(InputError, match="There are 6 neurons; 9 cannot be chosen"):
        largest(torch.ones(2, 3), 9)


# --- patchscopes ----------------------------------------------------------------------------------------------------


def test_the_logit_lens_is_a_patchscope_of_the_same_prompt(tiny_lalm, samples):
    run = Question.about(tiny_lalm, samples, "emotion", "P3", True).run(samples[1])
    for position in (-1, -9):
        how = {
            "positions": (position,),
            "target_position": position,
            "read": position,
        }
        ours = patchscope(tiny_lalm, run, run, target_layers=(7,), top_k=3, progress=False, **how).to_frame()
        lens = logit_lens(tiny_lalm, samples[1:2], attribute="emotion", positions=(position,), top_k=3, progress=False)
        theirs = lens.frame[(lens.frame.kind == "top") & (lens.frame.layer >= 0)].sort_values(["layer", "rank"])
        assert ours.token_id.tolist() == theirs.token_id.tolist()
        assert_close(torch.tensor(ours.log_prob.tolist()), torch.tensor(theirs.log_prob.tolist()), rtol=1e-4, atol=1e-4)


@pytest.mark.numbers
def test_a_state_goes_into_another_prompt_of_another_model(random_pair, tiny_lalm, asked, samples):
    hf, model = random_pair
    _, runs, batches, regions = asked
    source = Question.about(tiny_lalm, samples, "emotion", "P3", True).run(samples[2])
    audio = int(np.flatnonzero(regions[0] == "audio")[4])
    how = {"positions": (-1, 40), "layers": (6,), "target_layers": (0, 5), "target_position": audio, "into": model}
    table = patchscope(tiny_lalm, source, runs[0], max_new_tokens=2, **how, progress=False)
    assert len(table.frame) == 4
    _, cache = tiny_lalm.run_with_cache(source.inputs)
    for row in table.frame.itertuples():
        state = cache["resid_post", row.source_layer][0, row.source_position]
        edit = {("resid_post", row.target_layer): lambda its, state=state: its[audio].copy_(state)}
        batch, tokens = dict(batches[0]), []
        for n in range(2):
            log_p = hf_edited(hf, batch, edit)[-1].log_softmax(-1)
            tokens.append(int(log_p.argmax()))
            if not n:
                assert (row.token_id, row.target_position) == (tokens[0], audio)
                assert_close(row.log_prob, float(log_p.max()), rtol=1e-3, atol=1e-4)
            batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([tokens[-1:]])], 1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        assert row.text == model.tokenizer.decode(tokens, skip_special_tokens=True)
    assert table.frame.word.tolist() == [model.tokenizer.decode([its]) for its in table.frame.token_id]


def test_a_text_can_be_the_target(tiny_lalm, samples):
    run = Question.about(tiny_lalm, samples, "emotion", "P3", True).run(samples[1])
    text = "The speaker's emotion is"
    table = patchscope(tiny_lalm, run, text, layers=(3, 7), progress=False)
    same = Run(Inputs(*tiny_lalm.read([text])))
    again = patchscope(tiny_lalm, run, same, layers=(3, 7), engine="hooks", progress=False)
    assert_close(torch.tensor(table.frame.log_prob.tolist()), torch.tensor(again.frame.log_prob.tolist()))
    assert table.frame.target_layer.tolist() == [3, 7]
    assert table.top().shape == (2, 2)
    assert repr(table).startswith("Patchscope(2 states of tiny_lalm into tiny_lalm)")


def test_models_of_different_widths(tiny_lalm, samples, pair):
    from reference import chirps, hf_batch, tiny_hf

    narrow = from_hf(tiny_hf())
    run = Run(Inputs.from_hf(hf_batch(chirps([0.5]))))
    with pytest.raises(InputError, match="A state of 64 numbers has no place in a model with states of 128"):
        patchscope(narrow, run, "text", into=tiny_lalm, progress=False)
    with pytest.raises(InputError, match="There are 4 layers in the decoder"):
        patchscope(narrow, run, run, layers=(4,), progress=False)


@pytest.mark.parametrize("kind", [Ablation, ScaledAttention, Steering, NeuronGain, Patchscope])
def test_tables_are_saved_and_loaded(kind, tiny_lalm, samples, tmp_path):
    few = samples[:2]
    make = {
        Ablation: lambda: ablate(tiny_lalm, few, units=[(3, (0,))], place="last", **QUIET),
        ScaledAttention: lambda: scale_attention(tiny_lalm, few, layers=["all"], **QUIET),
        Steering: lambda: steer(
            tiny_lalm, few, direction=audio_minus_silence(tiny_lalm, few, attribute="emotion"), layers=(2,), **QUIET
        ),
        NeuronGain: lambda: neuron_gain(tiny_lalm, few[:1] + samples[5:], k=3, n_choosing=1, labels=[], **QUIET),
        Patchscope: lambda: patchscope(
            tiny_lalm, Question.about(tiny_lalm, few, "emotion", "P3", True).run(few[0]), "a text", progress=False
        ),
    }
    table = make[kind]()
    path = table.save(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(kind.load(path).to_frame(), table.to_frame())


@pytest.mark.numbers
def test_the_examples_in_the_docs_run(tiny_lalm, samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "interventions.md").read_text(encoding="utf-8")
    run = Question.about(tiny_lalm, samples, "emotion", "P3", True).run(samples[0])
    names = {"model": tiny_lalm, "samples": samples[:4], "run": run}
    for block in text.split("```python")[1:]:
        exec(block.split("```")[0], names)
    assert set(names["summary"].picked_on) == {"held_out", "same"}
    assert len(names["written"].tokens) == 1
    assert names["scoped"].frame.text.notna().all()
