"""What two papers published, beside what result tables say: number by number, claim by claim.

A published row is compared for its own checkpoint alone. A number agrees if it lies, as it is rounded, in the 95 %
bootstrap interval of what was measured; a claim if its measure is on the right side of its bound
(`lalm_lens.experiments.claims`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from pyarrow import ArrowInvalid
from pyarrow.parquet import read_schema

from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.errors import DataError
from lalm_lens.experiments.attention_knockout import AttentionKnockout
from lalm_lens.experiments.claim import Claim, Finding, Quantity
from lalm_lens.experiments.claims import CLAIMS, QUANTITIES
from lalm_lens.experiments.correlation import p_of
from lalm_lens.experiments.enrich import Enrichment
from lalm_lens.experiments.evidence import TRACED, Measured, NotMeasured, evidence_for
from lalm_lens.experiments.information_score import InformationScore
from lalm_lens.results import CausalTrace
from lalm_lens.shapes import typed
from lalm_lens.tables import Table, write_tables

UNDEFINED = "undefined on these clips"
NO_INTERVAL = "its interval is undefined: one clip, or a resample without a value"
KINDS: tuple[type[Table], ...] = (InformationScore, Enrichment, CausalTrace, AttentionKnockout)


@dataclass(frozen=True)
class Checkpoint:
    """What a paper's model is on the Hub. `ids` are several where the paper does not say which size it took."""

    ids: tuple[str, ...]
    n_layers: tuple[int, ...]


CHECKPOINTS = {
    "DeSTA2": Checkpoint(("DeSTA-ntu/DeSTA2-8B-beta",), (32,)),
    "DeSTA2.5": Checkpoint(("DeSTA-ntu/DeSTA2.5-Audio-Llama-3.1-8B",), (32,)),
    "Qwen-Audio-Chat": Checkpoint(("Qwen/Qwen-Audio-Chat",), (32,)),
    "Qwen2-Audio-Instruct": Checkpoint(("Qwen/Qwen2-Audio-7B-Instruct",), (32,)),
    "Voxtral": Checkpoint(("mistralai/Voxtral-Mini-3B-2507", "mistralai/Voxtral-Small-24B-2507"), (30, 40)),
}


@dataclass(frozen=True, repr=False)
class Reproduction(Table):
    """Published rows beside measured ones: one row per published number or claim, model, attribute and way to score a
    label."""

    NAME: ClassVar[str] = "a reproduction"
    COLUMNS: ClassVar[dict[str, str]] = {
        "paper": "str",
        "source": "str",  # table, figure, section
        "model": "str",  # as the paper calls it; none where a claim is evaluated on another model
        "checkpoint": "str",  # on the Hub
        "attribute": "str",
        "quantity": "str",  # a number, or the measure of a claim
        "claim": "str",  # in words
        "published": "str",  # the number, or on which side of which bound the claim holds
        "measured_on": "str",  # the model of the tables
        "label_space": "boolean",  # labels are scored with or without the space before them
        "measured": "float64",
        "low": "float64",  # 95 % bootstrap over clips
        "high": "float64",
        "n": "Int64",  # clips
        # agrees, differs, not measured; of a claim about another model: holds, does not hold; of a printed number that
        # was computed from printed numbers: consistent, inconsistent
        "verdict": "str",
        "note": "str",
    }

    def verdicts(self) -> pd.DataFrame:
        """How many rows agree, differ or are not measured, by paper, model and source."""
        counts = self.frame.fillna({"model": ""}).groupby(["paper", "model", "source", "verdict"], sort=False).size()
        return counts.unstack(fill_value=0).reset_index().rename_axis(columns=None)

    def needed(self) -> pd.DataFrame:
        """What is not measured, by checkpoint and reason."""
        missing = self.frame[self.frame.verdict == "not measured"]
        return missing.groupby(["checkpoint", "note"], sort=False).size().rename("rows").reset_index()

    def __repr__(self) -> str:
        counts = self.frame.verdict.value_counts()
        return f"Reproduction({', '.join(f'{n} {verdict}' for verdict, n in counts.items())})"


@typed
def published() -> pd.DataFrame:
    """What was published, one row per number or claim, model and attribute; what stands together is joined by `+`."""
    with files("lalm_lens.assets").joinpath("published.csv").open(encoding="utf-8") as lines:
        frame = pd.read_csv(lines, dtype=str, keep_default_na=False)
    each = frame.assign(model=frame.model.str.split(";"), attribute=frame.attribute.str.split(";"))
    return each.explode("model").explode("attribute").reset_index(drop=True)


