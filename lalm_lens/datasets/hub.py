"""Datasets of Hugging Face, from the Hub or a folder. Sounds stay as they are stored: no FFmpeg is needed."""

from pathlib import Path
from typing import Any

from lalm_lens.attributes import Attribute, attribute_named
from lalm_lens.datasets.clip import Clip, cleaned
from lalm_lens.datasets.folder import folders_named, is_listed, list_track
from lalm_lens.datasets.sample import refuse_repeated
from lalm_lens.errors import DataError, reason

SAKURA, TRACK = "SLLM-multi-hop", "{}QA"  # on the Hub, for Animal, Emotion, Gender and Language
UNLABELLED = -1  # a ClassLabel's
OPTIONAL = ("transcript", "speaker", "question")


def list_hub(
    name: str,
    *,
    split: str = "test",
    config: str | None = None,
    audio: str = "audio",
    label: str = "label",
    **columns: str,
) -> list[Clip]:
    """The clips of a dataset on the Hub, or of a folder in one of the layouts that `datasets.load_dataset` reads. See
    `list_dataset`. Raises `DataError` for a dataset that cannot be loaded."""
    from datasets import load_dataset  # seconds to import
    from datasets.exceptions import DatasetGenerationError

    try:
        loaded = load_dataset(name, config, split=split)
    except DatasetGenerationError as error:
        raise DataError(
            f"The dataset {name} cannot be read ({reason(error.__cause__ or error)}). Sound files with a "
            "metadata.jsonl or metadata.csv are read as a folder: in a study, folder = ... in place of hub = ..."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"The dataset {name} cannot be loaded ({reason(error)}).") from error
    return list_dataset(loaded, audio=audio, label=label, **columns)


def list_dataset(dataset: Any, *, audio: str = "audio", label: str = "label", **columns: str) -> list[Clip]:
    """The clips of a `datasets.Dataset`, by the columns of the sound and the label; `transcript`, `speaker` and
    `question` may name further ones. A clip is named by its file, or numbered.

    Raises `DataError` for columns that there are not and for a clip that comes twice.
    """
    from datasets import Audio, ClassLabel

    if unknown := [name for name in columns if name not in OPTIONAL]:
        raise DataError(f"{unknown[0]} is not read of a clip. Columns may be named for {', '.join(OPTIONAL)}.")
    if missing := [name for name in (audio, label, *columns.values()) if name not in dataset.column_names]:
        raise DataError(f"The dataset has no column {missing[0]!r}, only {', '.join(dataset.column_names)}.")
    is_class = isinstance(dataset.features[label], ClassLabel)
    names = dataset.features[label].int2str if is_class else str
    clips = []
    for n, row in enumerate(dataset.cast_column(audio, Audio(decode=False))):
        sound, about = row[audio], {key: row[column] for key, column in columns.items()}
        if sound is None or row[label] is None or (is_class and row[label] == UNLABELLED):
            raise DataError(f"Row {n} of the dataset has no {audio if sound is None else label}.")
        clip_name = row.get("file") or (Path(sound["path"]).name if sound["path"] else f"{n:05d}")
        source = Path(sound["path"]) if sound["bytes"] is None else sound["bytes"]
        texts = {key: None if value is None else str(value) for key, value in about.items()}
        clips.append(Clip(str(clip_name), names(row[label]), source, **texts))
    refuse_repeated(clips)
    return clips


def sakura(attribute: str | Attribute, name: str | Path | None = None) -> list[Clip]:
    """A track of SAKURA (arXiv 2505.13237) as it is published: 500 clips of its attribute, from the Hub or, with
    `name`, from a copy: the folder of GitHub (`data/Gender/metadata.csv`), one that holds what was downloaded from the
    Hub (`GenderQA`), or the folder of a track. Labels are cleaned.

    Raises `DataError` for a dataset that cannot be loaded or a label that is not the attribute's."""
    attribute = attribute_named(attribute) if isinstance(attribute, str) else attribute
    track = TRACK.format(attribute.name.capitalize())
    if name is None:
        return cleaned(list_hub(f"{SAKURA}/{track}", label="attribute_label"), attribute)
    folder = Path(name)
    if is_listed(folder) or folders_named(folder, [attribute.name]):
        return cleaned(list_track(folder, attribute), attribute)
    downloaded = folder / track if (folder / track).is_dir() else folder
    return cleaned(list_hub(str(downloaded), label="attribute_label"), attribute)
