"""Voxtral's tokens, on the whole vocabulary that mistral-common bundles: the traps that lie there."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, N_WORDS, mistral_turns, voxtral_config, write_tekken
from mistral_common.exceptions import InvalidMessageStructureException
from reference import chirps, randomise
from torch.testing import assert_close
from transformers import VoxtralForConditionalGeneration, VoxtralProcessor, WhisperFeatureExtractor
from transformers.tokenization_mistral_common import MistralCommonBackend

from conversions.voxtral import VOXTRAL
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.encoders.whisper import n_pooled_states
from lalm_lens.errors import AudioError, ConversionError, InputError, PromptError
from lalm_lens.inputs import Inputs
from lalm_lens.loading import from_hf, from_pretrained, skeleton
from lalm_lens.prompts import Processor

GENDER = ATTRIBUTES["gender"]
SYSTEM_PROMPT, AUDIO, BEGIN_AUDIO = 17, 24, 25
AFTER = [
    # (token, region, segment) of what follows the audio
    *((word, "early", "early") for word in "What| is| the| gender| of| the| speaker| in| the| speech|?".split("|")),
    *((word, "early", "early") for word in (" Possible", " options", ":")),
    (" male", "object", "object"),
    (",", "object_sep", "object"),
    (" female", "object", "object"),
    (".", "object_sep", "none"),
    ("[/INST]", "template", "none"),
    *((word, "late", "late") for word in ("The", " speaker", "'s")),
    (" gender", "attribute", "late"),
    (" is", "last", "last"),
]


@pytest.mark.parametrize("n_stacked", [1, 2, 5])
def test_as_many_states_are_a_token_as_the_mlp_is_wide(n_stacked):
    config = voxtral_config()
    config.audio_config.intermediate_size = n_stacked * config.audio_config.hidden_size
    torch.manual_seed(n_stacked)
    hf = randomise(VoxtralForConditionalGeneration(config)).eval()
    mel = torch.randn(2, config.audio_config.num_mel_bins, 2 * config.audio_config.max_source_positions)
    tokens = torch.tensor([[1, 3, *(2 * config.audio_config.max_source_positions // n_stacked) * [AUDIO], 1784]])
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "input_features": mel}
    with torch.no_grad():
        assert_close(from_hf(hf)(Inputs.from_hf(batch)), hf(**batch, use_cache=False).logits)


def processor_of(folder, n_words: int | None = None, version: str = "v7") -> Processor:
    write_tekken(folder, n_words, version=version)
    hf = VoxtralProcessor(WhisperFeatureExtractor(feature_size=128), MistralCommonBackend.from_pretrained(folder))
    mini = skeleton({"model_type": "voxtral", "audio_token_id": AUDIO}, VOXTRAL, "mini")
    processor = Processor(hf, VOXTRAL.template, VOXTRAL.hearing, mini.lalm_cfg, mini.audio_encoder.n_audio)
    processor.check()
    return processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    return processor_of(tmp_path_factory.mktemp("tekken"))


def test_the_gender_prompt_has_the_published_tokens(processor):
    prompt = processor.prompt(GENDER, 137, "P1")
    assert prompt.tokens == (1, 3, BEGIN_AUDIO, *375 * [AUDIO], 4, 1784, 31341, 1681, 14626, 1395)
    assert processor.label_tokens(["male", "female"]) == {"male": 10222, "female": 10493}
    assert processor.label_tokens(["male", "female"], label_space=False) == {"male": 53781, "female": 103108}


def test_every_position_has_its_region_and_segment(processor):
    prompt = processor.prompt(GENDER, 137, answer="male")
    assert [p.region for p in prompt.positions[:3]] == ["text_before", "text_before", "audio_tag"]
    assert {p.region for p in prompt.positions[3:378]} == {"audio"}
    assert [(p.token, p.region, p.segment) for p in prompt.positions[378:]] == AFTER
    assert [p.token for p in prompt.positions if p.is_correct] == [" male"]
    assert [p.label for p in prompt.positions if p.region == "object"] == ["male", "female"]


def test_tokens_do_not_depend_on_the_version_of_the_tokenizer(tmp_path):
    """A system prompt beside a clip would: with older ones mistral-common refuses it. We say nothing there."""
    by_version = {version: processor_of(tmp_path, N_WORDS, version) for version in ("v7", "v11", "v13")}
    prompts = [processor.prompt(GENDER, 137) for processor in by_version.values()]
    assert prompts[0] == prompts[1] == prompts[2]
    system = [{"role": "system", "content": "Be brief."}, *mistral_turns(chirps([1.0])[0], "Hm?", None)]
    with pytest.raises(ValueError, match=r"Found system messages .* and audio chunks"):
        by_version["v7"].tokenizer.apply_chat_template(system)
    assert by_version["v13"].tokenizer.apply_chat_template(system)["input_ids"][:2] == [1, SYSTEM_PROMPT]


def test_the_method_of_the_hf_processor_cannot_force_an_answer(processor):
    """The reason why we ask its tokenizer. When this passes no more, transformers has mended it."""
    turns = mistral_turns(chirps([1.0])[0], "Hm?", "It is")
    with pytest.raises(InvalidMessageStructureException, match="Expected last role"):
        processor.hf.apply_chat_template(turns, continue_final_message=True, tokenize=True, return_dict=True)
    tokens = processor.tokenizer.apply_chat_template(turns, continue_final_message=True, tokenize=True)["input_ids"]
    asked = replace(GENDER, question="Hm?", prefix="It is")
    assert list(processor.prompt(asked, 100, "P2").tokens) == tokens


@pytest.mark.parametrize(("n_frames", "n_audio"), [(1, 375), (3000, 375), (3001, 750), (4100, 750), (9000, 1125)])
def test_every_chunk_of_30_s_is_375_tokens(processor, n_frames, n_audio):
    assert processor.prompt(GENDER, n_frames).tokens.count(AUDIO) == n_audio


@pytest.mark.parametrize("durations_s", [[0.5], [41.0, 2.0]], ids=str)
def test_features_of_whole_chunks_are_those_of_hf(processor, durations_s):
    clips, hf = chirps(durations_s), processor.hf
    theirs = hf._retrieve_input_features([clip.numpy() for clip in clips], **hf.audio_kwargs)
    mel, n_frames = processor.hearing.features(hf.feature_extractor, clips)
    assert torch.equal(mel, theirs)
    assert n_frames.tolist() == [3000] * len(mel)


def test_regions_are_exact_where_a_character_is_several_tokens(processor):
    labels = ("\N{ROOSTER}\N{OX}", "caf\N{LATIN SMALL LETTER E WITH ACUTE} \N{YI SYLLABLE PIT}")
    asked = replace(GENDER, question="\N{CJK UNIFIED IDEOGRAPH-9DC4}?", labels=labels)
    prompt = processor.prompt(asked, 100)
    for label in labels:
        tokens = [token for token, p in zip(prompt.tokens, prompt.positions, strict=True) if p.label == label]
        assert processor.tokenizer.decode(tokens) == f" {label}"
        assert len(tokens) > len(label.split())
    early = [token for token, p in zip(prompt.tokens, prompt.positions, strict=True) if p.region == "early"]
    assert processor.tokenizer.decode(early) == f"{asked.question} Possible options:"


def test_what_mistral_common_would_change_or_take_for_a_mark_is_refused(processor):
    with pytest.raises(PromptError, match=r"mistral-common writes .*'the final one:' for .*'the final one: '"):
        processor.prompt(replace(GENDER, prefix="the final one: "), 100, "P1")
    with pytest.raises(PromptError, match=r"'\[INST\]' is a mark of the chat template and no word"):
        processor.prompt(replace(GENDER, question="Is it [INST]?"), 100)
    assert processor.prompt(replace(GENDER, prefix="Well,\n\nit is"), 100).positions[-1].token == " is"


def test_a_prompt_longer_than_the_model_reads_is_refused(processor):
    assert processor.n_samples == 131072 // 375 * 480_000
    small = replace(processor, cfg=replace(processor.cfg, decoder=replace(processor.cfg.decoder, n_ctx=400)))
    with pytest.raises(InputError, match="this model has 400"):
        small.pad([small.prompt(GENDER, 3001)])
    with pytest.raises(AudioError, match=r"too long: this model hears 30\.0 s"):
        small.inputs([small.prompt(GENDER, 3001)], [torch.ones(480_001)])


# --- files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    """As Mistral's repositories are: a tekken.json, and no tokenizer_config.json nor processor_config.json."""
    FAMILIES["voxtral"].save(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    FAMILIES["voxtral"].processor().feature_extractor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tekken.json",
    }
    return tmp_path


