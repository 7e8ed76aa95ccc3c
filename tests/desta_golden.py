"""The golden DeSTA models, and real vocabularies where they are at hand."""

import json
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lalm_lens.loading import from_pretrained
from lalm_lens.model import HookedLALM

GOLDEN = Path(__file__).parent / "golden"
VOCABULARIES = Path(__file__).parents[2] / "shared" / "tokenizers"
NAMES = ("desta2", "desta25")
LLM = {"desta2": "llama", "desta25": "llm"}  # folders of the golden sets
REAL = {"desta2": "llama3", "desta25": "llama31"}  # vocabularies

needs_vocabularies = pytest.mark.skipif(not VOCABULARIES.is_dir(), reason=f"no real vocabularies in {VOCABULARIES}")


@cache
def model_of(name: str) -> HookedLALM:
    """Not to be changed: the tests share it."""
    parts = {"whisper": GOLDEN / name / "checkpoint/whisper", "llm": GOLDEN / name / "checkpoint" / LLM[name]}
    return from_pretrained(GOLDEN / name / "checkpoint", parts=parts)


@cache
def golden(name: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """What a set says of itself, its inputs, and what the original made of them."""
    meta = json.loads((GOLDEN / name / "meta.json").read_text(encoding="utf-8"))
    return meta, *(load_file(GOLDEN / name / f"{file}.safetensors") for file in ("inputs", "expected"))


def said(name: str) -> str:
    """The transcript of the golden clip."""
    meta, *_ = golden(name)
    return meta["transcript"] if name == "desta2" else meta["transcripts"][0]


@cache
def vocabulary(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(VOCABULARIES / REAL[name])
