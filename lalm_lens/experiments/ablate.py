"""Ablation: what an answer loses without a head, or without some neurons.

In place of what a head (`z`) or neurons (`post`) have at some positions stands nothing (`zero`), their mean over clips
(`mean`), or what they have when another clip is heard (`resample`).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lalm_lens.attributes import Attribute, Form
from lalm_lens.conflict import CONFLICT_COLUMNS
from lalm_lens.corrupt import OtherClip
from lalm_lens.datasets import Sample
from lalm_lens.engine.branches import check
from lalm_lens.engine.plan import Engine
from lalm_lens.errors import InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.changed import ANSWER_COLUMNS, Changed, Effect, How, Variant, answers
from lalm_lens.experiments.cuts import PERCEIVED, Place, place_name, positions, spelled
from lalm_lens.interventions import BlockSite, Edit, Patch, Scale, hook_name
from lalm_lens.metrics import Predict
from lalm_lens.model import HookedLALM
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.runs import Run, Source
from lalm_lens.shapes import typed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Method = Literal["zero", "mean", "resample"]
Units = Sequence[tuple[int, Sequence[int]]]  # layers, and heads or neurons of each
EVERYWHERE = ("audio_side", "text")
Spot = tuple[str, int]  # a region, and which of its positions


@typed
def ablate(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    of: Literal["heads", "neurons"] = "heads",
    units: Units | None = None,
    method: Method = "mean",
    place: Place = EVERYWHERE,
    n_neurons: int = 128,
    seed: int = 0,
    form: Form = "P3",
    predict: Predict = "labels",
    label_space: bool = True,
    engine: Engine = "auto",
    token_budget: int | None = None,
    n_together: int = 8,
    progress: bool = True,
) -> "Ablation":
    """Take out heads or neurons, and read the answer at the last position, before and after.

    `units` are what is taken out at a time, each as a layer and some of its heads or neurons, [(3, (0, 2)), ...]; by
    default every single head, or every `n_neurons` neurons that stand beside each other. `place` is that of
    `attention_knockout`, by default all that is heard or read: then a head of an early layer costs a whole forward, and
    with `place="last"` next to nothing.

    The mean is that over the clips: of each word of a region of the prompt by itself, and one for all positions of the
    audio, as of a transcript. Another clip is `OtherClip(seed)`: one of another label, cut or padded to the
    length, in the same prompt.

    Raises what `attention_knockout` raises, and `DataError` where there is no other clip.
    """
    question = Question.about(model, samples, attribute, form, label_space)
    cfg = model.decoder_cfg
    site: BlockSite = "z" if of == "heads" else "post"
    if n_neurons < 1:
        raise InputError(f"Groups of {n_neurons} neurons hold nothing.")
    n, size = (cfg.n_heads, 1) if of == "heads" else (cfg.d_mlp, n_neurons)
    if units is None:
        groups = [tuple(range(start, min(start + size, n))) for start in range(0, n, size)]
        units = [(layer, group) for layer in range(cfg.n_layers) for group in groups]
    if not units or not all(group for _, group in units):
        raise InputError(f"Nothing is taken out: name layers and {of}, or leave units out for all of them.")
    check([layer for layer, _ in units], cfg.n_layers, "layers")
    check([unit for _, group in units for unit in group], n, of)
    layers = sorted({layer for layer, _ in units})
    means = Means.over(question, samples, site, layers, progress) if method == "mean" else None
    other = OtherClip(seed)

    def variants(sample: Sample, run: Run) -> list[Variant]:
        where = positions(run, place)
        beside = another(question, sample, samples, other) if method == "resample" else None
        found = []
        for layer, group in units:
            part: Any = {of: tuple(group)}
            change: Edit
            if means is not None:
                value = means.at(run, layer, where)[:, list(group)]
                change = Patch(site, layer, where, value, **part)
            elif beside is not None:
                change = Patch(site, layer, where, Source(beside), **part)
            else:
                change = Scale(site, layer, where, factor=0.0, **part)
            columns = {"of": of, "method": method, "place": place_name(place), "layer": layer, "units": spelled(group)}
            found.append(Variant(columns, (change,)))
        return found

    how = How(predict, engine, token_budget, n_together, progress)
    return Ablation.concat([*answers(question, samples, variants, how, f"without {of}")])


def another(question: Question, sample: Sample, samples: Sequence[Sample], other: OtherClip) -> Run:
    """The same prompt, in which another clip is heard."""
    return question.run(replace(sample, waveform=other.of(sample, samples).waveform))


@dataclass(frozen=True)
class Means:
    """Means over clips of the states of some layers, by what stands at a position."""

    layers: Sequence[int]
    of: Mapping[Spot, Float[Tensor, "layer *unit"]]

    @classmethod
    @torch.no_grad()
    def over(
        cls, question: Question, samples: Sequence[Sample], site: BlockSite, layers: Sequence[int], progress: bool
    ) -> "Means":
        model, names = question.model, [hook_name(site, layer) for layer in layers]
        sums: dict[Spot, Tensor] = {}
        counts: Counter[Spot] = Counter()
        for sample in tqdm(samples, f"means of {site}", unit="clip", disable=not progress):
            run = question.run(sample)
            _, cache = model.run_with_cache(run.inputs.to(model.device), names_filter=names, logits_at=-1)
            states = torch.stack([cache[name][0] for name in names])
            for spot, where in by_spot(run).items():
                total = states[:, where].sum(1)
                sums[spot] = sums[spot] + total if spot in sums else total
                counts[spot] += len(where)
        return cls(layers, {spot: total / counts[spot] for spot, total in sums.items()})

    def at(self, run: Run, layer: int, where: Sequence[int]) -> Float[Tensor, "at *unit"]:
        spots = {position: spot for spot, its in by_spot(run).items() for position in its}
        return torch.stack([self.of[spots[position]][self.layers.index(layer)] for position in where])


def by_spot(run: Run) -> dict[Spot, list[int]]:
    """Each word of a region by itself; what is heard or seen all together, because clips have more or less of it."""
    assert run.prompt is not None
    found, n_seen = defaultdict(list), Counter()
    for position, its in enumerate(run.prompt.positions, run.n_pad):
        found[its.region, 0 if its.region in PERCEIVED else n_seen[its.region]].append(position)
        n_seen[its.region] += 1
    return found


@dataclass(frozen=True, repr=False)
class Ablation(Changed):
    """Answers before and after an ablation, one row per clip and what was taken out."""

    NAME: ClassVar[str] = "a table of ablation"
    CELL: ClassVar[tuple[str, ...]] = ("of", "method", "place", "layer", "units")
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        **CONFLICT_COLUMNS,
        "predict": "str",
        "of": "str",  # heads, or neurons
        "method": "str",
        "place": "str",  # where they are taken out
        "layer": "int64",
        "units": "str",  # which of them, as "0-127"
        **ANSWER_COLUMNS,
    }

    @typed
    def plot(self, effect: Effect = "label_probability") -> "Figure":
        """The change by layer and head, or group of neurons."""
        return plots_module("pair_plots").unit_map(self.effects(effect), effect, self.frame)

    def about(self) -> str:
        first = self.frame.iloc[0]
        return f"{first.of} at {first.place}, {first.method}"
