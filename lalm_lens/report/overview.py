"""Numbers as a page shows them: models x attributes, and the long lists behind that."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from markupsafe import Markup

from lalm_lens.experiments.information_score import InformationScore
from lalm_lens.report.found import USUAL, Found, Study
from lalm_lens.report.others import Other
from lalm_lens.results import summarise
from lalm_lens.tables import readable as powers_of_ten

MOST_ROWS = 16  # of a list that is not folded
ONE_LINE = 32  # letters of a cell
CRITICAL = (
    "The critical layer is the mean of the layers, each weighted by what its score has above 1.2 / labels. The first "
    "layer is 1, as in the paper; all else here counts from 0. A prompt without a layer that has more is left out."
)
NO_BREAK = "\N{NO-BREAK SPACE}"


class Matrix(NamedTuple):
    """One number of each model and attribute; without them, `note` says why."""

    title: str
    note: str
    html: Markup = Markup()


class Section(NamedTuple):
    """What a page has of one kind of table; `curves` are places in the list of all."""

    title: str
    matrices: Sequence[Matrix]
    rows: Markup
    n_rows: int
    curves: range = range(0)
    missing: Sequence[str] = ()
    note: str = ""

    @property
    def is_long(self) -> bool:
        """Whether the list of all is not what one looks at first."""
        return any(its.html for its in self.matrices) or self.n_rows > MOST_ROWS


def of_traces(studies: Sequence[Study]) -> Section:
    rows = pd.DataFrame([traced(study) for study in studies])
    shown = [
        ("fusion_layer", "Fusion layer", "the first layer whose text positions bring back half; stronger: later", True),
        ("peak", "Peak recovery of one word", "the largest mean of a segment before the last position", False),
        ("kept", "Clips that are kept", "of those that were traced", False),
    ]
    matrices = [
        its
        for value, title, note, by_depth in shown
        if (
            its := matrix(
                rows.assign(n=rows.kept), value, title, note, rows.n_layers if by_depth else of_all(rows, value)
            )
        )
    ]
    rows = rows.drop(columns="n_layers").astype({"fusion_layer": "Int64"})
    rows = rows.assign(noise_floor=rows.noise_floor.map("{:.0e}".format, na_action="ignore"))
    return Section("Causal tracing", matrices, html(rows), len(rows))


def of_all(rows: pd.DataFrame, value: str) -> "pd.Series | float":
    return rows.clips if value == "kept" else 1.0


def traced(study: Study) -> dict[str, Any]:
    """What a row of the overview says of a traced study."""
    whole = study.whole
    about = {"model": study.model, "attribute": study.attribute, "form": study.form}
    how = {name: study.settings[name] for name in study.told if name not in USUAL} | {"how": study.how or None}
    words = whole[(whole.status == "kept") & (whole.kind == "token") & whole.segment.isin(["early", "object", "late"])]
    means = words.groupby(["segment", "layer", "sample"]).recovery.mean().groupby(["segment", "layer"]).mean()
    numbers = summarise(study.rows) | {"peak": means.max()}
    ways = {name: study.settings[name] for name in ("direction", "site")}
    numbers |= {"metric": study.settings["metric"]}
    return {**about, **ways, "corrupted hears": study.heard, **how, **numbers, "n_layers": whole.layer.max() + 1}


def of_scores(found: Found) -> Section:
    """Of the last position, without knockouts, first; all of them in the list."""
    ends = {f"critical_{end}": f"critical_layer_{end}" for end in ("low", "high")}
    apart = found.scores.groupby("how", sort=False)
    tables = [InformationScore(its).table().assign(how=how or None) for how, its in apart]
    rows = pd.concat(tables, ignore_index=True).rename(columns=ends)
    ends = rows[(rows.place == "last") & (rows.knockout == "none")]
    n_layers = ends.model.map(found.scores.groupby("model", sort=False).layer.max() + 1)
    shown = [
        ("critical_layer", "Critical layer", "counted from 1, as in the paper; stronger: later", n_layers),
        ("accuracy", "Accuracy", "of the last layer", 1.0),
    ]
    matrices = [its for value, title, note, all_of in shown if (its := matrix(ends, value, title, note, all_of))]
    told = ["layer_base", *(name for name in ("norm", "knockout") if rows[name].nunique() == 1)]
    rows = rows.drop(columns=told).rename(columns={"n_defined": "prompts_with_critical_layer"})
    return Section("Information scores, means over prompts", matrices, html(rows), len(rows), note=CRITICAL)


def of_other(other: Other, first: int) -> Section:
    value, title = other.kind.HEADLINE or ("", "")
    found = matrix(other.rows, value, title, "") if value and len(other.rows) else None
    curves = range(first, first + len(other.curves))
    name, matrices = other.name[0].upper() + other.name[1:], [found] if found else []
    return Section(name, matrices, html(other.rows), len(other.rows), curves, other.missing)


def matrix(rows: pd.DataFrame, value: str, title: str, note: str, whole: "pd.Series | float" = 1.0) -> Matrix | None:
    """Models, each as it was asked where there are several ways, x attributes. The colour of a cell is as strong as its
    share of the `whole`. None without rows, and nothing but a note where no number is known or some cell has two."""
    ways = [
        name
        for name in map(str, rows.select_dtypes(exclude="number"))
        if name not in ("model", "attribute") and rows[name].nunique(dropna=False) > 1
    ]
    way = [", ".join(filter(None, map(said_of, ways, its))) for its in rows[ways].itertuples(index=False)]
    cells = rows.assign(way=way, share=(rows[value] / whole).astype(float))
    if not len(cells):
        return None
    if cells[value].isna().all():
        return Matrix(title, f"{note}: not known of any model" if note else "not known of any model")
    if cells.duplicated(["model", "way", "attribute"]).any():
        return Matrix(title, "some model and attribute has several numbers: they are in the list below")
    attributes = list(cells.attribute.unique())
    lines = [Markup("<tr><th></th>{}</tr>").format(joined("<th>{}</th>", attributes))]
    for (model, way), its in cells.groupby(["model", "way"], sort=False):
        if its[value].isna().all():
            continue
        by_attribute = its.set_index("attribute")
        found = [by_attribute.loc[name] if name in by_attribute.index else None for name in attributes]
        head = Markup('<th scope="row">{}{}</th>').format(
            model, Markup("<br><small>{}</small>").format(way) if way else ""
        )
        lines.append(Markup("<tr>{}{}</tr>").format(head, Markup("").join(cell(row, value) for row in found)))
    return Matrix(title, note, Markup('<table class="matrix">{}</table>').format(Markup("").join(lines)))


def cell(row: "pd.Series | None", value: str) -> Markup:
    if row is None or pd.isna(row[value]):
        return Markup("<td>-</td>")
    number = row[value]
    ends = [f"{value}_low", f"{value}_high"] if f"{value}_low" in row else ["low", "high"]
    known = all(end in row and not pd.isna(row[end]) for end in ends)
    said = {"kept": f"{number} of {row.get('clips')}", "fusion_layer": f"{number:.0f}"}.get(value, short(number))
    about = [f"{short(row[ends[0]])} to {short(row[ends[1]])}"] if known else []
    about += [f"n = {row['n']}"] if "n" in row and value != "kept" else []
    small = Markup("<br><small>{}</small>").format(", ".join(about).replace(" ", NO_BREAK)) if about else ""
    share = min(1.0, max(0.0, row.share))
    return Markup('<td style="--share:{:.3f}">{}{}</td>').format(share, said, small)


def short(number: float) -> str:
    """With two decimals, or more where that would be 0."""
    return powers_of_ten(number) if 0 < abs(number) < 5e-3 else f"{number + 0.0:.2f}"


def said_of(name: str, value: Any) -> str:
    """What is asked, in words: a yes or no by the name of the column; nothing for what is not known."""
    if isinstance(value, bool):
        return name.replace("_", " ") if value else f"no {name.replace('_', ' ')}"
    return "" if pd.isna(value) else str(value)


def joined(template: str, values: Sequence[object]) -> Markup:
    return Markup("").join(Markup(template).format(value) for value in values)


def html(table: pd.DataFrame) -> Markup:
    """With escaped words, numbers of three decimals, "-" for what is not known, and a number's interval beside it."""
    table = with_intervals(table.dropna(axis="columns", how="all"))
    cells = table.astype(object).where(table.notna(), "-").rename(columns=lambda name: name.replace("_", " "))
    return Markup(cells.map(readable).to_html(index=False, border=0))


def with_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """`x`, `x_low` and `x_high` in one column, or `low` and `high` with the number before them."""
    columns = [str(name) for name in table]
    for low in [name for name in columns if name == "low" or name.endswith("_low")]:
        high, at = low.removesuffix("low") + "high", columns.index(low)
        value = low.removesuffix("_low") if low != "low" else columns[at - 1]
        if high not in table or value not in table:
            continue
        both = zip(table[value], table[low], table[high], strict=True)
        told = [
            number if pd.isna(start) or pd.isna(end) else f"{decimals(number)} ({decimals(start)} to {decimals(end)})"
            for number, start, end in both
        ]
        table = table.assign(**{value: pd.Series(told, table.index, dtype=object)}).drop(columns=[low, high])
    return table


def decimals(value: float) -> str:
    return powers_of_ten(value + 0.0)  # 0 has no sign


def readable(value: object) -> str:
    """In one line where it is not long."""
    said = decimals(value) if isinstance(value, float) else str(value)
    return said.replace(" ", NO_BREAK) if len(said) <= ONE_LINE else said
