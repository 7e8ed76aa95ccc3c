"""Layer x position maps of one clip as a page draws them: what a patch brings back, what layers say there."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

N_WORDS = 3  # of a cell, the most probable first
MAX_CELLS = 1000  # of a map that only a lens fills: positions next to each other share a column beyond that
TIMED = ("audio_window", "encoder_window", "moment")
MAPPED = (*TIMED, "token")


@dataclass
class Words:
    """The words of a page, each of them once."""

    places: dict[str, int] = field(default_factory=dict)

    def add(self, word: str) -> int:
        return self.places.setdefault(word, len(self.places))


def maps_of(rows: pd.DataFrame, said: pd.DataFrame, words: Words) -> Iterator[dict]:
    """Of one clip: the rows of its trace, and those of its lens; either may be empty."""
    said = said[(said.kind == "top") & (said["rank"] < N_WORDS)]
    heard = said[said.region == "audio"]
    timed, slots = heard[heard.start_s.notna()], heard[heard.start_s.isna()]
    kinds = [kind for kind in TIMED if (rows.kind == kind).any()]
    for kind in kinds:
        of_decoder = timed if kind != "encoder_window" else timed.iloc[:0]
        yield time_map(kind, rows[rows.kind == kind], of_decoder, words)
    if len(timed) and not set(kinds) - {"encoder_window"}:
        yield lens_map("time", timed, words)
    if len(slots):
        yield lens_map("slots", slots, words)
    tokens, read = rows[rows.kind == "token"], said[said.region != "audio"]
    if len(tokens) or len(read):
        yield token_map(tokens, read, words)


def time_map(kind: str, rows: pd.DataFrame, said: pd.DataFrame, words: Words) -> dict:
    """Stretches of the clip. Where windows lie in others, as those of a search, a column is what the finest of them
    leave, and its number that of the shortest window around it."""
    edges = np.unique(rows[["start_s", "end_s"]].to_numpy().round(6))
    middles = (edges[:-1] + edges[1:]) / 2
    windows = rows.assign(length=rows.end_s - rows.start_s).sort_values("length", kind="stable")
    columns, cells = [], []
    for middle, start_s, end_s in zip(middles, edges[:-1], edges[1:], strict=True):
        around = windows[(windows.start_s < middle) & (middle < windows.end_s)].drop_duplicates("layer")
        if len(around):
            first = around.iloc[0]
            columns.append({"start_s": start_s, "end_s": end_s, "of_s": [first.start_s, first.end_s]})
            cells.append(around[["layer", "recovery"]].assign(column=len(columns) - 1))
    starts = [column["start_s"] for column in columns]
    at = np.searchsorted(starts, ((said.start_s + said.end_s) / 2).to_numpy(), side="right") - 1
    named(columns, said.assign(column=at))
    return layer_map(kind, "time", columns, pd.concat(cells), said.assign(column=at), words)


def lens_map(axis: str, said: pd.DataFrame, words: Words) -> dict:
    """Audio positions at which only a lens was read: stretches of the clip, or slots that have no place in it."""
    positions = np.sort(said.position.unique())
    n_columns = min(len(positions), max(1, MAX_CELLS // said.layer.nunique()))
    parts = np.array_split(positions, n_columns)
    column_of = {position: column for column, part in enumerate(parts) for position in part}
    said = said.assign(column=said.position.map(column_of))
    spans = said.groupby("column").agg(start_s=("start_s", "min"), end_s=("end_s", "max"))
    columns = [dict(row) for row in spans.to_dict("records")] if axis == "time" else [{} for _ in parts]
    named(columns, said)
    return layer_map("lens", axis, columns, None, said, words)


def named(columns: list[dict], said: pd.DataFrame) -> None:
    """Say which positions of the prompt stand in a column, and what token is there."""
    for column, its in said.groupby("column"):
        columns[int(str(column))] |= {
            "positions": [int(its.position.min()), int(its.position.max())],
            "token": its.token.iloc[0],
        }


def token_map(rows: pd.DataFrame, said: pd.DataFrame, words: Words) -> dict:
    """Text positions, in the order of the prompt."""
    about = ["position", "token", "region", "segment"]
    places = pd.concat([rows[[*about, "option", "is_correct"]], said[about]])
    places = places.drop_duplicates("position").sort_values("position")
    columns = [
        {
            **{name: row[name] for name in ("token", "region", "segment", "option") if not pd.isna(row[name])},
            "positions": [int(row["position"])] * 2,
            "is_correct": bool(row["is_correct"]) if not pd.isna(row["is_correct"]) else False,
        }
        for row in places.to_dict("records")
    ]
    column_of = {int(position): column for column, position in enumerate(places.position)}
    cells = rows.assign(column=rows.position.map(column_of)) if len(rows) else None
    return layer_map("token", "tokens", columns, cells, said.assign(column=said.position.map(column_of)), words)


def layer_map(
    kind: str, axis: str, columns: list[dict], cells: pd.DataFrame | None, said: pd.DataFrame, words: Words
) -> dict:
    """Recovery by layer and column, and the words of each cell as [word, probability in thousandths, ...]."""
    layers = sorted({*said.layer, *(() if cells is None else cells.layer)})
    row_of = {layer: row for row, layer in enumerate(layers)}
    recovery = None
    if cells is not None:
        grid: list[list[float | None]] = [[None] * len(columns) for _ in layers]
        for layer, column, value in zip(cells.layer, cells.column, cells.recovery, strict=True):
            grid[row_of[layer]][int(column)] = rounded(value)
        recovery = grid
    found: list[list[list[int]]] = [[[] for _ in columns] for _ in layers]
    likely = said.sort_values("probability", ascending=False, kind="stable")
    likely = likely.drop_duplicates(["layer", "column", "token_id"])
    for row in likely.groupby(["layer", "column"]).head(N_WORDS).to_dict("records"):
        cell = found[row_of[row["layer"]]][int(row["column"])]
        cell += [words.add(row["word"]), round(1000 * row["probability"])]
    return {
        "kind": kind,
        "axis": axis,
        "layers": [int(layer) for layer in layers],
        "columns": columns,
        "recovery": recovery,
        "words": found if len(said) else None,
    }


def rounded(value: float) -> float | None:
    """Seven digits: what float32 holds. None for what is not a number, which JSON has no word for."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
