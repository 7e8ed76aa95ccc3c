"""Results as tidy tables with the views that belong to them."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, get_args

import pandas as pd
from pyarrow import ArrowInvalid

from lalm_lens.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["layer", "audio_layer", "token"]
Status = Literal["kept", "clean_wrong", "corrupted_right", "no_gap"]
View = Literal["layers", "tokens"]
BY_SAMPLE = ["model", "attribute", "sample"]
EMBED_LAYER = -1  # rows of site "embed": the merged embedding, before block 0

COLUMNS = {
    "model": "str",
    "attribute": "str",
    "sample": "str",  # path of the clip, relative to its folder
    "label": "str",
    "status": "str",
    "kind": "str",
    "site": "str",
    "layer": "int64",  # 0-based block; -1 is the embedding
    "position": "Int64",  # absolute, without padding
    "text_index": "Int64",  # from the end: -1 is the last position
    "token": "str",
    "region": "str",
    "segment": "str",
    "p_clean": "float64",
    "p_corrupted": "float64",
    "p_patched": "float64",
    "recovery": "float64",
}


def plots_module() -> ModuleType:
    """`lalm_lens.plots`; raises `DataError` where matplotlib, an extra, is missing."""
    try:
        from lalm_lens import plots
    except ModuleNotFoundError as error:
        raise DataError(f"Pictures need {error.name}: pip install 'lalm_lens[plots]'.") from None
    return plots


def summarise(rows: pd.DataFrame) -> dict[str, int | float]:
    samples = rows.drop_duplicates("sample")
    kept = samples[samples.status == "kept"]
    text = rows[(rows.status == "kept") & (rows.kind == "layer")].groupby("layer").recovery.mean()
    fused = text.index[text >= 0.5]
    return {
        "clips": len(samples),
        **{status: (samples.status == status).sum() for status in get_args(Status)},
        "p_clean": kept.p_clean.mean(),
        "p_corrupted": kept.p_corrupted.mean(),
        "fusion_layer": fused.min() if len(fused) else float("nan"),
    }


@dataclass(frozen=True, repr=False)
class CausalTrace:
    """Recovery rates, one row per patched run; columns as in `COLUMNS`."""

    frame: pd.DataFrame

    @classmethod
    def concat(cls, frames: list[pd.DataFrame]) -> "CausalTrace":
        if not frames:
            raise DataError("There is nothing to trace: give at least one sample.")
        return cls(pd.concat(frames, ignore_index=True).reindex(columns=list(COLUMNS)).astype(COLUMNS))

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.frame.copy()

    @property
    def kept(self) -> pd.DataFrame:
        """The rows of samples that the paper's exclusions keep."""
        return self.frame[self.frame.status == "kept"]

    def only(self, attribute: str) -> "CausalTrace":
        """The rows of one attribute."""
        rows = self.frame[self.frame.attribute == attribute]
        if not len(rows):
            raise DataError(f"The table has no rows of {attribute!r}, only of {sorted(self.frame.attribute.unique())}.")
        return CausalTrace(rows)

    def counts(self) -> pd.DataFrame:
        """Samples by model, attribute and status."""
        samples = self.frame.drop_duplicates(BY_SAMPLE)
        return samples.groupby(["model", "attribute", "status"]).size().unstack(fill_value=0)

    def summary(self) -> pd.DataFrame:
        """One row per model and attribute: samples, how many are kept and why others are not, and over the kept ones
        the mean probability of the true label in both runs and the first layer whose text states bring back half of
        it (NaN if none does)."""
        groups = self.frame.groupby(["model", "attribute"], sort=False)
        return pd.DataFrame([{"attribute": name, **summarise(rows)} for (_, name), rows in groups])

    def plot(self, view: View = "layers") -> "Figure":
        """`layers`: recovery by layer, text against audio. `tokens`: layer x position maps. A panel per attribute.

        Without a kept sample the excluded ones are drawn, and the title says so. Raises `DataError` for several models
        in one table, and without matplotlib.
        """
        if self.frame.model.nunique() > 1:
            raise DataError(f"One picture shows one model, and the table has {sorted(self.frame.model.unique())}.")
        plots = plots_module()
        views = {"layers": plots.layer_curves, "tokens": plots.token_maps}
        if view not in views:
            raise DataError(f"There is no view {view!r}. Choose one of {', '.join(views)}.")
        return views[view](self.frame)

    def save(self, path: str | Path) -> Path:
        """Write a Parquet file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            self.frame.to_parquet(unfinished, index=False)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "CausalTrace":
        """Read what `save` wrote; raises `DataError` for another table."""
        try:
            frame = pd.read_parquet(path)
        except ArrowInvalid as error:
            raise DataError(f"{path} is not a Parquet file ({error}).") from None
        missing = [column for column in COLUMNS if column not in frame]
        if missing:
            raise DataError(f"{path} is not a causal trace: it has no column {', '.join(missing)}.")
        return cls(frame[list(COLUMNS)].astype(COLUMNS))

    def __repr__(self) -> str:
        counts = self.counts().astype(str)
        parts = [
            " ".join(index) + ": " + ", ".join(f"{n} {status}" for status, n in row.items() if n != "0")
            for index, row in zip(counts.index.to_list(), counts.to_dict("records"), strict=True)
        ]
        return f"CausalTrace({len(self.frame)} patched runs; {'; '.join(parts)})"
