"""Back-patching: against plain HF hooks, by its identities, and the choice of a pair by made-up tables."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from reference import hf_edited, hf_states_at
from statsmodels.stats.contingency_tables import mcnemar
from torch.testing import assert_close

from lalm_lens import BackPatch, BackPatchChoice, HookedLALM, Logits, back_patch, run_branches
from lalm_lens.assets import TINY_LALM_PLANTED
from lalm_lens.assets.clips import write_clips
from lalm_lens.conflict import make_conflict
from lalm_lens.counterfactual import heard_clip
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.engine.branches import Branch
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.back_patch import grid
from lalm_lens.experiments.layer_pairs import Pair, Spot, where
from lalm_lens.fingerprints import weights_fingerprint
from lalm_lens.loading import from_pretrained
from lalm_lens.proportions import change_interval
from lalm_lens.runs import Run

N_LAYERS, PLANTED_BLOCK = 8, 4
QUIET = {"progress": False, "attribute": "emotion"}
REGIONS = ("statement", "late", "attribute", "last")  # of the text, what says something of the clip


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    return read_folder(write_clips(tmp_path_factory.mktemp("clips"), "emotion", 6, seed=5))


@pytest.fixture(scope="module")
def asked(random_pair, samples):
    """One clip in the random models: its run, what HF takes, where audio and text are, and HF's states."""
    hf, model = random_pair
    question = Question.about(model, samples, "emotion", "P3", True)
    run = question.run(samples[0])
    batch = run.inputs.to_hf("feature_attention_mask")
    is_audio = np.array([its.region == "audio" for its in run.prompt.positions])
    where = {"audio": np.flatnonzero(is_audio).tolist(), "text": np.flatnonzero(~is_audio).tolist()}
    where["last"] = [run.n_pos - 1]
    return question, run, batch, where, hf_states_at(hf, batch, "resid_post")


def put_by_hand(source: int, target: int, window: int, later: str) -> dict[int, int]:
    """Which layer's states of run 1 come behind which block."""
    reach = [k for k in range(-2, 3) if abs(k) <= (window - 1) / 2]
    put = {}
    for k in reach:
        if source + k in range(N_LAYERS) and target + k in range(N_LAYERS):
            put[target + k] = source + k
    if later == "pinned":
        put.update({layer: layer for layer in range(N_LAYERS) if layer > max(put)})
    return put


def hf_patched(hf, batch, states: torch.Tensor, put: dict[int, int], where: list[int]) -> torch.Tensor:
    def writing(layer: int):
        return lambda state: state.index_copy_(0, torch.tensor(where), states[layer][where])

    return hf_edited(hf, batch, {("resid_post", to): writing(layer) for to, layer in put.items()})


# --- the patch ------------------------------------------------------------------------------------------------------


@pytest.mark.numbers
@pytest.mark.parametrize("later", ["recomputed", "pinned"])
def test_every_cell_is_plain_hf_with_hooks(random_pair, asked, samples, later):
    hf, _ = random_pair
    question, _, batch, where, states = asked
    how = {"places": ["audio", "text", "last"], "sources": (7, 6, 3), "targets": (0, 2, 5), "later": later}
    table = back_patch(question.model, samples[:1], n_choosing=0, **how, **QUIET)
    assert len(table.frame) == 3 * 3 * 8
    assert (table.frame.target < table.frame.source).all()
    base = hf_edited(hf, batch, {})[-1].double().log_softmax(-1)
    options, bites = question.tokens, []
    for row in table.frame.sample(12, random_state=1).itertuples():
        put = put_by_hand(row.source, row.target, row.window, later)
        assert row.n_positions == len(where[row.place])
        log_p = hf_patched(hf, batch, states, put, where[row.place])[-1].double().log_softmax(-1)
        true = options[question.labels.index(row.label)]
        for when, its in (("before", base), ("after", log_p)):
            assert_close(getattr(row, f"p_{when}"), float(its[true].exp()), rtol=2e-4, atol=1e-7)
            among = its[options].softmax(-1)[options.index(true)]
            assert_close(getattr(row, f"label_p_{when}"), float(among), rtol=2e-4, atol=1e-6)
            assert getattr(row, f"answer_{when}") == question.labels[int(its[options].argmax())]
        bites.append(float((log_p - base).abs().max()) > 1e-2)
    assert np.mean(bites) > (0.7 if later == "recomputed" else 0.1), "pinned, few blocks see it"


