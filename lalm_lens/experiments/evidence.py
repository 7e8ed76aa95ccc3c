"""What the measures of `lalm_lens.experiments.claims` read, out of result tables."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd

from lalm_lens.aggregates import corruption_kinds
from lalm_lens.aggregates import refuse_mixed as refuse_mixed_traces
from lalm_lens.errors import DataError
from lalm_lens.experiments.attention_knockout import AttentionKnockout
from lalm_lens.experiments.claim import PLACES, Evidence, Reads
from lalm_lens.experiments.enrich import Enrichment
from lalm_lens.experiments.information_score import InformationScore, rights_of
from lalm_lens.results import CausalTrace
from lalm_lens.tables import Table

TRACED: tuple[Reads, ...] = ("text", "places", "models")
FORMS = {"P1", "P2", "P3"}
OF_THE_PAPER = {  # how arXiv 2603.13768 traces
    "form": "P3",
    "metric": "probability",
    "predict": "labels",
    "direction": "denoise",
    "corruption": "silence",
}
RIVALS = ("DeSTA", "Qwen")  # the families that Voxtral is compared with


class NotMeasured(DataError):
    """The tables do not hold what a row is about; the message says what is missing."""


@dataclass(frozen=True)
class Measured:
    """The tables of one model, by what they are of."""

    model: str
    frames: Mapping[type[Table], pd.DataFrame] = field(repr=False)
    norm: bool = True  # whether the scores that are read are behind the final norm

    def rows(self, kind: type[Table], **settings: object) -> pd.DataFrame:
        """Those of some settings. Raises `NotMeasured` if there are none."""
        if kind not in self.frames:
            raise NotMeasured(f"there is no table of it ({kind.NAME.split(' ', 1)[1]})")
        rows = self.frames[kind]
        for name, value in settings.items():
            left = rows[rows[name] == value]
            if not len(left):
                there = ", ".join(map(str, rows[name].unique()))
                raise NotMeasured(f"{name} {value} is not in the table, only {there}")
            rows = left
        return rows

    @property
    def attributes(self) -> list[str]:
        return list(dict.fromkeys(name for frame in self.frames.values() for name in frame.attribute.unique()))

    def n_layers(self) -> set[int]:
        """Of the decoder, as its tables say that name every layer; the others say nothing."""
        every = {kind: self.frames[kind] for kind in (InformationScore, CausalTrace) if kind in self.frames}
        if CausalTrace in every:
            every[CausalTrace] = every[CausalTrace].query("kind in ('layer', 'audio_layer', 'token')")
        return {int(rows.layer.max()) + 1 for rows in every.values() if len(rows)}


def evidence_for(
    reads: Reads,
    measured: Measured,
    attribute: str,
    label_space: bool,
    layer_base: int | None,
    others: Mapping[str, Measured],
) -> Evidence:
    """What a measure reads, of one attribute or several joined by `+`. Raises `NotMeasured`."""
    if reads in TRACED:
        base = 0 if layer_base is None else layer_base
        of_others = [its for name, its in others.items() if name.startswith(RIVALS)] if reads == "models" else []
        if reads == "models" and {name for name in RIVALS if any(its.startswith(name) for its in others)} < set(RIVALS):
            raise NotMeasured("needs the traces of a DeSTA and a Qwen model beside it")
        read = places_of if reads == "places" else text_of
        return Evidence(tuple(read(its, attribute, label_space) for its in (measured, *of_others)), layer_base=base)
    base = 1 if layer_base is None else layer_base
    groups = tuple(READ[reads](measured, name, label_space).astype(float) for name in attribute.split("+"))
    if not all(len(group) for group in groups):
        raise NotMeasured("no clip is of that kind")
    about: dict = {"layer_base": base}
    if reads == "factors":
        about["factors"] = tuple(sorted(enriched(measured, attribute, label_space).factor.unique()))
    elif reads != "knockout":
        rows = (measured.rows(InformationScore, attribute=name) for name in attribute.split("+"))
        about["n_labels"] = tuple(int(its.n_labels.iloc[0]) for its in rows)
    if reads == "wrong":
        wrong = outcome_rows(measured, attribute, label_space, right=False).drop_duplicates("sample")
        about["constant"] = float(wrong.label.value_counts(normalize=True).max())
    return Evidence(groups, **about)


def traced(measured: Measured, attribute: str, label_space: bool) -> pd.DataFrame:
    """Kept clips as the paper traces them."""
    whole = measured.rows(CausalTrace, attribute=attribute, label_space=label_space)
    heard = whole.assign(corruption=corruption_kinds(whole))
    rows = Measured(measured.model, {CausalTrace: heard}).rows(CausalTrace, **OF_THE_PAPER, site="resid_post")
    kept = rows[rows.status == "kept"]
    if not len(kept):
        raise NotMeasured(f"none of {rows['sample'].nunique()} clips is kept")
    refuse_mixed_traces(kept, ["kind"])
    return kept


def text_of(measured: Measured, attribute: str, label_space: bool) -> np.ndarray:
    rows = traced(measured, attribute, label_space)
    text = rows[rows.kind == "layer"]
    if not len(text):
        raise NotMeasured("no layer-wise trace is in the table (kind layer)")
    return text.pivot(index="sample", columns="layer", values="recovery").to_numpy()


def places_of(measured: Measured, attribute: str, label_space: bool) -> np.ndarray:
    rows = traced(measured, attribute, label_space)
    words = rows[(rows.kind == "token") & rows.segment.isin(PLACES)]
    if set(words.segment) != set(PLACES):
        raise NotMeasured("no token-wise trace is in the table (kind token)")
    means = words.groupby(["sample", "segment", "layer"]).recovery.mean().unstack(["segment", "layer"])
    return np.stack([means[place].sort_index(axis="columns").to_numpy() for place in PLACES], axis=1)


def scored(measured: Measured, attribute: str, label_space: bool, **settings: object) -> pd.DataFrame:
    return measured.rows(InformationScore, attribute=attribute, label_space=label_space, norm=measured.norm, **settings)


def scores_of(measured: Measured, attribute: str, label_space: bool) -> np.ndarray:
    rows = scored(measured, attribute, label_space, knockout="none", place="last")
    if set(rows.form) != FORMS:
        raise NotMeasured("needs the prompts P1, P2 and P3")
    return rights_of(rows)


def positions_of(measured: Measured, attribute: str, label_space: bool) -> np.ndarray:
    places = (
        scored(measured, attribute, label_space, knockout="none", form="P3", place=place)
        for place in ("last", "penultimate")
    )
    return np.concatenate([rights_of(rows) for rows in places], axis=1)


def masked_of(measured: Measured, attribute: str, label_space: bool) -> np.ndarray:
    rows = scored(measured, attribute, label_space, form="P3", place="last")
    last = int(rows.layer.max())
    deaf = rows[rows.knockout.isin([told for told in rows.knockout.unique() if is_audio_knockout(str(told), last)])]
    if deaf.knockout.nunique() != 1:
        raise NotMeasured("needs one run whose last position cannot see the audio, in all layers")
    whole = rights_of(rows[rows.knockout == "none"])
    if len(whole) != deaf["sample"].nunique():
        raise NotMeasured("needs the same clips with the audio knocked out")
    return np.concatenate([whole, rights_of(deaf)], axis=1)


def is_audio_knockout(told: str, last: int) -> bool:
    """Whether a knockout in words (`lalm_lens.experiments.lens.told`) is AudioLens': all layers, the last position."""
    keys = ("audio", "audio_side", "transcript")
    parts = told.split("; ")
    return "without audio" in told and all(
        part in [f"-1 without {k}, layers 0 to {last}" for k in keys] for part in parts
    )


