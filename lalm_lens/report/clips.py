"""Where the clips of a page come from: the folders that are given, or the study, which knows what it has analysed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tomllib import TOMLDecodeError
from typing import Any, Protocol, runtime_checkable

from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.audio import Waveform
from lalm_lens.audio_visual import swapped_clip
from lalm_lens.corrupt import WhiteNoise, fitted, silence
from lalm_lens.datasets import Clip, Sample, cut_to, list_folder
from lalm_lens.datasets.folder import attribute_folders, is_listed, list_as
from lalm_lens.errors import DataError, LensError, reason
from lalm_lens.report.found import Source
from lalm_lens.study import Study
from lalm_lens.study_results import lists_in

NOT_GIVEN = "no clips were given (--clips), and no study says where they are"


@runtime_checkable
class Clips(Protocol):
    """What gives the clip of a row, or says why there is none."""

    def find(self, source: Source, attribute: str, name: str, label: str | None = None) -> Sample | str:
        """The clip of that name, and of that label if one is given, which a row of the file is about."""
        ...


@dataclass(frozen=True)
class Given:
    """The clips of some folders, those of an attribute's folder apart; none is read before it is asked for."""

    listed: Mapping[str, Sequence[Clip]]  # by attribute, or under "" those of any

    @classmethod
    def of(cls, folders: Sequence[Path]) -> "Given":
        """Folders with metadata.jsonl, or with a folder like that for each attribute, as `trace` and `audiolens` read
        them. Raises `DataError` for another, and for two clips of one name and label."""
        listed: dict[str, list[Clip]] = {}
        for folder in folders:
            for attribute, clips in lists_of(folder).items():
                listed.setdefault(attribute, []).extend(clips)
        for clips in listed.values():
            by_name: dict[tuple[str, str], Clip] = {}
            for clip in [its for its in clips if not is_gone(its)]:
                other = by_name.setdefault((clip.name, clip.label), clip)
                if other is not clip and other.digest != clip.digest:
                    raise DataError(f"Two clips are named {clip.name} and labelled {clip.label}. Leave one out.")
        return cls(listed)

    def find(self, source: Source, attribute: str, name: str, label: str | None = None) -> Sample | str:
        clips = [*self.listed.get(attribute, []), *self.listed.get("", [])]
        found = (clip for clip in clips if clip.name == name and label in (None, clip.label))
        clip = next(found, None)
        if clip is None:
            return f"{name} is not among the clips that were given"
        try:
            return clip.read()
        except (LensError, OSError) as error:
            return f"{name} cannot be read: {why(clip, error)}"


def why(clip: Clip, error: LensError | OSError) -> str:
    """Why there is no sound; of a file that is gone, where it was."""
    where = clip.source.resolve() if isinstance(clip.source, Path) else ""
    return f"the file {where} is not there (any more)" if is_gone(clip) else reason(error).rstrip(".")


def is_gone(clip: Clip) -> bool:
    return isinstance(clip.source, Path) and not clip.source.is_file()


def lists_of(folder: Path) -> dict[str, list[Clip]]:
    """Clips by attribute, or under "" those of a folder with a list of its own."""
    if is_listed(folder):
        return {"": list_folder(folder)}
    return {name: list_as(its, ATTRIBUTES[name]) for name, its in attribute_folders(folder, list(ATTRIBUTES)).items()}


@dataclass(frozen=True)
class Analysed:
    """The clips of studies, listed again as their files say. A clip is there only if it is what was analysed: if its
    hash is the one that the table holds."""

    listed: dict[tuple[str, ...], Mapping[str, Clip] | str] = field(default_factory=dict)

    def find(self, source: Source, attribute: str, name: str, label: str | None = None) -> Sample | str:
        if not source.told:
            return NOT_GIVEN
        study = next((its for its in lists_in(source.path.parent).values() if source.path.name in its["units"]), {})
        where = str(source.path.parent), study.get("path", ""), source.told["dataset"], attribute
        if where not in self.listed:
            self.listed[where] = listed_again(study, source, attribute)
        clips, digest = self.listed[where], source.digests.get(name)
        if isinstance(clips, str):
            return clips
        clip = clips.get(name) or swapped_clip(clips, name)
        if clip is None or digest is None:
            return f"{name} is not a clip of {source.told['dataset']} (any more)"
        try:
            if clip.digest != digest:
                return f"{name} is not what it was when it was analysed"
            sample = clip.read()
        except (LensError, OSError) as error:
            return f"{name} cannot be read: {why(clip, error)}"
        n_heard = source.told["n_heard"]
        return sample if n_heard is None else cut_to([sample], n_heard)[0]


def listed_again(told: Mapping[str, Any], source: Source, attribute: str) -> Mapping[str, Clip] | str:
    """The clips of the dataset by their names, as the list of its study says where it is; or why there are none."""
    places = [Path(told[key]) for key in ("path", "from_here") if key in told]
    if not places:
        return NOT_GIVEN
    path = next((its for place in places if (its := source.path.parent / place).parent.is_dir()), places[0])
    try:
        study = Study.of(told["study"], path)
        datasets = [its for its in study.datasets if its.called == source.told["dataset"]]
        tables = [its for its in datasets if attribute in its.attributes]
        found = [clip for its in tables for clip in its.list(study.attribute(attribute), path.parent)]
    except (LensError, OSError, TOMLDecodeError) as error:
        return f"the clips of {source.told['dataset']} cannot be found: {reason(error)}"
    return {its.name: its for its in found if isinstance(its, Clip)}


def corrupted(sample: Sample, corruption: str, seed: int, other: Callable[[str], Sample | str]) -> Waveform | str:
    """What the corrupted run heard, as the table names it, or why it is not there; `other` finds a clip by its name."""
    kind, _, which = corruption.partition(" ")
    if kind == "silence":
        return silence(sample.waveform)
    if kind == "white_noise":
        return WhiteNoise(float(which.removesuffix(" dB")), seed).of(sample, ()).waveform
    if kind != "other_clip":
        raise DataError(f"{sample.name} was corrupted by something that is not known, {corruption!r}.")
    found = other(which)
    return found if isinstance(found, str) else fitted(found.waveform, len(sample.waveform))