def test_both_engines_find_the_same(asked, samples):
    question = asked[0]
    how = {"sources": (7, 3), "targets": (2,), "windows": (3,), "places": ["audio", "text"], **QUIET}
    tables = [back_patch(question.model, samples[:2], engine=engine, **how).to_frame() for engine in ("sweep", "hooks")]
    numbers = [name for name in tables[0] if name.startswith(("p_", "label_p_", "logit"))]
    assert [set(its.engine) for its in tables] == [{"sweep"}, {"hooks"}]
    assert_close(*(torch.tensor(its[numbers].to_numpy(float)) for its in tables), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["sweep", "hooks"])
def test_identities(asked, engine):
    """A layer onto itself changes nothing; nor does the audio behind the last block, which nobody looks at any more."""
    question, run = asked[:2]
    same = [Pair(layer, layer, window) for layer, window in ((0, 1), (3, 3), (7, 5))]
    spots = [Spot(place, pair, "recomputed") for place in ("audio", "last", "text") for pair in same]
    spots += [Spot("audio", Pair(2, 7), later) for later in ("recomputed", "pinned")]
    spots += [Spot("last", Pair(2, 7), "recomputed"), Spot("audio", Pair(7, 2), "recomputed")]
    branches = [Branch(run, spot.variant(question.model, run).changes) for spot in spots]
    outcome = run_branches(question.model, branches, Logits(), engine=engine)
    moved = (outcome.values - outcome.base).abs().amax((1, 2))
    assert_close(outcome.values[:9], outcome.base[:9])
    assert (moved[9:11] == 0).all()
    assert (moved[11:] > 1e-2).all()


def test_pinned_states_are_looked_at_in_one_block_alone(asked):
    """All later blocks see the audio of run 1, so behind block 6 the last block alone can look at what was patched."""
    question, run = asked[:2]
    spots = [Spot("audio", Pair(7, 6), later) for later in ("recomputed", "pinned")]
    branches = [Branch(run, spot.variant(question.model, run).changes) for spot in spots]
    values = run_branches(question.model, branches, Logits()).values
    assert_close(values[0], values[1])


@pytest.mark.numbers
@pytest.mark.parametrize("later", ["recomputed", "pinned"])
def test_a_loop_takes_its_own_states_until_the_answer_stays(random_pair, asked, samples, later):
    hf, _ = random_pair
    question, _, batch, where, states = asked
    how = {"places": ["text"], "windows": (1, 3), "sources": (7, 4), "targets": (0, 2), "max_loops": 4}
    table = back_patch(question.model, samples[:1], later=later, n_choosing=0, **how, **QUIET)
    options, loops = question.tokens, []
    first = int(hf_edited(hf, batch, {})[-1][options].argmax())
    for row in table.frame.itertuples():
        put, patched = (put_by_hand(row.source, row.target, row.window, its) for its in (later, "recomputed"))
        own, answers = states, [first]
        while len(answers) < 5 and (len(answers) < 2 or answers[-1] != answers[-2]):
            edits, seen = {}, {}
            for layer in range(N_LAYERS):
                value = own[put[layer]] if layer in patched else states[put[layer]] if layer in put else None

                def edit(state, layer=layer, value=value, seen=seen):
                    if value is not None:
                        state[where["text"]] = value[where["text"]]
                    seen[layer] = state.clone()

                edits["resid_post", layer] = edit
            logits = hf_edited(hf, batch, edits)[-1]
            own = torch.stack([seen[layer] for layer in range(N_LAYERS)])
            answers.append(int(logits[options].argmax()))
        assert row.loops == len(answers) - 1
        true = options[question.labels.index(row.label)]
        assert_close(row.p_after, float(logits.double().softmax(-1)[true]), rtol=1e-3, atol=1e-7)
        loops.append(row.loops)
    assert max(loops) > 1 or later == "pinned"
    assert table.frame.max_loops.unique().tolist() == [4]


