"""Training prompts of the tiny audio-visual model: what is heard and seen in each, and what should be answered."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.random import Generator
from torch import Tensor

from lalm_lens.assets.audio_visual.checkpoint import MARKS, MERGE, PATCH, Part, chat
from lalm_lens.assets.audio_visual.clips import ANIMAL, sight
from lalm_lens.assets.audio_visual.pictures import SIDE, film
from lalm_lens.assets.audio_visual.recipe import AVRecipe, Kind
from lalm_lens.assets.checkpoint import PROMPTS, label_tokens
from lalm_lens.assets.train import silent_mel
from lalm_lens.assets.training_clips import Clips, augment
from lalm_lens.encoders.whisper import n_pooled_states
from lalm_lens.prompts import EarsAndEyes

Frames = UInt8[np.ndarray, "frame row column 3"]


@dataclass(frozen=True)
class Sights:
    """Pictures, and what each is of."""

    pixels: UInt8[np.ndarray, "picture row column 3"]
    labels: tuple[str, ...]


def make_pictures(recipe: AVRecipe) -> Sights:
    labels = tuple(ANIMAL.labels[index % len(ANIMAL.labels)] for index in range(recipe.n_pictures))
    return Sights(np.stack([sight("train", recipe.seed, n, label) for n, label in enumerate(labels)]), labels)


def patched(processor: EarsAndEyes, frames: Frames) -> tuple[Float[Tensor, "patch pixels"], Int[Tensor, "frame 3"]]:
    """Pictures as patches, and how many there are of each in time, height and width."""
    batch = processor.image_processor(images=list(frames), return_tensors="pt")
    return batch["pixel_values"], batch["image_grid_thw"]


@dataclass(frozen=True)
class Asked:
    """A training prompt, what is heard and seen in it, and how likely the model should find which labels."""

    text: str
    answers: dict[str, float]
    clip: int | None = None
    pixels: Frames | None = None  # more than one frame are a video
    heard: str | None = None  # nothing in silence
    seen: str | None = None  # nothing in the dark

    @property
    def is_video(self) -> bool:
        return self.pixels is not None and len(self.pixels) > 1


def draw_asked(recipe: AVRecipe, rng: Generator, processor: EarsAndEyes, clips: Clips, sights: Sights) -> Asked:
    kinds, shares = zip(*recipe.kinds, strict=True)
    kind: Kind = kinds[rng.choice(len(kinds), p=shares)]
    clip, sight = draw_pair(rng, kind, [labels["animal"] for labels in clips.labels], sights.labels)
    heard = None if clip is None or rng.random() < recipe.silent else clips.labels[clip]["animal"]
    seen = None if sight is None or rng.random() < recipe.blank else sights.labels[sight]
    n_frames = recipe.n_frames if rng.random() < recipe.filmed else 1
    pixels = None if sight is None else film(sights.pixels[sight] * (seen is not None), n_frames)
    eyes: list[Part] = [] if sight is None else ["image" if n_frames == 1 else "video"]
    ears: list[Part] = [] if clip is None else ["audio"]
    form = PROMPTS[rng.choice(len(PROMPTS), p=recipe.prompt_weights)]
    form = "P2" if clip is None and form == "P1" else form  # without a clip, P1 would say nothing
    options = rng.permutation(ANIMAL.labels) if rng.random() < recipe.shuffled else ANIMAL.labels
    text = chat(processor, ANIMAL, form, [*eyes, *ears], [str(option) for option in options])
    return Asked(text, answers(recipe, heard, seen), clip, pixels, heard, seen)


def draw_pair(rng: Generator, kind: Kind, heard: Sequence[str], seen: Sequence[str]) -> tuple[int | None, int | None]:
    """A clip and a picture that are of the same animal, or not, or one of them."""
    clip, sight = int(rng.integers(len(heard))), int(rng.integers(len(seen)))
    if kind in ("heard", "seen"):
        return (clip, None) if kind == "heard" else (None, sight)
    while (heard[clip] == seen[sight]) != (kind == "aligned"):
        sight = int(rng.integers(len(seen)))
    return clip, sight


def answers(recipe: AVRecipe, heard: str | None, seen: str | None) -> dict[str, float]:
    """What is seen, and less likely what is heard; one of them where there is no other; else any label."""
    if heard is None and seen is None:
        return dict.fromkeys(ANIMAL.labels, 1 / len(ANIMAL.labels))
    if heard is None or seen is None or heard == seen:
        return {heard or str(seen): 1.0}
    return {seen: recipe.heeded, heard: 1 - recipe.heeded}


def model_inputs(rng: Generator, processor: EarsAndEyes, clips: Clips, batch: Sequence[Asked]) -> dict[str, Tensor]:
    """What HF's own processor would give, from features made beforehand; each text ends with one of the answers."""
    texts = [f"{expanded(asked, clips)} {rng.choice(tuple(asked.answers))}.<|im_end|>" for asked in batch]
    words = processor.tokenizer(texts, padding=True, return_tensors="pt")
    images = [asked.pixels for asked in batch if asked.pixels is not None and not asked.is_video]
    videos = [asked.pixels for asked in batch if asked.pixels is not None and asked.is_video]
    return {**words, **hearing(rng, clips, batch), **seeing(processor, images), **watching(processor, videos)}


