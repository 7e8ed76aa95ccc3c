"""The plan of a study: which clips can be heard, and the units that they make."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pandas as pd
import torch

from lalm_lens.attributes import Attribute
from lalm_lens.audio import check_audible, check_sounding
from lalm_lens.audio_visual import SeenClip, swap_clips
from lalm_lens.corrupt import OtherClip
from lalm_lens.datasets import Refused
from lalm_lens.datasets.clip import Row
from lalm_lens.errors import AudioError, DataError, InputError, LensError, reason
from lalm_lens.loading import without_weights
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import Processor
from lalm_lens.study import Chosen, DatasetTable, Study
from lalm_lens.units import Listed, Opened, Unit, fingerprint
from lalm_lens.weights import Conversion


@dataclass(frozen=True)
class Screened:
    """The clips of a dataset that can be read and are labelled as the attribute's are, how long they are, and what is
    left out, and why."""

    dataset: DatasetTable
    attribute: Attribute
    clips: tuple[Listed, ...]
    lengths: tuple[int, ...]
    excluded: tuple[Refused, ...]

    @classmethod
    def of(cls, dataset: DatasetTable, attribute: Attribute, rows: Sequence[Row]) -> "Screened":
        """All sounds are read before some are drawn, so that what is broken changes nothing of what is drawn."""
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(looked_at, rows))
        bad = tuple(its for its in found if isinstance(its, Refused))
        good = {its[0].clip.name: its for its in found if not isinstance(its, Refused)}
        drawn = dataset.drawn([listed.clip for listed, _ in good.values()])
        kept = [good[clip.name] for clip in drawn]
        if dataset.seen == "swapped":
            kept = swapped(kept, dataset.seed)
        return cls(dataset, attribute, *unzipped(kept), bad)

    @property
    def called(self) -> str:
        return f"{self.dataset.called}, {self.attribute.name}"

    @property
    def lack(self) -> str:
        """Why there are no clips."""
        why = self.excluded[0].reason if self.excluded else "no clip is listed."
        return f"No clip of {self.dataset.called} can be asked about {self.attribute.name}: {why}"

    def heard_by(self, processor: Processor) -> "Screened":
        """Without those that the model cannot hear to their end, unless they are cut; none if it cannot see them."""
        if self.dataset.seen and processor.cfg.vision is None:
            why = Refused("every clip", f"A {processor.cfg.model_type} model hears and does not see.")
            return replace(self, clips=(), lengths=(), excluded=(why,))
        kept, bad = [], list(self.excluded)
        for listed, n in zip(self.clips, self.lengths, strict=True):
            try:
                processor.check_audible(torch.zeros(min(n, processor.n_samples) if self.dataset.cut else n), "")
                kept.append((listed, n))
            except AudioError as error:
                bad.append(Refused(listed.clip.name, f"{listed.clip.name}{error}"))
        clips, lengths = unzipped(kept)
        return replace(self, clips=clips, lengths=lengths, excluded=tuple(bad))


def unzipped(pairs: Sequence[tuple[Listed, int]]) -> tuple[tuple[Listed, ...], tuple[int, ...]]:
    return tuple(listed for listed, _ in pairs), tuple(n for _, n in pairs)


def swapped(kept: Sequence[tuple[Listed, int]], seed: int) -> list[tuple[Listed, int]]:
    """What is seen of each with the sound of another, as long as its own. Raises what `swap_audio` does."""
    lengths = {listed.clip.name: n for listed, n in kept}
    clips = swap_clips([listed.clip for listed, _ in kept if isinstance(listed.clip, SeenClip)], seed)
    return [(Listed(clip, clip.digest), lengths[clip.seen.name]) for clip in clips]


def looked_at(row: Row) -> tuple[Listed, int] | Refused:
    """A clip with its hash and its length, or why it is left out."""
    if isinstance(row, Refused):
        return row
    try:
        sample, digest = row.read(), row.digest
        check_audible(sample.waveform, len(sample.waveform), row.name)
        check_sounding(sample.waveform, row.name)
    except (AudioError, DataError, OSError) as error:  # DataError: of a picture
        return Refused(row.name, reason(error))
    return Listed(row, digest), len(sample.waveform)


@dataclass(frozen=True)
class Planned:
    """The units of a study in their order, and what is left out of it: clips; models by their paths, datasets with the
    attribute that is asked about, and the pair where a model hears none of its clips."""

    study: Study
    units: tuple[Unit, ...]
    excluded: pd.DataFrame  # model, dataset, attribute, sample, reason
    failed: Mapping[str, str] = field(default_factory=dict)  # what is left out altogether, and why


def planned(study: Study, conversion_named: Callable[[str | None], Conversion | None] = lambda name: None) -> Planned:
    """Read all clips and the files of all models once, and no weights into memory.

    Models that cannot be opened, datasets that cannot be listed or have no good clip, and what cannot be asked of them
    are left out, and the rest is planned. Raises `InputError` if no model can be opened, and `DataError` if nothing is
    left for another reason, with all reasons."""
    failed: dict[str, str] = {}
    screened = screened_of(study, failed)
    refuse_nothing(study, failed, [each for each in screened if each.clips])
    units, left_out, unopened = {}, [], {}
    for table in study.models:
        opened = study.opened(table, conversion_named)
        try:
            model, weights = that_hears(opened), fingerprint(opened)
        except (LensError, OSError) as error:
            unopened[table.path] = str(error)
            continue
        heard = heard_by(model, table.path, screened, failed)
        left_out += excluded_of(model, heard)
        for chosen, each in product(study.experiments, heard):
            if each.clips and chosen.is_about(table.path, each.attribute.name):
                try:
                    units |= {unit.hash: unit for unit in units_of(chosen, each, opened, model, weights)}
                except LensError as error:
                    failed[f"{chosen.experiment.name}, {table.path}, {each.called}"] = str(error)
    if all(table.path in unopened for table in study.models):
        raise InputError(f"No model of {study.path} can be opened. {'; '.join(unopened.values())}")
    failed = {**unopened, **failed}
    refuse_nothing(study, failed, units)
    columns = ["model", "dataset", "attribute", "sample", "reason"]
    return Planned(study, tuple(units.values()), pd.DataFrame(left_out, columns=columns, dtype="str"), failed)


def screened_of(study: Study, failed: dict[str, str]) -> list[Screened]:
    """Each dataset about each of its attributes; `failed` is told which cannot be listed, or have no good clip."""
    found = []
    for dataset in study.datasets:
        for attribute in map(study.attribute, dataset.attributes):
            try:
                found.append(Screened.of(dataset, attribute, dataset.list(attribute, study.path.parent)))
            except (LensError, OSError) as error:
                failed[f"{dataset.called}, {attribute.name}"] = str(error)
    failed |= {each.called: each.lack for each in found if not each.clips}
    return found


def heard_by(model: HookedLALM, path: str, screened: Sequence[Screened], failed: dict[str, str]) -> list[Screened]:
    """What a model hears of each dataset; `failed` is told of which that is nothing."""
    assert model.processor is not None
    heard = [each.heard_by(model.processor) for each in screened]
    both = zip(screened, heard, strict=True)
    failed |= {f"{path}, {after.called}": after.lack for before, after in both if before.clips and not after.clips}
    return heard


def excluded_of(model: HookedLALM, heard: Sequence[Screened]) -> Iterator[dict[str, str]]:
    for each in heard:
        about = {"model": model.cfg.model_name, "dataset": each.dataset.called, "attribute": each.attribute.name}
        yield from (about | {"sample": its.name, "reason": its.reason} for its in each.excluded)


def refuse_nothing(study: Study, failed: Mapping[str, str], left: Collection) -> None:
    if not left:
        reasons = "; ".join(dict.fromkeys(failed.values())) or "No experiment is about its models and attributes."
        raise DataError(f"Nothing of {study.path} can be run. {reasons}")


def that_hears(opened: Opened) -> HookedLALM:
    model = opened.named(without_weights(opened.path, **opened.files))
    if model.processor is None:
        raise InputError(f"{opened.path} has no tokenizer and feature extractor beside it: save the processor there.")
    return model


def units_of(chosen: Chosen, screened: Screened, opened: Opened, model: HookedLALM, weights: str) -> Iterator[Unit]:
    assert model.processor is not None
    settings = chosen.experiment.settings(chosen.given, model.decoder_cfg.n_layers)
    about = (opened, model.cfg.model_name, weights, screened.dataset.called, screened.attribute)
    n_heard = model.processor.n_samples if screened.dataset.cut else None
    n = chosen.shard or len(screened.clips)
    every = [its.clip for its in screened.clips]
    conflict = None if chosen.conflict is None else chosen.conflict.among(every, screened.attribute)
    for form in chosen.prompts:
        for start in range(0, len(screened.clips), n):
            clips = screened.clips[start : start + n]
            others = others_of(clips, screened.clips, settings)
            yield Unit(*about, form, chosen.experiment, settings, clips, others, n_heard, conflict)


def others_of(clips: Sequence[Listed], every: Sequence[Listed], settings: Mapping[str, Any]) -> tuple[Listed, ...]:
    """What may be heard in place of these clips: of all that there are, those that are chosen."""
    by_name = {its.clip.name: its for its in every}
    corruptions = [value for value in settings.values() if isinstance(value, OtherClip)]
    chosen = {
        corruption.choose(its.clip, [other.clip for other in every]).name: None
        for corruption in corruptions
        for its in clips
    }
    return tuple(by_name[name] for name in chosen)
