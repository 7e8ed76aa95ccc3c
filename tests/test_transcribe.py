"""What Whisper writes: the same as a greedy loop over its logits."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import pytest
import torch
from desta_golden import model_of
from reference import RATE_HZ, chirps, extractor, randomise
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer

from lalm_lens.errors import AudioError, ConversionError, PromptError
from lalm_lens.transcribe import MAX_NEW_TOKENS, Transcriber, has_speech

SPECIAL = "<|endoftext|> <|startoftranscript|> <|en|> <|de|> <|transcribe|> <|translate|> <|notimestamps|>".split()
CLIPS = chirps([1.0, 1.7])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random Whisper as it is published, of bytes; it has to find the language out."""
    folder = tmp_path_factory.mktemp("whisper")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = WhisperTokenizer(vocab={char: n for n, char in enumerate(alphabet)}, merges=[])
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    end, begin, en, de, transcribe, translate, untimed = tokenizer.convert_tokens_to_ids(SPECIAL)
    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=16,
        max_source_positions=100,
        max_target_positions=MAX_NEW_TOKENS + 8,
        vocab_size=len(tokenizer),
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=begin,
    )
    torch.manual_seed(0)
    whisper = randomise(WhisperForConditionalGeneration(config))
    says = {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": en, "<|de|>": de},
        "task_to_id": {"transcribe": transcribe, "translate": translate},
        "no_timestamps_token_id": untimed,
        "suppress_tokens": [],
        "begin_suppress_tokens": [220, end],
        "forced_decoder_ids": [[1, None], [2, transcribe]],  # as whisper-large-v3 says it
    }
    whisper.save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | says | {"_from_model_config": False}))
    WhisperProcessor(extractor(16), tokenizer).save_pretrained(folder)
    return folder


def written(folder: Path, clip: Tensor) -> str:
    """Token by token, the most probable one."""
    processor = WhisperProcessor.from_pretrained(folder)
    whisper = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer, says = processor.tokenizer, whisper.generation_config
    mel = processor(clip.numpy(), sampling_rate=RATE_HZ, return_tensors="pt")["input_features"]
    end, begin, en, de, transcribe, _, untimed = tokenizer.convert_tokens_to_ids(SPECIAL)

    @torch.no_grad()
    def logits(tokens: list[int]) -> Tensor:
        return whisper(input_features=mel, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]

    language = max((en, de), key=lambda token: logits([begin])[token])
    tokens = [begin, language, transcribe, untimed]
    assert MAX_NEW_TOKENS == 128, "the originals' number"
    for n in range(MAX_NEW_TOKENS):
        scores = logits(tokens)
        if n == 0:
            scores[says.begin_suppress_tokens] = -torch.inf
        tokens.append(int(scores.argmax()))
        if tokens[-1] == end:
            break
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_transcript_is_what_whisper_finds_most_probable(folder):
    transcriber = Transcriber(folder)
    texts = [transcriber(clip) for clip in CLIPS]
    assert texts[0] == written(folder, CLIPS[0])
    assert all(texts)
    assert texts[0] != texts[1]


def test_marks_are_no_part_of_a_transcript(folder, monkeypatch):
    transcriber = Transcriber(folder)
    processor, whisper = transcriber.parts
    end, begin, *_ = processor.tokenizer.convert_tokens_to_ids(SPECIAL)
    words = processor.tokenizer(" Hi.", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(whisper, "generate", lambda *_, **__: torch.tensor([[begin, *words, end, end]]))
    assert transcriber(CLIPS[0]) == " Hi."


def test_a_clip_is_transcribed_once(folder, monkeypatch):
    transcriber = Transcriber(folder)
    first = transcriber(CLIPS[0])
    monkeypatch.setattr(Transcriber, "write", None)
    assert transcriber(CLIPS[0].clone()) == first
    with pytest.raises(TypeError):
        transcriber(CLIPS[1])


@pytest.mark.parametrize(("name", "shown"), [("desta2", " so it says "), ("desta25", "so it says")])
def test_desta25_strips_what_is_heard_and_desta2_does_not(name, shown, tmp_path, monkeypatch):
    transcriber = Transcriber(tmp_path)
    monkeypatch.setattr(transcriber, "write", lambda waveform: " so it says ")
    processor = replace(model_of(name).processor, transcriber=transcriber)
    assert processor.transcribe(CLIPS[0]) == shown


@pytest.mark.parametrize("name", ["desta2", "desta25"])
def test_a_whisper_without_tokenizer_cannot_write(name):
    with pytest.raises(ConversionError, match=r"No transcript can be made: .* Give the transcripts yourself"):
        model_of(name).processor.transcribe(CLIPS[0])
    alone = replace(model_of(name).processor, transcriber=None)
    with pytest.raises(PromptError, match=r"no Whisper beside this model .* Give the transcripts yourself"):
        alone.transcribe(CLIPS[0])


def test_a_whisper_without_decoder_cannot_write(folder, tmp_path):
    copytree(folder, tmp_path / "whisper")
    weights = load_file(folder / "model.safetensors")
    encoder = {name: tensor for name, tensor in weights.items() if ".encoder." in name}
    save_file(encoder, tmp_path / "whisper" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConversionError, match=r"lacks \d+ tensors of Whisper, as model\.decoder.* Give the transcripts"
    ):
        Transcriber(tmp_path / "whisper")(CLIPS[0])


def test_speech_is_asked_for_by_silero(monkeypatch):
    def spans(waveform, detector):
        assert detector == "detector"
        return [{"start": 0, "end": 10}] if waveform.any() else []

    silero = SimpleNamespace(load_silero_vad=lambda: "detector", get_speech_timestamps=spans)
    monkeypatch.setitem(sys.modules, "silero_vad", silero)
    assert has_speech(CLIPS[0])
    assert not has_speech(torch.zeros(16_000))
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    with pytest.raises(AudioError, match=r"needs silero-vad .*pip install 'lalm_lens\[speech\]'"):
        has_speech(CLIPS[0])
