"""What the studies of a folder say of themselves: what they are of, with what they were run, and what is left out."""

import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pyarrow import parquet

from lalm_lens.report.found import Found, Source
from lalm_lens.runner import ENDING
from lalm_lens.study_results import lists_in, load_results, units_of


class About(NamedTuple):
    """Of the studies of one folder: facts by their names, what is left out or has failed, and how much is missing."""

    name: str
    facts: dict[str, list[str]]
    left_out: dict[str, list[str]]
    unfinished: int


def about(found: Found) -> list[About]:
    """Of each folder that holds studies."""
    by_folder: dict[Path, list[Source]] = {}
    for its in found.sources:
        if its.told and any(its.path.parent.glob(f"*{ENDING}")):
            by_folder.setdefault(its.path.parent, []).append(its)
    return [of_folder(folder, sources) for folder, sources in by_folder.items()]


def of_folder(folder: Path, sources: Sequence[Source]) -> About:
    results, lists = load_results(folder), list(lists_in(folder).values())
    finished = distinct(its.told["experiment"] for its in sources)
    failures = {name: its for each in lists for name, its in each.get("failures", {}).items()}
    missing = [name for name in units_of(lists) if not (folder / name).is_file()]
    not_done = [f"{its['of']}: {its['reason']}" for name in missing if (its := failures.get(name))]
    names = [path.name.removesuffix(ENDING) for path in sorted(folder.glob(f"*{ENDING}"))]
    facts = {
        "models": distinct(model_of(its.told) for its in sources),
        "datasets": [*clips_in(sources)],
        "experiments": [", ".join(finished).replace("_", " ")],
        "nothing is finished of": [
            ", ".join(name for name in asked_in(lists) if name not in finished).replace("_", " ")
        ],
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
    left_out = {"left out altogether": failed, "failed": not_done, "clips left out": distinct(excluded)}
    return About(
        ", ".join(names), {name: its for name, its in facts.items() if any(its)}, left_out, len(missing) - len(not_done)
    )


def asked_in(lists: Sequence[Mapping[str, Any]]) -> list[str]:
    """The experiments of studies, as their files and their lists of units name them."""
    named = [str(each["name"]) for its in lists for each in tomllib.loads(its["study"]).get("experiment", [])]
    return distinct([*named, *(name.rpartition("-")[0] for name in units_of(lists))])


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
        names = [name for name, *_ in its.told["clips"]]
        known |= dict.fromkeys(name for name in names if name not in known)
        if any(known[name] is None for name in names) and {"sample", "label"} <= set(its.table.COLUMNS):
            rows = parquet.read_table(its.path, columns=["sample", "label"]).to_pandas().drop_duplicates()
            known |= {row["sample"]: row["label"] for row in rows.to_dict("records") if row["sample"] in known}
    for (dataset, attribute), known in labels.items():
        counts = Counter(label for label in known.values() if label is not None)
        told = ", ".join(f"{n} {label}" for label, n in sorted(counts.items()))
        yield f"{dataset}, {attribute}: {len(known)} clips" + (f" ({told})" if told else "")
