"""The model that ships with the package: it really listens, and it is small."""

import pytest
import torch
from safetensors import safe_open

from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.animals import animal
from lalm_lens.assets.speech import speech
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.corrupt import silence

N_CLIPS = 240  # per attribute; speakers and seeds that training never saw
SEED = 424_242


def speech_clips() -> list[tuple[torch.Tensor, dict[str, str]]]:
    import numpy as np

    gender, language, emotion = (ATTRIBUTES[name].labels for name in ("gender", "language", "emotion"))
    clips = []
    for n in range(N_CLIPS):
        labels = {
            "gender": gender[n % 2],
            "language": language[(n // 2) % 8],
            "emotion": emotion[(n // 16) % 5],
        }
        rng = np.random.default_rng([SEED, 0, n])
        duration_s = float(rng.choice([1.4, 1.6, 1.8, 2.0]))
        clips.append((torch.from_numpy(speech(rng, **labels, duration_s=duration_s)), labels))
    return clips


def animal_clips() -> list[tuple[torch.Tensor, dict[str, str]]]:
    import numpy as np

    clips = []
    for n in range(N_CLIPS):
        rng = np.random.default_rng([SEED, 1, n])
        name = ATTRIBUTES["animal"].labels[n % 9]
        clips.append((torch.from_numpy(animal(rng, name, float(rng.choice([1.4, 1.6, 1.8, 2.0])))), {"animal": name}))
    return clips


@torch.no_grad()
def answers(tiny_lalm, name: str, waveforms: list[torch.Tensor]) -> torch.Tensor:
    """Probabilities of the labels, [clip, label], over the whole vocabulary."""
    processor, attribute = tiny_lalm.processor, ATTRIBUTES[name]
    options = list(processor.label_tokens(attribute.labels).values())
    rows = []
    for start in range(0, len(waveforms), 40):
        chunk = waveforms[start : start + 40]
        prompts = [processor.prompt(attribute, processor.n_frames(waveform)) for waveform in chunk]
        rows.append(tiny_lalm(processor.inputs(prompts, chunk), logits_at=-1)[:, -1].softmax(-1)[:, options])
    return torch.cat(rows)


@pytest.fixture(scope="module")
def clips() -> dict[str, list]:
    spoken = speech_clips()
    return {"gender": spoken, "language": spoken, "emotion": spoken, "animal": animal_clips()}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_it_hears_unseen_speakers(tiny_lalm, clips, name):
    truth = torch.tensor([ATTRIBUTES[name].labels.index(labels[name]) for _, labels in clips[name]])
    right = answers(tiny_lalm, name, [waveform for waveform, _ in clips[name]]).argmax(-1) == truth
    assert len(right) >= 200
    assert right.float().mean() >= 0.9


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_silence_tells_it_nothing(tiny_lalm, clips, name):
    p = answers(tiny_lalm, name, [silence(waveform) for waveform, _ in clips[name][:20]])
    n_labels = len(ATTRIBUTES[name].labels)
    assert (p.sum(-1) > 0.95).all()
    assert (p * n_labels).max() < 1.6
    assert (p * n_labels).min() > 0.5


def test_it_is_small_and_stored_in_bf16():
    assert sum(path.stat().st_size for path in TINY_LALM.iterdir()) <= 5_000_000
    with safe_open(TINY_LALM / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_its_card_says_what_it_is():
    card = (TINY_LALM / "README.md").read_text(encoding="utf-8").lower()
    assert "synthetic" in card
    assert "stand-in" in card
    assert "n = " in card or "| n " in card