def outcome_rows(measured: Measured, attribute: str, label_space: bool, right: bool) -> pd.DataFrame:
    return scored(measured, attribute, label_space, knockout="none", form="P3", place="last", right_at_end=right)


def outcome_of(measured: Measured, attribute: str, label_space: bool, right: bool) -> np.ndarray:
    return rights_of(outcome_rows(measured, attribute, label_space, right))[:, 0]


def enriched(measured: Measured, attribute: str, label_space: bool) -> pd.DataFrame:
    return measured.rows(Enrichment, attribute=attribute, label_space=label_space, split="test", form="P3")


def factors_of(measured: Measured, attribute: str, label_space: bool) -> np.ndarray:
    rows = enriched(measured, attribute, label_space)
    if rows.gap.nunique() > 1 or rows[rows.arm == "chosen"].layer.nunique() > 1:
        raise DataError(f"The tables hold several enrichments of {measured.model}, {attribute}. Give one of them.")
    arms = rows.groupby(["sample", "arm", "factor"]).is_right.mean().unstack("factor")
    if set(rows.arm) != {"chosen", "random"}:
        raise NotMeasured("random layers are missing beside the chosen one")
    return np.stack([arms.xs(arm, level="arm").to_numpy() for arm in ("chosen", "random")], axis=1)


def knockout_of(measured: Measured, attribute: str, label_space: bool) -> np.ndarray:
    if AttentionKnockout not in measured.frames:  # the last layer's scores of the same runs are these answers
        return masked_of(measured, attribute, label_space)[..., -1]
    rows = measured.rows(AttentionKnockout, attribute=attribute, label_space=label_space, form="P3", predict="labels")
    whole = rows[(rows.kind == "all") & (rows["heads"] == "all")]
    for edge in ("audio_side -> last", "audio -> last"):
        its = whole[whole.edge == edge]
        if len(its):
            return its[["right_before", "right_after"]].to_numpy(float)
    raise NotMeasured("needs the knockout of audio -> last in all layers and heads")


READ: dict[Reads, Callable[[Measured, str, bool], np.ndarray]] = {
    "scores": scores_of,
    "attributes": scores_of,
    "positions": positions_of,
    "masked": masked_of,
    "right": partial(outcome_of, right=True),
    "wrong": partial(outcome_of, right=False),
    "factors": factors_of,
    "knockout": knockout_of,
}
