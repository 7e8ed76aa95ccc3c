"""The page itself: tables and clips in, one HTML file out."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from pyarrow import parquet

from lalm_lens.audio import RATE_HZ
from lalm_lens.counterfactual import BESIDE
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.information_score import InformationScore
from lalm_lens.report.about import about
from lalm_lens.report.clips import Analysed, Clips, Given, corrupted
from lalm_lens.report.curves import score_curves, trace_curves
from lalm_lens.report.found import Found, Source, Study, find
from lalm_lens.report.maps import MAPPED, Words, maps_of, rounded
from lalm_lens.report.others import others
from lalm_lens.report.overview import Section, of_other, of_scores, of_traces
from lalm_lens.report.sounds import Sounds, spectrogram
from lalm_lens.shapes import typed

HERE = Path(__file__).parent


class Shown(NamedTuple):
    """One clip of one study."""

    study: Study
    sample: str
    source: Source  # the file of its first row
    rows: pd.DataFrame  # of its trace
    said: pd.DataFrame  # of its lens


@typed
def write_report(
    folder: str | Path,
    *,
    clips: Sequence[str | Path] = (),
    n_samples: int = 20,
    out: str | Path | None = None,
) -> Path:
    """Write one HTML file about all tables in `folder`, by default into it as `report.html`: an overview, curves by
    layer, and for `n_samples` clips their maps. `clips` are the folders with the sound files and their metadata.jsonl,
    for spectrograms and players; without them, those of a study are looked for where its file says that they are. Clips
    that are kept come first, as many of every study.

    Raises `DataError` for a folder without a table to show, and without plotly, an extra.
    """
    if n_samples < 0:
        raise InputError(f"n_samples is how many clips are shown, 0 or more; got {n_samples}.")
    plotly = plotly_js()
    found = find(Path(folder))
    heard = Given.of([Path(each) for each in clips]) if clips else Analysed()
    studies, sounds, words, seen = found.studies(), Sounds(), Words(), seen_in(found)
    places = {id(study): place for place, study in enumerate(studies)}
    cards: list[dict[str, Any]] = [
        card(shown, heard, sounds, words, seen.get(shown.sample, "")) | {"study": places[id(shown.study)]}
        for shown in chosen(studies, found, n_samples)
    ]
    curves, other_sections = curves_of(studies, found), []
    n_curves = len(curves)
    for other in others(found):
        other_sections.append(of_other(other, len(curves)))
        curves += other.curves
    page = (
        environment()
        .get_template("page.html")
        .render(
            plotly=plotly,
            style=(HERE / "page.css").read_text(encoding="utf-8"),
            script=(HERE / "page.js").read_text(encoding="utf-8"),
            abouts=about(found),
            repeated=found.repeated,
            sections=list(sections_of(studies, found)),
            other_sections=other_sections,
            n_curves=n_curves,
            cards=cards,
            is_traced=any(len(study.rows) for study in studies),
            is_noised=any((study.rows.direction == "noise").any() for study in studies),
            has_scales=any(its["axis"] == "time" and its["recovery"] for one in cards for its in one["maps"]),
            unheard=common([its.get("unheard") for its in cards]),
            data={"curves": curves, "cards": cards, "sounds": sounds.uris(), "words": list(words.places)},
        )
    )
    path = Path(folder) / "report.html" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def plotly_js() -> str:
    """The library as text. Raises `DataError` where plotly, an extra, is missing."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise DataError(f"A report needs {error.name}: pip install 'lalm_lens[report]'.") from None
    return get_plotlyjs()


def environment() -> Environment:
    """Jinja that escapes; what `tojson` writes holds no "<", so it ends no script."""
    found = Environment(autoescape=True, loader=FileSystemLoader(HERE), trim_blocks=True, lstrip_blocks=True)
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    return found


def sections_of(studies: Sequence[Study], found: Found) -> Iterator[Section]:
    traced = [study for study in studies if len(study.rows)]
    if traced:
        yield of_traces(traced)
    if len(found.scores):
        yield of_scores(found)


