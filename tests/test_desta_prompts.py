"""DeSTA's prompts: the originals' own tokens, and what every position is."""

from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from desta_golden import NAMES, golden, model_of, needs_vocabularies, said, vocabulary
from torch.testing import assert_close

from lalm_lens.attributes import ATTRIBUTES, Attribute, Form
from lalm_lens.errors import AudioError, ConversionError, PromptError
from lalm_lens.prompts import Desta2Template, Desta25Template, EarsAndWords, Processor, Prompt

FORMS = get_args(Form)
GENDER = ATTRIBUTES["gender"]
TRANSCRIPTS = ("", " ", " this is a small test", "hello world", "  Twice , spaced. ", " ¿Qué? 你好 🙂", "?!", "\tTab")


def processor_of(name: str) -> Processor:
    processor = model_of(name).processor
    assert processor is not None
    return processor


def real_processor(name: str) -> Processor:
    """With the published vocabulary and number of audio positions."""
    processor, tokenizer = processor_of(name), vocabulary(name)
    audio_token = 128255 if name == "desta2" else 128095
    hf = EarsAndWords(processor.hf.feature_extractor, tokenizer)
    real = replace(processor, hf=hf, cfg=replace(processor.cfg, audio_token=audio_token), n_audio=lambda _: 64)
    real.check()
    return real


def user_turn(attribute: Attribute, form: Form) -> str | None:
    return {"P1": None, "P2": attribute.question, "P3": attribute.options()}[form]


def as_desta2(processor: Processor, attribute: Attribute, form: Form, transcript: str) -> list[int]:
    """As AudioLens' code and DeSTA2's own do it, with -1 for the clip: kehanlu/DeSTA2, desta/modeling_desta.py."""
    tokenizer, path, user = processor.tokenizer, "clips/a.wav", user_turn(attribute, form)
    turns = [("audio", path), *([("user", user)] if user else []), ("assistant", attribute.prefix)]
    messages = [{"role": role, "content": content} for role, content in turns]
    chat = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert chat[-1] == tokenizer.eos_token_id
    left, right = tokenizer.decode(chat[:-1]).split(path)
    tokens, position = tokenizer(left + transcript + right)["input_ids"], len(tokenizer.tokenize(left))
    return [*tokens[:position], *[-1] * processor.n_audio(0), *tokens[position:]]


