"""Prompts: the tokens are HF's own, and every position knows what it is."""

from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from reference import chirps, n_audio_tokens
from transformers import AutoProcessor

from lalm_lens.assets import TINY_LALM
from lalm_lens.attributes import ATTRIBUTES, Attribute, Form
from lalm_lens.encoders.whisper import n_pooled_states
from lalm_lens.errors import InputError, PromptError
from lalm_lens.pieces import Piece

FORMS = get_args(Form)
GENDER = [
    # (token, region, segment) of what follows the audio
    ("<|audio_eos|>", "audio_tag", "none"),
    ("\n", "template", "none"),
    *((word, "early", "early") for word in "What| is| the| gender| of| the| speaker| in| the| speech|?".split("|")),
    *((word, "early", "early") for word in (" Possible", " options", ":")),
    (" male", "object", "object"),
    (",", "object_sep", "object"),
    (" female", "object", "object"),
    (".", "object_sep", "none"),
    *((word, "template", "none") for word in ("<|im_end|>", "\n", "<|im_start|>", "assistant", "\n")),
    *((word, "late", "late") for word in ("The", " speaker", "'s")),
    (" gender", "attribute", "late"),
    (" is", "last", "last"),
]


@pytest.fixture(scope="module")
def processor(tiny_lalm):
    return tiny_lalm.processor


def test_token_count_matches_the_real_layers():
    for n_frames in range(3, 3001):
        assert n_pooled_states(n_frames) == n_audio_tokens(n_frames)


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("n_samples", [22_400, 16_001, 32_000, 480])
def test_tokens_and_features_are_those_of_the_hf_processor(processor, name, n_samples):
    attribute, clip = ATTRIBUTES[name], chirps([2.0])[0][:n_samples]
    options = ", ".join(attribute.labels)
    conversation = [
        {"role": "system", "content": "You are a helpful assistant."},
        {
            "role": "user",
            "content": [
                {"type": "audio", "audio_url": "clip.wav"},
                {"type": "text", "text": f"{attribute.question} Possible options: {options}."},
            ],
        },
    ]
    hf = AutoProcessor.from_pretrained(TINY_LALM)
    text = hf.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False) + attribute.prefix
    theirs = hf(text=text, audio=clip.numpy(), sampling_rate=16_000, return_tensors="pt")
    ours = processor.inputs([processor.prompt(attribute, processor.n_frames(clip))], [clip])
    assert torch.equal(ours.tokens, theirs["input_ids"])
    assert torch.equal(ours.mel, theirs["input_features"])
    assert ours.n_frames.tolist() == theirs["feature_attention_mask"].sum(-1).tolist()


def test_every_position_of_the_gender_prompt_has_its_region_and_segment(processor):
    prompt = processor.prompt(ATTRIBUTES["gender"], n_frames=20)
    after = [(p.token, p.region, p.segment) for p in prompt.positions[-len(GENDER) :]]
    assert after == GENDER
    before = prompt.positions[: -len(GENDER)]
    assert [p.region for p in before[-6:]] == ["audio_tag", *["audio"] * 5]
    assert {p.region for p in before[:-6]} == {"text_before"}
    assert "".join(p.token for p in before[:-6]).endswith("user\nAudio 1: ")


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_object_tokens_carry_their_label(processor, name):
    attribute = ATTRIBUTES[name]
    prompt = processor.prompt(attribute, n_frames=20, answer=attribute.labels[-1])
    objects = [p for p in prompt.positions if p.region == "object"]
    assert [p.label for p in objects] == list(attribute.labels)
    assert [p.token for p in objects] == [f" {label}" for label in attribute.labels]
    assert all(p.label is None for p in prompt.positions if p.region != "object")
    assert [p.token for p in prompt.positions if p.is_correct] == [f" {attribute.labels[-1]}"]
    assert not any(p.is_correct for p in processor.prompt(attribute, n_frames=20).positions)


def test_a_token_across_a_border_belongs_to_the_piece_of_its_last_character(processor):
    """Real vocabularies merge ">" with the newline after it, say."""

    class Merging:
        def __call__(self, text, **_):
            assert text == "is it>\nThe end"
            return {"input_ids": [0, 1, 2, 3], "offset_mapping": [(0, 2), (2, 5), (5, 7), (7, 14)]}

        def decode(self, tokens):
            return f"token {tokens[0]}"

    hf = SimpleNamespace(tokenizer=Merging())
    pieces = [Piece("is it>", "early", "early"), Piece("\n", "template"), Piece("The end", "late", "late")]
    regions = [position.region for position in processor.template.tokenize(hf, pieces).positions]
    assert regions == ["early", "early", "template", "last"]