def curves_of(studies: Sequence[Study], found: Found) -> list[dict]:
    traced = [its for study in studies if (its := trace_curves(study)) is not None]
    scores = [(str(how), InformationScore(its)) for how, its in found.scores.groupby("how", sort=False)]
    return [*traced, *(curve for how, its in scores for curve in score_curves(its, how))]


def chosen(studies: Sequence[Study], found: Found, n_samples: int) -> list[Shown]:
    """The first clips of every study, those that are kept before others. A study of whole layers has no maps, and is
    left out where another has some of the same question."""
    mapped = {study.asked for study in studies if has_map(study)}
    studies = [study for study in studies if has_map(study) or study.asked not in mapped]
    by_turns = [one for turn in zip_longest(*(clips_of(study, found) for study in studies)) for one in turn if one]
    places = {id(study): place for place, study in enumerate(studies)}
    return sorted(by_turns[:n_samples], key=lambda shown: places[id(shown.study)])


def has_map(study: Study) -> bool:
    return bool(study.whole.kind.isin(MAPPED).any())


def clips_of(study: Study, found: Found) -> Iterator[Shown]:
    lens = found.lens
    asked = (lens.model == study.model) & (lens.attribute == study.attribute) & (lens.form == study.form)
    said = lens[asked & lens.norm & (lens.knockout == "none")]
    rows = study.whole
    kept = rows[rows.status == "kept"]
    names = [*kept["sample"].unique(), *rows["sample"].unique(), *(said["sample"].unique() if not len(rows) else ())]
    for name in dict.fromkeys(names):
        of_trace, of_lens = rows[rows["sample"] == name], said[said["sample"] == name]
        first = (of_trace if len(of_trace) else of_lens).iloc[0]
        yield Shown(study, name, found.sources[first.source], of_trace, of_lens)


def seen_in(found: Found) -> dict[str, str]:
    """What is seen of each clip that has pictures, as tables say it that have a column for it."""
    seen: dict[str, str] = {}
    for its in found.sources:
        if "seen_label" in its.table.COLUMNS:
            rows = parquet.read_table(its.path, columns=["sample", "seen_label"]).to_pandas().dropna()
            seen |= dict(zip(rows["sample"], rows.seen_label, strict=True))
    return seen


def looks(name: str, seen: str) -> str:
    """What is seen of a clip, and whose pictures those are where they are another's."""
    pictures, _, sound = name.partition(BESIDE)
    of_others = f"the pictures of {pictures} with the sound of {sound}" if sound else ""
    return ", ".join(filter(None, (f"seen: {seen}" if seen else "", of_others)))


def card(shown: Shown, clips: Clips, sounds: Sounds, words: Words, seen: str = "") -> dict:
    """What the page holds of one clip."""
    study, rows = shown.study, shown.rows
    first = (rows if len(rows) else shown.said).iloc[0]
    found = {
        "sample": shown.sample,
        "label": str(first.label),
        "model": study.model,
        "title": study.title,
        "seen": looks(shown.sample, seen),
        "maps": list(maps_of(rows, shown.said, words)),
    }
    if len(rows):
        numbers = {name: rounded(first[name]) for name in ("p_clean", "p_corrupted", "noise")}
        told = {name: str(first[name]).replace("_", " ") for name in ("status", "metric", "direction")}
        found |= numbers | told | {"corruption": str(first.corruption).replace("_", " ", 1)}
    sample = clips.find(shown.source, study.attribute, shown.sample, str(first.label))
    if isinstance(sample, str):
        return found | {"unheard": sample}
    found |= {"clean": sounds.add(sample.waveform), "duration_s": len(sample.waveform) / RATE_HZ}
    found["mel"] = spectrogram(sample.waveform)
    if len(rows):
        seed, other = 0 if pd.isna(first.seed) else int(first.seed), partial(clips.find, shown.source, study.attribute)
        waveform = corrupted(sample, str(first.corruption), seed, other)
        found |= {"no_corrupted": waveform} if isinstance(waveform, str) else {"corrupted": sounds.add(waveform)}
    return found


def common(reasons: Sequence[Any]) -> str | None:
    """What is the reason of all, if one is."""
    return reasons[0] if len(set(reasons)) == 1 else None
