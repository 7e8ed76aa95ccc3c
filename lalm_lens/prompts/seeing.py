"""The processor of a model that also sees, without what needs torchvision."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, no_type_check

from transformers import AutoProcessor, ProcessorMixin


class EarsAndEyes(ProcessorMixin):
    """Tokenizer, feature extractor and image processor of a repository. HF's own class has a video processor beside
    them, which needs torchvision."""

    @no_type_check  # HF reads the names of these arguments from the function's own code, which no wrapper has
    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
    ):
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template)


def seeing_processor(folder: Path) -> ProcessorMixin:
    """HF's own where torchvision is there, and else all of it but the video processor."""
    if find_spec("torchvision") is not None:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    return EarsAndEyes.from_pretrained(folder, trust_remote_code=False)
