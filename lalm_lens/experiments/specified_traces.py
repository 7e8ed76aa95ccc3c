"""Claims about traces under every choice: what differs in runs is run, all else is read of the same runs again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm

from lalm_lens.attributes import Attribute, Form
from lalm_lens.corrupt import Corruption, OtherClip, Silence, WhiteNoise
from lalm_lens.datasets import Sample
from lalm_lens.engine.recorded import Recorded
from lalm_lens.errors import LensError
from lalm_lens.experiments.asked import processor_of, read_of
from lalm_lens.experiments.causal_trace import Settings, answer_of, case_of, check, exclusions
from lalm_lens.experiments.cells import Cell, Grid
from lalm_lens.experiments.choices import Choices, Objects, Reasons, Template, claims_of, rows_of
from lalm_lens.experiments.claim import PLACES, Claim, Evidence, Reads
from lalm_lens.experiments.recovery import Case, Patched, patch_all
from lalm_lens.metrics import Metric, Predict, is_right
from lalm_lens.model import HookedLALM
from lalm_lens.pieces import Region
from lalm_lens.prompts import Prompt
from lalm_lens.runs import Run
from lalm_lens.transcripts import Reading

QUESTION: tuple[Region, ...] = ("early", "object", "object_sep", "late", "attribute", "last")
MAPS = ("text", "question", *PLACES, "object_correct", "late_template")
Key = tuple[str, str | None]  # corruption and transcript: what has runs of its own


@dataclass(frozen=True)
class Clip:
    """One clip in one pair of runs, by label space and metric: mean recovery by map (`MAPS`) and layer, and the gap;
    and by label space and predict as well, whether it is kept."""

    maps: dict[tuple[bool, Metric], Float[np.ndarray, "map layer"]]
    gaps: dict[tuple[bool, Metric], float]
    is_kept: dict[tuple[bool, Metric, Predict], bool]


def traced(
    model: HookedLALM,
    samples: Sequence[Sample],
    attribute: Attribute,
    form: Form,
    choices: Choices,
    spaces: Sequence[bool],
    how: Mapping,
) -> tuple[dict[Key, list[Clip]], dict[object, str]]:
    """All clips in all pairs of runs; and why some pairs cannot be."""
    possible: dict[Key, Settings] = {}
    reasons: dict[object, str] = {}
    for transcript, corruption in product(choices.transcripts, choices.corruptions):
        settings = settings_of(model, attribute, form, corruption, transcript, spaces[0], how)
        key = name_of(corruption), settings.transcript.name if settings.transcript else None
        if not possible and not reasons:  # what is wrong with the clips themselves is no choice
            check(model, samples, replace(settings, corruption=Silence()))
        try:
            check(model, samples, settings)
        except LensError as error:
            reasons[key] = str(error)
            continue
        possible[key] = settings
    found: dict[Key, list[Clip]] = {key: [] for key in possible}
    recorded = Recorded(model)
    told = {"desc": f"tracing {attribute.name}", "unit": "clip", "disable": not how["progress"]}
    with tqdm(total=len(samples), **told) as bar:
        for start in range(0, len(samples), how["n_together"]):
            together, runs = samples[start : start + how["n_together"]], {}
            for key, its in patched(model, together, samples, possible, spaces, runs, recorded):
                found[key].append(clip_of(its, possible[key], choices, spaces, model))
            recorded.keep(())
            bar.update(len(together))
    return found, reasons


def settings_of(
    model: HookedLALM,
    attribute: Attribute,
    form: Form,
    corruption: Corruption,
    transcript: Reading | str | None,
    label_space: bool,
    how: Mapping,
) -> Settings:
    grid = Grid(kinds=("layer", "token"))
    read = read_of(model, transcript, None, False)
    how = {name: how[name] for name in ("engine", "token_budget", "n_together")}
    asked = {"attribute": attribute, "form": form, "grid": grid, "corruption": corruption, "label_space": label_space}
    usual = {"metric": "probability", "predict": "labels", "direction": "denoise"}
    return Settings(**asked, **usual, **how, search=None, transcript=read, voice_activity=False)


def name_of(corruption: Corruption) -> str:
    return {Silence: "silence", WhiteNoise: "noise", OtherClip: "clip"}[type(corruption)]


def patched(
    model: HookedLALM,
    together: Sequence[Sample],
    samples: Sequence[Sample],
    possible: Mapping[Key, Settings],
    spaces: Sequence[bool],
    runs: dict[tuple, Run],
    recorded: Recorded,
) -> Iterator[tuple[Key, tuple[Patched, Sample]]]:
    """Every patched run of some clips, in one plan: clean runs, and what is corrupted alike, are shared."""
    keys, cases = [], []
    for (key, settings), sample in product(possible.items(), together):
        _, _, case = case_of(model, sample, samples, settings, runs)
        keys.append((key, sample))
        cases.append(replace(case, cells=cells_of(case)))
    if not cases:
        return
    settings = next(iter(possible.values()))
    labels = [processor_of(model).label_tokens(settings.attribute.labels, space).values() for space in spaces]
    how = {"engine": settings.engine, "token_budget": settings.token_budget, "recorded": recorded}
    found = patch_all(model, cases, tokens=[token for its in labels for token in its], **how)
    for (key, sample), its in zip(keys, found, strict=True):
        yield key, (its, sample)


def cells_of(case: Case) -> list[Cell]:
    """Those of the blocks, and of each block all tokens of question and answer without the template's."""
    assert case.clean.prompt is not None
    blocks = [cell for cell in case.cells if cell.layer >= 0]
    question = tuple((case.clean.prompt.is_region(*QUESTION).nonzero()[:, 0] + case.clean.n_pad).tolist())
    return [*blocks, *(replace(cell, positions=question) for cell in blocks if cell.kind == "layer")]


