"""Steering: a direction added to the residual stream.

    h[l] <- h[l] + a v[l],        v[l] = mean of h[l] over some runs - mean over others

Each run has the mean over the positions of one place. What is heard minus silence is arXiv 2603.06854's direction, the
difference of two prompts arXiv 2312.06681's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lalm_lens.attributes import Attribute, Form
from lalm_lens.conflict import CONFLICT_COLUMNS
from lalm_lens.corrupt import silence
from lalm_lens.datasets import Sample
from lalm_lens.engine.branches import check
from lalm_lens.engine.plan import Engine
from lalm_lens.errors import InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.changed import ANSWER_COLUMNS, Changed, Effect, How, Variant, answers
from lalm_lens.experiments.cuts import Place, place_name, positions
from lalm_lens.fingerprints import weights_fingerprint
from lalm_lens.interventions import Add, NamedHook, hook_name
from lalm_lens.metrics import Predict
from lalm_lens.model import HookedLALM
from lalm_lens.results import QUESTION_COLUMNS, plots_module
from lalm_lens.runs import Run
from lalm_lens.shapes import typed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Direction:
    """One vector for each layer, to be added behind its block. `norms` are their lengths, `stream` the mean length of
    the states they were made of, `model` and `fingerprint` whose these are (`weights_fingerprint`)."""

    name: str
    vectors: Float[Tensor, "layer d_model"] = field(repr=False)
    stream: Float[Tensor, " layer"] = field(repr=False)
    n_runs: tuple[int, int]
    model: str
    fingerprint: str = field(repr=False)

    @property
    def norms(self) -> Float[Tensor, " layer"]:
        return self.vectors.norm(dim=-1)

    def check(self, model: HookedLALM) -> None:
        """Raise `InputError` for a model of another shape, or with other weights."""
        cfg, advice = model.decoder_cfg, "Make one of this model, as with mean_difference."
        if self.vectors.shape != (cfg.n_layers, cfg.d_model):
            raise InputError(
                f"The direction has {' x '.join(map(str, self.vectors.shape))} numbers, and this model {cfg.n_layers} "
                f"layers x {cfg.d_model}. {advice}"
            )
        if weights_fingerprint(model) != self.fingerprint:
            raise InputError(
                f"The direction is of {self.model}, and {model.cfg.model_name} has other weights, or the same rounded "
                f"otherwise than to bfloat16. {advice}"
            )

    def add(self, layer: int, where: tuple[int, ...], factor: float) -> Add:
        return Add("resid_post", layer, where, self.vectors[layer].expand(len(where), -1), factor=factor)

    def hook(self, layer: int, where: Iterable[int], factor: float) -> NamedHook:
        """For `model.generate`, at absolute positions; those that are generated count on behind the prompt's."""
        return self.add(layer, tuple(where), factor).hook()


@typed
@torch.no_grad()
def mean_difference(
    model: HookedLALM, runs: Sequence[Run], minus: Sequence[Run], *, place: Place = "last", name: str = "difference"
) -> Direction:
    """The direction from the mean of `minus` to that of `runs`, at one place of each."""
    if not runs or not minus:
        raise InputError("A difference of means needs one run or more on both sides.")
    (mean, norm), (other, its_norm) = (means(model, its, place) for its in (runs, minus))
    of = {"model": model.cfg.model_name, "fingerprint": weights_fingerprint(model)}
    return Direction(name, mean - other, (norm + its_norm) / 2, (len(runs), len(minus)), **of)


def means(
    model: HookedLALM, runs: Sequence[Run], place: Place
) -> tuple[Float[Tensor, "layer d_model"], Float[Tensor, " layer"]]:
    """Of the states behind each block, and of their lengths."""
    names = [hook_name("resid_post", layer) for layer in range(model.decoder_cfg.n_layers)]
    states, norms = [], []
    for run in runs:
        _, cache = model.run_with_cache(run.inputs.to(model.device), names_filter=names, logits_at=-1)
        here = torch.stack([cache[name][0, list(positions(run, place))] for name in names])
        states.append(here.mean(1))
        norms.append(here.norm(dim=-1).mean(-1))
    return torch.stack(states).mean(0), torch.stack(norms).mean(0)