def test_the_published_files_are_enough(published):
    processor = from_pretrained(published).processor
    assert isinstance(processor.hf, VoxtralProcessor)
    assert processor.prompt(GENDER, 137).tokens.count(AUDIO) == 25


def test_without_mistral_common_one_line_says_what_to_do(published, monkeypatch):
    monkeypatch.setitem(sys.modules, "mistral_common", None)
    with pytest.raises(ConversionError) as caught:
        from_pretrained(published)
    assert str(caught.value).endswith("that is not installed. Install it: pip install 'lalm_lens[voxtral]'.")
    assert "\n" not in str(caught.value)
    (published / "tekken.json").unlink()
    assert from_pretrained(published).processor is None


def spoil(folder, **changes: object) -> None:
    tekken = json.loads((folder / "tekken.json").read_text()) | changes
    (folder / "tekken.json").write_text(json.dumps({key: value for key, value in tekken.items() if value is not None}))


def test_a_tekken_that_hears_nothing_or_otherwise_is_refused(published):
    spoil(published, audio=None)
    with pytest.raises(ConversionError, match="hears nothing: it has no audio section"):
        from_pretrained(published)
    shutil.rmtree(published)
    published.mkdir()
    FAMILIES["voxtral"].save(published)
    write_tekken(published, 2000, chunk_s=30.0)
    with pytest.raises(ConversionError, match="375 times token 24 for a clip, and the model hears 25 times token 24"):
        from_pretrained(published)
    (published / "tekken.json").write_text("{")
    with pytest.raises(ConversionError, match="cannot be read"):
        from_pretrained(published)


def test_a_feature_extractor_for_another_encoder_is_refused():
    family = FAMILIES["voxtral"]
    theirs = VoxtralProcessor(WhisperFeatureExtractor(feature_size=80), family.processor().tokenizer)
    with pytest.raises(ConversionError, match="makes 80 mel bins x 3000 frames, and the encoder takes 16 x 200"):
        from_hf(family.build(), theirs)
    theirs = VoxtralProcessor(WhisperFeatureExtractor(feature_size=16), family.processor().tokenizer)
    with pytest.raises(ConversionError, match="makes 16 mel bins x 3000 frames, and the encoder takes 16 x 200"):
        from_hf(family.build(), theirs)


def test_tokens_of_windows_add_up():
    """Audio Flamingo 3 counts by the sum of frames, and its encoder makes tokens window by window."""
    for n_frames in range(3, 9001):
        windows = [*(n_frames // 3000) * [3000], n_frames % 3000]
        assert sum(n_pooled_states(n) for n in windows if n) == n_pooled_states(n_frames)
    assert n_pooled_states(4100) == 1025
