"""A question about a clip as a model's own tokens and features, with a label for every position."""

from lalm_lens.prompts.hearing import Chunks, CutClip, Hearing, OneWindow, WholeClip, Windows
from lalm_lens.prompts.mistral import MistralTemplate
from lalm_lens.prompts.processor import Processor
from lalm_lens.prompts.prompt import Position, Prompt
from lalm_lens.prompts.qwen import qwen_processor
from lalm_lens.prompts.seeing import EarsAndEyes, seeing_processor
from lalm_lens.prompts.templates import ChatTemplate, Mark, Template

__all__ = [
    "ChatTemplate",
    "Chunks",
    "CutClip",
    "EarsAndEyes",
    "Hearing",
    "Mark",
    "MistralTemplate",
    "OneWindow",
    "Position",
    "Processor",
    "Prompt",
    "Template",
    "WholeClip",
    "Windows",
    "qwen_processor",
    "seeing_processor",
]
