"""`lalm-lens conflict`."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from lalm_lens.attributes import Attribute
from lalm_lens.commands.base import app, ready
from lalm_lens.commands.clips import heard, read_study
from lalm_lens.commands.opening import opened
from lalm_lens.commands.options import (
    AttributeNames,
    Cut,
    Data,
    Device,
    DeviceMap,
    Dtype,
    Labels,
    Model,
    NControls,
    Own,
    Part,
    Prefix,
    Question,
    TokenBudget,
    Transcript,
    VoiceActivity,
    numbers,
)
from lalm_lens.commands.steps import Shown, Steps, run_steps, steps_named
from lalm_lens.errors import InputError
from lalm_lens.pieces import Order

if TYPE_CHECKING:
    from lalm_lens.conflict import ConflictItem
    from lalm_lens.datasets import Sample
    from lalm_lens.experiments.pathways import Pathways
    from lalm_lens.experiments.suppression import Suppression
    from lalm_lens.model import HookedLALM

EXAMPLES = """[bold]Examples[/bold]

lalm-lens conflict Qwen/Qwen2-Audio-7B-Instruct ./sakura --out conflict --device cuda --dtype bfloat16

lalm-lens conflict ./checkpoint ./clips --attribute animal --only dominance,suppression --out conflict

lalm-lens conflict ./checkpoint ./clips --attribute animal --framing "A friend says: {label}." --out conflict
"""


ORDERS = get_args(Order)
ONSETS = ("cka", "above", "centred_above")  # of what two modalities share


@dataclass(frozen=True)
class Asked:
    """What all steps are about."""

    model: "HookedLALM"
    samples: "list[Sample]"
    attribute: Attribute
    framings: list[str]
    n_pathways: int
    windows: list[int]
    n_controls: int
    seed: int
    token_budget: int | None
    out: Path

    @property
    def how(self) -> dict:
        return {"attribute": self.attribute, "seed": self.seed}

    @cached_property
    def parts(self) -> "tuple[list[Sample], list[Sample]]":
        """Clips whose pathways are looked for, half of all at most, and others that their circuits are tried on."""
        from lalm_lens.datasets import split

        choosing, others = split(self.samples, min(self.n_pathways, len(self.samples) // 2), self.seed)
        return choosing, others[: self.n_pathways]

    @cached_property
    def pathways(self) -> "Pathways":
        from lalm_lens.experiments.pathways import pathways

        found = pathways(self.model, self.parts[0], framing=self.framings[0], **self.how)
        found.save(self.out / "pathways.parquet")
        return found

    @cached_property
    def suppressions(self) -> "dict[str, Suppression]":
        """By order."""
        from lalm_lens.experiments.suppression import suppression

        found = {}
        for order in ORDERS:
            how: dict = {"framing": self.framings[0], "order": order, "token_budget": self.token_budget, **self.how}
            found[order] = suppression(self.model, self.samples, **how)
            found[order].save(self.out / f"suppression_{order}.parquet")
        return found


def dominance(asked: Asked) -> Shown:
    """Finding 1: does the text dominate?"""
    from lalm_lens.conflict import make_conflict
    from lalm_lens.experiments.text_dominance import text_dominance

    items = make_conflict(asked.samples, framing=asked.framings, order=ORDERS, **asked.how)
    found = text_dominance(asked.model, items, token_budget=asked.token_budget)
    found.save(asked.out / "dominance.parquet")
    return {"dominance": found.tdr(), "accuracies": found.accuracies()}, {"dominance": found.plot()}


def listening(asked: Asked) -> Shown:
    """Finding 1: does the answer need the audio?"""
    from lalm_lens.experiments.audio_sensitivity import audio_sensitivity

    found = audio_sensitivity(asked.model, asked.samples, token_budget=asked.token_budget, **asked.how)
    found.save(asked.out / "sensitivity.parquet")
    return {"sensitivity": found.summary()}, {}


def meeting(asked: Asked) -> Shown:
    """Finding 2: do what is read and what is heard converge in late layers?"""
    import pandas as pd

    from lalm_lens.experiments.convergence import convergence

    met = convergence(asked.model, asked.samples, framing=asked.framings[0], **asked.how)
    met.save(asked.out / "convergence.parquet")
    first = pd.DataFrame({"statistic": ONSETS, "first_layer": [met.first_layer(name) for name in ONSETS]})
    tables = {"convergence": met.layers(), "first_layer": first.astype({"first_layer": "Int64"})}
    return tables, {"convergence": met.plot()}


def kept(asked: Asked) -> Shown:
    """Finding 2: how many answers are those of what is read, and of what is heard, and another's where that is?"""
    return {"kept": asked.pathways.counts().reset_index()}, {}