def as_desta25(processor: Processor, attribute: Attribute, form: Form, transcript: str) -> list[int]:
    """As kehanlu/DeSTA2.5-Audio, desta/models/modeling_desta25.py does it, with -1 for the clip."""
    tokenizer, user = processor.tokenizer, user_turn(attribute, form)
    messages = [
        {"role": "system", "content": "Focus on the audio clips and instructions."},
        {"role": "user", "content": f"<|AUDIO|>\n{user}" if user else "<|AUDIO|>"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + attribute.prefix
    words = tokenizer(transcript, add_special_tokens=False)["input_ids"]
    slots = "<|reserved_special_token_87|>" * (processor.n_audio(0) + len(words))
    text = text.replace("<|AUDIO|>", "<start_audio><|AUDIO|><end_audio>").replace("<|AUDIO|>", slots)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = tokens.index(processor.cfg.audio_token)
    heard = [*[-1] * processor.n_audio(0), *words]
    return [*tokens[:start], *heard, *tokens[start + len(heard) :]]


ORIGINALS = {"desta2": as_desta2, "desta25": as_desta25}


def tokens_of(processor: Processor, prompt: Prompt) -> list[int]:
    return [-1 if token == processor.cfg.audio_token else token for token in prompt.tokens]


@pytest.mark.parametrize("name", NAMES)
def test_the_golden_prompt_is_written_from_its_words(name):
    processor, (_, files, _) = processor_of(name), golden(name)
    waveform = files["waveform"]
    prompt = processor.prompt(GENDER, processor.n_frames(waveform), transcript=said(name))
    for region, mask in (("audio", "audio_mask"), ("transcript", "transcript_mask")):
        assert torch.equal(prompt.is_region(region), files[mask][0])
    stored = files["merged_input_ids" if name == "desta2" else "input_ids"][0].clone()
    words = files["transcript_ids" if name == "desta2" else "transcript_ids.0"]
    stored[files["transcript_mask"][0]] = words
    stored[files["audio_mask"][0]] = -1
    assert tokens_of(processor, prompt) == stored.tolist()
    inputs = processor.inputs([prompt], [waveform])
    assert_close(inputs.mel, files["clean.input_features"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vocabulary", ["golden", pytest.param("real", marks=needs_vocabularies)])
def test_every_prompt_has_the_tokens_of_the_original(name, vocabulary, form):
    processor = processor_of(name) if vocabulary == "golden" else real_processor(name)
    for attribute in ATTRIBUTES.values():
        for transcript in TRANSCRIPTS:
            prompt = processor.prompt(attribute, 100, form, transcript=transcript)
            assert tokens_of(processor, prompt) == ORIGINALS[name](processor, attribute, form, transcript)
            assert "".join(p.token for p in prompt.positions if p.region == "object").split() == (
                list(attribute.labels) if form == "P3" else []
            )


@needs_vocabularies
def test_the_published_tokens_of_desta2():
    processor = real_processor("desta2")
    prompt = processor.prompt(GENDER, 100, transcript=" Hi.")
    bos, header, end = processor.tokenizer.convert_tokens_to_ids(
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    )
    audio, *_ = processor.tokenizer("audio", add_special_tokens=False)["input_ids"]
    assert list(prompt.tokens[:5]) == [bos, bos, header, audio, end]
    assert prompt.is_region("audio").nonzero()[:, 0].tolist() == list(range(5, 69))
    assert prompt.tokens[69] == 271
    assert list(prompt.tokens[-5:]) == [791, 19114, 596, 10026, 374]
    labels = ("male", "female")
    assert list(processor.label_tokens(labels).values()) == [8762, 8954]
    assert list(processor.label_tokens(labels, label_space=False).values()) == [37576, 43734]


@needs_vocabularies
def test_the_published_tokens_of_desta25():
    processor = real_processor("desta25")
    prompt = processor.prompt(GENDER, 100, transcript="Hi.")
    words = processor.transcript_tokens("Hi.")
    assert prompt.is_region("audio").nonzero()[:, 0].tolist() == list(range(42, 106))
    assert list(prompt.tokens[38:42]) == [27, 2527, 30788, 29]
    behind = 106 + len(words)
    assert prompt.tokens[106:behind] == words
    assert list(prompt.tokens[behind : behind + 4]) == [27, 408, 30788, 397]
    assert [p.region for p in prompt.positions[behind : behind + 4]] == [*["audio_tag"] * 3, "template"]
    assert list(prompt.tokens[-5:]) == [791, 19114, 596, 10026, 374]


def stretches(prompt: Prompt) -> list[tuple[str, str]]:
    """Region by region, the text; the clip's is a dot for each position."""
    cut = [(region, list(its)) for region, its in groupby(prompt.positions, lambda position: position.region)]
    return [(region, "".join("." if region == "audio" else p.token for p in its)) for region, its in cut]


USER, ANSWER = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
HEADER = "<|begin_of_text|><|start_header_id|>audio<|end_header_id|>"
SYSTEM = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\nFocus on the audio clips and instructions.<|eot_id|>"
)
ASKED = [
    ("early", "What is the gender of the speaker in the speech? Possible options:"),
    ("object", " male"),
    ("object_sep", ","),
    ("object", " female"),
    ("object_sep", "."),
]
ANSWERED = [("late", "The speaker's"), ("attribute", " gender"), ("last", " is")]
REGIONS = {
    ("desta2", "P3"): [
        ("text_before", f"<|begin_of_text|>{HEADER}"),
        ("audio", "." * 16),
        ("template", "\n\n"),
        ("transcript", " a test"),
        ("template", f"<|eot_id|>{USER}"),
        *ASKED,
        ("template", f"<|eot_id|>{ANSWER}"),
        *ANSWERED,
    ],
    ("desta2", "P1"): [
        ("text_before", f"<|begin_of_text|>{HEADER}"),
        ("audio", "." * 16),
        ("template", "\n\n"),
        ("transcript", " a test"),
        ("template", f"<|eot_id|>{ANSWER}"),
        *ANSWERED,
    ],
    ("desta25", "P3"): [
        ("text_before", f"{SYSTEM}{USER}"),
        ("audio_tag", "<start_audio>"),
        ("audio", "." * 16),
        ("transcript", " a test"),
        ("audio_tag", "<end_audio"),  # > is one token with the line break behind it
        ("template", ">\n"),
        *ASKED,
        ("template", f"<|eot_id|>{ANSWER}"),
        *ANSWERED,
    ],
    ("desta25", "P1"): [
        ("text_before", f"{SYSTEM}{USER}"),
        ("audio_tag", "<start_audio>"),
        ("audio", "." * 16),
        ("transcript", " a test"),
        ("audio_tag", "<end_audio>"),
        ("template", f"<|eot_id|>{ANSWER}"),
        *ANSWERED,
    ],
}


@pytest.mark.parametrize(("name", "form"), REGIONS)
def test_every_position_has_its_region(name, form):
    prompt = processor_of(name).prompt(GENDER, 100, form, transcript=" a test", answer="female")
    assert stretches(prompt) == REGIONS[name, form]
    assert {p.segment for p in prompt.positions if p.region in ("audio", "transcript", "template")} == {"none"}
    assert [p.token for p in prompt.positions if p.is_correct] == ([" female"] if form == "P3" else [])


@pytest.mark.parametrize("name", NAMES)
def test_without_a_transcript_the_clip_says_nothing(name):
    processor = processor_of(name)
    assert processor.prompt(GENDER, 100) == processor.prompt(GENDER, 100, transcript=" ")
    bare = processor.prompt(GENDER, 100, transcript="")
    assert "transcript" not in {position.region for position in bare.positions}


def test_desta2_as_it_was_meant():
    published = processor_of("desta2")
    meant = replace(published, template=Desta2Template(quirks="none"))
    first, second = (stretches(its.prompt(GENDER, 100, transcript=" a test")) for its in (published, meant))
    assert second[:3] == [("text_before", f"{HEADER}\n\n"), ("audio", "." * 16), ("transcript", " a test")]
    assert first[3:] == second[2:]
    with pytest.raises(PromptError, match=r"quirks are \"published\" or \"none\"; got 'nun'"):
        Desta2Template.__post_init__(SimpleNamespace(quirks="nun"))  # as a caller without type checks meets it


@pytest.mark.parametrize(
    ("name", "template"),
    [("desta2", Desta2Template(system="Listen.")), ("desta25", Desta25Template(system="Listen."))],
)
def test_another_system_prompt(name, template):
    processor = replace(processor_of(name), template=template)
    processor.check()
    (_, before), *_ = stretches(processor.prompt(GENDER, 100))
    assert "Listen.<|eot_id|>" in before
    assert ("Focus" in before) is False


@pytest.mark.parametrize("name", NAMES)
def test_marks_are_no_words(name):
    processor = processor_of(name)
    marks = ["<|start_header_id|>", "<|reserved_special_token_87|>", "\ue000"]
    for mark in [*marks, *(["<|AUDIO|>"] if name == "desta25" else ["\ue002"])]:
        with pytest.raises(PromptError, match="is a mark of the chat template and no word"):
            processor.prompt(replace(GENDER, question=f"What {mark}?"), 100)
        with pytest.raises(PromptError, match="is a mark of the chat template and no word"):
            processor.prompt(GENDER, 100, transcript=f" so {mark}")
    for line in (" a\nb", "a\r b", "a\u2028b"):
        with pytest.raises(PromptError, match="A transcript is one line; this one breaks"):
            processor.prompt(GENDER, 100, transcript=line)
    with pytest.raises(PromptError, match="more than to put question and answer prefix"):
        processor.prompt(replace(GENDER, question="Who? "), 100, "P2")  # Llama's template strips a turn


def with_chat_template(processor: Processor, edit) -> Processor:
    template = edit(processor.tokenizer.chat_template)

    def render(messages, **how):
        return processor.tokenizer.apply_chat_template(messages, chat_template=template, **how)

    names = ("__call__", "get_vocab", "tokenize", "decode", "convert_tokens_to_ids")
    tokenizer = SimpleNamespace(
        apply_chat_template=render,
        all_special_tokens=processor.tokenizer.all_special_tokens,
        added_tokens_decoder=processor.tokenizer.added_tokens_decoder,
        **{each: getattr(processor.tokenizer, each) for each in names},
    )
    hf = SimpleNamespace(tokenizer=tokenizer, feature_extractor=processor.hf.feature_extractor)
    return replace(processor, hf=hf)


def test_the_dates_are_those_of_llama_31_unless_told_otherwise():
    processor, dates = processor_of("desta25"), "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    assert dates in processor.tokenizer.chat_template
    bare = with_chat_template(processor, lambda template: template.replace(dates, ""))
    replace(bare, template=replace(bare.template, dates="")).check()
    for edit in (
        lambda template: template.replace(dates, ""),
        lambda template: template.replace("26 Jul 2024", "27 Jul 2024"),
        lambda template: template.replace("<|eot_id|>", "<|end_of_text|>"),
    ):
        with pytest.raises(ConversionError, match="chat template is not the one of Llama 3"):
            with_chat_template(processor, edit).check()


def test_another_chat_template_than_llamas_is_refused():
    with pytest.raises(ConversionError, match="chat template is not the one of Llama 3"):
        with_chat_template(processor_of("desta2"), lambda template: template.replace("eot_id", "end")).check()


def test_a_tokenizer_without_the_placeholder_is_refused():
    processor = processor_of("desta25")
    with pytest.raises(ConversionError, match="reserved_special_token_87"):
        replace(processor, cfg=replace(processor.cfg, audio_token=7)).check()


def test_a_transcript_for_a_model_that_reads_none_is_refused(tiny_lalm):
    with pytest.raises(PromptError, match="hold no transcript"):
        tiny_lalm.processor.prompt(GENDER, 100, transcript="hello")
    with pytest.raises(PromptError, match="hold no transcript"):
        tiny_lalm.processor.transcribe(torch.zeros(16_000))


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_has_as_many_audio_positions_whatever_its_length(name):
    processor = processor_of(name)
    n_audio = {int(processor.prompt(GENDER, n).is_region("audio").sum()) for n in (3, 100, 200)}
    assert n_audio == {16}
    with pytest.raises(AudioError, match="too long"):
        processor.check_audible(torch.ones(processor.n_samples + 1), "A clip")