@typed
def audio_minus_silence(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    form: Form = "P3",
    place: Place = "last",
    label_space: bool = True,
) -> Direction:
    """From silence of the same length to the clips."""
    question = Question.about(model, samples, attribute, form, label_space)
    silent = [replace(sample, waveform=silence(sample.waveform)) for sample in samples]
    runs, minus = ([question.run(sample) for sample in its] for its in (samples, silent))
    return mean_difference(model, runs, minus, place=place, name="audio - silence")


@typed
def prompt_contrast(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: Attribute,
    minus: Attribute,
    form: Form = "P3",
    place: Place = "last",
    label_space: bool = True,
) -> Direction:
    """From one question to another about the same clips. Only the words may differ: both have the labels."""
    questions = (Question.about(model, samples, its, form, label_space) for its in (attribute, minus))
    runs, others = ([question.run(sample) for sample in samples] for question in questions)
    return mean_difference(model, runs, others, place=place, name=f"{attribute.question} - {minus.question}")


@typed
def steer(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    direction: Direction,
    layers: Sequence[int] | None = None,
    factors: Sequence[float | int] = (-2.0, -1.0, 1.0, 2.0),
    place: Place = "last",
    form: Form = "P3",
    predict: Predict = "labels",
    label_space: bool = True,
    engine: Engine = "auto",
    token_budget: int | None = None,
    n_together: int = 8,
    progress: bool = True,
) -> "Steering":
    """Add a direction behind single blocks (all by default), `factors` times, and read the answer before and after.

    A direction that was made of the same clips knows them: make it of others. Raises what `attention_knockout` raises,
    and `InputError` for a direction of another model.
    """
    question = Question.about(model, samples, attribute, form, label_space)
    cfg = model.decoder_cfg
    direction.check(model)
    layers = range(cfg.n_layers) if layers is None else layers
    check(layers, cfg.n_layers, "layers")
    norms, stream = direction.norms.tolist(), direction.stream.tolist()

    def variants(sample: Sample, run: Run) -> list[Variant]:
        where = positions(run, place)
        return [
            Variant(
                {
                    "direction": direction.name,
                    "place": place_name(place),
                    "layer": layer,
                    "factor": float(factor),
                    "norm": norms[layer],
                    "relative_norm": norms[layer] / stream[layer],
                },
                (direction.add(layer, where, float(factor)),),
            )
            for layer in layers
            for factor in factors
        ]

    how = How(predict, engine, token_budget, n_together, progress)
    return Steering.concat([*answers(question, samples, variants, how, "steering")])


@dataclass(frozen=True, repr=False)
class Steering(Changed):
    """Answers before and after steering, one row per clip, layer and factor."""

    NAME: ClassVar[str] = "a table of steering"
    CELL: ClassVar[tuple[str, ...]] = ("direction", "place", "layer", "factor")
    COLUMNS: ClassVar[dict[str, str]] = {
        **QUESTION_COLUMNS,
        **CONFLICT_COLUMNS,
        "predict": "str",
        "direction": "str",
        "place": "str",  # where it is added
        "layer": "int64",
        "factor": "float64",
        "norm": "float64",  # of the direction there, not yet multiplied
        "relative_norm": "float64",  # over the mean length of the states that it was made of
        **ANSWER_COLUMNS,
    }

    @typed
    def plot(self, effect: Effect = "label_probability") -> "Figure":
        """The change by factor, a line for each layer."""
        effects = self.effects(effect)
        lines = effects.assign(line="layer " + effects.layer.astype(str))
        return plots_module("pair_plots").change_curves(lines, "factor", 0.0, effect, self.frame)

    def about(self) -> str:
        norms = self.frame.relative_norm
        return f"{self.frame.direction.iloc[0]}, {norms.min():.2g} to {norms.max():.2g} of the states' length"
