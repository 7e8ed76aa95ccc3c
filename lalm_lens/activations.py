"""Activations as files, so that probes, sparse autoencoders and whatever else can be trained elsewhere."""

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lalm_lens.attributes import Attribute, Form
from lalm_lens.datasets import Sample
from lalm_lens.errors import HookError, InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.cuts import Place, positions
from lalm_lens.model import HookedLALM
from lalm_lens.shapes import typed
from lalm_lens.tables import write_whole


@typed
def save_activations(
    model: HookedLALM,
    samples: Sequence[Sample],
    out: str | Path,
    *,
    attribute: str | Attribute,
    names: Sequence[str],
    place: Place = "last",
    form: Form = "P3",
    shard: int = 64,
    progress: bool = True,
) -> list[Path]:
    """Write decoder activations of each clip's prompt at a place, a file for every `shard` clips.

    `activations-00000.safetensors` has a tensor for each of the `names` of hooks, as blocks.12.hook_resid_post: [row,
    ...], in the model's dtype. `activations-00000.parquet` has a row for each of its rows: clip, label, position, token
    and region. What is there already is kept, so that the same call goes on where it was stopped.

    Raises `HookError` for a hook that there is not, `InputError` for one that has no row for each position of the
    prompt, and what `causal_trace` raises for clips and attributes.
    """
    if shard < 1 or not names:
        raise InputError("Activations need the names of hooks, and a shard of 1 clip or more.")
    if unknown := [name for name in names if name not in model.hook_dict]:
        raise HookError(f"There is no hook {unknown[0]}; `lalm-lens info` lists them.")
    question, out = Question.about(model, samples, attribute, form, True), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    with tqdm(total=len(samples), desc="activations", unit="clip", disable=not progress) as bar:
        for start in range(0, len(samples), shard):
            path = out / f"activations-{start // shard:05d}.safetensors"
            if not path.is_file():
                write(question, samples[start : start + shard], names, place, path)
            bar.update(len(samples[start : start + shard]))
            paths.append(path)
    return paths


def write(question: Question, samples: Sequence[Sample], names: Sequence[str], place: Place, path: Path) -> None:
    rows, states = [], []
    for sample in samples:
        its_rows, its_states = activations_of(question, sample, names, place)
        rows += its_rows
        states.append(its_states)
    write_whole(pd.DataFrame(rows), path.with_suffix(".parquet"))
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        save_file({name: torch.cat([its[name] for its in states]) for name in names}, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@torch.no_grad()
def activations_of(
    question: Question, sample: Sample, names: Sequence[str], place: Place
) -> tuple[list[dict], dict[str, Tensor]]:
    model, run = question.model, question.run(sample)
    assert run.prompt is not None
    _, cache = model.run_with_cache(run.inputs.to(model.device), names_filter=list(names), logits_at=-1)
    at = positions(run, place)
    for name in names:
        if cache[name].ndim < 3 or cache[name].shape[:2] != (1, run.n_pos):
            raise InputError(f"{name} is {tuple(cache[name].shape)}: it has no row for each of {run.n_pos} positions.")
    about = {"sample": sample.name, "label": sample.label}
    rows = [
        {**about, "position": n, "token": its.token, "region": its.region}
        for n, its in enumerate(run.prompt.positions)
        if n in at
    ]
    return rows, {name: cache[name][0, sorted(at)].cpu().contiguous() for name in names}
