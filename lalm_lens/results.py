"""Results as tidy tables with the views that belong to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import pandas as pd

from lalm_lens.aggregates import BY_SAMPLE, aggregate, refuse_mixed
from lalm_lens.errors import DataError
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GridKind = Literal["layer", "audio_layer", "token", "audio_window", "encoder_window"]
Kind = Literal[GridKind, "moment"]  # a window that a search for the moment tried
Status = Literal["kept", "clean_wrong", "corrupted_right", "no_gap"]
View = Literal["layers", "segments", "tokens", "heads", "windows", "moments"]
EMBED_LAYER = -1  # rows of site "embed": the merged embedding, before block 0

QUESTION_COLUMNS = {
    "model": "str",
    "attribute": "str",
    "sample": "str",  # path of the clip, relative to its folder
    "label": "str",
    "form": "str",  # P1, P2, P3
    "question": "str",  # what the user says beside the clip
    "labels": "str",
    "prefix": "str",  # how the answer was forced to begin
    "label_space": "bool",
}
COLUMNS = {
    **QUESTION_COLUMNS,
    "corruption": "str",  # what the corrupted run heard
    "seed": "Int64",  # of noise, or of the choice of another clip
    "transcript": "str",  # what both runs read of the clip, where the prompt holds it
    "transcript_is": "str",  # audio, or text
    "voice_activity": "boolean",  # whether a clip without speech says nothing
    "metric": "str",
    "predict": "str",  # a prediction is the largest logit among the labels, or in the vocabulary
    "direction": "str",
    "status": "str",  # kept, or the first reason against it
    "clean_right": "bool",
    "corrupted_right": "bool",
    "has_gap": "bool",  # m_clean > m_corrupted
    "kind": "str",
    "site": "str",
    "layer": "int64",  # 0-based block, of the encoder for an `encoder_window`; -1 is the embedding
    "head": "Int64",  # of a site by head
    "neurons": "str",  # first and last of those patched together, of the site `post`
    "start_s": "float64",  # of a window: the stretch of the clip that it holds
    "end_s": "float64",
    "position": "Int64",  # absolute, without padding
    "text_index": "Int64",  # from the end: -1 is the last position
    "token": "str",
    "region": "str",
    "segment": "str",
    "option": "str",  # the label that an object token belongs to
    "is_correct": "bool",  # whether that is the true one
    "p_clean": "float64",  # probability of the true label's first token
    "p_corrupted": "float64",
    "p_patched": "float64",
    "m_clean": "float64",  # the metric
    "m_corrupted": "float64",
    "m_patched": "float64",
    "recovery": "float64",
    "noise": "float64",  # the recovery rate of a run in which nothing is patched: what rounding alone does
    "engine": "str",  # sweep, or hooks
}


def plots_module(name: str = "plots") -> ModuleType:
    """A module of pictures; raises `DataError` where matplotlib, an extra, is missing."""
    try:
        return import_module(f"lalm_lens.{name}")
    except ModuleNotFoundError as error:
        raise DataError(f"Pictures need {error.name}: pip install 'lalm_lens[plots]'.") from None


def summarise(rows: pd.DataFrame) -> dict[str, str | int | float]:
    samples = rows.drop_duplicates("sample")
    kept = samples[samples.status == "kept"]
    whole = rows[(rows.status == "kept") & rows["head"].isna() & rows.neurons.isna()]
    text = whole[whole.kind == "layer"].groupby("layer").recovery.mean()
    fused = text.index[text >= 0.5]
    return {
        "metric": rows.metric.iloc[0],
        "clips": len(samples),
        **{status: (samples.status == status).sum() for status in get_args(Status)},
        "p_clean": kept.p_clean.mean(),
        "p_corrupted": kept.p_corrupted.mean(),
        "fusion_layer": fused.min() if len(fused) else float("nan"),
        "noise_floor": kept.noise.max(),
    }


def to_read(summary: pd.DataFrame) -> pd.DataFrame:
    """A summary whose noise can be read among numbers of three decimals."""
    return summary.assign(noise_floor=summary.noise_floor.map("{:.0e}".format, na_action="ignore"))


def outermost(windows: pd.DataFrame) -> pd.DataFrame:
    """The windows of one clip that are part of no other: those that a search began with."""
    start, end = windows.start_s.to_numpy(), windows.end_s.to_numpy()
    inside = (start[:, None] > start - 1e-6) & (end[:, None] < end + 1e-6)
    shorter = (end - start)[:, None] < (end - start) - 1e-6
    return windows[~(inside & shorter).any(axis=1)]


@dataclass(frozen=True, repr=False)
class CausalTrace(Table):
    """Recovery rates, one row per patched run; columns as in `COLUMNS`."""

    NAME: ClassVar[str] = "a causal trace"
    BY_CLIP: ClassVar[bool] = True
    COLUMNS: ClassVar[dict[str, str]] = COLUMNS

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

    def moments(self) -> pd.DataFrame:
        """Where in each kept clip the answer was decided: of the finest windows that a search tried, the one with the
        largest recovery, from `start_s` to `end_s`. `widest` is the largest recovery of the windows that the search
        began with: where `recovery` is far below it, no single moment decided, and `start_s` tells little. Raises
        `DataError` for a table without such a search."""
        rows = self.kept[self.kept.kind == "moment"]
        if not len(rows):
            raise DataError('No moment was looked for in a clip that is kept: trace with audio="coarse-to-fine".')
        length = (rows.end_s - rows.start_s).round(6)
        finest = rows[length == length.groupby([rows[name] for name in BY_SAMPLE]).transform("min")]
        best = finest.loc[finest.groupby(BY_SAMPLE, sort=False).recovery.idxmax()]
        first = pd.concat([outermost(its) for _, its in rows.groupby(BY_SAMPLE, sort=False)])
        widest = first.groupby(BY_SAMPLE).recovery.max().rename("widest")
        shown = best[[*BY_SAMPLE, "label", "start_s", "end_s", "recovery"]]
        return shown.merge(widest, left_on=BY_SAMPLE, right_index=True).reset_index(drop=True)

    def counts(self) -> pd.DataFrame:
        """Samples by model, attribute and status."""
        samples = self.frame.drop_duplicates(BY_SAMPLE)
        return samples.groupby(["model", "attribute", "status"]).size().unstack(fill_value=0)

    def classes(self) -> pd.DataFrame:
        """Samples by model, attribute, label and status. Exclusions can leave a class with none: kept is 0. Raises
        `DataError` if settings vary."""
        refuse_mixed(self.frame, ["model", "attribute", "kind"])
        samples = self.frame.drop_duplicates(BY_SAMPLE)
        counts = samples.groupby(["model", "attribute", "label", "status"]).size().unstack(fill_value=0)
        return counts.reindex(columns=get_args(Status), fill_value=0)

    def aggregate(
        self, by: Sequence[str] = ("kind", "layer"), min_gap: float = 0.0, n_resamples: int = 1000, seed: int = 0
    ) -> pd.DataFrame:
        """Averages of the kept samples whose |m_clean - m_corrupted| is `min_gap` or more, one row per group of `by`.

        The rows of one sample in a group (the positions of a segment) are averaged first, then the samples: mean with
        its 95 % bootstrap interval, mean of class means, median, ratio of mean difference and mean gap.
        """
        return aggregate(self.kept, by, min_gap, n_resamples, seed)

    def summary(self) -> pd.DataFrame:
        """One row per model and attribute: samples, how many are kept and why others are not, and over the kept ones
        the mean probability of the true label in both runs, the first layer whose text states bring back half of the
        metric (NaN if none does) and the largest noise. Raises `DataError` if other settings vary."""
        refuse_mixed(self.frame, ["model", "attribute", "kind"])
        groups = self.frame.groupby(["model", "attribute"], sort=False)
        return pd.DataFrame([{"attribute": name, **summarise(rows)} for (_, name), rows in groups])

    @property
    def views(self) -> list[View]:
        """The pictures that can be drawn of these rows."""
        of_part = self.frame["head"].notna() | self.frame.neurons.notna()
        kinds = {
            "layers": self.frame.kind.isin(["layer", "audio_layer"]) & ~of_part,
            "segments": (self.frame.kind == "token") & ~of_part,
            "tokens": (self.frame.kind == "token") & ~of_part,
            "heads": of_part,
            "windows": self.frame.kind.isin(["audio_window", "encoder_window"]) & ~of_part,
            "moments": self.frame.kind == "moment",
        }
        return [view for view in get_args(View) if kinds[view].any()]

    def plot(self, view: View = "layers") -> "Figure":
        """`layers`: recovery by layer, text against audio. `segments`: the same for single positions, by segment.
        `tokens`: layer x position maps. `heads`: layer x head, or group of neurons, the mean over what a kind has many
        of. `windows`: layer x time. `moments`: clip x time, recovery per second of the finest windows that a search
        tried. A panel per attribute (and kind); `views` lists those that there are.

        Without a kept sample the excluded ones are drawn, and the title says so. Raises `DataError` for several models,
        metrics or other settings in one table, for a view of which there are no rows, and without matplotlib.
        """
        refuse_mixed(self.frame, ["attribute", "kind"])
        plots = plots_module()
        views = {
            "layers": plots.layer_curves,
            "segments": plots.segment_curves,
            "tokens": plots.token_maps,
            "heads": plots.head_maps,
            "windows": plots.window_maps,
            "moments": plots.moment_maps,
        }
        if view not in views:
            raise DataError(f"There is no view {view!r}. Choose one of {', '.join(views)}.")
        if view not in self.views:
            raise DataError(f"The table has nothing to show as {view}, only as {', '.join(self.views) or 'a table'}.")
        return views[view](self.frame)

    def __repr__(self) -> str:
        counts = self.counts().astype(str)
        parts = [
            " ".join(index) + ": " + ", ".join(f"{n} {status}" for status, n in row.items() if n != "0")
            for index, row in zip(counts.index.to_list(), counts.to_dict("records"), strict=True)
        ]
        return f"CausalTrace({len(self.frame)} patched runs; {'; '.join(parts)})"
