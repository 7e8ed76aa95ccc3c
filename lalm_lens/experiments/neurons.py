"""Neurons of one class: which are active for it, and what comes of making them stronger.

    score[l, n] = | mean activation over clips of the class - mean over all other clips |

of neuron n of layer l (`post`) at the positions of one place, whose mean each clip has. The first k of all layers are
multiplied, and against them stand as many that were drawn. Other clips than those that chose them are looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lalm_lens.attributes import Attribute, Form
from lalm_lens.conflict import CONFLICT_COLUMNS
from lalm_lens.datasets import Sample
from lalm_lens.draws import drawing, refuse_seed
from lalm_lens.engine.plan import Engine
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.changed import ANSWER_COLUMNS, Changed, Effect, How, Variant, answers
from lalm_lens.experiments.cuts import Place, place_name, positions
from lalm_lens.experiments.enrich import split
from lalm_lens.interventions import Scale, hook_name
from lalm_lens.metrics import Predict
from lalm_lens.model import HookedLALM
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.runs import Run
from lalm_lens.shapes import typed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Chosen = dict[int, tuple[int, ...]]  # neurons by layer


@typed
def neuron_scores(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    label: str,
    place: Place = "last",
    form: Form = "P3",
    progress: bool = True,
) -> Float[Tensor, "layer neuron"]:
    """How much more or less active each neuron is for clips of one label than for all others: the absolute difference
    of means. Raises `DataError` unless there are some of both."""
    question = Question.about(model, samples, attribute, form, True)
    return scores(activations(question, samples, place, progress), [sample.label for sample in samples], label)


@torch.no_grad()
def activations(
    question: Question, samples: Sequence[Sample], place: Place, progress: bool
) -> Float[Tensor, "clip layer neuron"]:
    model, found = question.model, []
    names = [hook_name("post", layer) for layer in range(model.decoder_cfg.n_layers)]
    for sample in tqdm(samples, "activations", unit="clip", disable=not progress):
        run = question.run(sample)
        _, cache = model.run_with_cache(run.inputs.to(model.device), names_filter=names, logits_at=-1)
        where = list(positions(run, place))
        found.append(torch.stack([cache[name][0, where].float().mean(0) for name in names]).cpu())
    return torch.stack(found)


def scores(
    active: Float[Tensor, "clip layer neuron"], labels: Sequence[str], label: str
) -> Float[Tensor, "layer neuron"]:
    is_class = torch.tensor([its == label for its in labels])
    if is_class.all() or not is_class.any():
        raise DataError(f"{int(is_class.sum())} of {len(labels)} clips are {label!r}: give some that are, and others.")
    return (active[is_class].mean(0) - active[~is_class].mean(0)).abs()


def largest(score: Float[Tensor, "layer neuron"], k: int) -> Chosen:
    """The `k` neurons with the largest scores."""
    if not 1 <= k <= score.numel():
        raise InputError(f"There are {score.numel()} neurons; {k} cannot be chosen.")
    return by_layer(score.flatten().topk(k).indices.tolist(), score.shape[1])


def drawn(n_layers: int, n_neurons: int, k: int, seed: int) -> Chosen:
    return by_layer(drawing(seed).permutation(n_layers * n_neurons)[:k].tolist(), n_neurons)


def by_layer(flat: Sequence[int], n_neurons: int) -> Chosen:
    found: Chosen = {}
    for number in sorted(flat):
        found[number // n_neurons] = (*found.get(number // n_neurons, ()), number % n_neurons)
    return found


@typed
def neuron_gain(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    labels: Sequence[str] | None = None,
    k: int = 50,
    gains: Sequence[float | int] = (0.0, 2.0, 4.0),
    place: Place = "last",
    n_choosing: int | None = None,
    n_seeds: int = 3,
    seed: int = 0,
    form: Form = "P3",
    predict: Predict = "labels",
    label_space: bool = True,
    engine: Engine = "auto",
    token_budget: int | None = None,
    n_together: int = 8,
    progress: bool = True,
) -> "NeuronGain":
    """Multiply the `k` neurons of each of the `labels` that tell it apart best, and read the answer.

    `n_choosing` clips, by default half, in the proportions of their labels, choose the neurons; `seed` says which, and
    their labels are looked at where none are named. The table has the other clips: each with the neurons of each label,
    and with `n_seeds` times as many that were drawn. Raises what `attention_knockout` raises, and `DataError` for a
    label that no clip has.
    """
    refuse_seed(seed)
    if n_seeds < 0:
        raise InputError(f"n_seeds is 0 or more; got {n_seeds}.")
    question = Question.about(model, samples, attribute, form, label_space)
    choosing, test = split(samples, len(samples) // 2 if n_choosing is None else n_choosing, seed)
    active = activations(question, choosing, place, progress)
    n_layers, n_neurons = active.shape[1:]
    heard = {sample.label for sample in choosing}
    wanted = [label for label in question.labels if label in heard] if labels is None else labels
    arms = [
        ("chosen", label, None, largest(scores(active, [its.label for its in choosing], label), k)) for label in wanted
    ]
    arms += [("random", "", n, drawn(n_layers, n_neurons, k, seed + n)) for n in range(n_seeds)]

    def variants(sample: Sample, run: Run) -> list[Variant]:
        where = positions(run, place)
        return [
            Variant(
                {"arm": arm, "of": of, "seed": n, "k": k, "place": place_name(place), "gain": float(gain)},
                tuple(Scale("post", layer, where, neurons=its, factor=float(gain)) for layer, its in chosen.items()),
            )
            for arm, of, n, chosen in arms
            for gain in gains
        ]

    how = How(predict, engine, token_budget, n_together, progress)
    frame = pd.concat([*answers(question, test, variants, how, "multiplying neurons")], ignore_index=True)
    side = np.where(frame.label == frame.of, "own", np.where(frame.arm == "random", "none", "other"))
    return NeuronGain.concat([frame.assign(side=side)])


@dataclass(frozen=True, repr=False)
class NeuronGain(Changed):
    """Answers before and after neurons were multiplied, one row per test clip, set of neurons and gain."""

    NAME: ClassVar[str] = "a table of multiplied neurons"
    CELL: ClassVar[tuple[str, ...]] = ("arm", "of", "side", "seed", "k", "place", "gain")
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        **CONFLICT_COLUMNS,
        "predict": "str",
        "arm": "str",  # chosen, or random
        "of": "str",  # the label whose neurons they are
        "side": "str",  # whether that is the clip's own label: own, other; none of random ones
        "seed": "Int64",
        "k": "int64",
        "place": "str",
        "gain": "float64",
        **ANSWER_COLUMNS,
    }

    @typed
    def plot(self, effect: Effect = "label_probability") -> "Figure":
        """The change by gain: of a label's neurons on its own clips and on others, and of random ones."""
        effects = self.mean_over_clips(effect)
        return plots_module("pair_plots").change_curves(effects, "gain", 1.0, effect, self.frame)

    def mean_over_clips(self, effect: Effect = "label_probability", n_resamples: int = 1000) -> pd.DataFrame:
        """As `effects`, of all labels together, each clip with the mean of its sets of neurons."""
        names = {"own": "neurons of the clip's label", "other": "neurons of other labels", "none": "random neurons"}
        numbers = [name for name, kind in ANSWER_COLUMNS.items() if kind != "str"]
        rows = self.frame.groupby([*QUESTION_COLUMNS, "predict", "arm", "side", "k", "place", "gain"], sort=False)
        one = rows[numbers].mean().reset_index()
        effects = type(self)(one.assign(of="", seed=0, engine="")).effects(effect, n_resamples=n_resamples)
        return effects.assign(line=effects.side.map(names))

    def about(self) -> str:
        return f"{self.frame.k.iloc[0]} neurons, gains {', '.join(f'{its:g}' for its in self.frame.gain.unique())}"