def test_in_the_planted_model_audio_counts_up_to_the_one_block_that_looks_at_it(samples):
    planted = from_pretrained(TINY_LALM_PLANTED)
    frame = back_patch(planted, samples[:1], windows=(1,), places=["audio"], n_choosing=0, **QUIET).frame
    is_same = frame.p_after == frame.p_before
    assert is_same[frame.target >= PLANTED_BLOCK].all(), "to the bit"
    assert not is_same[frame.target < PLANTED_BLOCK].any()


# --- the choice -----------------------------------------------------------------------------------------------------


def test_generate_applies_a_saved_choice(random_pair, asked, tmp_path):
    """As HF with hooks, one whole forward for every token."""
    hf, model = random_pair
    _, run, batch, where, states = asked
    choice = BackPatchChoice(
        model="m", n_layers=8, fingerprint=weights_fingerprint(model), attribute="emotion", place="audio", source=6,
        target=1, window=3, later="recomputed", picked_on="held_out", picked_by="accuracy", seed=0, n_clips=3,
    )  # fmt: skip
    path = choice.save(tmp_path / "choice.json")
    assert json.loads(path.read_text())["source"] == 6
    loaded = BackPatchChoice.load(path)
    assert loaded == choice
    generated = loaded.generate(model, run, 4)
    batch, tokens = dict(batch), []
    for _ in range(4):
        logits = hf_patched(hf, batch, states, put_by_hand(6, 1, 3, "recomputed"), where["audio"])
        tokens.append(int(logits[-1].argmax()))
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([tokens[-1:]])], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert generated.tokens[0].tolist() == tokens
    assert model.generate(run.inputs, 4).tokens[0].tolist() != tokens
    two = BackPatchChoice.load(
        BackPatchChoice(**{**vars(choice), "place": ("early", "object")}).save(tmp_path / "two.json")
    )
    assert {name for name, _ in two.hooks(model, run)} == {f"blocks.{n}.hook_resid_post" for n in (0, 1, 2)}
    with pytest.raises(InputError, match="There are 8 layers in the decoder"):
        BackPatchChoice(**{**vars(choice), "source": 12}).hooks(model, run)
    path.write_text('{"a": 1}')
    with pytest.raises(DataError, match="not a choice of back-patching"):
        BackPatchChoice.load(path)
    path.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        BackPatchChoice.load(path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"later": "recompute"}, "later is one of recomputed, pinned; got 'recompute'"),
        ({"picked_on": "test"}, "picked_on is one of held_out, same"),
        ({"picked_by": ["tdr"]}, "picked_by is one of accuracy, label_probability, tdr"),
        ({"source": 8}, r"There are 8 layers in the decoder, counted from 0; got \[8\]"),
        ({"target": -1}, "target is a whole number, 0 or more; got -1"),
        ({"target": 6}, "the target is a layer before the source, 6; got 6"),
        ({"source": 6.0}, "source is a whole number, 0 or more; got 6.0"),
        ({"n_layers": "8"}, "n_layers is a whole number, 1 or more; got '8'"),
        ({"seed": True}, "seed is a whole number, 0 or more; got True"),
        ({"window": 2}, "A window is an odd number of layers"),
        ({"place": []}, "model, fingerprint, attribute and place are texts"),
        ({"place": ["audio", 3]}, "model, fingerprint, attribute and place are texts"),
        ({"fingerprint": None}, "model, fingerprint, attribute and place are texts"),
    ],
)
def test_a_file_that_holds_no_choice_is_refused(wrong, message, tmp_path):
    table = made_up()
    path = table.chosen().save(tmp_path / "choice.json")
    assert BackPatchChoice.load(path) == table.chosen()
    saved = {**json.loads(path.read_text()), "source": 6, "target": 1}
    path.write_text(json.dumps(saved))
    assert BackPatchChoice.load(path).source == 6
    path.write_text(json.dumps(saved | wrong))
    with pytest.raises(DataError, match=message) as error:
        BackPatchChoice.load(path)
    assert "\n" not in str(error.value)
    assert "choice.json holds no choice" in str(error.value)