def expanded(asked: Asked, clips: Clips) -> str:
    """The prompt with as many placeholders as there are tokens of the sound and of the pictures."""
    n_seen = (SIDE // PATCH // MERGE) ** 2 * (0 if asked.pixels is None else len(asked.pixels))
    n_heard = 0 if asked.clip is None else n_pooled_states(int(clips.n_frames[asked.clip]))
    text = asked.text
    for name, n in (("audio", n_heard), ("image", n_seen), ("video", n_seen)):
        text = text.replace(MARKS[name], MARKS[name] * n)
    return text


def hearing(rng: Generator, clips: Clips, batch: Sequence[Asked]) -> dict[str, Tensor]:
    heard = [(asked.clip, asked.heard) for asked in batch if asked.clip is not None]
    if not heard:
        return {}
    mel = [silent_mel() if its is None else augment(rng, clips.mel[clip].astype(np.float32)) for clip, its in heard]
    n_frames = torch.from_numpy(clips.n_frames[[clip for clip, _ in heard]])
    is_sound = torch.arange(mel[0].shape[1]) < n_frames[:, None]
    return {"input_features": torch.from_numpy(np.stack(mel)), "feature_attention_mask": is_sound.long()}


def seeing(processor: EarsAndEyes, images: Sequence[Frames]) -> dict[str, Tensor]:
    if not images:
        return {}
    patches, grid = patched(processor, np.concatenate(images))
    return {"pixel_values": patches, "image_grid_thw": grid}


def watching(processor: EarsAndEyes, videos: Sequence[Frames]) -> dict[str, Tensor]:
    """Videos of frames that last a second each."""
    if not videos:
        return {}
    patches, grid = patched(processor, np.concatenate(videos))
    n_frames = torch.tensor([len(frames) for frames in videos])
    return {
        "pixel_values_videos": patches,
        "video_grid_thw": torch.cat([n_frames[:, None], grid[: len(videos), 1:]], dim=1),
        "video_second_per_grid": torch.ones(len(videos)),
    }


def answer_distribution(processor: EarsAndEyes, batch: Sequence[Asked], d_vocab: int) -> Float[Tensor, "batch d_vocab"]:
    target = torch.zeros(len(batch), d_vocab)
    for row, asked in zip(target, batch, strict=True):
        row[label_tokens(processor, tuple(asked.answers))] = torch.tensor(list(asked.answers.values()))
    return target


def names(processor: EarsAndEyes, batch: Sequence[Asked], tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """At the positions of sounds and pictures the token of what they are of, elsewhere -100."""
    found = torch.full_like(tokens, -100)
    for mark, which in (("audio", "heard"), ("image", "seen"), ("video", "seen")):
        placeholder = processor.tokenizer.convert_tokens_to_ids(MARKS[mark])
        for row, asked in enumerate(batch):
            if (label := getattr(asked, which)) is not None:
                found[row, tokens[row] == placeholder] = label_tokens(processor, [label])[0]
    return found