def paths(asked: Asked) -> Shown:
    """Finding 2: are the pathways of text and audio distinct?"""
    found = asked.pathways.kept  # tasks whose answer is that of their modality: else there is no pathway of it
    tables = {"overlap": found.overlap(), "agreement": found.agreement()}
    return tables, {f"pathways_{view}": found.plot(view) for view in ("map", "nodes", "overlap")}


def tried(asked: Asked) -> Shown:
    """Finding 2: what does the circuit of one modality do for the other, on clips that did not choose them?"""
    from lalm_lens.experiments.circuits import circuits

    chosen = asked.pathways.kept
    every = circuits(asked.model, asked.parts[1], chosen, framing=asked.framings[0], **asked.how)
    every.save(asked.out / "circuits.parquet")
    found = every.kept
    return {"circuits": found.faithfulness()}, {"circuits": found.plot()}


def near(asked: Asked) -> Shown:
    """Finding 2: which words are the states of the audio near to?"""
    from lalm_lens.experiments.nearest_tokens import nearest_tokens

    how: dict = {"attribute": asked.attribute, "token_budget": asked.token_budget}
    found = nearest_tokens(asked.model, asked.samples, **how)
    found.save(asked.out / "nearest_tokens.parquet")
    return {"nearest_tokens": found.layers()}, {}


def suppressed(asked: Asked) -> Shown:
    """Finding 3: does the text suppress the audio, or erase it?"""
    import pandas as pd

    verdicts = [{"order": order, **found.verdict(seed=asked.seed)} for order, found in asked.suppressions.items()]
    pictures = {f"suppression_{order}": found.plot() for order, found in asked.suppressions.items()}
    return {"suppression": pd.DataFrame(verdicts)}, pictures


def probed(asked: Asked) -> Shown:
    """Finding 3: what do linear probes read of both, where a text states any label?"""
    import pandas as pd

    from lalm_lens.experiments.probe import probe

    tables, pictures = [], {}
    for order, found in asked.suppressions.items():
        items = stated_by_chance(asked, {"framing": asked.framings[0], "order": order, **asked.how})
        targets = {"audio": [str(its.audio_label) for its in items], "text": [str(its.text_label) for its in items]}
        reads = {}
        for side, labels in targets.items():
            rarest = min(labels.count(label) for label in labels)
            places: dict = {"stacks": ["decoder"], "places": ["last", "object"], "n_folds": max(2, min(5, rarest))}
            places["n_controls"] = asked.n_controls
            reads[side] = probe(asked.model, items, targets=labels, **places, **asked.how)
            reads[side].save(asked.out / f"probe_{order}_{side}.parquet")
            tables.append(reads[side].layers(seed=asked.seed).assign(order=order, label_of=side))
        pictures[f"probes_{order}"] = found.plot(reads)
    return {"probes": pd.concat(tables, ignore_index=True)}, pictures


def stated_by_chance(asked: Asked, how: dict) -> "list[ConflictItem]":
    """Each clip with a text that states any of the labels, its own among them: where only others are stated, who reads
    the text knows something of the audio."""
    import numpy as np

    from lalm_lens.conflict import make_conflict

    rng = np.random.default_rng(asked.seed)
    drawn = rng.permutation(np.resize(asked.attribute.labels, len(asked.samples))).tolist()
    stated = {sample.name: label for sample, label in zip(asked.samples, drawn, strict=True)}
    true, false = ([its for its in asked.samples if (stated[its.name] == its.label) == same] for same in (True, False))
    items = make_conflict(true, conditions=["aligned"], **how) if true else []
    return items + (make_conflict(false, conditions=["conflict"], states=stated, **how) if false else [])