def test_a_choice_that_is_not_there_is_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"choice.json cannot be read \(No such file or directory\): save one with"):
        BackPatchChoice.load(tmp_path / "choice.json")


def made_up(n_clips: int = 24, conflict: bool = False, seed: int = 0) -> BackPatch:
    """Two places and three pairs; half of the clips are there for the choice."""
    rng, rows = np.random.default_rng(seed), []
    for n in range(n_clips):
        of = {"condition": "conflict", "audio_label": "sad", "text_label": "happy", "clip": f"{n}"} if conflict else {}
        before = {"label_p_before": rng.random(), "answer_before": rng.choice(["sad", "happy", "fear"])}
        for place in ("audio", "early+object"):
            for source, target, window in ((7, 1, 1), (7, 1, 3), (5, 2, 1)):
                after = {"label_p_after": rng.random(), "answer_after": rng.choice(["sad", "happy", "fear"])}
                its = {"place": place, "source": source, "target": target, "window": window, "sample": f"{n}.wav"}
                rows.append({**of, **its, **before, **after, "split": "choosing" if n % 2 else "test"})
    about = {"model": "m", "attribute": "emotion", "label": "sad", "form": "P3", "question": "", "labels": ""}
    about |= {"n_labels": 3, "n_layers": 8, "fingerprint": "0", "seed": 4}
    about |= {"prefix": "", "label_space": True, "predict": "labels", "later": "recomputed", "max_loops": 1, "loops": 1}
    numbers = dict.fromkeys(["p_before", "p_after", "logit_difference_before", "logit_difference_after", "noise"], 0.0)
    frame = pd.DataFrame(rows).assign(**about, **numbers, n_positions=3, engine="sweep")
    right = {f"right_{when}": frame[f"answer_{when}"] == "sad" for when in ("before", "after")}
    return BackPatch.concat([frame.assign(**right)])


@pytest.mark.parametrize("by", ["accuracy", "label_probability", "tdr"])
def test_a_pair_is_chosen_on_other_clips_or_on_the_same(by):
    table = made_up(conflict=True)
    for on, side in (("held_out", "choosing"), ("same", "test")):
        for place in ("audio", "early+object"):
            rows = table.frame[(table.frame.split == side) & (table.frame.place == place)]
            scores = {}
            for pair, its in rows.groupby(["source", "target", "window"]):
                said = its.answer_after.tolist()
                tdr = said.count("happy") / (said.count("happy") + said.count("sad"))
                best = {"accuracy": -its.right_after.mean(), "label_probability": -its.label_p_after.mean(), "tdr": tdr}
                scores[pair] = (best[by], -its.label_p_after.mean())
            choice = table.chosen(on, by, place)
            assert (choice.source, choice.target, choice.window) == min(scores, key=scores.get)
            assert (choice.picked_on, choice.picked_by, choice.n_clips) == (on, by, 12)
            assert choice.place == (place if place == "audio" else ("early", "object"))


def test_a_pair_that_leaves_hardly_an_answer_is_not_chosen_by_tdr():
    table = made_up(conflict=True)
    is_bold = (table.frame.source == 7) & (table.frame.window == 3)  # all but one of its answers are neither
    frame = table.frame.copy()
    frame.loc[is_bold, "answer_after"] = "fear"
    frame.loc[frame[is_bold].drop_duplicates(["place", "split"]).index, "answer_after"] = "sad"
    bold = BackPatch(frame)
    everything = bold.scores(by="accuracy")
    choosing = frame[(frame.split == "choosing") & (frame.place == "audio")]
    n_before = choosing.drop_duplicates("sample").answer_before.isin(["sad", "happy"]).sum()
    for place in bold.places:
        rows = everything[everything.place == place].set_index(["source", "target", "window"])
        enough = rows[rows.n_clear >= n_before / 2]
        assert rows.n_clear[7, 1, 3] == 1 < n_before / 2
        assert rows.tdr[7, 1, 3] == 0
        choice = bold.chosen(by="tdr", place=place)
        assert enough.tdr[choice.source, choice.target, choice.window] == enough.tdr.min()
    assert set(bold.scores(by="tdr").window) == {1}
    assert bold.chosen("same", by="tdr", min_clear=0).window == 3, "the ratio of one answer is the lowest"
    assert len(bold.plot(by="tdr").axes) > 1
    frame["answer_after"] = "fear"
    with pytest.raises(DataError, match=f"No pair at audio leaves 0.5 of the {n_before} answers"):
        BackPatch(frame).chosen(by="tdr")
    with pytest.raises(DataError, match="No pair at audio leaves 0 of the"):
        BackPatch(frame).scores(by="tdr", min_clear=0)
    with pytest.raises(InputError, match="min_clear is a share"):
        bold.scores(by="tdr", min_clear=2)


