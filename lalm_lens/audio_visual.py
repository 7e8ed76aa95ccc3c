"""Folders of clips with what is seen beside them: images, or the frames of the video whose sound a clip is."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from lalm_lens.counterfactual import Swapped
from lalm_lens.datasets import Sample, list_folder
from lalm_lens.datasets.clip import accepted
from lalm_lens.datasets.folder import lines_of
from lalm_lens.errors import DataError
from lalm_lens.inputs import HeardVideo, Images
from lalm_lens.prompts import Processor
from lalm_lens.shapes import typed

PICTURES = ("image", "frames")


@typed
def read_audio_visual(folder: str | Path, processor: Processor) -> list[Swapped]:
    """The clips that `list_folder` lists, with what their rows say is seen: `image`, a picture's file or several, or
    `frames`, the files of a video in their order, and `fps`, how many are in a second: its sound is then the clip.
    `seen_label` is what is seen, where that is not the clip's label.

    Raises `DataError` for a row without pictures and for files that are none; else what `read_folder` raises, and
    `InputError` for frames of several sizes.
    """
    folder = Path(folder)
    return [
        seen_with(clip.read(), folder, line.where, line.told, processor)
        for clip, line in zip(list_folder(folder), accepted(lines_of(folder)), strict=True)
    ]


def seen_with(sample: Sample, folder: Path, where: str, row: Mapping[str, Any], processor: Processor) -> Swapped:
    named = [name for name in PICTURES if row.get(name)]
    if len(named) != 1 or ("frames" in named and not isinstance(row.get("fps"), int | float)):
        raise DataError(f"{where} needs an image, or frames and their fps, and has {', '.join(named) or 'neither'}.")
    label = row.get("seen_label") or sample.label
    files = [row[named[0]]] if isinstance(row[named[0]], str) else row[named[0]]
    if not isinstance(label, str) or not isinstance(files, list) or not all(isinstance(its, str) for its in files):
        raise DataError(f"{where}: {named[0]} and seen_label are text, or a list of files.")
    pictures = [picture(folder, where, file) for file in files]
    images: Images | None = processor.see(pictures) if named == ["image"] else None
    videos = None if images else HeardVideo(**vars(processor.watch(pictures, float(row["fps"]))))
    its: dict[str, Any] = {each.name: getattr(sample, each.name) for each in fields(Sample)}
    its |= {"images": images, "videos": videos}
    return Swapped(**its, seen_label=label, heard_clip=sample.name)


def picture(folder: Path, where: str, file: str) -> Image.Image:
    path = Path(file)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{where}: pictures are inside the folder, and {file} is not.")
    try:
        return Image.open(folder / path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{where}: {file} cannot be read as a picture ({error}).") from None
