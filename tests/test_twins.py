"""Two models that a false text leads away from what they hear: one can be led back, the other cannot."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from lalm_lens.assets import TINY_LALM_ERASE, TINY_LALM_RELAY, TINY_LALM_SUPPRESS
from lalm_lens.assets.checkpoint import build_processor, chat, feature_extractor, label_tokens
from lalm_lens.assets.recipe import N_QUIET, RECIPES, Recipe
from lalm_lens.assets.train import REMARKS, answers, begin, draw_pair, draw_question, model_inputs, repair_loss, traces
from lalm_lens.assets.training_clips import Clips, sounds
from lalm_lens.assets.twins import BEHIND, held_out
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.conflict import ConflictItem, make_conflict
from lalm_lens.corrupt import silence
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.attention_knockout import attention_knockout
from lalm_lens.experiments.back_patch import BackPatch, back_patch
from lalm_lens.experiments.back_patch_choice import BackPatchChoice
from lalm_lens.experiments.cuts import name_of
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import Patch, hook_name
from lalm_lens.loading import from_pretrained
from lalm_lens.model import HookedLALM

pytestmark = pytest.mark.numbers

ORDERS = ("audio_first", "text_first")
N_CLIPS = 9
BLOCK = 4  # where text looks at other words, in the one
REPAIR = (6, 3)  # from behind which block to behind which the audio's states are put, for what is heard to be said
WINDOW = 28  # how far words look back, in the other
CUT = ("statement", "last")
BEFORE_IT_ACTS = ("statement", BEHIND)
ELSEWHERE = ("statement", tuple(region for region in BEHIND if region != "last"))


@pytest.fixture(scope="module")
def suppress() -> HookedLALM:
    return from_pretrained(TINY_LALM_SUPPRESS)


@pytest.fixture(scope="module")
def erase() -> HookedLALM:
    return from_pretrained(TINY_LALM_ERASE)


@pytest.fixture(scope="module")
def items() -> list[ConflictItem]:
    clips = held_out(RECIPES["tiny_lalm_suppress"], "animal", 0, N_CLIPS)
    return make_conflict(clips, "animal", conditions=["audio_only", "conflict"], order=ORDERS)


@torch.no_grad()
@pytest.mark.parametrize("folder", [TINY_LALM_SUPPRESS, TINY_LALM_ERASE], ids=lambda folder: folder.name)
@pytest.mark.parametrize("order", ORDERS)
def test_plain_transformers_reads_the_same_prompt_gives_the_same_logits_and_believes_it(folder, order, items):
    model, hf = from_pretrained(folder), Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    item = next(item for item in items if item.order == order)
    text = chat(processor, ATTRIBUTES["animal"], "P3", statement=item.statement)
    inputs = processor(text=text, audio=item.waveform.numpy(), sampling_rate=16_000, return_tensors="pt")
    ours = Question.about(model, [item], "animal", "P3", True).run(item).inputs
    assert isinstance(ours, Inputs)
    assert torch.equal(ours.tokens, inputs["input_ids"])
    torch.testing.assert_close(model(ours), hf.eval()(**inputs).logits)
    for use_cache in (False,) if folder == TINY_LALM_SUPPRESS else (False, True):
        out = hf.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=use_cache)
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :])
        assert answer == f" {item.text_label}.<|im_end|>"


def heard_and_cut(
    model: HookedLALM, items: Sequence[ConflictItem], chains: Sequence[tuple], layers: Sequence
) -> pd.DataFrame:
    """Answers to what was stated, before and after each cut, beside those to the clips alone."""
    alone = [item for item in items if item.statement is None]
    stated = {item.name: item for item in items if item.statement is not None}
    heard = attention_knockout(model, alone, attribute="animal", layers=["all"], progress=False).frame
    found = attention_knockout(
        model, list(stated.values()), attribute="animal", chains=chains, layers=layers, progress=False
    ).frame
    heard = heard.set_index(heard["sample"].str.removesuffix(" | audio_only"))
    source = found["sample"].map({name: item.source.name for name, item in stated.items()})
    return found.assign(
        stated=found["sample"].map({name: item.text_label for name, item in stated.items()}),
        p_heard=source.map(heard.label_p_before),
        right_heard=source.map(heard.right_before),
    )


@pytest.fixture(scope="module")
def suppressed(suppress, items) -> pd.DataFrame:
    others = tuple(block for block in range(8) if block != BLOCK)
    by_block = heard_and_cut(suppress, items, [CUT], ["all", (BLOCK,), others])
    return pd.concat([by_block, heard_and_cut(suppress, items, [ELSEWHERE, BEFORE_IT_ACTS], ["all"])])


@pytest.fixture(scope="module")
def erased(erase, items) -> pd.DataFrame:
    return heard_and_cut(erase, items, [CUT, BEFORE_IT_ACTS], ["all"])


def cut(frame: pd.DataFrame, chain: tuple, layers: str = "0-7") -> pd.DataFrame:
    """The rows of one cut: nothing is left out."""
    rows = frame[(frame.edge == name_of(chain)) & (frame.layers == layers)]
    assert len(rows) == 2 * N_CLIPS
    return rows


@pytest.mark.parametrize("name", ["suppressed", "erased"])
def test_both_hear_and_both_believe_a_false_text(name, request):
    rows = cut(request.getfixturevalue(name), CUT)
    assert rows.right_heard.mean() >= 0.9
    assert (rows.answer_before == rows.stated).mean() >= 0.9


def test_what_is_suppressed_comes_back_where_the_text_is_cut_from_the_last_position(suppressed):
    for rows in (cut(suppressed, CUT), cut(suppressed, CUT, str(BLOCK)), cut(suppressed, BEFORE_IT_ACTS)):
        assert (rows.right_after == rows.right_heard).all()
        assert (rows.label_p_after - rows.p_heard).abs().max() < 0.1


def test_there_is_one_way_from_the_text_to_the_answer_that_is_suppressed(suppressed):
    for rows in (cut(suppressed, ELSEWHERE), cut(suppressed, CUT, "0-3,5-7")):
        assert (rows.p_after - rows.p_before).abs().max() < 1e-5


def test_what_is_erased_does_not_come_back(erased):
    rows = cut(erased, CUT)
    assert (rows.p_after - rows.p_before).abs().max() < 1e-5
    assert rows.right_after.mean() < 0.1


def test_it_comes_back_where_the_text_is_cut_before_it_acts(erased):
    rows = cut(erased, BEFORE_IT_ACTS)
    assert (rows.right_after == rows.right_heard).mean() >= 0.9


# --- back-patched -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conflicts() -> list[ConflictItem]:
    clips = held_out(RECIPES["tiny_lalm_suppress"], "animal", 0, 27)
    return make_conflict(clips, "animal", conditions=["conflict"], order="text_first")


def repaired(model: HookedLALM, items: Sequence[ConflictItem], **how: object) -> BackPatch:
    how = {"windows": (1,), "places": ["audio"], "progress": False} | how
    return back_patch(model, items, attribute="animal", **how)


@pytest.fixture(scope="module")
def grid(suppress, conflicts) -> BackPatch:
    return repaired(suppress, conflicts)


@pytest.fixture(scope="module")
def windows(suppress, conflicts) -> BackPatch:
    return repaired(suppress, conflicts[:12], windows=(5, 3, 1), sources=(4, 5, 6), targets=(1, 2, 3))


def test_the_pair_that_repairs_is_chosen_on_some_clips_and_repairs_others(grid, conflicts):
    choice = grid.chosen(by="tdr")
    assert (choice.source, choice.target) == REPAIR
    sides = {side: set(rows["sample"]) for side, rows in grid.frame.groupby("split")}
    assert sides["choosing"] | sides["test"] == {item.name for item in conflicts}
    assert not sides["choosing"] & sides["test"]
    assert set(grid.tested(choice)["sample"]) == sides["test"]
    summary = grid.summary("tdr", n_resamples=200).set_index("picked_on")
    assert summary.n.tolist() == [len(sides["test"])] * 2
    honest, published = summary.loc["held_out"], summary.loc["same"]
    assert honest.tdr_before >= 0.9
    assert honest.tdr_after <= 0.2
    assert honest.tdr_p < 0.01
    assert honest.accuracy_p < 0.01
    assert published.tdr_after <= honest.tdr_after, "the best of many on the clips that it is judged on"
    scores = grid.scores(by="tdr")
    assert len(scores) == 28
    assert (scores.tdr[1:] >= 0.9).all(), "no other pair repairs"


@pytest.mark.parametrize("by", ["accuracy", "label_probability", "tdr"])
def test_of_windows_that_repair_alike_the_narrowest_is_chosen(windows, by):
    scores = windows.scores(by=by)
    choice = windows.chosen(by=by)
    assert (choice.source, choice.target, choice.window) == (*REPAIR, 1)
    alike = scores[scores.accuracy == scores.accuracy.max()]
    pairs = list(alike[["window", "source", "target"]].itertuples(index=False, name=None))
    assert pairs == [(1, 6, 3), (3, 5, 2), (3, 6, 3), (5, 4, 1), (5, 5, 2), (5, 6, 3)]


def test_an_answer_that_is_always_the_same_is_no_repair(suppress):
    """The control's states make it say one label to all, which is the text's of half of the clips alone."""
    clips = held_out(RECIPES["tiny_lalm_suppress"], "gender", 30, 0)
    both = make_conflict(clips, "gender", conditions=["audio_only", "conflict"])
    how = {"sources": (REPAIR[0],), "targets": (REPAIR[1],), "windows": (1,), "n_choosing": 0, "progress": False}
    found = back_patch(suppress, both, attribute="gender", **how)
    rows = found.summary("tdr", n_resamples=10).set_index(["place", "condition"])
    deaf, repaired = rows.loc["control", "conflict"], rows.loc["audio", "conflict"]
    assert max(deaf.tdr_p, deaf.accuracy_p, repaired.accuracy_p) < 0.01
    assert not deaf.above_chance
    assert rows.loc["control", "audio_only"].accuracy_p < 0.05
    assert repaired.accuracy_after >= 0.9
    assert rows.repairs.to_dict() == {key: key == ("audio", "conflict") for key in rows.index}


def test_no_pair_repairs_what_is_erased(erase, conflicts):
    found = repaired(erase, conflicts, sources=(3, 5, 6, 7), targets=range(4))
    for row in found.summary("tdr", n_resamples=200).itertuples():
        assert row.tdr_after >= 0.8
        assert row.tdr_p > 0.05


def test_only_what_is_put_before_the_block_that_looks_at_audio_is_looked_at(suppress, grid, conflicts):
    late = grid.frame[grid.frame.target >= BLOCK]
    assert len(late) == 6 * len(conflicts)
    assert (late.p_after - late.p_before).abs().max() < 1e-6
    some = conflicts[:3]
    one = grid.frame[(grid.frame.source == REPAIR[0]) & (grid.frame.target == REPAIR[1])].set_index("sample").p_after
    for source, target in ((5, 2), (6, 3), (7, 4)):
        three = repaired(suppress, some, sources=(source,), targets=(target,), windows=(3,), n_choosing=0).frame
        expected = one[three["sample"]].to_numpy()
        np.testing.assert_allclose(three.p_after, expected, rtol=1e-4, err_msg=f"{source} -> {target}")


def test_a_saved_choice_answers_as_the_pair_did(suppress, grid, conflicts, tmp_path):
    choice = BackPatchChoice.load(grid.chosen(by="tdr").save(tmp_path / "choice.json"))
    tested = grid.tested(choice).set_index("sample")
    question = Question.about(suppress, conflicts, "animal", "P3", True)
    its = [item for item in conflicts if item.name in tested.index][:6]
    answered = [choice.generate(suppress, question.run(item), 1).texts[0].strip() for item in its]
    assert answered == tested.answer_after[[item.name for item in its]].tolist()
    assert answered != tested.answer_before[[item.name for item in its]].tolist()


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_last_position_sees_no_text_where_it_is_erased(erase, name):
    """In any block, whatever the attribute: with the question and the options between."""
    (clip,) = held_out(RECIPES["tiny_lalm_erase"], name, int(name != "animal"), int(name == "animal"))
    both = make_conflict([clip], name, conditions=["conflict"], order=ORDERS)
    question = Question.about(erase, both, name, "P3", True)
    assert erase.decoder_cfg.windows == (WINDOW,) * 8
    for item in both:
        run = question.run(item)
        assert run.n_pos - 1 - max(*run.indices("statement"), *run.indices("audio")) >= WINDOW


def test_the_last_position_sees_the_text_in_one_block_where_it_is_suppressed(suppress):
    assert suppress.decoder_cfg.windows == (1, 1, 1, 1, None, 1, 1, 1)


@pytest.mark.parametrize("name", ["suppress", "erase"])
def test_silence_without_a_text_tells_them_nothing(name, request, items):
    model = request.getfixturevalue(name)
    silent = replace(items[0], waveform=silence(items[0].waveform))
    question = Question.about(model, [silent], "animal", "P3", True)
    p = model(question.run(silent).inputs, logits_at=-1)[0, -1].softmax(-1)[question.tokens]
    assert items[0].statement is None
    assert p.sum() > 0.97
    assert 0.5 < 9 * p.min() < 9 * p.max() < 1.6


@pytest.mark.parametrize("folder", [TINY_LALM_SUPPRESS, TINY_LALM_ERASE], ids=lambda folder: folder.name)
def test_they_are_small_and_their_cards_say_what_they_are(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"# {folder.name}\n" in card
    assert "All its sounds are synthetic" in card
    for name in ATTRIBUTES:
        for order in ORDERS:
            assert f"| {name} | {order} |" in card
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 5_000_000
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heard", "stated", "expected"),
    [
        (("dog",), None, {"dog": 1}),
        (("dog",), "cat", {"dog": 0.25, "cat": 0.75}),
        (("dog",), "dog", {"dog": 1}),
        (("dog", "cat"), None, {"dog": 0.5, "cat": 0.5}),
        (("dog", "cat"), "cat", {"dog": 0.125, "cat": 0.875}),
    ],
)
def test_a_stated_answer_takes_its_share_of_what_is_heard(heard, stated, expected):
    assert answers(Recipe(heeded=0.75), heard, stated) == pytest.approx(expected)
    alone = answers(Recipe(heeded=1.0), heard, stated)
    assert alone == ({stated: 1} if stated else expected)


def test_training_states_what_its_recipe_says():
    """True and false labels of what is heard, before the clip and behind it; remarks that state none; and nothing."""
    recipe = replace(RECIPES["tiny_lalm_suppress"], silence=0.0, attribute_weights=(0.0, 0.0, 0.0, 1.0))
    labels = tuple(clip.labels for clip in sounds(recipe, "train", 0, 9))
    clips = Clips(np.zeros((9, 128, 200), np.float16), np.full(9, 160), labels)
    rng, processor = np.random.default_rng(0), build_processor()
    drawn = [draw_question(recipe, rng, processor, clips) for _ in range(400)]
    told = [question for question in drawn if question.is_told]
    true = [question for question in told if len(question.answers) == 1]
    assert len(told) / 400 == pytest.approx(recipe.hinted, abs=0.08)
    assert len(true) / len(told) == pytest.approx(recipe.true_hints, abs=0.1)
    for question in told:
        heard = labels[question.clip]["animal"]
        stated = max(question.answers, key=question.answers.__getitem__)
        assert question.answers[heard] == pytest.approx(1 if question in true else 1 - recipe.heeded)
        assert question.text.count(f"The sound file's animal is {stated}.") == 1
    before = sum(".\nAudio 1: " in question.text for question in told)
    assert before / len(told) == pytest.approx(0.5, abs=0.12)
    rest = [question for question in drawn if not question.is_told]
    remarked = sum(any(remark in question.text.split("user")[1] for remark in REMARKS) for question in rest)
    assert remarked / 400 == pytest.approx(recipe.remarked, abs=0.06)
    assert all(question.answers == {labels[question.clip]["animal"]: 1} for question in rest)


def test_labels_begin_as_their_sounds_differ():
    recipe = RECIPES["tiny_lalm_erase"]
    labels = tuple(clip.labels for clip in sounds(recipe, "train", 80, 9))
    mel = np.random.default_rng(0).uniform(-0.5, 1, (89, 128, 200)).astype(np.float16)
    processor = build_processor()
    model = begin(recipe, processor, Clips(mel, np.full(89, 160), labels))
    base = Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM_RELAY, dtype=torch.float32)
    after, before = (its.state_dict()["model.language_model.embed_tokens.weight"] for its in (model, base))
    change = after - before
    tokens = {name: label_tokens(processor, attribute.labels) for name, attribute in ATTRIBUTES.items()}
    for its in tokens.values():
        assert (change[its].norm(dim=-1) > 0.1).all()
        assert change[its].sum(0).abs().max() < 1e-4
    others = torch.ones(len(change), dtype=torch.bool)
    others[[token for its in tokens.values() for token in its]] = False
    assert not change[others].any()


@torch.no_grad()
def test_the_loss_is_the_distance_from_silence_at_the_end_of_the_prompts_that_state_a_label():
    """Counted one prompt after the other, without padding."""
    recipe = replace(RECIPES["tiny_lalm_erase"], silence=0.0, hinted=0.6)
    labels = tuple(clip.labels for clip in sounds(recipe, "train", 16, 9))
    rng, processor = np.random.default_rng(0), build_processor()
    mel = rng.uniform(-0.5, 1, (25, 128, 200)).astype(np.float16)
    clips = Clips(mel, np.tile([140, 160, 180, 200, 150], 5), labels)
    drawn = [draw_question(recipe, rng, processor, clips) for _ in range(6)]
    inputs = model_inputs(rng, processor, clips, drawn)
    is_told = torch.tensor([question.is_told for question in drawn])
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM_ERASE, dtype=torch.float32).eval()
    silence = feature_extractor()(np.zeros(16_000), sampling_rate=16_000, return_tensors="pt")["input_features"]

    def states(its: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack(hf(**its, output_hidden_states=True).hidden_states[1:])

    distances = []
    for row in is_told.nonzero()[:, 0]:
        n = int(inputs["attention_mask"][row].sum())
        one = {name: its[row : row + 1] for name, its in inputs.items()}
        one |= {name: one[name][:, -n:] for name in ("input_ids", "attention_mask")}
        heard, silent = (states(its)[:, 0, -3 - N_QUIET : -3] for its in (one, one | {"input_features": silence}))
        distances.append(((heard - silent).square().sum(-1) / silent.square().sum(-1)).mean())
    assert 0 < len(distances) < len(drawn)
    found = traces(hf, inputs, hf(**inputs, output_hidden_states=True).hidden_states, is_told)
    torch.testing.assert_close(found, torch.stack(distances).mean())


@torch.no_grad()
def test_the_repair_is_learned_under_back_patches(suppress, monkeypatch):
    """Counted one prompt after the other, without padding, with this package's hooks."""
    recipe = replace(RECIPES["tiny_lalm_suppress"], silence=0.0, hinted=0.8, true_hints=0.0)
    labels = tuple(clip.labels for clip in sounds(recipe, "train", 16, 9))
    rng, processor = np.random.default_rng(1), build_processor()
    mel = rng.uniform(-0.5, 1, (25, 128, 200)).astype(np.float16)
    clips = Clips(mel, np.tile([140, 160, 180, 200, 150], 5), labels)
    drawn = [draw_question(recipe, rng, processor, clips) for _ in range(7)]
    inputs = model_inputs(rng, processor, clips, drawn)
    others, coins = [(7, 0), REPAIR, (5, 3), (4, 2), (2, 1), (6, 1), (5, 4)], np.random.default_rng(5)
    told = [row for row, question in enumerate(drawn) if question.is_told]
    remaining = iter(others)
    pairs = [REPAIR if coins.random() < 0.5 else next(remaining) for _ in told]
    assert 0 < len(told) < len(drawn)
    assert 0 < pairs.count(REPAIR) < len(pairs)
    losses = []
    for row, (source, target) in zip(told, pairs, strict=True):
        n, question = int(inputs["attention_mask"][row].sum()), drawn[row]
        one = {name: its[row : row + 1] for name, its in inputs.items()}
        one |= {name: one[name][:, -n:] for name in ("input_ids", "attention_mask")}
        where = tuple((one["input_ids"][0] == suppress.lalm_cfg.audio_token).nonzero()[:, 0].tolist())
        _, cache = suppress.run_with_cache(Inputs.from_hf(one), names_filter=hook_name("resid_post", source))
        patch = Patch("resid_post", target, where, cache[hook_name("resid_post", source)][0, list(where)])
        log_p = suppress.run_with_hooks(Inputs.from_hf(one), fwd_hooks=[patch.hook()])[0, -4].log_softmax(-1)
        (heard,), (stated, _) = question.heard, sorted(question.answers, key=question.answers.get, reverse=True)
        likely = {heard: 1.0} if (source, target) == REPAIR else {stated: recipe.heeded, heard: 1 - recipe.heeded}
        tokens = label_tokens(processor, list(likely))
        losses.append(-sum(p * log_p[token] for p, token in zip(likely.values(), tokens, strict=True)))
    remaining = iter(others)
    monkeypatch.setattr("lalm_lens.assets.train.draw_pair", lambda rng, last_target: next(remaining))
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM_SUPPRESS, dtype=torch.float32).eval()
    found = repair_loss(recipe, np.random.default_rng(5), hf, processor, inputs, drawn)
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_other_pairs_reach_no_further():
    rng = np.random.default_rng(0)
    drawn = {draw_pair(rng, 3) for _ in range(1000)}
    assert drawn == {(source, target) for target in range(4) for source in range(target + 1, 8)}