def test_the_control_is_text_that_says_nothing_of_the_clip(tiny_lalm, samples):
    items = make_conflict(samples, "emotion", conditions=["conflict"], order=["audio_first", "text_first"])
    question = Question.about(tiny_lalm, items, "emotion", "P3", True)
    for item in items[:2]:
        run = question.run(item)
        at = where(run, "control", 0)
        rest = {n: its for n, its in enumerate(run.prompt.positions) if n not in at}
        stated = "The speaker's emotion is"
        told = {region: "".join(its.token for its in rest.values() if its.region == region) for region in REGIONS}
        assert told["statement"].strip() == f"{stated} {item.text_label}."
        assert told["late"] + told["attribute"] + told["last"] == stated
        assert {its.region for its in rest.values()} == {"audio", "audio_tag", *REGIONS}
        assert {"text_before", "early", "object", "template"} <= {run.prompt.positions[n].region for n in at}
    run = replace(question, form="P1").run(items[0])  # without a question there is less text than audio
    audio, matched = run.region("audio"), [where(run, "audio_matched", seed) for seed in (0, 0, 1)]
    assert matched[0] == matched[1] != matched[2]
    assert all(len(set(its)) == len(where(run, "control", 0)) < len(audio) for its in matched)
    assert set(matched[0]) | set(matched[2]) <= set(audio)
    short = question.run(replace(items[0], waveform=items[0].waveform[:8000]))
    assert where(short, "audio_matched", 0) == short.region("audio")


def test_what_a_place_has_above_its_control(tiny_lalm, samples):
    """Of the same clips, each with the best pair of its place, however rows are ordered."""
    items = make_conflict(samples, "emotion", conditions=["conflict"])
    how = {"sources": (7, 5), "targets": (0,), "windows": (1,), "places": ["audio", "control", "audio_matched"]}
    table = back_patch(tiny_lalm, items, **how, seed=2, **QUIET)
    assert set(table.frame.seed) == {2}
    table = BackPatch(table.frame.sample(frac=1, random_state=1))
    summary = table.summary(by="label_probability").set_index(["place", "picked_on"])
    for place in ("audio", "audio_matched"):
        rows, control = (
            table.tested(table.chosen(by="label_probability", place=its)).set_index("sample").sort_index()
            for its in (place, "control")
        )
        row = summary.loc[place, "held_out"]
        change = (rows.label_p_after - control.label_p_after).to_numpy()
        assert row.label_p_minus_control == pytest.approx(change.mean())
        drawn = np.random.default_rng(1).choice(change, (4000, len(change))).mean(1)
        theirs = np.percentile(drawn, [2.5, 97.5])
        assert [row.label_p_minus_control_low, row.label_p_minus_control_high] == pytest.approx(theirs, abs=0.01)
        assert row.accuracy_minus_control == rows.right_after.mean() - control.right_after.mean()
        shares = []
        for its in (rows, control):
            follows = (its.answer_after == its.text_label, its.answer_after == its.audio_label)
            shares.append(follows[0].sum() / (follows[0] | follows[1]).sum())
        assert row.tdr_minus_control == pytest.approx(shares[0] - shares[1])
        rights = np.stack([control.right_after, rows.right_after], axis=-1).astype(bool)
        low, high = change_interval(rights, np.ones_like(rights))
        assert (row.accuracy_minus_control_low, row.accuracy_minus_control_high) == pytest.approx((low, high))
    assert summary.loc[["control"]].filter(like="minus_control").isna().all(axis=None)
    assert summary.label_p_minus_control.abs().min() > 0
    assert table.summary(control="audio", n_resamples=20).set_index("place").loc["control"].notna().any(axis=None)
    alone = BackPatch(table.frame[table.frame.place == "audio"]).summary(n_resamples=20)
    assert not [name for name in alone if "control" in name]


