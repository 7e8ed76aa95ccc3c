"""What is left of an answer when only a circuit hears, or reads: faithfulness, and circuits of the other modality.

    faithfulness = (m_circuit - m_corrupted) / (m_clean - m_corrupted)

with m_circuit from the clean run in which every head and MLP outside of the circuit has the output that it has in the
corrupted run (arXiv 2403.17806); what enters the first block is the clean run's. 0 for no node, 1 for all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd
from tqdm import tqdm

from lalm_lens.aggregates import intervals
from lalm_lens.attributes import Attribute, Form
from lalm_lens.attribution import Node, only
from lalm_lens.conflict import Framing
from lalm_lens.corrupt import Corruption, OtherClip
from lalm_lens.datasets import Sample
from lalm_lens.draws import drawing
from lalm_lens.engine.plan import Engine, run_branches
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.contrasts import MODALITIES, Contrasts, Modality, Task, Within
from lalm_lens.experiments.pathways import SETTINGS, TASK, Pathways, columns_of, rate
from lalm_lens.model import HookedLALM
from lalm_lens.pieces import Order
from lalm_lens.readouts import Logits
from lalm_lens.results import plots_module
from lalm_lens.shapes import typed
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Clips = Literal["held_out", "choosing", "each"]

RANDOM = "random"
TOLD = {"held_out": "did not choose", "choosing": "chose"}


@dataclass(frozen=True, repr=False)
class Circuits(Table):
    """What circuits do for answers: one row per clip, task, circuit and size."""

    NAME: ClassVar[str] = "a table of circuits"
    COLUMNS: ClassVar[dict[str, str]] = {
        **SETTINGS,
        **TASK,
        "circuit": "str",  # whose: text, audio, or random
        "seed": "Int64",  # of a random one
        "k": "int64",  # nodes in it
        "n_nodes": "int64",  # nodes that there are
        "is_chosen_by": "bool",  # whether the clip was among those that chose the circuits
        "m_circuit": "float64",
    }

    @property
    def kept(self) -> "Circuits":
        """The tasks alone whose answer is that of their modality in the clean run, and not in the corrupted one. Raises
        `DataError` if there are none."""
        rows = self.frame[self.frame.status == "kept"]
        if not len(rows):
            raise DataError("No answer is kept that comes from text or audio: give more clips that the model answers.")
        return Circuits(rows)

    def clips(self, on: Clips) -> pd.DataFrame:
        """The rows of clips that did not choose the circuits, of those that did, or of each, with `clips` saying which.
        Raises `DataError` if there are none."""
        self.refuse_mixed(tuple(SETTINGS))
        rows = self.frame.assign(clips=np.where(self.frame.is_chosen_by, "choosing", "held_out"))
        rows = rows if on == "each" else rows[rows.clips == on]
        if not len(rows):
            other = "choosing" if on == "held_out" else "held_out"
            raise DataError(f"No clip of the table {TOLD[on]} the circuits: give such clips, or ask for on={other!r}.")
        return rows

    @typed
    def faithfulness(self, on: Clips = "held_out", n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """One row per task, circuit and size: mean of m_circuit - m_corrupted over mean of m_clean - m_corrupted, with
        its 95 % bootstrap interval over clips; random circuits are averaged first. In the rows whose circuit is that of
        the other modality the two are swapped.

        By default of clips that did not choose the circuits: on those that did, the circuits are too good. `on="each"`
        has both, apart. Raises `DataError` if there are none.
        """
        rows = self.clips(on).assign(change=lambda its: its.m_circuit - its.m_corrupted)
        found = []
        for (clips, modality, circuit), its in rows.groupby(["clips", "modality", "circuit"], sort=False):
            changes = its.pivot_table(index="sample", columns="k", values="change")
            gaps = its.drop_duplicates("sample").set_index("sample")
            values = np.column_stack([changes, (gaps.m_clean - gaps.m_corrupted)[changes.index]])
            low, high = intervals(values, rate, n_resamples, seed)
            about = {"clips": clips, "task": modality, "circuit": circuit, "k": changes.columns, "n": len(changes)}
            found.append(pd.DataFrame({**about, "faithfulness": rate(values.mean(0)), "low": low, "high": high}))
        return pd.concat(found, ignore_index=True)

    @typed
    def plot(self, on: Literal["held_out", "choosing"] = "held_out") -> "Figure":
        """Faithfulness by size of the circuit, for both tasks: the task's own, that of the other modality, random."""
        one = self.frame.iloc[0]
        about = f"{one.model}: {one.attribute}, {one.form}, clips that {TOLD[on]} the circuits"
        return plots_module("pathway_plots").faithfulness_curves(self.faithfulness(on), about)

    def __repr__(self) -> str:
        """Of held-out clips, where there are some."""
        on = "choosing" if self.frame.is_chosen_by.all() else "held_out"
        rows = self.faithfulness(on, n_resamples=100)
        table = rows.pivot(index="k", columns=["task", "circuit"], values="faithfulness")
        n = self.clips(on)["sample"].nunique()
        about = f"{n} clips that {TOLD[on]} the circuits; faithfulness"
        return f"Circuits({self.frame.model.iloc[0]}, {about})\n{table.round(3).to_string()}"


