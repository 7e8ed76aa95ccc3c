"""Whether back-patching is a repair: what it changes of test clips, and how sure that is."""

from collections.abc import Sequence

import pandas as pd

from lalm_lens.aggregates import interval
from lalm_lens.experiments.text_dominance import SIDES, WHEN, Comparison, Outcome, comparison
from lalm_lens.proportions import wilson

ALPHA = 0.05  # a change is one where its exact p is below
SHOWN = ("order", "place", "layers", "picked_on", "condition", "n", "accuracy_before", "accuracy_after", "accuracy_p")
SHOWN += ("tdr_before", "tdr_after", "repairs")  # of a summary


def in_short(summary: pd.DataFrame) -> pd.DataFrame:
    """The columns of a summary that are read first."""
    pairs = [f"{its.source} -> {its.target}, window {its.window}" for its in summary.itertuples()]
    shown = summary.assign(layers=pairs)
    return shown[[name for name in SHOWN if name in shown]]


def pair_scores(rows: pd.DataFrame, cell: Sequence[str], when: str = "after") -> pd.DataFrame:
    """Means over clips, one row per group."""
    follows = followed(rows, when)
    counted = {"n": 1, "right": rows[f"right_{when}"], "label_p": rows[f"label_p_{when}"]}
    counted |= {side: follows == side for side in SIDES}
    sums = rows[list(cell)].assign(**counted).groupby(list(cell), sort=False).sum()
    means = {"accuracy": sums.right / sums.n, "label_probability": sums.label_p / sums.n}
    n_clear = sums.text + sums.audio
    return pd.DataFrame({"n": sums.n, **means, "tdr": sums.text / n_clear, "n_clear": n_clear}).reset_index()


def followed(rows: pd.DataFrame, when: str) -> pd.Series:
    """Text or audio, where they disagree and one of them is the answer."""
    disagree = rows.audio_label.notna() & rows.text_label.notna() & (rows.audio_label != rows.text_label)
    found = pd.Series("other", rows.index)
    for side in SIDES:
        found[disagree & (rows[f"answer_{when}"] == rows[f"{side}_label"])] = side
    return found


def before_and_after(rows: pd.DataFrame, n_resamples: int, seed: int) -> dict[str, float | int]:
    sides = [(rows, when) for when in WHEN]
    right, text = (compared(outcome, *sides) for outcome in ("right", "text"))
    change = rows.label_p_after - rows.label_p_before
    low, high = interval(change.to_numpy(), n_resamples, seed)
    label_p = {"before": rows.label_p_before.mean(), "after": rows.label_p_after.mean(), "change": change.mean()}
    n_clear = {"tdr_n_clear_before": text.n_clear_before, "tdr_n_clear_after": text.n_clear_after}
    return {
        **columns("accuracy", right),
        **above(rows),
        **{f"label_p_{name}": its for name, its in {**label_p, "low": low, "high": high}.items()},
        **({**columns("tdr", text), **n_clear} if any(n_clear.values()) else {}),
    }


def above(rows: pd.DataFrame) -> dict[str, float | bool]:
    """How often an answer is right that does not listen, one of the labels by chance or always the same; and whether
    answers after are right more often than that."""
    most = rows.label.value_counts(normalize=True).max()
    chance = float(max((1 / rows.n_labels).mean(), most))
    return {"chance": chance, "above_chance": wilson(int(rows.right_after.sum()), len(rows))[0] > chance}


def repairs(summary: pd.DataFrame) -> pd.Series:
    """Which rows of a summary tell of a repair: what breaks a model is none."""
    rises, falls = changed(summary, "accuracy", 1), changed(summary, "accuracy", -1)
    breaks = (falls & (summary.condition == "audio_only")).groupby([summary.place, summary.picked_on]).transform("any")
    return summary.above_chance & (rises | changed(summary, "tdr", -1)) & ~falls & ~breaks


def changed(summary: pd.DataFrame, name: str, sign: int) -> pd.Series:
    """Whether a share changed to that side, by McNemar's exact test."""
    if f"{name}_p" not in summary:
        return pd.Series(False, summary.index)
    return (summary[f"{name}_p"] < ALPHA) & (sign * (summary[f"{name}_won"] - summary[f"{name}_lost"]) > 0)


def minus_control(rows: pd.DataFrame, control: pd.DataFrame, n_resamples: int, seed: int) -> dict[str, float | int]:
    """Of the same clips, after the one minus after the other."""
    control = control.set_index("sample").loc[rows["sample"]].set_index(rows.index)
    sides = [(control, "after"), (rows, "after")]
    right, text = (compared(outcome, *sides) for outcome in ("right", "text"))
    change = rows.label_p_after - control.label_p_after
    found = {
        "accuracy": (right.difference, right.low, right.high),
        "label_p": (change.mean(), *interval(change.to_numpy(), n_resamples, seed)),
        "tdr": (text.difference, text.low, text.high),
    }
    ends = ("", "_low", "_high")
    return {f"{name}_minus_control{end}": x for name, its in found.items() for end, x in zip(ends, its, strict=True)}


def compared(outcome: Outcome, *sides: tuple[pd.DataFrame, str]) -> Comparison:
    """Two runs of the same clips, each a table's rows before or after."""
    if outcome == "right":
        every = [pd.Series(True, its.index) for its, _ in sides]
        return comparison(outcome, [its[f"right_{when}"] for its, when in sides], every)
    follows = [followed(its, when) for its, when in sides]
    return comparison(outcome, [its == "text" for its in follows], [its.isin(SIDES) for its in follows])


def columns(name: str, its: Comparison) -> dict[str, float | int]:
    change = {"before": its.before, "after": its.after, "change": its.difference, "low": its.low, "high": its.high}
    test = {"won": its.mcnemar.won, "lost": its.mcnemar.lost, "p": its.mcnemar.exact, "h": its.h}
    return {f"{name}_{what}": number for what, number in {**change, **test}.items()}
