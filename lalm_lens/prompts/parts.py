"""The processor of a model whose encoder and language model come from repositories of their own."""

from pathlib import Path
from typing import Any, no_type_check

from transformers import AutoTokenizer, ProcessorMixin, WhisperFeatureExtractor


class EarsAndWords(ProcessorMixin):
    """The feature extractor of one repository and the tokenizer of another."""

    @no_type_check  # HF reads the names of these arguments from the function's own code, which no wrapper has
    def __init__(self, feature_extractor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)


def processor_of_parts(whisper: Path, llm: Path) -> EarsAndWords:
    """From the folders of a Whisper model and of a language model."""
    return EarsAndWords(
        WhisperFeatureExtractor.from_pretrained(whisper),
        AutoTokenizer.from_pretrained(llm, trust_remote_code=False),
    )
