"""Qwen-Audio's processor: its tokenizer from qwen.tiktoken, which comes with code of its own that is not run."""

import base64
from pathlib import Path
from typing import Any, no_type_check

from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin, WhisperFeatureExtractor
from transformers.convert_slow_tokenizer import TikTokenConverter

VOCABULARY = "qwen.tiktoken"
WORD = (  # what pieces are made within
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END, CLIP, CLIP_BEGINS, CLIP_ENDS = "<|endoftext|>", "[[[AUDIO:modality]]]", "<audio>", "</audio>"
TASKS = """
    startoftranscript startofanalysis translate transcribe caption keyword
    unknown en zh de es ko fr ja it zh_tr notimestamps sil timestamps
""".split()
OUTPUTS = """
    caption_audiocaps caption_clotho audioset_ontology caption_plain itn wo_itn startofentityvalue endofentityvalue
    startofentitytype endofentitytype named_entity_recognition audio_grounding startofword endofword delim
    emotion_recognition music_description note_analysis pitch
""".split()
TOPICS = """
    sonic instrument speaker_meta song_meta question answer choice scene event vocal_classification
    speech_understanding scenario action entities speech_edit
""".split()
MARKS = (  # in the order of their ids, the first of which comes after the last piece of qwen.tiktoken
    *(END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)), CLIP),
    *(f"<|{name}|>" for name in TASKS),
    *(f"<|{n / 100:.2f}|>" for n in range(3001)),  # seconds
    *(f"<|{name}|>" for name in OUTPUTS),
    *(f"<|midi_pitch_{n}|>" for n in range(128)),
    *("<|velocity|>", *(f"<|midi_velocity_{n}|>" for n in range(128))),
    *(f"<|{name}|>" for name in TOPICS),
    *(CLIP_BEGINS, CLIP_ENDS),
)
# The turns that the authors' `chat` writes, and a clip in the line that their `from_list_format` makes of it.
CHAT = f"""{{% set n = namespace(clips=0) %}}{{% for turn in messages %}}{{% if loop.first %}}<|im_start|>system
You are a helpful assistant.<|im_end|>
{{% endif %}}<|im_start|>{{{{ turn.role }}}}
{{% for part in turn.content %}}{{% if part.type == 'audio' %}}{{% set n.clips = n.clips + 1 %}}\
Audio {{{{ n.clips }}}}:{CLIP_BEGINS}{CLIP}{CLIP_ENDS}
{{% else %}}{{{{ part.text }}}}{{% endif %}}{{% endfor %}}<|im_end|>
{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant
{{% endif %}}"""


class QwenConverter(TikTokenConverter):
    """transformers' own, which would keep a copy of the file by its name, and take that for a newer one."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        lines = filter(None, Path(tiktoken_url).read_bytes().splitlines())
        return {base64.b64decode(piece, validate=True): int(n) for piece, n in map(bytes.split, lines)}


class Ears(ProcessorMixin):
    """Tokenizer and feature extractor."""

    @no_type_check  # HF reads the names of these arguments from the function's own code, which no wrapper has
    def __init__(self, feature_extractor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)


def qwen_processor(folder: Path) -> ProcessorMixin | None:
    """What stands in qwen.tiktoken and the authors' code, as HF's own classes; None without that file."""
    if not (folder / VOCABULARY).is_file():
        return None
    words = QwenConverter(str(folder / VOCABULARY), pattern=WORD, extra_special_tokens=MARKS).converted()
    words.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=list(MARKS[1:]),
        padding_side="left",
    )
    return Ears(WhisperFeatureExtractor(feature_size=80), tokenizer, CHAT)
