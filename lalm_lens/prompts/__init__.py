"""A question about a clip as a model's own tokens and features, with a label for every position."""

from lalm_lens.prompts.desta import Desta2Template, Desta25Template
from lalm_lens.prompts.hearing import Chunks, CutClip, Hearing, OneWindow, PaddedWindow, WholeClip, Windows
from lalm_lens.prompts.mistral import MistralTemplate
from lalm_lens.prompts.parts import EarsAndWords, processor_of_parts
from lalm_lens.prompts.processor import Processor
from lalm_lens.prompts.prompt import Position, Prompt
from lalm_lens.prompts.qwen import qwen_processor
from lalm_lens.prompts.seeing import EarsAndEyes, seeing_processor
from lalm_lens.prompts.templates import ChatTemplate, ClipFirstTemplate, Mark, Template, Transcript

__all__ = [
    "ChatTemplate",
    "Chunks",
    "ClipFirstTemplate",
    "CutClip",
    "Desta2Template",
    "Desta25Template",
    "EarsAndEyes",
    "EarsAndWords",
    "Hearing",
    "Mark",
    "MistralTemplate",
    "OneWindow",
    "PaddedWindow",
    "Position",
    "Processor",
    "Prompt",
    "Template",
    "Transcript",
    "WholeClip",
    "Windows",
    "processor_of_parts",
    "qwen_processor",
    "seeing_processor",
]
