"""Conflict data: balanced, repeatable, and in every prompt where it was meant to be."""

from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import groupby

import pytest
import torch
from desta_golden import NAMES, model_of, needs_vocabularies
from families import FAMILIES
from reference import chirps
from test_desta_prompts import real_processor
from transformers import AutoProcessor

from lalm_lens.assets import TINY_LALM
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.conflict import CONDITIONS, CONFLICT_COLUMNS, FRAMINGS, WARNINGS, Framing, make_conflict
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.errors import AudioError, DataError, InputError, PromptError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.attention_knockout import attention_knockout
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.experiments.logit_lens import logit_lens
from lalm_lens.loading import from_hf
from lalm_lens.pieces import Statement
from lalm_lens.prompts import ChatTemplate, Processor, Prompt

GENDER, ANIMAL = ATTRIBUTES["gender"], ATTRIBUTES["animal"]
ORDERS = ("audio_first", "text_first")
QUIET = {"progress": False}
CLIP = chirps([1.1])[0]


def clips_of(attribute, n: int) -> list[Sample]:
    """`n` clips of each label."""
    return [Sample(f"{label}{k}.wav", label, CLIP) for label in attribute.labels for k in range(n)]


@cache
def processor_of(name: str) -> Processor:
    if name in FAMILIES:
        model = from_hf(FAMILIES[name].build(), FAMILIES[name].processor())
        assert model.processor is not None
        return model.processor
    if name.endswith("_real"):
        return real_processor(name.removesuffix("_real"))
    processor = model_of(name).processor
    assert processor is not None
    return processor


def text_of(prompt: Prompt, *regions: str, label: str | None = None) -> str:
    return "".join(p.token for p in prompt.positions if p.region in regions and label in (None, p.label))


def rest_of(prompt: Prompt) -> list[tuple[str, str, str]]:
    """All that is not stated, and stays as it was, but for the space before the question."""
    rest = [p for p in prompt.positions if p.region != "statement"]
    cut = groupby(rest, lambda p: (p.region, p.segment))
    return [(*key, "".join(p.token for p in its).lstrip(" ")) for key, its in cut]