def repair(asked: Asked) -> Shown:
    """The repair: what do late states of the audio bring back in earlier layers?"""
    import pandas as pd

    from lalm_lens.conflict import make_conflict
    from lalm_lens.experiments.back_patch import back_patch
    from lalm_lens.experiments.repair import in_short
    from lalm_lens.tables import write_tables

    summaries, pictures = [], {}
    for order in ORDERS:
        about: dict = {"conditions": ["audio_only", "conflict"], "framing": asked.framings[0], "order": order}
        items = make_conflict(asked.samples, **about, **asked.how)
        found = back_patch(asked.model, items, windows=asked.windows, token_budget=asked.token_budget, **asked.how)
        found.save(asked.out / f"back_patch_{order}.parquet")
        found.chosen().save(asked.out / f"back_patch_{order}.json")
        summaries.append(found.summary(seed=asked.seed).assign(order=order))
        pictures[f"back_patch_{order}"] = found.plot()
    summary = pd.concat(summaries, ignore_index=True)
    write_tables(asked.out / "tables", {"back_patch": summary})
    return {"repair": in_short(summary)}, pictures


STEPS: Steps = {
    "dominance": dominance,
    "sensitivity": listening,
    "convergence": meeting,
    "kept": kept,
    "pathways": paths,
    "circuits": tried,
    "nearest": near,
    "suppression": suppressed,
    "probes": probed,
    "repair": repair,
}


@app.command("conflict", epilog=EXAMPLES)
def conflict_command(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for tables, pictures and conflict.md, one inside per attribute.")],
    attribute: AttributeNames = None,
    question: Question = None,
    labels: Labels = None,
    prefix: Prefix = None,
    only: Annotated[str | None, typer.Option(help=f"Some of {', '.join(STEPS)}, with commas between.")] = None,
    framing: Annotated[
        list[str] | None,
        typer.Option(
            help="How the text states a label: statement, transcript, option, or a text with {label}; repeat "
            "it for dominance. The first is that of all else."
        ),
    ] = None,
    n_pathways: Annotated[
        int, typer.Option(min=1, help="Clips whose pathways are looked for, which is dear; half at most.")
    ] = 32,
    windows: Annotated[str, typer.Option(help="Layers that are back-patched together, odd, with commas.")] = "1,3,5",
    n_controls: NControls = 5,
    seed: Annotated[int, typer.Option(help="Of the stated labels, splits and bootstraps.")] = 0,
    cut: Cut = False,
    transcript: Transcript = None,
    voice_activity: VoiceActivity = False,
    device: Device = "cpu",
    device_map: DeviceMap = None,
    dtype: Dtype = "float32",
    token_budget: TokenBudget = None,
    part: Part = None,
    conversion: Own = None,
) -> None:
    """Find out whom a model believes where a text disagrees with what it hears, where in it the text wins, and whether
    back-patching repairs it (after arXiv 2606.18924)."""
    steps = steps_named(only, STEPS)
    sizes = [int(each) for each in numbers("windows", windows)]
    if not sizes or any(size < 1 or size % 2 == 0 for size in sizes):
        raise InputError(f"--windows are odd numbers of layers, as 1,3,5; got {windows}.")
    study = read_study(data, attribute, question, labels, prefix)
    ready(out)
    from lalm_lens.conflict import FRAMINGS, framing_of

    framings = framing or list(FRAMINGS)
    for each in framings:
        framing_of(each)
    lens = opened(model, part=part, conversion=conversion, device=device, device_map=device_map, dtype=dtype)
    study = {its: heard(lens, samples, cut, transcript, voice_activity) for its, samples in study.items()}
    about = [
        Asked(lens, samples, its, framings, n_pathways, sizes, n_controls, seed, token_budget, out / its.name)
        for its, samples in study.items()
    ]
    run_steps(steps, about, f"Text against audio in {lens.cfg.model_name}", out / "conflict.md")
