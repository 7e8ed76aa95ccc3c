"""Activations as files, so that probes, sparse autoencoders and whatever else can be trained elsewhere."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lalm_lens.attributes import Attribute, Form
from lalm_lens.datasets import Sample
from lalm_lens.errors import HookError, InputError, reason
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.cuts import Place, positions
from lalm_lens.model import HookedLALM
from lalm_lens.results import QUESTION_COLUMNS
from lalm_lens.shapes import typed
from lalm_lens.tables import Table


@dataclass(frozen=True, repr=False)
class Activations(Table):
    """Which row of each tensor of `states` is of which clip and position. What is read from a table has no states:
    they are in the safetensors file beside it."""

    NAME: ClassVar[str] = "a table of activations"
    BY_CLIP: ClassVar[bool] = True
    COLUMNS: ClassVar[dict[str, str]] = {
        **{name: kind for name, kind in QUESTION_COLUMNS.items() if name != "label_space"},
        "position": "int64",
        "token": "str",
        "region": "str",
    }

    states: Mapping[str, Tensor] = field(default_factory=dict)  # [row, ...] by the name of a hook, in the model's dtype

    def save_beside(self, path: Path) -> None:
        path = path.with_suffix(".safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            try:
                save_file(dict(self.states), unfinished)
            except SafetensorError as error:
                raise OSError(f"{path} cannot be written ({reason(error)}).") from error
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(state.shape)}" for name, state in self.states.items())
        return f"Activations({len(self.frame)} rows of {self.frame['sample'].nunique()} clips; {shapes})"


@typed
def activations(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    names: Sequence[str] | None = None,
    place: Place = "last",
    form: Form = "P3",
    progress: bool = True,
) -> Activations:
    """Decoder activations of each clip's prompt at a place, by the `names` of hooks: by default what each block of the
    decoder leaves in the residual stream.

    Raises `HookError` for a hook that there is not, `InputError` for one that has no row for each position of the
    prompt, and what `causal_trace` raises for clips and attributes.
    """
    names = resid_post(model) if names is None else names
    check(model, names)
    question = Question.about(model, samples, attribute, form, True)
    read = [
        activations_of(question, sample, names, place)
        for sample in tqdm(samples, desc="activations", unit="clip", disable=not progress)
    ]
    table = Activations.concat([rows for rows, _ in read])
    return Activations(table.frame, {name: torch.cat([its[name] for _, its in read]) for name in names})


@typed
def save_activations(
    model: HookedLALM,
    samples: Sequence[Sample],
    out: str | Path,
    *,
    attribute: str | Attribute,
    names: Sequence[str] | None = None,
    place: Place = "last",
    form: Form = "P3",
    shard: int = 64,
    progress: bool = True,
) -> list[Path]:
    """Write what `activations` gives, a file for every `shard` clips.

    `activations-00000.safetensors` has a tensor for each of the `names`, as blocks.12.hook_resid_post: [row, ...], in
    the model's dtype. `activations-00000.parquet` has a row for each of its rows: clip, label, position, token and
    region. What is there already is kept, so that the same call goes on where it was stopped.
    """
    names = resid_post(model) if names is None else names
    check(model, names)
    Question.about(model, samples, attribute, form, True)
    if shard < 1:
        raise InputError("Activations need a shard of 1 clip or more.")
    how: dict = {"attribute": attribute, "place": place, "form": form, "progress": False}
    paths = []
    with tqdm(total=len(samples), desc="activations", unit="clip", disable=not progress) as bar:
        for start in range(0, len(samples), shard):
            path = Path(out) / f"activations-{start // shard:05d}.parquet"
            some, beside = samples[start : start + shard], path.with_suffix(".safetensors")
            if not (path.is_file() and beside.is_file()):
                activations(model, some, names=names, **how).save(path)
            bar.update(len(some))
            paths.append(beside)
    return paths


def resid_post(model: HookedLALM) -> list[str]:
    return [f"blocks.{layer}.hook_resid_post" for layer in range(model.decoder_cfg.n_layers)]


def check(model: HookedLALM, names: Sequence[str]) -> None:
    if not names:
        raise InputError("Activations need the names of hooks.")
    if unknown := [name for name in names if name not in model.hook_dict]:
        raise HookError(f"There is no hook {unknown[0]}; `lalm-lens info` lists them.")


@torch.no_grad()
def activations_of(
    question: Question, sample: Sample, names: Sequence[str], place: Place
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    model, run = question.model, question.run(sample)
    assert run.prompt is not None
    _, cache = model.run_with_cache(run.inputs.to(model.device), names_filter=list(names), logits_at=-1)
    at = sorted(positions(run, place))
    for name in names:
        if cache[name].ndim < 3 or cache[name].shape[:2] != (1, run.n_pos):
            raise InputError(f"{name} is {tuple(cache[name].shape)}: it has no row for each of {run.n_pos} positions.")
    told = [run.prompt.positions[n] for n in at]
    rows = {"position": at, "token": [its.token for its in told], "region": [its.region for its in told]}
    states = {name: cache[name][0, at].cpu().contiguous() for name in names}
    return pd.DataFrame(rows).assign(**question.columns(sample)), states
