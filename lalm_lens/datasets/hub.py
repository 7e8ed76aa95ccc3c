"""Datasets of Hugging Face, from the Hub or a folder. Sounds stay as they are stored: no FFmpeg is needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lalm_lens.attributes import Attribute, attribute_named
from lalm_lens.datasets.clip import Clip, Refused, Row, cleaned, told_once
from lalm_lens.datasets.folder import folder_of, folders_named, is_listed, rows_of_folder
from lalm_lens.errors import DataError, reason

SAKURA, TRACK = "SLLM-multi-hop", "{}QA"  # on the Hub, for Animal, Emotion, Gender and Language
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
    return told_once(rows_of_hub(name, split=split, config=config, audio=audio, label=label, **columns))


def rows_of_hub(name: str, *, split: str = "test", config: str | None = None, **columns: str) -> list[Row]:
    """What such a dataset lists, clips or not."""
    from datasets import load_dataset  # seconds to import
    from datasets.exceptions import DatasetGenerationError

    try:
        loaded = load_dataset(name, config, split=split)
    except DatasetGenerationError as error:
        raise DataError(
            f"The dataset {name} cannot be read ({reason(error.__cause__ or error)}). Sound files with a "
            "metadata.jsonl or metadata.csv are read as a folder: in a study, folder = ... in place of hub = ..."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # of the last kind: "scripts are no longer supported"
        raise DataError(f"The dataset {name} cannot be loaded ({reason(error)}).") from error
    return rows_of_dataset(loaded, **columns)


def list_dataset(dataset: Any, *, audio: str = "audio", label: str = "label", **columns: str) -> list[Clip]:
    """The clips of a `datasets.Dataset`, by the columns of the sound and the label; `transcript`, `speaker` and
    `question` may name further ones. A clip is named by its file, or numbered.

    Raises `DataError` for columns that there are not and for a clip that comes twice.
    """
    return told_once(rows_of_dataset(dataset, audio=audio, label=label, **columns))


def rows_of_dataset(dataset: Any, *, audio: str = "audio", label: str = "label", **columns: str) -> list[Row]:
    """What a dataset lists, clips or not."""
    from datasets import Audio, ClassLabel

    if unknown := [name for name in columns if name not in OPTIONAL]:
        raise DataError(
            f"{unknown[0]} is not read of a clip. Columns may be named for {', '.join(('audio', 'label', *OPTIONAL))}."
        )
    if missing := [name for name in (audio, label, *columns.values()) if name not in dataset.column_names]:
        raise DataError(f"The dataset has no column {missing[0]!r}, only {', '.join(dataset.column_names)}.")
    try:
        stored = dataset.cast_column(audio, Audio(decode=False))
    except (TypeError, ValueError, RuntimeError) as error:  # Arrow's too
        raise DataError(f"The column {audio!r} of the dataset holds no sounds ({reason(error)}).") from None
    feature = dataset.features[label]
    names = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else None
    named = {"sound": audio, "label": label, **columns}
    return [clip_of(n, row, named, names) for n, row in enumerate(stored)]


def clip_of(n: int, row: Mapping[str, Any], named: Mapping[str, str], names: Mapping[int, str] | None) -> Row:
    """Of the n-th row; `names` of the classes, where labels are numbers of those."""
    told = {key: row[column] for key, column in named.items()}
    stored, label = told.pop("sound") or {"path": None, "bytes": None}, told.pop("label")
    path = Path(str(stored["path"])) if stored["path"] else None
    sound = path if stored["bytes"] is None else stored["bytes"]
    file = row.get("file") or (path and path.name)
    label = label if names is None else names.get(label)
    if sound is None or label is None:
        what = named["sound" if sound is None else "label"]
        return Refused(str(file or f"row {n}"), f"Row {n} of the dataset has no {what}.")
    texts = {key: None if value is None else str(value) for key, value in told.items()}
    return Clip(str(file or f"{n:05d}"), str(label), sound, **texts)


def sakura(attribute: str | Attribute, name: str | Path | None = None) -> list[Clip]:
    """A track of SAKURA (arXiv 2505.13237) as it is published: 500 clips of its attribute, from the Hub or, with
    `name`, from a copy: the folder of GitHub (`data/Gender/metadata.csv`), one that holds what was downloaded from the
    Hub (`GenderQA`), or the folder of a track. Labels are cleaned.

    Raises `DataError` for a dataset that cannot be loaded or a label that is not the attribute's."""
    attribute = attribute_named(attribute) if isinstance(attribute, str) else attribute
    return cleaned(told_once(rows_of_sakura(attribute, name)), attribute)


def rows_of_sakura(attribute: Attribute, name: str | Path | None = None) -> list[Row]:
    """What a track of SAKURA lists, clips or not, with labels as they stand there."""
    track = TRACK.format(attribute.name.capitalize())
    if name is None:
        return rows_of_hub(f"{SAKURA}/{track}", label="attribute_label")
    folder = Path(name)
    if is_listed(folder) or folders_named(folder, [attribute.name]):
        return rows_of_folder(folder_of(folder, attribute))
    downloaded = folder / track if (folder / track).is_dir() else folder
    return rows_of_hub(str(downloaded), label="attribute_label")