EVERY = [*FAMILIES, *NAMES, *(pytest.param(f"{name}_real", marks=needs_vocabularies) for name in NAMES)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", EVERY)
def test_what_is_stated_has_its_place_in_every_prompt(name, order):
    processor = processor_of(name)
    for attribute in ATTRIBUTES.values():
        for form in ("P1", "P2", "P3"):
            label = attribute.labels[1]
            statement = FRAMINGS["statement"].statement(attribute, label, order, "adversarial")
            prompt = processor.prompt(attribute, 100, form, statement=statement, answer=label)
            plain = processor.prompt(attribute, 100, form, answer=label)
            assert text_of(prompt, "statement").strip() == str(statement)
            assert text_of(prompt, "statement", label=label) == f" {label}"
            assert {p.segment for p in prompt.positions if p.region == "statement"} == {"none"}
            assert {p.is_correct for p in prompt.positions if p.region == "statement"} == {False, True}
            at = prompt.is_region("statement").nonzero()[:, 0].tolist()
            assert at == list(range(at[0], at[-1] + 1))
            audio = prompt.is_region("audio").nonzero()[:, 0].tolist()
            assert (at[-1] < audio[0]) == (order == "text_first")
            gets_a_turn = name.startswith("desta") and (form == "P1" or (order == "text_first" and "25" not in name))
            if not gets_a_turn:
                assert rest_of(prompt) == rest_of(plain)


def test_desta2_gives_what_is_said_first_a_turn_of_its_own():
    statement = FRAMINGS["statement"].statement(GENDER, "male", "text_first")
    prompt = processor_of("desta2").prompt(GENDER, 100, statement=statement)
    header = "<|start_header_id|>{}<|end_header_id|>"
    assert "".join(p.token for p in prompt.positions).startswith(
        f"<|begin_of_text|><|begin_of_text|>{header.format('user')}\n\n{statement}<|eot_id|>{header.format('audio')}"
    )


@pytest.mark.parametrize("name", [*FAMILIES, *NAMES])
def test_a_prompt_without_a_clip_is_the_same_without_what_stands_for_it(name):
    processor = processor_of(name)
    statement = FRAMINGS["statement"].statement(GENDER, "male", "text_first")
    prompt = processor.prompt(GENDER, None, statement=statement)
    assert {p.region for p in prompt.positions} == {
        *("text_before", "statement", "early", "object", "object_sep", "template", "late", "attribute", "last")
    }
    said = text_of(prompt, "statement", "early", "object", "object_sep")
    assert text_of(prompt, "statement") == str(statement)
    assert said.startswith(f"{statement} What is the gender")
    assert processor.cfg.audio_token not in prompt.tokens
    inputs = processor.inputs([prompt], [])
    assert inputs.mel is None
    assert inputs.tokens.tolist() == [list(prompt.tokens)]
    with pytest.raises(PromptError, match="Without a clip, a question or a statement the user says nothing"):
        processor.prompt(GENDER, None, "P1")
    with pytest.raises(InputError, match="got 1 prompts, 0 of them with a clip, and 1 clips"):
        processor.inputs([prompt], [CLIP])


@pytest.mark.parametrize("content", ["audio text", "text audio text", "text"])
def test_the_tokens_are_those_of_hf(tiny_lalm, content):
    """Of Qwen2-Audio's own processor for the same conversation."""
    hf, processor = AutoProcessor.from_pretrained(TINY_LALM), tiny_lalm.processor
    is_first = content == "text audio text"
    stated = f"{GENDER.prefix} male."
    texts = iter([f"{stated}\n", GENDER.options()] if is_first else [f"{stated} {GENDER.options()}"])
    kinds = {"audio": lambda: {"audio_url": "a.wav"}, "text": lambda: {"text": next(texts)}}
    turns = [{"role": "user", "content": [{"type": kind, **kinds[kind]()} for kind in content.split()]}]
    text = hf.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + GENDER.prefix
    clip = {"audio": CLIP.numpy(), "sampling_rate": 16_000} if "audio" in content else {}
    theirs = hf(text=text, **clip, return_tensors="pt")["input_ids"][0].tolist()
    statement = FRAMINGS["statement"].statement(GENDER, "male", ORDERS[is_first])
    n_frames = processor.n_frames(CLIP) if clip else None
    assert list(processor.prompt(GENDER, n_frames, statement=statement).tokens) == theirs


def test_a_template_that_moves_the_clip_has_no_text_before_it():
    processor = processor_of("audioflamingo3")
    other = replace(processor, template=ChatTemplate(placeholder="<sound>"))
    with pytest.raises(PromptError, match='so there is no order "text_first"'):
        other.prompt(GENDER, 100, statement=FRAMINGS["statement"].statement(GENDER, "male", "text_first"))


@pytest.mark.parametrize("name", NAMES)
def test_a_false_transcript_is_where_transcripts_are(name):
    processor = processor_of(name)
    framing = FRAMINGS["transcript"]
    prompt = processor.prompt(GENDER, 100, statement=framing.statement(GENDER, "male", "audio_first"))
    claim = "The speaker's gender is male."
    assert prompt.tokens == processor.prompt(GENDER, 100, transcript=claim).tokens
    assert text_of(prompt, "transcript") == claim
    assert text_of(prompt, "transcript", label="male") == " male"
    assert not prompt.is_region("statement").any()
    warned = framing.statement(GENDER, "male", "audio_first", "explicit_ignore")
    prompt = processor.prompt(GENDER, 100, statement=warned)
    assert text_of(prompt, "transcript") == claim
    assert text_of(prompt, "statement") == WARNINGS["explicit_ignore"].strip()
    alone = processor.prompt(GENDER, None, statement=warned)
    assert text_of(alone, "statement") == str(warned)
    with pytest.raises(PromptError, match='place behind the clip in the prompts of this model: "audio_first"'):
        processor.prompt(GENDER, 100, statement=framing.statement(GENDER, "male", "text_first"))
    with pytest.raises(PromptError, match="it has another one: leave one of them out"):
        processor.prompt(GENDER, 100, statement=warned, transcript=" so she said")
    with pytest.raises(PromptError, match="A transcript is of a clip, and this prompt has none"):
        processor.prompt(GENDER, None, transcript=" so she said")


def test_a_label_is_found_as_a_word_and_where_it_is_last():
    def stated(text: str, label: str | None) -> list[tuple[str, str | None]]:
        return [(piece.text, piece.label) for piece in Statement(text, label, closing="!").pieces]

    assert stated("A female is no male.", "male") == [
        ("A female is no", None),
        (" male", "male"),
        (".", None),
        ("!", None),
    ]
    assert stated("male or male", "male") == [("male or", None), (" male", "male"), ("!", None)]
    assert stated("a female", "male") == [("a female", None), ("!", None)]
    assert stated("anything", None) == [("anything", None), ("!", None)]


# --- items --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("attribute", "n"), [(GENDER, 5), (ANIMAL, 3), (ANIMAL, 8), (ANIMAL, 10)])
def test_every_pair_of_labels_is_as_frequent_as_every_other(attribute, n):
    samples = clips_of(attribute, n)
    items = make_conflict(samples, attribute, conditions=["conflict"], seed=3)
    pairs = Counter((item.audio_label, item.text_label) for item in items)
    assert all(said != true for true, said in pairs)
    for label in attribute.labels:
        of_label = [pairs[label, other] for other in attribute.labels if other != label]
        assert sum(of_label) == n
        assert max(of_label) - min(of_label) <= 1
    stated = Counter(item.text_label for item in items)
    assert max(stated.values()) - min(stated.values()) <= 1 + (n % 8 > 0)


def test_labels_are_drawn_by_seed_and_name_alone():
    samples = clips_of(ANIMAL, 3)

    def drawn(some, **how):
        items = make_conflict(some, "animal", conditions=["conflict"], **how)
        return {item.source.name: item.text_label for item in items}

    first = drawn(samples)
    assert drawn(samples[::-1]) == first
    assert drawn(samples, framing="option", order="text_first", strength="adversarial") == first
    assert drawn(samples, seed=1) != first
    assert (
        drawn(samples, states=dict.fromkeys(first, "dog") | {f"dog{n}.wav": "cat" for n in range(3)})["dog1.wav"]
        == "cat"
    )


def test_every_condition_has_the_clip_and_the_text_that_it_says():
    her = Sample("her.wav", "female", CLIP, " so she said")
    items = make_conflict([her], "gender", order=ORDERS, strength=["baseline", "adversarial"])
    assert [item.condition for item in items] == [*CONDITIONS[:2], *["aligned"] * 4, *["conflict"] * 4]
    assert len({item.name for item in items}) == len(items)
    by_condition = {item.condition: item for item in items}
    texts = {name: None if item.statement is None else str(item.statement) for name, item in by_condition.items()}
    warning = WARNINGS["adversarial"]
    assert texts == {
        "audio_only": None,
        "text_only": "The speaker's gender is male.",
        "aligned": f"The speaker's gender is female.{warning}",
        "conflict": f"The speaker's gender is male.{warning}",
    }
    labels = {name: (its.label, its.audio_label, its.text_label) for name, its in by_condition.items()}
    assert labels == {
        "audio_only": ("female", "female", None),
        "text_only": ("male", None, "male"),
        "aligned": ("female", "female", "female"),
        "conflict": ("female", "female", "male"),
    }
    for name, item in by_condition.items():
        assert item.source is her
        assert item.is_heard == (name != "text_only")
        assert (item.transcript, item.waveform is CLIP) == (
            (None, False) if name == "text_only" else (" so she said", True)
        )
        assert list(item.columns) == list(CONFLICT_COLUMNS)
        assert item.columns["statement"] == texts[name]
    (silent,) = make_conflict([her], "gender", conditions=["text_only"], text_only="silence", text_only_states="audio")
    assert silent.is_heard
    assert len(silent.waveform) == len(CLIP)
    assert not silent.waveform.any()
    assert (silent.label, silent.text_label) == ("female", "female")


def test_framings_are_templates():
    her = Sample("her.wav", "female", CLIP)

    def said(framing, **how):
        (item,) = make_conflict([her], "gender", conditions=["conflict"], framing=framing, **how)
        return item.framing, str(item.statement)

    assert said("transcript") == ("transcript", 'Transcript of the audio: "The speaker\'s gender is male."')
    assert said("option", strength="explicit_ignore") == (
        "option",
        f"The right option is male.{WARNINGS['explicit_ignore']}",
    )
    assert said("So {label}?") == ("So {label}?", "So male?")
    assert said(Framing("mine", "{prefix} surely {label}")) == ("mine", "The speaker's gender is surely male")
    for wrong in ("a {label} {other}", "{label} {}"):
        with pytest.raises(PromptError, match=r"A framing states a \{label\}"):
            said(wrong)
    with pytest.raises(PromptError, match="A framing states a"):
        Framing("mine", "nothing")
    with pytest.raises(PromptError, match="is no template"):
        said("{label} {")
    with pytest.raises(
        PromptError, match=r"There is no framing 'sentence'\. Choose one of statement, transcript, option"
    ):
        said("sentence")


def test_what_cannot_be_a_conflict_is_refused():
    her = Sample("her.wav", "female", CLIP)
    with pytest.raises(PromptError, match=r"her\.wav: 'female' is not an option of animal"):
        make_conflict([her], "animal")
    with pytest.raises(PromptError, match=r"her\.wav: 'cat' is not an option of gender"):
        make_conflict([her], "gender", states={"her.wav": "cat"})
    with pytest.raises(PromptError, match=r"her\.wav: None is not an option of gender"):
        make_conflict([her], "gender", states={})
    with pytest.raises(DataError, match="the text would say the same"):
        make_conflict([her], "gender", states={"her.wav": "female"})
    with pytest.raises(DataError, match="listed 2 times"):
        make_conflict([her, her], "gender")
    with pytest.raises(PromptError, match="A text can disagree among two labels or more"):
        make_conflict([her], replace(GENDER, labels=("female",)))
    with pytest.raises(InputError, match="Nothing is made"):
        make_conflict([her], "gender", conditions=[])


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items(folders):
    return make_conflict(read_folder(folders["gender"])[:2], "gender", order=ORDERS)


def audio_states(model, run, n_pos: int) -> torch.Tensor:
    """Of the embedding and every block, with more words behind the prompt, up to `n_pos` positions."""
    processor = model.processor
    (word,) = processor.answer_tokens("male")
    prompt = processor.begun(run.prompt, (word,) * (n_pos - len(run.prompt)))
    inputs = replace(
        run.inputs, tokens=torch.tensor([prompt.tokens]), attention_mask=torch.ones(1, n_pos, dtype=torch.bool)
    )
    _, cache = model.run_with_cache(
        inputs,
        names_filter=lambda name: name == "hook_embed" or (name.startswith("blocks") and name.endswith("resid_post")),
    )
    return torch.stack([state[0][prompt.is_region("audio")] for state in cache.values()])


@pytest.mark.numbers
def test_audio_first_leaves_the_audio_as_it_was(tiny_lalm, folders):
    """Bit by bit, whatever comes behind it. Text before it changes its states."""
    (her, *_) = read_folder(folders["gender"])
    how = {"framing": list(FRAMINGS), "strength": ["baseline", "adversarial"], "conditions": ["audio_only", "conflict"]}
    for order in ORDERS:
        some = make_conflict([her], "gender", order=order, **how)
        runs = [Question.about(tiny_lalm, some, "gender", "P3", True).run(item) for item in some]
        n_pos = max(len(run.prompt) for run in runs)
        alone, *stated = (audio_states(tiny_lalm, run, n_pos) for run in runs)
        assert len(stated) == 6
        assert all(torch.equal(its, alone) == (order == "audio_first") for its in stated)


@pytest.mark.numbers
def test_experiments_take_items_as_they_are(tiny_lalm, items):
    conflict = [item for item in items if item.condition == "conflict"]
    question = Question.about(tiny_lalm, items, "gender", "P3", True)
    for item in items:
        run = question.run(item)
        assert run.has("statement") == (item.statement is not None)
        assert run.has("audio") == (item.condition != "text_only")
        assert question.columns(item)["text_label"] == item.text_label
        assert tiny_lalm(run.inputs).isfinite().all()
    cut = attention_knockout(
        tiny_lalm, conflict, attribute="gender", chains=[("statement", "last")], layers=["all"], **QUIET
    )
    assert sorted(cut.frame["sample"]) == sorted(item.name for item in conflict)
    assert (cut.frame.p_before != cut.frame.p_after).all()
    trace = causal_trace(tiny_lalm, conflict[:1], attribute="gender", form="P1", kinds=["token"], **QUIET)
    stated = trace.frame[trace.frame.region == "statement"]
    assert len(stated) == 9 * int(question.run(conflict[0]).prompt.is_region("statement").sum())
    assert set(stated.option.dropna()) == {conflict[0].text_label}
    read = logit_lens(tiny_lalm, items, attribute="gender", positions="last", **QUIET)
    assert set(read.frame["sample"]) == {item.name for item in items}
    with pytest.raises(AudioError, match=r"text_only, .* has no clip"):
        causal_trace(tiny_lalm, items, attribute="gender", **QUIET)