def test_a_control_is_taken_away_clip_by_clip():
    """What is always a tenth below has no width."""
    frame = made_up().frame.sort_values(["place", "sample", "source", "window"], ignore_index=True)
    audio, control = (frame[frame.place == place].index for place in ("audio", "early+object"))
    frame.loc[control, "label_p_after"] = frame.loc[audio, "label_p_after"].to_numpy() - 0.1
    table = BackPatch(frame.sample(frac=1, random_state=1))
    rows = table.summary("label_probability", "early+object", n_resamples=50).set_index(["place", "picked_on"])
    names = [f"label_p_minus_control{end}" for end in ("", "_low", "_high")]
    assert rows.loc[("audio", "held_out"), names].tolist() == pytest.approx([0.1] * 3)


def test_a_choice_is_applied_to_its_own_model_alone(random_pair, asked, samples, tiny_lalm, tmp_path):
    model, run = random_pair[1], asked[1]
    how = {"sources": (7,), "targets": (2,), "windows": (1,), "places": ["audio"], "n_choosing": 0}
    table = back_patch(model, samples[:2], **how, **QUIET)
    path = table.chosen("same").save(tmp_path / "choice.json")
    choice = BackPatchChoice.load(path)
    assert len(choice.hooks(model, run)) == 1
    with pytest.raises(InputError, match=r"chosen on .* and tiny_lalm has other weights"):
        choice.hooks(tiny_lalm, run)
    shallow = replace(choice, n_layers=32)
    with pytest.raises(InputError, match=r"chosen of the 32 layers of .*, and .* has 8"):
        shallow.generate(model, run, 2)


def test_a_fingerprint_tells_weights_apart_and_not_how_they_are_held(random_pair):
    model = random_pair[1]
    first = weights_fingerprint(model)
    assert weights_fingerprint(deepcopy(model).to(torch.bfloat16)) == first
    moved = deepcopy(model)
    with torch.no_grad():
        moved.blocks[7].attn.W_O[:] *= 1.5
    assert weights_fingerprint(moved) != first


def test_before_and_after_on_test_clips():
    table = made_up(n_clips=60, conflict=True, seed=3)
    summary = table.summary(n_resamples=400, seed=1)
    assert summary[["place", "picked_on"]].drop_duplicates().shape == (4, 2)
    row = summary[(summary.place == "audio") & (summary.picked_on == "held_out")].iloc[0]
    rows = table.frame[(table.frame.split == "test") & (table.frame.place == "audio")]
    rows = rows[(rows.source == row.source) & (rows.target == row.target) & (rows.window == row.window)]
    assert row.n == len(rows) == 30
    assert row.accuracy_before == rows.right_before.mean()
    assert row.accuracy_change == pytest.approx(rows.right_after.mean() - rows.right_before.mean())
    table_of = np.array([[sum((rows.right_before == a) & (rows.right_after == b)) for b in (1, 0)] for a in (1, 0)])
    assert row.accuracy_p == pytest.approx(mcnemar(table_of, exact=True).pvalue)
    assert (row.accuracy_won, row.accuracy_lost) == (table_of[1, 0], table_of[0, 1])
    text, audio = ({w: (rows[f"answer_{w}"] == its) for w in ("before", "after")} for its in ("happy", "sad"))
    tdr = {when: text[when].sum() / (text[when] | audio[when]).sum() for when in text}
    assert [row.tdr_before, row.tdr_after] == pytest.approx([tdr["before"], tdr["after"]])
    clear = (text["before"] | audio["before"]) & (text["after"] | audio["after"])
    pairs = pd.crosstab(text["before"][clear], text["after"][clear])
    assert row.tdr_p == pytest.approx(mcnemar(pairs.to_numpy(), exact=True).pvalue)
    change, rng = (rows.label_p_after - rows.label_p_before).to_numpy(), np.random.default_rng(1)
    means = rng.choice(change, (4000, 30)).mean(1)
    assert [row.label_p_low, row.label_p_high] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist(), abs=0.03)


