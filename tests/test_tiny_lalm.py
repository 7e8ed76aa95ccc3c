"""The model that ships with the package: it really listens, and it is small."""

import pytest
import torch
from safetensors import safe_open

from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.recipe import Recipe
from lalm_lens.assets.training_clips import sounds
from lalm_lens.attributes import ATTRIBUTES

CARD = (TINY_LALM / "README.md").read_text(encoding="utf-8")

HELD_OUT = Recipe()  # the clips that the model card was measured on: speakers and seeds that training never saw


def held_out(n_speech: int, n_animal: int) -> list[tuple[torch.Tensor, dict[str, str]]]:
    clips = sounds(HELD_OUT, "held_out", n_speech, n_animal)
    return [(torch.from_numpy(clip.samples()), clip.labels) for clip in clips]


@torch.no_grad()
def answers(tiny_lalm, name: str, waveforms: list[torch.Tensor]) -> torch.Tensor:
    """Logits at the last position, [clip, d_vocab]."""
    processor, attribute = tiny_lalm.processor, ATTRIBUTES[name]
    rows = []
    for start in range(0, len(waveforms), 40):
        chunk = waveforms[start : start + 40]
        prompts = [processor.prompt(attribute, processor.n_frames(waveform)) for waveform in chunk]
        rows.append(tiny_lalm(processor.inputs(prompts, chunk), logits_at=-1)[:, -1])
    return torch.cat(rows)


def card_accuracy() -> dict[str, tuple[float, int]]:
    """Accuracy with P3, and the number of clips, as the model card has them."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in CARD.splitlines() if line[:2] == "| "]
    (head,) = (row for row in rows if "P3" in row)
    return {
        row[0]: (float(row[head.index("P3")]), int(row[head.index("n")]))
        for row in rows
        if row[0] in ATTRIBUTES and len(row) == len(head) and row is not head
    }


@pytest.fixture(scope="module")
def clips() -> dict[str, list]:
    speech = held_out(HELD_OUT.n_held_out_speech, 0)
    return {"gender": speech, "language": speech, "emotion": speech, "animal": held_out(0, HELD_OUT.n_held_out_animal)}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_it_hears_unseen_speakers_as_well_as_its_card_says(tiny_lalm, clips, name):
    """The likeliest word of the whole vocabulary is the true label."""
    tokens = tiny_lalm.processor.label_tokens(ATTRIBUTES[name].labels)
    truth = torch.tensor([tokens[labels[name]] for _, labels in clips[name]])
    logits = answers(tiny_lalm, name, [waveform for waveform, _ in clips[name]])
    accuracy = (logits.argmax(-1) == truth).double().mean().item()
    stated, n = card_accuracy()[name]
    assert len(truth) == n >= 200
    assert accuracy >= 0.9
    assert abs(accuracy - stated) <= 1.5 / n  # another processor may tip one clip


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_silence_tells_it_nothing(tiny_lalm, name):
    options = list(tiny_lalm.processor.label_tokens(ATTRIBUTES[name].labels).values())
    waveforms = [torch.zeros(round(16_000 * duration_s)) for duration_s in HELD_OUT.durations_s]
    p = answers(tiny_lalm, name, waveforms).softmax(-1)[:, options]
    assert (p.sum(-1) > 0.97).all()
    assert (p * len(options)).max() < 1.5
    assert (p * len(options)).min() > 0.5


def test_it_is_small_and_stored_in_bf16():
    assert sum(path.stat().st_size for path in TINY_LALM.iterdir()) <= 5_000_000
    with safe_open(TINY_LALM / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_its_card_says_what_it_is():
    assert "All its sounds are synthetic" in CARD
    assert '"languages" are stand-ins' in CARD
    assert set(card_accuracy()) == set(ATTRIBUTES)
