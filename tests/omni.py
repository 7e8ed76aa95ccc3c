"""The reference for Qwen2.5-Omni: transformers' own Thinker, tiny and random, and prompts with sounds and pictures.

Nothing here imports lalm_lens, so that nothing of it can vouch for itself.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from reference import RATE_HZ, chirps, left_padded, n_audio_tokens, randomise
from torch import Tensor, nn
from transformers import (
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)
from transformers.vision_utils import get_vision_window_index

AUDIO, IMAGE, VIDEO, AUDIO_BOS, AUDIO_EOS, VISION_BOS, VISION_EOS = range(250, 257)
PATCH, MERGE, WINDOW = 4, 2, 16  # pixels, patches, pixels: a window holds 4 x 4 patches
N_PIXELS = 3 * 2 * PATCH**2
LAYERS = {"audio": 2, "vision": 3, "text": 3}

Thinker = Qwen2_5OmniThinkerForConditionalGeneration


def tiny_config(n_window: int = 25, **text: object) -> Qwen2_5OmniThinkerConfig:
    return Qwen2_5OmniThinkerConfig(
        audio_config={
            "d_model": 32,
            "encoder_layers": LAYERS["audio"],
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "num_mel_bins": 16,
            "max_source_positions": 200,
            "n_window": n_window,
            "output_dim": 64,
        },
        vision_config={
            "depth": LAYERS["vision"],
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "window_size": WINDOW,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        text_config={
            "vocab_size": 260,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": LAYERS["text"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            **text,
        },
        audio_token_index=AUDIO,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_start_token_id=AUDIO_BOS,
        audio_end_token_id=AUDIO_EOS,
        vision_start_token_id=VISION_BOS,
        vision_end_token_id=VISION_EOS,
    )


def tiny_omni(seed: int = 0, n_window: int = 25, **text: object) -> Thinker:
    torch.manual_seed(seed)
    return randomise(Thinker(tiny_config(n_window, **text))).eval()


@dataclass(frozen=True)
class Words:
    n: int


@dataclass(frozen=True)
class Clip:
    duration_s: float


@dataclass(frozen=True)
class Image:
    rows: int
    columns: int


@dataclass(frozen=True)
class Video:
    frames: int
    rows: int
    columns: int
    seconds: float = 1.0  # of each frame of the grid
    sound_s: float | None = None  # how long its own sound is, if that is heard


Part = Words | Clip | Image | Video


def extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=16, chunk_length=4)


class Batch:
    """Left-padded prompts, as HF's processor would return them."""

    def __init__(self, rows: list[list[Part]], seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.seed, self.durations_s = seed, []
        self.images, self.videos, self.seconds = [], [], []
        self.is_heard = any(isinstance(part, Video) and part.sound_s for row in rows for part in row)
        self.padded = left_padded([torch.cat([self.tokens(part) for part in row]) for row in rows])

    def tokens(self, part: Part) -> Tensor:
        match part:
            case Words(n):
                return torch.randint(10, 240, (n,), generator=self.generator)
            case Clip(duration_s):
                return torch.tensor([AUDIO_BOS, *[AUDIO] * self.n_audio(duration_s), AUDIO_EOS])
            case Image(rows, columns):
                self.images.append((1, rows, columns))
                return torch.tensor([VISION_BOS, *[IMAGE] * (rows * columns // MERGE**2), VISION_EOS])
            case Video(frames, rows, columns, seconds, sound_s):
                self.videos.append((frames, rows, columns))
                self.seconds.append(seconds)
                n = frames * rows * columns // MERGE**2
                inner = [VIDEO] * n if sound_s is None else interleaved(part, self.n_audio(sound_s))
                return torch.tensor([VISION_BOS, *inner, VISION_EOS])

    def n_audio(self, duration_s: float) -> int:
        self.durations_s.append(duration_s)
        return n_audio_tokens(-(-int(duration_s * RATE_HZ) // 160))

    def pixels(self, grids: list[tuple[int, ...]]) -> Tensor:
        n = sum(int(np.prod(grid)) for grid in grids)
        return torch.randn(n, N_PIXELS, generator=torch.Generator().manual_seed(self.seed + n))

    def hf(self) -> dict[str, Tensor]:
        batch = dict(self.padded)
        if self.durations_s:
            features = extractor()(
                [clip.numpy() for clip in chirps(self.durations_s, self.seed)],
                sampling_rate=RATE_HZ,
                padding="max_length",
                return_attention_mask=True,
                return_tensors="pt",
            )
            batch["input_features"] = features["input_features"]
            batch["feature_attention_mask"] = features["attention_mask"]
        if self.images:
            batch["pixel_values"], batch["image_grid_thw"] = self.pixels(self.images), torch.tensor(self.images)
        if self.videos:
            batch["pixel_values_videos"], batch["video_grid_thw"] = self.pixels(self.videos), torch.tensor(self.videos)
            batch["video_second_per_grid"] = torch.tensor(self.seconds)
        return batch

    def flags(self) -> dict[str, bool]:
        return {"use_audio_in_video": True} if self.is_heard else {}


def interleaved(video: Video, n_audio: int) -> list[int]:
    """In the order of HF's own processor."""
    marks = dict(zip("<>av", (AUDIO_BOS, AUDIO_EOS, AUDIO, VIDEO), strict=True))
    processor = SimpleNamespace(
        audio_bos_token="<",
        audio_eos_token=">",
        audio_token="a",
        video_token="v",
        video_processor=SimpleNamespace(merge_size=MERGE),
        get_chunked_index=lambda *args: Qwen2_5OmniProcessor.get_chunked_index(None, *args),
    )
    written = Qwen2_5OmniProcessor.replace_video_with_audio_token(
        processor,
        {
            "video_grid_thw": np.array([[video.frames, video.rows, video.columns]]),
            "video_second_per_grid": [video.seconds],
        },
        0,
        {"num_audio_tokens": [n_audio]},
        0,
        position_id_per_seconds=25,
        seconds_per_chunk=2.0,
    )
    return [marks[mark] for mark in written]


@torch.no_grad()
def hf_positions(hf: Thinker, batch: dict[str, Tensor], is_heard: bool) -> tuple[Tensor, Tensor]:
    """Positions [3, batch, pos], and how far those of new tokens are ahead of their number."""
    mask = batch.get("feature_attention_mask")
    return hf.model.get_rope_index(
        batch["input_ids"],
        batch.get("image_grid_thw"),
        batch.get("video_grid_thw"),
        batch["attention_mask"],
        is_heard,
        None if mask is None else mask.sum(-1),
        batch.get("video_second_per_grid"),
    )


@torch.no_grad()
def hf_states(hf: Thinker, batch: dict[str, Tensor], **flags: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and what every block and adapter returns. The audio tower's are of the sound alone, clip after clip; the
    vision tower's are in the order of the patches, those of images before those of videos."""
    inner, states = hf.model, {}
    modules = {
        **{f"audio.{n}": layer for n, layer in enumerate(inner.audio_tower.layers)},
        "audio_norm": inner.audio_tower.ln_post,
        "audio_adapter": inner.audio_tower.proj,
        **{f"vision.{n}": block for n, block in enumerate(inner.visual.blocks)},
        "vision_adapter": inner.visual.merger,
        **{f"text.{n}": layer for n, layer in enumerate(inner.language_model.layers)},
    }

    def keep(name: str, out: Tensor | tuple) -> None:
        states.setdefault(name, []).append(out if isinstance(out, Tensor) else out[0])

    def look(name: str):
        def hook(module: nn.Module, args: tuple, out: Tensor | tuple) -> None:
            keep(name, out)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in modules.items()]
    try:
        logits = hf(**batch, **flags, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    grids = [batch[name] for name in ("image_grid_thw", "video_grid_thw") if name in batch]
    for name, seen in states.items():
        if name.startswith("vision"):
            n = 1 if name == "vision_adapter" else MERGE**2
            seen = [in_order(state, grid, n) for state, grid in zip(seen, grids, strict=True)]
        states[name] = torch.cat(seen)
    return logits, states


def in_order(state: Tensor, grid: Tensor, n: int) -> Tensor:
    """HF's vision tower sorts squares of patches by window."""
    index, _ = get_vision_window_index(grid, spatial_merge_size=MERGE, window_size=WINDOW, patch_size=PATCH)
    return state.unflatten(0, (-1, n))[index.argsort()].flatten(0, 1)