def test_a_label_of_several_tokens_is_an_object_throughout(processor):
    labels = ("male", "someone unheard of")
    prompt = processor.prompt(ATTRIBUTES["gender"], n_frames=20, labels=labels)
    pieces = [p.token for p in prompt.positions if p.label == labels[1]]
    assert len(pieces) > 3
    assert "".join(pieces) == f" {labels[1]}"


def test_a_batch_is_padded_on_the_left(processor):
    prompts = [processor.prompt(ATTRIBUTES[name], n_frames=n) for name, n in (("gender", 40), ("animal", 160))]
    inputs = processor.inputs(prompts, chirps([0.4, 1.6]))
    for row, prompt in enumerate(prompts):
        assert inputs.tokens[row, -len(prompt) :].tolist() == list(prompt.tokens)
        assert inputs.attention_mask[row].sum() == len(prompt)
        assert inputs.attention_mask[row, -len(prompt) :].all()


def test_label_tokens_begin_with_a_space_by_default(processor):
    labels = ATTRIBUTES["animal"].labels
    spaced = processor.label_tokens(labels)
    assert [processor.tokenizer.decode([token]) for token in spaced.values()] == [f" {label}" for label in labels]
    bare = processor.label_tokens(["male", "female"], label_space=False)
    assert not processor.tokenizer.decode([bare["male"]]).startswith(" ")


def test_labels_that_cannot_be_told_apart_are_refused(processor):
    with pytest.raises(PromptError, match="begin with the same token"):
        processor.label_tokens(["xa", "xb"])
    with pytest.raises(PromptError, match="'male' is given 2 times"):
        processor.label_tokens(["male", "female", "male"])
    with pytest.raises(PromptError, match="empty labels"):
        processor.label_tokens(["male", "  "])
    with pytest.raises(PromptError, match="empty labels"):
        processor.label_tokens(["male", ""], label_space=False)


@pytest.mark.parametrize("edit", [str.upper, lambda text: text + "<|im_end|>"], ids=["upper", "tail"])
def test_a_template_that_changes_the_text_is_refused(processor, edit):
    def render(*args, **kwargs):
        return edit(processor.hf.apply_chat_template(*args, **kwargs))

    other = replace(processor, hf=SimpleNamespace(tokenizer=processor.tokenizer, apply_chat_template=render))
    with pytest.raises(PromptError):
        other.prompt(ATTRIBUTES["gender"], n_frames=20)


def test_audio_marks_of_another_model_are_refused(processor):
    other = replace(processor, template=replace(processor.template, before="<|sound|>"))
    with pytest.raises(PromptError, match="cannot be told apart"):
        other.prompt(ATTRIBUTES["gender"], n_frames=20)


def test_a_tokenizer_of_another_model_is_refused(processor):
    other = replace(processor, cfg=replace(processor.cfg, audio_token=7))
    with pytest.raises(PromptError, match="belongs to another model"):
        other.prompt(ATTRIBUTES["gender"], n_frames=20)


OWN = Attribute("mood", "Does it sound happy? Or male.", ("male", "someone unheard of"), "Answer:")
PREFIXES = ["The animal is", "It is", "Answer:", "Well,\n\nthe  final one: ", "a b c d e", "a\n"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "attribute", [*ATTRIBUTES.values(), *(replace(OWN, prefix=prefix) for prefix in PREFIXES)], ids=str
)
def test_every_form_has_the_tokens_of_hf(processor, attribute, form):
    user = {
        "P1": [],
        "P2": [{"type": "text", "text": attribute.question}],
        "P3": [{"type": "text", "text": f"{attribute.question} Possible options: {', '.join(attribute.labels)}."}],
    }
    turn = {"role": "user", "content": [{"type": "audio", "audio_url": "clip.wav"}, *user[form]]}
    hf, clip = AutoProcessor.from_pretrained(TINY_LALM), chirps([1.1])[0]
    text = hf.apply_chat_template([turn], add_generation_prompt=True, tokenize=False) + attribute.prefix
    theirs = hf(text=text, audio=clip.numpy(), sampling_rate=16_000, return_tensors="pt")["input_ids"][0].tolist()
    assert list(processor.prompt(attribute, processor.n_frames(clip), form).tokens) == theirs


