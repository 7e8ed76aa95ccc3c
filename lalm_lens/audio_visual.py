"""Folders of clips with what is seen beside them: images, or the frames of the video whose sound a clip is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from lalm_lens.counterfactual import BESIDE, Swapped, drawn, pairs_of, swapped
from lalm_lens.datasets import Clip, Refused, Sample
from lalm_lens.datasets.clip import told_once
from lalm_lens.datasets.folder import Line, clip_of, lines_of
from lalm_lens.datasets.sample import digest
from lalm_lens.errors import DataError
from lalm_lens.inputs import HeardVideo
from lalm_lens.prompts import Processor
from lalm_lens.shapes import typed

PICTURES = ("image", "frames")


@dataclass(frozen=True, kw_only=True)
class SeenClip(Clip):
    """A clip with the files of what is seen beside it: images, or frames of a video if it is known how many are in a
    second; its sound is then the clip."""

    seen_label: str
    pictures: tuple[Path, ...] = field(repr=False)
    fps: float | None = None

    def read(self) -> Sample:
        """The sound. Raises what `Clip.read` does, and `DataError` for pictures that cannot be opened."""
        self.opened()
        return super().read()

    def given_to(self, processor: Processor) -> Swapped:
        """Raises what `read` does, `PromptError` for a model that does not see and `InputError` for frames of several
        sizes."""
        pictures, sample = self.opened(), super().read()
        images = None if self.fps is not None else processor.see(pictures)
        videos = None if self.fps is None else HeardVideo(**vars(processor.watch(pictures, self.fps)))
        its: dict[str, Any] = {each.name: getattr(sample, each.name) for each in fields(Sample)}
        its |= {"images": images, "videos": videos}
        return Swapped(**its, seen_label=self.seen_label, heard_clip=self.name)

    def opened(self) -> list[Image.Image]:
        return [picture(path, self.name) for path in self.pictures]

    @property
    def digest(self) -> str:
        told = (self.seen_label, self.fps)
        files = [path.read_bytes() for path in self.pictures]
        return digest(super().digest.encode(), *(repr(each).encode() for each in told), *files)


@dataclass(frozen=True, kw_only=True)
class SwappedClip(Clip):
    """What is seen of one with the sound of another."""

    seen: SeenClip = field(repr=False)
    other: Clip = field(repr=False)

    @classmethod
    def of(cls, seen: SeenClip, other: SeenClip) -> "SwappedClip":
        heard = Clip(**{each.name: getattr(other, each.name) for each in fields(Clip)})
        about = {"speaker": other.speaker, "question": seen.question}
        return cls(f"{seen.name}{BESIDE}{other.name}", other.label, other.source, **about, seen=seen, other=heard)

    def read(self) -> Swapped:
        return swapped(self.seen.read(), self.other.read())

    def given_to(self, processor: Processor) -> Swapped:
        return swapped(self.seen.given_to(processor), self.other.read())

    @property
    def digest(self) -> str:
        return digest(self.seen.digest.encode(), self.other.digest.encode())


@typed
def read_audio_visual(folder: str | Path, processor: Processor) -> list[Swapped]:
    """The clips that `list_audio_visual` lists, as a model of that processor sees and hears them.

    Raises what that does, `AudioError` and `DataError` for files that cannot be read, and `InputError` for frames of
    several sizes.
    """
    return [clip.given_to(processor) for clip in list_audio_visual(folder)]


@typed
def list_audio_visual(folder: str | Path) -> list[SeenClip]:
    """The clips that `list_folder` lists, with what their rows say is seen: `image`, a picture's file or several, or
    `frames`, the files of a video in their order, and `fps`, how many are in a second: its sound is then the clip.
    `seen_label` is what is seen, where that is not the clip's label.

    Raises what `list_folder` does, and `DataError` for a row without pictures.
    """
    return told_once(rows_of_audio_visual(Path(folder)))


def rows_of_audio_visual(folder: Path) -> list[SeenClip | Refused]:
    return [line if isinstance(line, Refused) else seen_of(folder, line) for line in lines_of(folder)]


def seen_of(folder: Path, line: Line) -> SeenClip | Refused:
    clip, row = clip_of(folder, line), line.told
    if isinstance(clip, Refused):
        return clip
    named = [name for name in PICTURES if row.get(name)]
    if len(named) != 1 or ("frames" in named and not isinstance(row.get("fps"), int | float)):
        return line.refused(f" needs an image, or frames and their fps, and has {', '.join(named) or 'neither'}.")
    label = row.get("seen_label") or clip.label
    files = [row[named[0]]] if isinstance(row[named[0]], str) else row[named[0]]
    if not isinstance(label, str) or not isinstance(files, list) or not all(isinstance(its, str) for its in files):
        return line.refused(f": {named[0]} and seen_label are text, or a list of files.")
    if outside := [file for file in files if Path(file).is_absolute() or ".." in Path(file).parts]:
        return line.refused(f": pictures are inside the folder, and {outside[0]} is not.")
    pictures, fps = tuple(folder / file for file in files), float(row["fps"]) if named == ["frames"] else None
    return SeenClip(**vars(clip), seen_label=label, pictures=pictures, fps=fps)


def swap_clips(clips: Sequence[SeenClip], seed: int = 0) -> list[SwappedClip]:
    """As `swap_audio` does, of clips that have not been read."""
    return [SwappedClip.of(*pair) for pair in pairs_of(clips, drawn(seed))]


def swapped_clip(clips: Mapping[str, Clip], name: str) -> SwappedClip | None:
    """That of a name which `swap_clips` gives, if there are both."""
    seen, other = (clips.get(its) for its in (*name.split(BESIDE), "")[:2])
    return SwappedClip.of(seen, other) if isinstance(seen, SeenClip) and isinstance(other, SeenClip) else None


def picture(path: Path, clip: str) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{clip}: {path.name} cannot be read as a picture ({error}).") from None