@typed
def circuits(
    model: HookedLALM,
    samples: Sequence[Sample],
    paths: Pathways,
    *,
    attribute: str | Attribute,
    ks: Sequence[int] = (0, 5, 10, 20, 50),
    n_random: int = 3,
    form: Form = "P3",
    within: Within = "alone",
    framing: str | Framing = "statement",
    order: Order = "audio_first",
    corruption: Corruption = OtherClip(),  # noqa: B008  it is frozen
    label_space: bool = True,
    states: Mapping[str, str] | None = None,
    seed: int = 0,
    engine: Engine = "auto",
    progress: bool = True,
) -> Circuits:
    """Run both tasks of every clip with the circuits of both modalities, of k nodes each, and with `n_random` random
    ones. `paths` chose them; the other arguments are those that it was made with. Clips that did not choose them tell
    whether they hold for others. Sizes above the number of nodes are left out.

    Raises `DataError` for `paths` of another model or question, and what `pathways` raises.
    """
    if not ks or min(ks) < 0 or n_random < 0:
        raise InputError(f"Sizes ks are some whole numbers from 0 on, and n_random is 0 or more; got {ks}, {n_random}.")
    how = {"form": form, "within": within, "order": order, "corruption": corruption, "states": states}
    contrasts = Contrasts.of(attribute, framing, **how, label_space=label_space, seed=seed)
    refuse_other(paths, contrasts.columns(model))
    ranked = {modality: ranking(paths, modality) for modality in MODALITIES}
    chosen_by, frames = set(paths.frame["sample"]), []
    shown = {"total": 2 * len(samples), "unit": "task", "disable": not progress}
    for task in tqdm(contrasts.tasks(model, samples), "running circuits", **shown):
        frame = frame_of(model, task, ranked, ks, n_random, seed, engine)
        about = {**contrasts.columns(model), **columns_of(task), "is_chosen_by": task.sample.name in chosen_by}
        frames.append(frame.assign(**about))
    return Circuits.concat(frames)


def refuse_other(paths: Pathways, settings: dict[str, str | bool | None]) -> None:
    for name, value in settings.items():
        if not (paths.frame[name].isna() if value is None else paths.frame[name] == value).all():
            theirs = paths.frame[name].iloc[0]
            raise DataError(
                f"The pathways are of the {name} {theirs!r}, and circuits are asked for of {value!r}. "
                "Give the arguments that the pathways were made with."
            )


def ranking(paths: Pathways, modality: Modality) -> list[Node]:
    nodes = paths.nodes()
    return paths.circuit(modality, int((nodes.modality == modality).sum()))


def frame_of(
    model: HookedLALM,
    task: Task,
    ranked: dict[str, list[Node]],
    ks: Sequence[int],
    n_random: int,
    seed: int,
    engine: Engine,
) -> pd.DataFrame:
    """A row per circuit. Nodes are those that this task's own clips have."""
    every = ranked[task.modality]
    rankings: dict[tuple[str, int | None], list[Node]] = {
        (its, None): [node for node in ranked[its] if node in set(every)] for its in MODALITIES
    }
    for n in range(n_random):
        drawn = drawing([seed, n]).permutation(len(every))
        rankings[RANDOM, seed + n] = [every[place] for place in drawn]
    tried = [(*whose, k) for whose, nodes in rankings.items() for k in sorted(set(ks)) if k <= len(nodes)]
    branches = [only(task.contrast, rankings[whose, drawn][:k], every) for whose, drawn, k in tried]
    readout = Logits(tokens=(task.contrast.answer, task.contrast.rival))
    values = run_branches(model, branches, readout, engine=engine).values[:, 0].double().cpu().numpy()
    found = pd.DataFrame(tried, columns=["circuit", "seed", "k"]).astype({"seed": "Int64"})
    return found.assign(n_nodes=len(every), m_circuit=values[:, 0] - values[:, 1])