def regions(prompt) -> dict[str, str]:
    """What stands in each region after the audio."""
    found = {}
    for position in prompt.positions:
        if position.region not in ("text_before", "audio", "audio_tag"):
            found[position.region] = found.get(position.region, "") + position.token
    return found


def test_a_form_has_the_regions_of_what_it_says(processor):
    gender = ATTRIBUTES["gender"]
    answer = {"late": "The speaker's", "attribute": " gender", "last": " is"}
    rest = "<|im_end|>\n<|im_start|>assistant\n"
    p1, p2, p3 = (regions(processor.prompt(gender, 20, form)) for form in FORMS)
    assert p1 == {"template": f"\n{rest}", **answer}
    assert p2 == {"template": f"\n{rest}", "early": gender.question, **answer}
    options = {"object": " male female", "object_sep": ",."}
    assert p3 == {"template": f"\n{rest}", "early": f"{gender.question} Possible options:", **options, **answer}
    question = processor.prompt(gender, 20, "P2").positions
    assert {p.segment for p in question if p.region == "early"} == {"early"}


def test_the_turn_of_p1_holds_no_text_at_all(processor):
    """A template may put something before a text, even before an empty one."""

    def render(messages, **_):
        user, answer = (turn["content"] for turn in messages)
        texts = "".join(f"[text] {part['text']}" for part in user[1:])
        return f"<|audio_bos|><|AUDIO|><|audio_eos|>{texts}\n{answer[0]['text']}"

    other = replace(processor, hf=SimpleNamespace(tokenizer=processor.tokenizer, apply_chat_template=render))
    template = {form: regions(other.prompt(ATTRIBUTES["gender"], 20, form))["template"] for form in FORMS[:2]}
    assert template == {"P1": "\n", "P2": "[text] \n"}


def test_a_question_that_ends_in_an_option_is_cut_at_the_right_place(processor):
    asked = replace(OWN, question="Is it male. Or?", labels=("male",))
    assert regions(processor.prompt(asked, 20))["early"] == "Is it male. Or? Possible options:"


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("The animal is", {"late": "The", "attribute": " animal", "last": " is"}),
        ("It is", {"attribute": "It", "last": " is"}),
        ("is", {"last": "is"}),
        ("Answer:", {"late": "Answer", "last": ":"}),
        ("the\n\nanimal  is: ", {"late": "the  is:", "attribute": "\n\nanimal", "last": " "}),
    ],
)
def test_a_prefix_of_any_length_ends_in_one_last_token(processor, prefix, expected):
    prompt = processor.prompt(replace(OWN, prefix=prefix), 20, "P1")
    found = regions(prompt)
    del found["template"]
    assert found == expected
    assert [p.region for p in prompt.positions].count("last") == 1
    assert prompt.positions[-1].segment == "last"


def test_what_a_form_needs_and_does_not_have_is_refused(processor):
    def ask(form, **changes):
        return processor.prompt(replace(OWN, **changes), 20, form)

    for form in ("P2", "P3"):
        with pytest.raises(PromptError, match=r"asks a question, and it is empty\. Write one, or use P1"):
            ask(form, question=" ")
    ask("P1", question="")
    with pytest.raises(PromptError, match=r"there are none\. Give labels, or use P2"):
        ask("P3", labels=())
    ask("P2", labels=())
    for prefix in ("", " \n"):
        with pytest.raises(PromptError, match=r"prefix is empty\. Give at least one word"):
            ask("P1", prefix=prefix)


def test_an_answer_that_has_begun_stands_behind_the_prompt(processor):
    prompt = processor.prompt(ATTRIBUTES["gender"], 20)
    tokens = processor.answer_tokens("someone unheard of")
    assert processor.tokenizer.decode(tokens) == " someone unheard of"
    begun = processor.begun(prompt, tokens[:-1])
    assert begun.tokens == prompt.tokens + tokens[:-1]
    assert begun.positions[: len(prompt)] == prompt.positions
    assert {p.region for p in begun.positions[len(prompt) :]} == {"answer"}


def test_a_prompt_longer_than_the_model_reads_is_refused(processor):
    with pytest.raises(InputError, match="this model has 512"):
        processor.pad([processor.prompt(ATTRIBUTES["gender"], n_frames=2500)])
