"""By what way an answer comes that is heard, and one that is read (arXiv 2506.09047, 2606.18924).

Every clip is two tasks. In the *text* task the corrupted run reads another label in the statement, in the *audio* task
it hears another clip; all else is the same. What single outputs of the decoder do for the difference is attributed to
all of them and measured for some (`lalm_lens.attribution`), and a modality's circuit is the k outputs that do most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import hypergeom
from torch import Tensor
from tqdm import tqdm

from lalm_lens.aggregates import interval, intervals
from lalm_lens.attributes import Attribute, Form
from lalm_lens.attribution import EVERYWHERE, Contrast, Node, attribution, node_scores, nodes_of, regions_of
from lalm_lens.conflict import Framing
from lalm_lens.corrupt import Corruption, OtherClip
from lalm_lens.datasets import Sample
from lalm_lens.draws import drawing
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import Engine, run_branches
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.contrasts import MODALITIES, STATUS, Contrasts, Modality, Task, Within
from lalm_lens.model import HookedLALM
from lalm_lens.pieces import Order
from lalm_lens.readouts import Logits
from lalm_lens.results import plots_module
from lalm_lens.shapes import typed
from lalm_lens.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Granularity = Literal["component", "region"]
NODE = list(Node._fields)
SETTINGS = {
    "model": "str",
    "attribute": "str",
    "form": "str",
    "label_space": "bool",
    "within": "str",  # alone: each modality has a prompt of its own; conflict: both are in one, and disagree
    "framing": "str",
    "order": "str",  # of text and clip, within a conflict
}
TASK = {
    "sample": "str",
    "modality": "str",  # where the answer comes from: text, audio
    "answer": "str",
    "rival": "str",  # what the corrupted run answers; its second, where that is the answer
    "corrupted_by": "str",
    "status": "str",  # kept, clean_wrong, corrupted_right
    "m_clean": "float64",  # the logit of the answer above that of its rival
    "m_corrupted": "float64",
}


@dataclass(frozen=True, repr=False)
class Pathways(Table):
    """What each output does for an answer: one row per clip, modality and node."""

    NAME: ClassVar[str] = "a table of pathways"
    COLUMNS: ClassVar[dict[str, str]] = {
        **SETTINGS,
        "ig_steps": "int64",
        **TASK,
        "component": "str",  # head, mlp, or resid: the residual stream after a block
        "layer": "int64",
        "head": "Int64",
        "region": "str",  # all: of all positions together
        "attribution": "float64",  # attributed change of m
        "exact": "float64",  # change of m when the clean output is put into the corrupted run; NaN if that was not run
    }

    @property
    def kept(self) -> "Pathways":
        """The tasks alone whose answer is that of their modality in the clean run, and not in the corrupted one. Raises
        `DataError` if there are none of some modality."""
        rows = self.frame[self.frame.status == "kept"]
        if missing := [str(its) for its in self.frame.modality.unique() if its not in set(rows.modality)]:
            raise DataError(
                f"No answer is kept that comes from the {' or the '.join(missing)}: see counts(). The model does not "
                "follow it, or answers the same whatever it is. What it does for the logits is in the whole table."
            )
        return Pathways(rows)

    def rows(self, *components: str) -> pd.DataFrame:
        self.refuse_mixed((*SETTINGS, "ig_steps"))
        return self.frame[self.frame.component.isin(components)]

    def counts(self) -> pd.DataFrame:
        """Tasks by modality and status, those that no task has among them."""
        tasks = self.frame.drop_duplicates(["modality", "sample"])
        counts = tasks.groupby(["modality", "status"]).size().unstack(fill_value=0)
        return counts.reindex(index=sorted(MODALITIES), columns=STATUS, fill_value=0).rename_axis(columns="status")

    def nodes(self) -> pd.DataFrame:
        """Heads and MLPs by modality, the mean of what is attributed to them over the clips that have them, the largest
        in size first."""
        rows = self.rows("head", "mlp")
        by_node = rows.groupby(["modality", *NODE], dropna=False).agg(
            attribution=("attribution", "mean"), exact=("exact", "mean"), n=("attribution", "size")
        )
        return by_node.reset_index().sort_values(["modality", "attribution"], key=size, ascending=[True, False])

    def circuit(self, modality: Modality, k: int) -> list[Node]:
        """The k heads and MLPs with the largest mean attribution, in size."""
        nodes = self.nodes()
        its = nodes[nodes.modality == modality]
        if not 0 <= k <= len(its):
            raise InputError(f"The {modality} pathway has {len(its)} heads and MLPs, of which k are taken; got k={k}.")
        return [node_of(row) for row in its.head(k).to_dict("records")]

    def overlap(self, ks: Sequence[int] = (5, 10, 20, 50)) -> pd.DataFrame:
        """How many nodes the circuits of the two modalities share, for each k: `jaccard`, what it is on average for two
        circuits of k drawn at random (`expected`), and how often those share as many (`p`).

        Both are of nodes that both modalities have. Larger k than there are nodes are left out. Raises `InputError` for
        k below 1."""
        if not ks or min(ks) < 1:
            raise InputError(f"Circuits that are compared have one node or more; got ks={tuple(ks)}.")
        nodes = self.nodes()
        ranked = [[node_of(row) for row in nodes[nodes.modality == its].to_dict("records")] for its in MODALITIES]
        shared = set(ranked[0]) & set(ranked[1])
        text, audio = ([node for node in its if node in shared] for its in ranked)
        return pd.DataFrame([overlap(text, audio, k) for k in ks if k <= len(shared)])

    def agreement(self, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """How far attribution is what patching measures, over the nodes that were patched: Pearson's and Spearman's
        correlation by modality and component, the mean over clips with its 95 % bootstrap interval."""
        rows = self.rows("head", "mlp", "resid").dropna(subset="exact")
        found = []
        for (modality, component), its in rows.groupby(["modality", "component"], sort=False):
            clips = [clip for _, clip in its.groupby("sample") if varied(clip)]
            about = {"modality": modality, "component": component, "n": len(clips)}
            for name in ("pearson", "spearman"):
                values = np.array([clip.attribution.corr(clip.exact, method=name) for clip in clips])
                low, high = interval(values, n_resamples, seed)
                about |= {name: values.mean() if len(values) else np.nan, f"{name}_low": low, f"{name}_high": high}
            found.append(about)
        return pd.DataFrame(found)

    def map(self, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """The causal map of each modality: of every layer and region, how much of m comes back when the clean residual
        stream of the region is put into the corrupted run, exact. Mean change over mean gap of the clips that have the
        region, with its 95 % bootstrap interval over clips."""
        found = []
        for (modality, region), rows in self.rows("resid").groupby(["modality", "region"], sort=False):
            changes = rows.pivot(index="sample", columns="layer", values="exact")
            gaps = rows.drop_duplicates("sample").set_index("sample")
            gap = (gaps.m_clean - gaps.m_corrupted)[changes.index].to_numpy()
            values = np.column_stack([changes.to_numpy(), gap])
            low, high = intervals(values, rate, n_resamples, seed)
            about = {"modality": modality, "region": region, "layer": changes.columns, "n": len(changes)}
            found.append(pd.DataFrame({**about, "recovery": rate(values.mean(0)), "low": low, "high": high}))
        return pd.concat(found, ignore_index=True)

    def overview(self) -> pd.DataFrame:
        """How far attribution is what patching measures."""
        return self.agreement()

    def lines(self) -> pd.DataFrame:
        """The causal map, where there is one."""
        if not len(self.rows("resid")):
            return Table.lines(self)
        found = self.map()
        return found.assign(line=found.modality + ": " + found.region)[["line", "layer", "recovery", "low", "high"]]

    def plot(self, view: Literal["map", "nodes", "overlap"] = "map") -> "Figure":
        """`map`: recovery by layer and region. `nodes`: mean attribution of heads and MLPs. Text and audio beside each
        other. `overlap`: the Jaccard index of their circuits by k, and that of random ones."""
        plots, one = plots_module("pathway_plots"), self.frame.iloc[0]
        within = "prompts of their own" if one.within == "alone" else f"one prompt, {one.order.replace('_', ' ')}"
        about = f"{one.model}: {one.attribute}, {one.form}, text and audio in {within}"
        if view == "map":
            return plots.pathway_maps(self.map(n_resamples=2), about)
        if view == "nodes":
            return plots.node_maps(self.nodes(), about, int(one.ig_steps))
        return plots.overlap_curves(self.overlap(range(1, self.nodes().groupby("modality").size().min() + 1)), about)

    def __repr__(self) -> str:
        counts = "; ".join(
            f"{modality}: " + ", ".join(f"{n} {status}" for status, n in row.items() if n)
            for modality, row in self.counts().iterrows()
        )
        about = f"Pathways({self.frame.model.iloc[0]}, {self.frame.attribute.iloc[0]}; {counts})"
        return f"{about}\n{self.overlap().to_string(index=False, float_format='{:.3f}'.format)}"


def rate(means: Float[np.ndarray, "*batch numbers"]) -> Float[np.ndarray, "*batch rates"]:
    """Mean changes over the mean gap, which comes last."""
    return means[..., :-1] / means[..., -1:]


def size(values: pd.Series) -> pd.Series:
    return values.abs() if pd.api.types.is_float_dtype(values) else values


def node_of(row: dict) -> Node:
    head = None if pd.isna(row["head"]) else int(row["head"])
    return Node(row["component"], int(row["layer"]), head, row["region"])


def varied(clip: pd.DataFrame) -> bool:
    return len(clip) > 2 and clip.attribution.nunique() > 1 and clip.exact.nunique() > 1


def overlap(first: Sequence[Node], second: Sequence[Node], k: int) -> dict[str, int | float]:
    """Of the first k of two rankings of the same nodes."""
    assert set(first) == set(second), "rankings are of the same nodes"
    n_shared, drawn, shared = len(set(first[:k]) & set(second[:k])), (len(first), k, k), np.arange(k + 1)
    return {
        "k": k,
        "n_nodes": len(first),
        "n_shared": n_shared,
        "jaccard": n_shared / (2 * k - n_shared),
        "expected": float(hypergeom.pmf(shared, *drawn) @ (shared / (2 * k - shared))),
        "p": float(hypergeom.sf(n_shared - 1, *drawn)),
    }


# --- the runs ---------------------------------------------------------------------------------------------------


@typed
def pathways(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    form: Form = "P3",
    within: Within = "alone",
    framing: str | Framing = "statement",
    order: Order = "audio_first",
    corruption: Corruption = OtherClip(),  # noqa: B008  it is frozen
    granularity: Granularity = "component",
    ig_steps: int = 5,
    n_exact: int | None = 32,
    label_space: bool = True,
    states: Mapping[str, str] | None = None,
    seed: int = 0,
    engine: Engine = "auto",
    progress: bool = True,
) -> Pathways:
    """What heads, MLPs and the residual stream do for answers that are read, and for answers that are heard.

    In the clean run of the text task the statement of `make_conflict` names a label, in the corrupted one another of as
    many tokens; in that of the audio task the clip is heard, and in the corrupted one `corruption` in its place.
    Prompts are `text_only` and `audio_only`, or within a "conflict" the same one, in which text and clip disagree. m is
    the logit of the clean answer above its rival, the label that the corrupted run chooses.

    Attribution is by `ig_steps` gradients (1: at the corrupted run alone), of nodes over all positions, or with
    `granularity="region"` of each region by itself. The residual stream is patched exactly in every layer and region,
    `n_exact` of the heads and MLPs of each clip (None: all), half of them those with the largest attribution, the
    others drawn by `seed`, which also draws what is stated, unless `states` says it. Raises as `make_conflict` and
    `causal_trace` do.
    """
    if n_exact is not None and n_exact < 0:
        raise InputError(f"n_exact is 0 or more, or None for all; got {n_exact}.")
    how = {"form": form, "within": within, "order": order, "corruption": corruption, "states": states}
    contrasts = Contrasts.of(attribute, framing, **how, label_space=label_space, seed=seed)
    rng, frames = drawing(seed), []
    shown = {"total": 2 * len(samples), "unit": "task", "disable": not progress}
    for task in tqdm(contrasts.tasks(model, samples), "attributing", **shown):
        frame = frame_of(model, task, granularity, ig_steps, n_exact, engine, rng)
        frames.append(frame.assign(**contrasts.columns(model), ig_steps=ig_steps, **columns_of(task)))
    return Pathways.concat(frames)


def columns_of(task: Task) -> dict[str, str | float]:
    return {"sample": task.sample.name, **{name: getattr(task, name) for name in TASK if name != "sample"}}


def frame_of(
    model: HookedLALM,
    task: Task,
    granularity: Granularity,
    ig_steps: int,
    n_exact: int | None,
    engine: Engine,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """A row per node."""
    contrast = task.contrast
    regions = list(dict.fromkeys(regions_of(contrast.clean)))
    parts = nodes_of(model, ("head", "mlp"), [EVERYWHERE] if granularity == "component" else regions)
    stream = nodes_of(model, ("resid",), regions)
    scores = attribution(model, contrast, ig_steps=ig_steps)
    found = pd.DataFrame([*parts, *stream], columns=NODE)
    found["attribution"] = node_scores(scores, contrast.clean, [*parts, *stream]).double().numpy()
    chosen = chosen_parts(found.attribution[: len(parts)].abs().to_numpy(), n_exact, rng)
    tested = [*chosen, *range(len(parts), len(found))]
    effects = exact_effects(model, contrast, [[*parts, *stream][n] for n in tested], engine)
    return found.assign(exact=pd.Series(effects.numpy(), index=tested)).astype({"head": "Int64"})


def chosen_parts(sizes: Float[np.ndarray, " node"], n_exact: int | None, rng: np.random.Generator) -> list[int]:
    """Which are patched: the largest, and as many of the others by chance."""
    ranked = np.argsort(-sizes, kind="stable")
    if n_exact is None or n_exact >= len(ranked):
        return list(range(len(ranked)))
    n_largest = n_exact - n_exact // 2
    return sorted([*ranked[:n_largest], *rng.choice(ranked[n_largest:], n_exact // 2, replace=False)])


def exact_effects(
    model: HookedLALM, contrast: Contrast, nodes: Sequence[Node], engine: Engine
) -> Float[Tensor, " node"]:
    """How far each clean output by itself changes m in the corrupted run."""
    branches = [Branch(contrast.corrupted, (node.patch(contrast.corrupted, contrast.clean),)) for node in nodes]
    if not branches:
        return torch.zeros(0, dtype=torch.float64)
    readout = Logits(tokens=(contrast.answer, contrast.rival))
    outcome = run_branches(model, branches, readout, engine=engine)
    values, base = (its[:, 0].double().cpu() for its in (outcome.values, outcome.base))
    return (values[:, 0] - values[:, 1]) - (base[:, 0] - base[:, 1])