def clip_of(
    its: tuple[Patched, Sample], settings: Settings, choices: Choices, spaces: Sequence[bool], model: HookedLALM
) -> Clip:
    runs, sample = its
    maps, gaps, is_kept = {}, {}, {}
    share = shares(runs.case)
    for space, metric in product(spaces, choices.metrics):
        answer = answer_of(processor_of(model), sample.label, replace(settings, label_space=space, metric=metric))
        recovery = runs.recovery(metric, answer)
        n_layers = model.decoder_cfg.n_layers
        grid, question = recovery.rate[:-n_layers], recovery.rate[-n_layers:]
        by_cell = torch.cat([grid.reshape(n_layers, -1), question[:, None]], dim=1)
        maps[space, metric] = share @ by_cell.T.double().numpy()
        gaps[space, metric] = recovery.m_clean - recovery.m_corrupted
        for predict in choices.predicts:
            right = (is_right(recovery.logits[name], answer, predict) for name in ("clean", "corrupted"))
            is_kept[space, metric, predict] = exclusions(recovery, *right)["status"] == "kept"
    return Clip(maps, gaps, is_kept)


def shares(case: Case) -> Float[np.ndarray, "map cell"]:
    """What each map is the mean of: cells of one layer, that of the question alone behind them. NaN for none."""
    assert case.clean.prompt is not None
    first = [cell for cell in case.cells if cell.layer == 0]
    rows = np.array([[is_in(name, cell, case.clean.prompt, case.clean.n_pad) for cell in first[:-1]] for name in MAPS])
    rows = np.column_stack([rows, np.array(MAPS) == "question"]).astype(float)
    with np.errstate(invalid="ignore"):
        return rows / rows.sum(1, keepdims=True)


def is_in(name: str, cell: Cell, prompt: Prompt, n_pad: int) -> bool:
    if cell.kind == "layer":
        return name == "text"
    position = prompt.positions[cell.positions[0] - n_pad]
    if name == "object_correct":
        return position.region == "object" and position.is_correct
    if name == "late_template":
        return position.segment == "late" or position.region == "template"
    return name in PLACES and position.segment == name


def trace_rows(
    clips: Mapping[Key, Sequence[Clip]], choices: Choices, reasons: Reasons, resampled: Mapping, progress: bool
) -> Iterator[dict]:
    """The claims about traces in every specification."""
    keys = [*clips, *(key for key in reasons if isinstance(key, tuple))]
    lists = (choices.templates, choices.label_spaces, choices.metrics, choices.predicts, choices.averages)
    combined = list(product(keys, *lists))
    for key, *chosen in tqdm(combined, desc="claims about traces", disable=not progress):
        names = ("corruption", "transcript", "template", "label_space", "metric", "predict", "average")
        about = dict(zip(names, (*key, *chosen), strict=True))
        reason = reasons.get(key) or reasons.get(about["label_space"])
        kept = None if reason else Kept.of(clips[key], about)
        for reads, objects, base in readings(choices):
            claims = [claim for claim in claims_of(reads) if is_asked(claim, objects, base, choices)]
            evidence = None if kept is None else kept.evidence(reads, objects or "all", base or 0)
            row = {**about, "object": objects, "layer_base": base}
            yield from rows_of(claims, evidence, row, reason or "no clip is kept", resampled)


def readings(choices: Choices) -> Iterator[tuple[Reads, Objects | None, int | None]]:
    """What claims about traces read, with the choices that only some of them depend on."""
    yield "text", None, None
    for base in choices.layer_bases:
        yield "text", None, base
    yield "places", None, None
    for objects in choices.objects:
        yield "places", objects, None


def is_asked(claim: Claim, objects: Objects | None, base: int | None, choices: Choices) -> bool:
    """Whether a claim depends on just the choices that are made."""
    return claim.counts_layers == (base is not None) and claim.name.startswith("object") == (objects is not None)


@dataclass(frozen=True)
class Kept:
    """The clips that a specification keeps."""

    maps: Float[np.ndarray, "sample map layer"]
    weights: Float[np.ndarray, " sample"]
    template: Template

    @classmethod
    def of(cls, clips: Sequence[Clip], about: Mapping) -> "Kept | None":
        read = about["label_space"], about["metric"]
        kept = [clip for clip in clips if clip.is_kept[*read, about["predict"]]]
        if not kept:
            return None
        gaps = np.array([clip.gaps[read] for clip in kept])
        weights = gaps if about["average"] == "ratio_of_means" else np.ones(len(kept))
        return cls(np.stack([clip.maps[read] for clip in kept]), weights, about["template"])

    def evidence(self, reads: Reads, objects: Objects, base: int) -> Evidence:
        is_text = self.template == "text"
        places = ("early", "object" if objects == "all" else "object_correct", "late_template" if is_text else "late")
        names = ("text" if is_text else "question",) if reads == "text" else (*places, "last")
        group = self.maps[:, [MAPS.index(name) for name in names]]
        return Evidence((group[:, 0] if reads == "text" else group,), (self.weights,), layer_base=base)
