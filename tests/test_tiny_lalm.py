"""The models that ship with the package: they really listen, and they are small."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from lalm_lens.assets import TINY_LALM, TINY_LALM_PLANTED, TINY_LALM_RELAY
from lalm_lens.assets.checkpoint import chat, feature_extractor
from lalm_lens.assets.recipe import RECIPES, Recipe
from lalm_lens.assets.training_clips import sounds
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.inputs import Inputs
from lalm_lens.loading import from_pretrained
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import OneWindow

pytestmark = pytest.mark.numbers

FOLDERS = (TINY_LALM, TINY_LALM_PLANTED, TINY_LALM_RELAY)
HELD_OUT = Recipe()  # the clips that the model cards were measured on: speakers and seeds that training never saw


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


@pytest.fixture(scope="module")
def model(folder) -> HookedLALM:
    return from_pretrained(folder)


@pytest.fixture(scope="module")
def card(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Heard:
    """A chunk of clips with their features, which are the same for every model and question."""

    waveforms: list[torch.Tensor]
    labels: list[dict[str, str]]
    mel: torch.Tensor
    n_frames: torch.Tensor


def heard(waveforms: list[torch.Tensor], labels: list[dict[str, str]]) -> list[Heard]:
    chunks = [slice(start, start + 40) for start in range(0, len(waveforms), 40)]
    return [
        Heard(waveforms[chunk], labels[chunk], *OneWindow().features(feature_extractor(), waveforms[chunk]))
        for chunk in chunks
    ]


def held_out(n_speech: int, n_animal: int) -> list[Heard]:
    clips = sounds(HELD_OUT, "held_out", n_speech, n_animal)
    return heard([torch.from_numpy(clip.samples()) for clip in clips], [clip.labels for clip in clips])


@torch.no_grad()
def answers(model: HookedLALM, name: str, clips: list[Heard]) -> torch.Tensor:
    """Logits at the last position, [clip, d_vocab]."""
    processor, attribute = model.processor, ATTRIBUTES[name]
    rows = []
    for chunk in clips:
        prompts = [processor.prompt(attribute, processor.n_frames(waveform)) for waveform in chunk.waveforms]
        inputs = Inputs(*processor.pad(prompts), mel=chunk.mel, n_frames=chunk.n_frames)
        rows.append(model(inputs, logits_at=-1)[:, -1])
    return torch.cat(rows)


def card_accuracy(card: str) -> dict[str, tuple[float, int]]:
    """Accuracy with P3, and the number of clips, as a model card has them."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:2] == "| "]
    (head,) = (row for row in rows if "P3" in row)
    return {
        row[0]: (float(row[head.index("P3")]), int(row[head.index("n")]))
        for row in rows
        if row[0] in ATTRIBUTES and len(row) == len(head) and row is not head
    }


@pytest.fixture(scope="module")
def clips() -> dict[str, list[Heard]]:
    speech = held_out(HELD_OUT.n_held_out_speech, 0)
    return {"gender": speech, "language": speech, "emotion": speech, "animal": held_out(0, HELD_OUT.n_held_out_animal)}


@pytest.mark.parametrize("name", ["animal"])
def test_it_hears_unseen_speakers_as_well_as_its_card_says(model, card, clips, name):
    """The likeliest word of the whole vocabulary is the true label."""
    hears_as_stated(model, card, clips, name)


@pytest.mark.stress
@pytest.mark.parametrize("name", ["gender", "language", "emotion"])
def test_it_hears_the_rest_as_well_as_its_card_says(model, card, clips, name):
    hears_as_stated(model, card, clips, name)


def hears_as_stated(model: HookedLALM, card: str, clips: dict[str, list[Heard]], name: str) -> None:
    tokens = model.processor.label_tokens(ATTRIBUTES[name].labels)
    truth = torch.tensor([tokens[labels[name]] for chunk in clips[name] for labels in chunk.labels])
    logits = answers(model, name, clips[name])
    accuracy = (logits.argmax(-1) == truth).double().mean().item()
    stated, n = card_accuracy(card)[name]
    assert len(truth) == n >= 200
    assert accuracy >= 0.9
    assert abs(accuracy - stated) <= 1.5 / n  # another processor may tip one clip


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_silence_tells_it_nothing(model, name):
    options = list(model.processor.label_tokens(ATTRIBUTES[name].labels).values())
    waveforms = [torch.zeros(round(16_000 * duration_s)) for duration_s in HELD_OUT.durations_s]
    p = answers(model, name, heard(waveforms, [{}] * len(waveforms))).softmax(-1)[:, options]
    assert (p.sum(-1) > 0.97).all()
    assert (p * len(options)).max() < 1.5
    assert (p * len(options)).min() > 0.5


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_plain_transformers_generates_the_answer(folder, clips, name):
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    waveform, labels = clips[name][0].waveforms[0], clips[name][0].labels[0]
    text = chat(processor, ATTRIBUTES[name], "P3")
    inputs = processor(text=text, audio=waveform.numpy(), sampling_rate=16_000, return_tensors="pt")
    for use_cache in (False,) if folder == TINY_LALM_PLANTED else (False, True):
        out = hf.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=use_cache)
        assert processor.decode(out[0, inputs["input_ids"].shape[1] :]) == f" {labels[name]}.<|im_end|>"


def test_it_is_small_and_stored_in_bf16(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 5_000_000
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_its_windows_are_the_recipe_s(folder, model):
    recipe = RECIPES[folder.name]
    last = recipe.window(recipe.steps - 1)
    assert list(model.decoder_cfg.windows) == [None if block in recipe.full_blocks else last for block in range(8)]


def test_its_card_says_what_it_is(folder, card):
    assert f"# {folder.name}\n" in card
    assert "All its sounds are synthetic" in card
    assert '"languages" are stand-ins' in card
    assert set(card_accuracy(card)) == set(ATTRIBUTES)
