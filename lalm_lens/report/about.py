"""What the studies of a folder say of themselves: what they are of, with what they were run, and what is left out."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pyarrow import parquet

from lalm_lens.report.found import Found, Source
from lalm_lens.runner import ENDING
from lalm_lens.study_results import load_results


class About(NamedTuple):
    """Of the studies of one folder: facts by their names, and what is left out or missing."""

    name: str
    facts: dict[str, list[str]]
    excluded: list[str]
    failed: list[str]
    unfinished: int


def about(found: Found) -> list[About]:
    """Of each folder that holds studies."""
    by_folder: dict[Path, list[Source]] = {}
    for its in found.sources:
        if its.told and any(its.path.parent.glob(f"*{ENDING}")):
            by_folder.setdefault(its.path.parent, []).append(its)
    return [of_folder(folder, sources) for folder, sources in by_folder.items()]


def of_folder(folder: Path, sources: Sequence[Source]) -> About:
    results = load_results(folder)
    names = [path.name.removesuffix(ENDING) for path in sorted(folder.glob(f"*{ENDING}"))]
    facts = {
        "models": distinct(model_of(its.told) for its in sources),
        "datasets": [*clips_in(sources)],
        "experiments": [", ".join(distinct(its.told["experiment"] for its in sources)).replace("_", " ")],
        "versions": distinct(versions_of(its.told) for its in sources),
        "finished": days(sources),
        "command": distinct(" ".join(map(str, its.told["command"])) for its in sources),
    }
    excluded = [
        f"{row['sample']} ({', '.join(str(row[name]) for name in ('dataset', 'attribute'))}"
        f"{'' if pd.isna(row['experiment']) else ', ' + row['experiment']}): {row['reason']}"
        for row in results.excluded.to_dict("records")
    ]
    failed = [f"{path}: {why}" for path, why in results.failed.items()]
    return About(", ".join(names), facts, distinct(excluded), failed, results.n_unfinished)


def distinct(values: "Iterator[str] | Sequence[str]") -> list[str]:
    return list(dict.fromkeys(values))


def model_of(told: Mapping[str, Any]) -> str:
    return f"{told['model']} ({told['dtype']}, on {told['device']}, weights {told['fingerprint'][:8]})"


def versions_of(told: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {its}" for name, its in told["versions"].items())


def days(sources: Sequence[Source]) -> list[str]:
    """From when to when; files of an older version do not say it."""
    times = sorted(its.told["finished"] for its in sources if "finished" in its.told)
    spent = sum(its.told["wall_s"] for its in sources)
    between = distinct(time.replace("T", " ").removesuffix("+00:00") + " UTC" for time in (*times[:1], *times[-1:]))
    return [" to ".join(between) + (", " if between else "") + f"{spent:.0f} s of work in {len(sources)} units"]


def clips_in(sources: Sequence[Source]) -> Iterator[str]:
    """How many clips of each dataset and attribute have which label, as the tables tell."""
    labels: dict[tuple[str, str], dict[str, str | None]] = {}
    for its in sources:
        known = labels.setdefault((its.told["dataset"], its.told["attribute"]["name"]), {})
        names = {name for name, *_ in its.told["clips"]}
        known |= dict.fromkeys(names - set(known))
        if any(known[name] is None for name in names) and {"sample", "label"} <= set(its.table.COLUMNS):
            rows = parquet.read_table(its.path, columns=["sample", "label"]).to_pandas().drop_duplicates()
            known |= {row["sample"]: row["label"] for row in rows.to_dict("records") if row["sample"] in names}
    for (dataset, attribute), known in labels.items():
        counts = Counter(label for label in known.values() if label is not None)
        told = ", ".join(f"{n} {label}" for label, n in counts.items())
        yield f"{dataset}, {attribute}: {len(known)} clips" + (f" ({told})" if told else "")
