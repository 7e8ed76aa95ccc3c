"""Curves by layer as a page draws them."""

import pandas as pd

from lalm_lens.experiments.information_score import InformationScore
from lalm_lens.report.found import Study
from lalm_lens.report.maps import rounded
from lalm_lens.results import CausalTrace

PARTS = {"layer": "text positions", "audio_layer": "audio positions"}
SEGMENTS = ("early", "object", "late", "last")


def trace_curves(study: Study) -> dict | None:
    """Mean recovery over kept clips with its interval: all text, all audio, and single positions by segment. None if
    there is no such row or no clip was kept."""
    rows = study.whole[study.whole.status == "kept"]
    tokens = rows[(rows.kind == "token") & rows.segment.isin(SEGMENTS)]
    lines = []
    for column, those, hidden in (("kind", rows[rows.kind.isin(list(PARTS))], False), ("segment", tokens, True)):
        if len(those):
            means = CausalTrace(those).aggregate((column, "layer"))
            for name in [*PARTS, *SEGMENTS]:
                its = means[means[column] == name]
                if len(its):
                    lines.append({"name": PARTS.get(name, f"one word: {name}"), "hidden": hidden, **line(its, "mean")})
    if not lines:
        return None
    of_metric = str(rows.metric.iloc[0]).replace("_", " ")
    return {
        "title": study.title,
        "heard": study.heard,
        "n": int(rows["sample"].nunique()),
        "y": f"recovery rate of {of_metric}",
        "marks": [0, 1],
        "note": f"noise floor {rows.noise.max():.0e}",
        "lines": lines,
    }


def score_curves(scores: InformationScore, how: str = "") -> list[dict]:
    """Information scores at the last position without knockouts, a figure for each model, attribute and way to score a
    label, and a line for each form of the prompt. `how` is what no column tells."""
    means = scores.curves()
    means = means[(means.place == "last") & (means.knockout == "none")]
    figures = []
    for (model, attribute, space, norm), its in means.groupby(
        ["model", "attribute", "label_space", "norm"], sort=False
    ):
        ways = [f"labels {'with' if space else 'without'} the space before them", "" if norm else "no final norm", how]
        figures.append(
            {
                "title": f"{model}: {', '.join(filter(None, (str(attribute), *ways)))}",
                "n": int(its.n.iloc[0]),
                "y": "information score",
                "marks": [rounded(1 / its.n_labels.iloc[0])],
                "note": "dotted: chance",
                "range": [-0.03, 1.03],
                "lines": [
                    {"name": form, "hidden": False, **line(rows, "score")}
                    for form, rows in its.groupby("form", sort=False)
                ],
            }
        )
    return figures


def line(rows: pd.DataFrame, mean: str) -> dict[str, list]:
    rows = rows.sort_values("layer")
    return {
        "layers": [int(layer) for layer in rows.layer],
        "mean": [rounded(value) for value in rows[mean]],
        "low": [rounded(value) for value in rows.low],
        "high": [rounded(value) for value in rows.high],
    }
