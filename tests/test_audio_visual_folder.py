"""Folders of clips with pictures and videos, as a model takes them."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from einops import rearrange
from reference import chirps
from test_omni import photos, seeing  # noqa: F401

from lalm_lens.audio_visual import read_audio_visual
from lalm_lens.errors import DataError, InputError
from lalm_lens.inputs import HeardVideo

PATCH, MERGE = 4, 2


def write(folder: Path, **row: object) -> Path:
    """One clip, four frames and a list."""
    soundfile.write(folder / "a.wav", chirps([0.6])[0].numpy(), 16_000)
    for n, photo in enumerate(photos((40, 48), (40, 48), (40, 48), (24, 24))):
        photo.save(folder / f"{n}.png")
    (folder / "text.png").write_text("no picture")
    its = {"file_name": "a.wav", "label": "male", **row}
    (folder / "metadata.jsonl").write_text(json.dumps(its))
    return folder


def test_frames_become_the_patches_of_a_video(seeing):  # noqa: F811
    """Two frames in each patch, the last one twice where there is no other: each frame's own pixels, made here."""
    processor = seeing[1].processor
    frames = photos((40, 48), (40, 48), (40, 48))
    video = processor.watch(frames, fps=4)
    assert (video.grid.tolist(), video.seconds.tolist()) == ([[2, 10, 12]], [0.5])
    images = processor.hf.image_processor
    mean, std = (np.array(its)[:, None, None] for its in (images.image_mean, images.image_std))
    pixels = [(np.asarray(frame).transpose(2, 0, 1) / 255 - mean) / std for frame in [*frames, frames[-1]]]
    squares = "(n t) c (row a y) (column b x) -> (n row column a b) (c t y x)"
    sizes = {"t": 2, "y": PATCH, "x": PATCH, "a": MERGE, "b": MERGE}
    theirs = rearrange(np.stack(pixels), squares, **sizes)
    torch.testing.assert_close(video.patches, torch.tensor(theirs, dtype=torch.float32), rtol=1e-4, atol=1e-5)
    still = processor.watch(frames[:1], fps=1)
    torch.testing.assert_close(still.patches, processor.see(frames[:1]).patches)


def test_a_row_says_what_is_seen(seeing, tmp_path):  # noqa: F811
    processor = seeing[1].processor
    (sample,) = read_audio_visual(write(tmp_path, image="0.png", seen_label="female"), processor)
    assert (sample.label, sample.seen_label, sample.heard_clip) == ("male", "female", "a.wav")
    assert torch.equal(sample.images.patches, processor.see([PIL.Image.open(tmp_path / "0.png")]).patches)
    (two,) = read_audio_visual(write(tmp_path, image=["0.png", "3.png"]), processor)
    assert (len(two.images.grid), two.seen_label) == (2, "male")
    (film,) = read_audio_visual(write(tmp_path, frames=["0.png", "1.png"], fps=2), processor)
    assert isinstance(film.videos, HeardVideo)
    assert film.videos.seconds.tolist() == [1.0]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "needs an image, or frames and their fps, and has neither"),
        ({"frames": ["0.png"]}, "needs an image, or frames and their fps, and has frames"),
        ({"image": "0.png", "frames": ["0.png"], "fps": 1}, "and has image, frames"),
        ({"image": "text.png"}, "text.png cannot be read as a picture"),
        ({"image": "none.png"}, "none.png cannot be read as a picture"),
        ({"image": "../0.png"}, "pictures are inside the folder"),
        ({"image": 3}, "are text, or a list of files"),
    ],
)
def test_a_row_without_pictures_is_refused(seeing, tmp_path, row, says):  # noqa: F811
    with pytest.raises(DataError, match=says):
        read_audio_visual(write(tmp_path, **row), seeing[1].processor)


def test_frames_of_several_sizes_are_no_video(seeing, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="are of one size"):
        read_audio_visual(write(tmp_path, frames=["0.png", "3.png"], fps=1), seeing[1].processor)
    with pytest.raises(InputError, match="has frames, and some of them in a second"):
        seeing[1].processor.watch(photos((24, 24)), fps=0)