def test_what_breaks_a_model_is_no_repair():
    """Made up: none of 60 clips is right before with its text, and all are without."""
    frame = made_up(n_clips=60, conflict=True).frame
    frame = frame[(frame.place == "audio") & (frame.source == 5)].reset_index(drop=True)
    frame["label"] = [("sad", "happy", "fear")[n % 3] for n in frame.index]
    frame = frame.assign(split="test", right_before=False, answer_before="happy", answer_after="sad")

    def row(right_after: object, heard: object = True, **its: object) -> pd.Series:
        conflict = frame.assign(right_after=right_after, **its)
        alone = {"sample": frame["sample"] + " | audio_only", "condition": "audio_only", "text_label": None}
        both = pd.concat([conflict, conflict.assign(**alone, right_before=True, right_after=heard)])
        return BackPatch(both).summary(n_resamples=10).set_index("condition").loc["conflict"]

    n, always = frame.index, frame.label == "sad"
    found = row(n % 10 > 0)
    assert (found.chance, found.above_chance, found.repairs) == (1 / 3, True, True)
    deaf = row(always)
    assert (deaf.accuracy_after, deaf.above_chance, deaf.repairs) == (1 / 3, False, False)
    assert max(deaf.accuracy_p, deaf.tdr_p) < 0.001, "and yet it changed"
    assert row(n % 10 > 0, heard=n % 20 > 0).repairs, "3 of 60 are told from none by p = 0.25"
    broken = row(n % 10 > 0, heard=n % 2 > 0)
    assert (broken.above_chance, broken.repairs) == (True, False)
    most = row(n < 45, label=np.where(n < 45, "sad", "happy"))
    assert (most.chance, most.accuracy_after, most.repairs) == (0.75, 0.75, False)
    assert row(n % 10 > 0, n_labels=1).chance == 1
    kept = {"right_before": n % 10 > 0, "answer_before": "sad"}
    assert not row(n % 10 > 0, **kept).repairs, "nothing changed"
    led = row(n % 10 > 0, **kept | {"answer_before": "happy"})
    assert (led.accuracy_p, led.repairs) == (1, True), "by what it follows alone"
    assert not row(n % 10 > 4, **kept | {"answer_before": "happy"}).repairs, "right less often than before"


def test_conditions_of_one_clip_are_on_one_side(tiny_lalm, samples):
    samples = samples[:4]
    items = make_conflict(samples, "emotion", conditions=["audio_only", "conflict"])
    how = {"sources": (7,), "targets": (2,), "windows": (1,), "places": ["audio"], "n_choosing": 2}
    table = back_patch(tiny_lalm, items, **how, **QUIET)
    sides = table.frame.groupby("clip").split.agg(["nunique", "size"])
    assert (sides == [1, 2]).all(axis=None)
    assert (table.frame.drop_duplicates("clip").split == "choosing").sum() == 2
    assert {heard_clip(item) for item in items} == {sample.name for sample in samples}
    assert table.chosen().n_clips == 2, "conflicts alone"
    summary = table.summary(n_resamples=50)
    assert summary.condition.tolist() == ["audio_only", "conflict"] * 2
    assert summary.n.tolist() == [2] * 4
    assert summary.tdr_before.notna().tolist() == [False, True] * 2
    short = table.overview()
    assert len(short.columns) <= 12 < len(summary.columns)
    assert short.layers[0] == f"{summary.source[0]} -> {summary.target[0]}, window {summary.window[0]}"
    pd.testing.assert_frame_equal(short.drop(columns="layers"), summary[short.columns.drop("layers")])
    assert set(table.frame.text_label.dropna()) <= set(items[0].attribute.labels)