@typed
def reproduce(
    folders: Sequence[str | Path],
    *,
    named: Mapping[str, str] | None = None,
    layer_base: int | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Reproduction:
    """Compare all tables under some folders with what was published.

    `named` says of a table's model which published one it is, where its name is no id of the Hub. `layer_base` is the
    number of the first layer, by default 1 for AudioLens (eq. 4) and 0 for causal tracing.

    Raises `DataError` for folders without a table, for a name that no table or no paper has, and for a model that
    cannot be the published one by its number of layers.
    """
    measured, how = read_measured(folders), {"n_resamples": n_resamples, "seed": seed}
    its = by_published_name(measured, named or {})
    found = []
    for row in records(published()):
        about = {name: row[name] for name in ("paper", "source", "model", "attribute")}
        about["checkpoint"] = " or ".join(CHECKPOINTS[row["model"]].ids)
        about |= {"published": row["value"], "quantity": row["quantity"]}
        if row["predicate"]:
            claim = CLAIMS[row["predicate"]]
            about |= {"published": claim.condition, "quantity": claim.name, "claim": claim.words}
        found += [{**about, **each} for each in compared(row, its, layer_base, how)]
    found += [printed_p(r, p, n) for r, p, n in correlations()]
    return Reproduction.concat([pd.DataFrame(found)])


@typed
def evaluate_claims(
    folders: Sequence[str | Path], *, layer_base: int | None = None, n_resamples: int = 1000, seed: int = 0
) -> Reproduction:
    """What every claim comes to on the tables of any model, whoever it was made about. This reproduces nothing."""
    found = []
    for model, measured in read_measured(folders).items():
        for claim in CLAIMS.values():
            several = claim.reads == "attributes"
            for attribute in ["+".join(ATTRIBUTES)] if several else measured.attributes:
                about = {"paper": claim.source.split(",")[0], "source": claim.source.split(", ", 1)[1]}
                about |= {"attribute": attribute, "quantity": claim.name, "claim": claim.words}
                for space in (False, True):
                    try:
                        evidence = evidence_for(claim.reads, measured, attribute, space, layer_base, {})
                    except NotMeasured:
                        continue
                    finding = evidence.find(claim.measure, n_resamples, seed)
                    its = {"published": claim.condition, "measured_on": model, "label_space": space}
                    found.append({**about, **its, **columns_of(finding), **held(claim, finding)})
    if not found:
        raise DataError("No claim can be evaluated on these tables: they hold none of what the claims are about.")
    return Reproduction.concat([pd.DataFrame(found)])


def show_reproduction(found: Reproduction, out: Path | None) -> None:
    """Print what was measured and what is missing; write the table in three formats."""
    print(to_print(found))
    if out is not None:
        for path in write_tables(out, {"reproduction": found.frame}):
            print(path)


def to_print(found: Reproduction) -> str:
    frame = found.frame[found.frame.measured.notna()].dropna(axis="columns", how="all")
    names = ("model", "measured_on", "attribute", "source", "quantity", "label_space", "published")
    names += ("measured", "low", "high", "n", "verdict")
    shown = frame[[name for name in names if name in frame]].assign(attribute=frame.attribute.map(shortened))
    parts = [shown.to_string(index=False, float_format="{:.3g}".format, na_rep="-")]
    needed = found.needed()
    if len(needed):
        parts.append("Not measured:")
        parts += [f"  {row['rows']:3} rows of {row['checkpoint']}: {row['note']}" for row in needed.to_dict("records")]
    return "\n".join([*parts, repr(found)])


def shortened(attribute: str) -> str:
    names = attribute.split("+")
    return attribute if len(names) == 1 else "all" if len(names) == len(ATTRIBUTES) else f"{len(names)} of them"


# --- tables -------------------------------------------------------------------------------------------------------


def read_measured(folders: Sequence[str | Path]) -> dict[str, Measured]:
    """All known tables under the folders, by model."""
    found: dict[type[Table], list[pd.DataFrame]] = {}
    for path in paths_of(folders):
        kind = kind_of(path)
        if kind is not None:
            found.setdefault(kind, []).append(kind.load(path).frame)
    if not found:
        raise DataError(f"No result table lies under {', '.join(map(str, folders))}: nothing to compare.")
    whole = {kind: pd.concat(frames, ignore_index=True).drop_duplicates() for kind, frames in found.items()}
    models = dict.fromkeys(model for frame in whole.values() for model in frame.model.unique())
    return {
        model: Measured(model, {kind: its for kind, frame in whole.items() if len(its := frame[frame.model == model])})
        for model in models
    }


def paths_of(folders: Sequence[str | Path]) -> list[Path]:
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder. Give those that hold result tables (.parquet).")
    return sorted({path.resolve() for folder in folders for path in Path(folder).rglob("*.parquet")})


def kind_of(path: Path) -> type[Table] | None:
    """By its columns; a table of anything else is passed over."""
    try:
        columns = set(read_schema(path).names)
    except ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file ({error}).") from None
    return next((kind for kind in KINDS if set(kind.COLUMNS) <= columns), None)


def by_published_name(measured: Mapping[str, Measured], named: Mapping[str, str]) -> dict[str, Measured]:
    if unknown := [name for name in named if name not in measured]:
        raise DataError(f"No table is of {unknown[0]}, only of {', '.join(measured)}.")
    if unknown := [name for name in named.values() if name not in CHECKPOINTS]:
        raise DataError(f"Neither paper has a model {unknown[0]}, only {', '.join(CHECKPOINTS)}.")
    ids = {each: name for name, checkpoint in CHECKPOINTS.items() for each in checkpoint.ids}
    found: dict[str, Measured] = {}
    for model, its in measured.items():
        name = named.get(model, ids.get(model))
        if name is None:
            continue
        if name in found:
            raise DataError(f"{found[name].model} and {model} are both {name}. Give the folder of one of them.")
        n_layers = its.n_layers()
        if not n_layers and model in named:
            raise DataError(f"The tables of {model} do not say how many layers it has: add its information scores.")
        if wrong := n_layers - set(CHECKPOINTS[name].n_layers):
            expected = " or ".join(map(str, CHECKPOINTS[name].n_layers))
            raise DataError(
                f"{model} cannot be {name}: it has {min(wrong)} layers, and {' or '.join(CHECKPOINTS[name].ids)} has "
                f"{expected}. Claims can be evaluated on any model with --claims."
            )
        found[name] = its
    return found


# --- one row ------------------------------------------------------------------------------------------------------


def compared(
    row: Mapping[str, str], its: Mapping[str, Measured], layer_base: int | None, how: Mapping[str, int]
) -> list[dict]:
    """A published row as it was measured: without the space before labels, and with it; or why it was not."""
    subject = CLAIMS[row["predicate"]] if row["predicate"] else QUANTITIES[row["quantity"]]
    made_by = "trace" if subject.reads in TRACED else "audiolens"
    made_by = "lalm_lens.audio_knockout of" if subject.reads == "knockout" else f"lalm-lens {made_by}"
    needs = f"needs {made_by} {CHECKPOINTS[row['model']].ids[0]}"
    found, reasons = [], []
    for space in (False, True):
        try:
            if row["model"] not in its:
                raise NotMeasured(needs)
            evidence = evidence_for(subject.reads, its[row["model"]], row["attribute"], space, layer_base, its)
            finding = evidence.find(subject.measure, **how)
            found.append({"label_space": space, **columns_of(finding), **judged(subject, row["value"], finding)})
        except NotMeasured as error:
            reasons.append(str(error))
    if not found:
        return [{"verdict": "not measured", "note": "; ".join(dict.fromkeys(reasons))}]
    return [{"measured_on": its[row["model"]].model, **each} for each in found]


def judged(subject: Claim | Quantity, value: str, finding: Finding) -> dict[str, str]:
    if missing := undefined(finding):
        return missing
    if isinstance(subject, Claim):
        return {"verdict": said(subject.holds(finding.measured))}
    if subject.name == "n_points":
        return {"verdict": said(finding.measured == float(value))}
    half = rounding(value)
    return {"verdict": said(finding.low - half <= float(value) <= finding.high + half)}


def said(agrees: bool) -> str:
    return "agrees" if agrees else "differs"


def held(claim: Claim, finding: Finding) -> dict[str, str]:
    """Of a claim on the tables of a model about which it was not made."""
    return undefined(finding) or {"verdict": "holds" if claim.holds(finding.measured) else "does not hold"}


def undefined(finding: Finding) -> dict[str, str]:
    """Why nothing can be said; empty where something can."""
    if not np.isfinite(finding.measured):
        return {"verdict": "not measured", "note": UNDEFINED}
    return {} if np.isfinite(finding.low) else {"verdict": "not measured", "note": NO_INTERVAL}


def columns_of(finding: Finding) -> dict[str, float | int]:
    return {name: getattr(finding, name) for name in ("measured", "low", "high", "n")}


def rounding(value: str) -> float:
    """Half a unit of the last digit that was printed."""
    exponent = Decimal(value).as_tuple().exponent
    assert isinstance(exponent, int), "a printed number is finite"
    return 0.5 * 10.0**exponent


def correlations() -> Iterator[tuple[dict, dict, dict]]:
    """Table III's rows: r, p and the number of points that belong together."""
    table = published()
    yield from zip(*(records(table[table.quantity == n]) for n in ("pearson_r", "pearson_p", "n_points")), strict=True)


def records(frame: pd.DataFrame) -> list[dict[str, str]]:
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.to_numpy().tolist()]


def printed_p(r: Mapping[str, str], p: Mapping[str, str], n: Mapping[str, str]) -> dict:
    """Whether a printed p belongs to the printed r, which is rounded, and the number of points. Needs no model."""
    half, at = rounding(r["value"]), abs(float(r["value"]))
    low, middle, high = (float(p_of(np.array([its]), int(n["value"]))[0]) for its in (at + half, at, at - half))
    agrees = low - rounding(p["value"]) <= float(p["value"]) <= high + rounding(p["value"])
    return {
        **{name: p[name] for name in ("paper", "source", "model", "attribute")},
        "quantity": "p_of_printed_r",
        "published": p["value"],
        "measured_on": f"the printed r of {n['value']} points",
        "measured": middle,
        "low": low,
        "high": high,
        "verdict": "consistent" if agrees else "inconsistent",
        "note": "arithmetic of the paper's own numbers; no model",
    }