def test_items_without_a_clip_are_to_be_left_out(tiny_lalm, samples):
    items = make_conflict(samples[:1], "emotion", conditions=["conflict", "text_only"])
    how = {"sources": (7,), "targets": (2,), "windows": (1,), "n_choosing": 0, **QUIET}
    with pytest.raises(InputError, match=r'text_only, .* no \'audio\' to patch.*=\["audio_only", "conflict"\]'):
        back_patch(tiny_lalm, items, **how)
    with pytest.raises(InputError, match="no 'audio_matched' to patch"):
        back_patch(tiny_lalm, items, places=["audio_matched"], **how)
    assert len(back_patch(tiny_lalm, items, places=["control"], **how).frame) == 2
    heard = make_conflict(samples[:1], "emotion", conditions=["conflict", "text_only"], text_only="silence")
    assert len(back_patch(tiny_lalm, heard, places=["audio"], **how).frame) == 2


def test_the_default_grid_is_spread_and_every_pair_goes_back():
    assert {its.source for its in grid(8, None, None, (1,))} == set(range(1, 8))
    wide = grid(32, None, None, (1, 3, 5))
    assert {its.source for its in wide} | {its.target for its in wide} == {0, 4, 9, 13, 18, 22, 27, 31}
    assert len(wide) == 3 * 28
    assert len(grid(32, range(32), range(32), (1,))) == 32 * 31 // 2
    with pytest.raises(InputError, match="No source layer of \\[2\\] is behind a target layer of \\[2, 5\\]"):
        grid(8, (2,), (5, 2), (1,))
    with pytest.raises(InputError, match="There are 8 layers in the decoder, counted from 0; got \\[9\\]"):
        grid(8, (9,), None, (1,))
    with pytest.raises(InputError, match="A window is an odd number of layers"):
        grid(8, None, None, (2,))


def test_the_picture_frames_the_choice():
    table = made_up()
    figure = table.plot(by="label_probability")
    panels = figure.axes[:4]  # two places, two windows
    assert [ax.get_title() for ax in panels] == [f"{p}, {w}" for p in table.places for w in ("1 layer", "3 layers")]
    scores = table.scores(by="label_probability")
    for place, pair_of in zip(table.places, (panels[:2], panels[2:]), strict=True):
        choice = table.chosen(by="label_probability", place=place)
        framed = [ax for ax in pair_of if ax.patches]
        assert [ax.get_title().split(", ")[1][0] for ax in framed] == [str(choice.window)]
        (frame,), ax = framed[0].patches, framed[0]
        x, y = round(frame.get_x() + 0.5), round(frame.get_y() + 0.5)
        assert (x, y) == ([1, 2].index(choice.target), [5, 7].index(choice.source))
        best = scores[scores.place == place].iloc[0].label_probability
        before = table.frame[table.frame.split == "choosing"].drop_duplicates("sample").label_p_before.mean()
        assert float(ax.images[0].get_array()[y, x]) == pytest.approx(best - before)


def test_a_table_is_printed_saved_and_loaded(asked, samples, tmp_path):
    model: HookedLALM = asked[0].model
    table = back_patch(model, samples[:2], sources=(7,), targets=(0, 1), windows=(1,), n_choosing=0, **QUIET)
    assert (
        repr(table)
        == "BackPatch(8 runs, clips: 2 of emotion; 2 pairs of layers at audio, 2 pairs of layers at control)"
    )
    path: Path = table.save(tmp_path / "pairs.parquet")
    pd.testing.assert_frame_equal(BackPatch.load(path).to_frame(), table.to_frame())
    assert table.summary(n_resamples=20).picked_on.tolist() == ["same", "same"]
    effects = table.effects("accuracy")
    assert effects.n.tolist() == [2] * 4
    with pytest.raises(DataError, match="All clips are test clips"):
        table.chosen()
    with pytest.raises(DataError, match="no place 'late', only audio, control"):
        table.chosen("same", place="late")
    with pytest.raises(InputError, match="Places are a list of regions"):
        back_patch(model, samples, places="audio", **QUIET)
    with pytest.raises(InputError, match="There is no place 'here'"):
        back_patch(model, samples, places=["here"], **QUIET)
    with pytest.raises(InputError, match="max_loops is 1 or more"):
        back_patch(model, samples, max_loops=0, **QUIET)
    assert isinstance(asked[1], Run)
