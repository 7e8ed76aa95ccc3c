"""The specification curve: do published claims survive the choices that the papers leave open?

Every combination of choices is a specification; in each, every claim of `lalm_lens.experiments.claims` that traces and
scores of one model and one attribute can decide is measured (after Simonsohn, Simmons and Nelson 2020,
doi 10.1038/s41562-020-0912-z). Choices that only read what was run, as the metric, do not run the model again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from tqdm import tqdm

from lalm_lens.attributes import Attribute, Form, attribute_named
from lalm_lens.corrupt import Corruption, OtherClip, Silence, WhiteNoise
from lalm_lens.datasets import Sample
from lalm_lens.engine.plan import Engine
from lalm_lens.engine.recorded import Recorded
from lalm_lens.errors import DataError, InputError, LensError, PromptError
from lalm_lens.experiments.asked import processor_of, read_of
from lalm_lens.experiments.audiolens import deafness
from lalm_lens.experiments.causal_trace import Settings, answer_of, case_of, check, exclusions
from lalm_lens.experiments.cells import Cell, Grid
from lalm_lens.experiments.claims import CLAIMS, PLACES, QUANTITIES, Claim, Evidence, Quantity, Reads
from lalm_lens.experiments.evidence import Measured, NotMeasured, evidence_for
from lalm_lens.experiments.information_score import InformationScore, information_score
from lalm_lens.experiments.recovery import Case, Patched, patch_all
from lalm_lens.metrics import Metric, Predict, is_right
from lalm_lens.model import HookedLALM
from lalm_lens.pieces import Region
from lalm_lens.prompts import Prompt
from lalm_lens.results import plots_module
from lalm_lens.runs import Run
from lalm_lens.shapes import typed
from lalm_lens.tables import Table
from lalm_lens.transcripts import Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Average = Literal["mean", "ratio_of_means"]
Template = Literal["text", "no text"]  # what tokens of the chat template behind the audio are
Objects = Literal["all", "correct"]  # whose option tokens are the object
QUESTION: tuple[Region, ...] = ("early", "object", "object_sep", "late", "attribute", "last")
MAPS = ("text", "question", *PLACES, "object_correct", "late_template")
TRACE_CHOICES = (
    "corruption",
    "transcript",
    "template",
    "label_space",
    "metric",
    "predict",
    "average",
    "object",
    "layer_base",
)
SCORE_CHOICES = ("norm", "label_space", "layer_base")
CHOICES = tuple(dict.fromkeys((*TRACE_CHOICES, *SCORE_CHOICES)))


@dataclass(frozen=True, repr=False)
class Specification(Table):
    """One row for each specification and claim. A column of a choice that a claim does not depend on is empty."""

    NAME: ClassVar[str] = "a specification curve"
    COLUMNS: ClassVar[dict[str, str]] = {
        "model": "str",
        "attribute": "str",
        "form": "str",  # of the prompts that are traced
        "claim": "str",  # the name of its measure
        "words": "str",
        "source": "str",
        "condition": "str",  # on which side of which bound it holds; none of a number without a claim
        "corruption": "str",  # silence, noise, clip
        "transcript": "str",  # what both runs read of a clip, where the prompt holds it
        "template": "str",  # what tokens of the chat template are: text, no text
        "label_space": "boolean",  # labels are scored with or without the space before them
        "metric": "str",
        "predict": "str",
        "average": "str",  # over clips: mean of rates, or ratio of mean differences
        "object": "str",  # option tokens: all, or of the correct one
        "layer_base": "Int64",  # number of the first layer
        "norm": "boolean",  # whether the lens applies the final norm
        "effect": "float64",  # the measure
        "low": "float64",  # 95 % bootstrap over clips
        "high": "float64",
        "n": "Int64",  # clips
        "holds": "boolean",
        "reason": "str",  # why it was not measured
    }

    def survival(self) -> pd.DataFrame:
        """Of each claim: in how many specifications it was measured and holds, and how far its effects spread."""
        groups = self.frame.groupby(["model", "attribute", "claim"], sort=False)
        return pd.DataFrame(
            {
                "attribute": attribute,
                "claim": claim,
                "condition": rows.condition.iloc[0],
                "specifications": len(rows),
                "measured": int(rows.effect.notna().sum()),
                "holds": int(rows.holds.sum()) if rows.condition.notna().any() else pd.NA,
                "smallest": rows.effect.min(),
                "median": rows.effect.median(),
                "largest": rows.effect.max(),
            }
            for (_, attribute, claim), rows in groups
        ).astype({"holds": "Int64"})

    def reasons(self) -> pd.DataFrame:
        """Why specifications were not measured, and how many rows that are."""
        missing = self.frame.dropna(subset="reason")
        return missing.groupby("reason", sort=False).size().rename("rows").reset_index()

    def overview(self) -> pd.DataFrame:
        return self.survival().drop(columns="attribute")

    def plot(self, claims: Sequence[str] | None = None) -> "Figure":
        """The curve of each claim: effects in order with their intervals and the claim's bound, and beneath them which
        choices each specification has made. Raises `DataError` for several models or attributes in one table, for
        claims that it does not have or has not measured, and without matplotlib."""
        self.refuse_mixed(("model", "attribute"))
        there = list(dict.fromkeys(self.frame.dropna(subset="effect").claim))
        if unknown := [name for name in claims or () if name not in there]:
            raise DataError(f"The table has no effect of {unknown[0]}, only of {', '.join(there)}.")
        if not there:
            raise DataError(f"Nothing was measured: {'; '.join(self.reasons().reason)}.")
        rows = self.frame[self.frame.claim.isin(there if claims is None else list(claims))]
        return plots_module("specification_plots").specification_curves(rows, CHOICES)

    def __repr__(self) -> str:
        frame, shown = self.frame, self.survival().drop(columns="attribute")
        table = shown.to_string(index=False, float_format="{:.3f}".format, na_rep="-")
        return f"Specification({frame.model.iloc[0]}, {', '.join(frame.attribute.unique())})\n{table}"


@dataclass(frozen=True)
class Choices:
    """What the papers leave open."""

    corruptions: tuple[Corruption, ...]
    transcripts: tuple[Reading | str | None, ...]
    templates: tuple[Template, ...]
    label_spaces: tuple[bool, ...]
    metrics: tuple[Metric, ...]
    predicts: tuple[Predict, ...]
    averages: tuple[Average, ...]
    objects: tuple[Objects, ...]
    layer_bases: tuple[int, ...]
    norms: tuple[bool, ...]

    def check(self) -> None:
        for name, chosen in vars(self).items():
            if not chosen:
                raise InputError(f"No specification is left: name at least one of {name}.")
        if "label_score" in self.metrics:
            raise InputError("A specification reads labels by their first tokens: leave out the metric label_score.")


@typed
def specification_curve(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    form: Form = "P3",
    corruptions: Sequence[Corruption] = (Silence(), WhiteNoise(), OtherClip()),
    transcripts: Sequence[Reading | str] | None = None,
    templates: Sequence[Template] = ("text", "no text"),
    label_spaces: Sequence[bool] = (True, False),
    metrics: Sequence[Metric] = ("probability", "logit_difference"),
    predicts: Sequence[Predict] = ("labels", "vocab"),
    averages: Sequence[Average] = ("mean", "ratio_of_means"),
    objects: Sequence[Objects] = ("all", "correct"),
    layer_bases: Sequence[int] = (0, 1),
    norms: Sequence[bool] = (True, False),
    engine: Engine = "auto",
    token_budget: int | None = None,
    n_together: int = 4,
    n_resamples: int = 200,
    seed: int = 0,
    progress: bool = True,
) -> Specification:
    """Measure the claims of causal tracing and AudioLens about these clips under every combination of choices.

    The model runs for each corruption, transcript (of models that read one; by default filler, clean, placeholder and
    own) and norm; tokens of the template are patched once more as text that is left out. All other choices read these
    runs again. Intervals are bootstraps over clips, the same resamples in all specifications of one number of clips.
    A choice that cannot be made about these clips, as labels that begin alike without a space, or a claim for which no
    clip is left, is a row with a `reason`.

    Raises what `causal_trace` and `information_score` raise for the clips and the question themselves.
    """
    attribute = attribute_named(attribute) if isinstance(attribute, str) else attribute
    chosen: Sequence[Reading | str | None] = transcripts or (None,)
    if transcripts is None and processor_of(model).template.has_transcript:
        chosen = ("filler", "clean", "placeholder", "own")
    choices = Choices(
        tuple(corruptions),
        tuple(chosen),
        tuple(templates),
        tuple(label_spaces),
        tuple(metrics),
        tuple(predicts),
        tuple(averages),
        tuple(objects),
        tuple(layer_bases),
        tuple(norms),
    )
    choices.check()
    spaces, unresolved = resolvable(model, attribute, choices.label_spaces)
    how = {"engine": engine, "token_budget": token_budget, "n_together": n_together, "progress": progress}
    clips, impossible = traced(model, samples, attribute, form, choices, spaces, how)
    tables = scored(model, samples, attribute, spaces, choices.norms, token_budget, progress)
    resampled = {"n_resamples": n_resamples, "seed": seed}
    rows = trace_rows(clips, choices, {**impossible, **unresolved}, resampled, progress)
    found = [{**row, "form": form} for row in rows]
    found += score_rows(tables, attribute, choices, unresolved, resampled)
    about = {"model": model.cfg.model_name, "attribute": attribute.name}
    return Specification.concat([pd.DataFrame(found).assign(**about)])


Reasons = Mapping[object, str]  # why a choice cannot be made


def resolvable(
    model: HookedLALM, attribute: Attribute, label_spaces: Sequence[bool]
) -> tuple[list[bool], dict[object, str]]:
    """The label spaces in which first tokens tell the labels apart, and why the others do not. Raises `PromptError` if
    there is none."""
    reasons: dict[object, str] = {}
    for space in label_spaces:
        try:
            processor_of(model).label_tokens(attribute.labels, space)
        except PromptError as error:
            reasons[space] = str(error)
            if len(reasons) == len(label_spaces):
                raise
    return [space for space in label_spaces if space not in reasons], reasons


# --- traces -------------------------------------------------------------------------------------------------------

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


def claims_of(reads: Reads) -> list[Claim]:
    return [claim for claim in CLAIMS.values() if claim.reads == reads]


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


# --- scores -------------------------------------------------------------------------------------------------------


def scored(
    model: HookedLALM,
    samples: Sequence[Sample],
    attribute: Attribute,
    spaces: Sequence[bool],
    norms: Sequence[bool],
    token_budget: int | None,
    progress: bool,
) -> dict[bool, Measured]:
    """Information scores with and without the final norm, and with the audio out of sight."""
    found = {}
    for norm in norms:
        how = {"attribute": attribute, "label_spaces": tuple(spaces), "norm": norm, "token_budget": token_budget}
        whole = information_score(model, samples, **how, progress=progress)
        without = information_score(model, samples, **how, forms=("P3",), knockouts=deafness(model), progress=progress)
        frame = pd.concat([whole.frame, without.frame], ignore_index=True)
        found[norm] = Measured(model.cfg.model_name, {InformationScore: frame}, norm)
    return found


def score_rows(
    tables: Mapping[bool, Measured], attribute: Attribute, choices: Choices, reasons: Reasons, resampled: Mapping
) -> Iterator[dict]:
    """The claims about scores, and the numbers themselves, in every specification."""
    numbers = [its for its in QUANTITIES.values() if its.reads == "scores"]
    for norm, space in product(choices.norms, choices.label_spaces):
        row = {"norm": norm, "label_space": space}
        for base in choices.layer_bases:
            counted = [its for its in numbers if its.name == "critical_layer"]
            yield from score_row(
                "scores", counted, tables[norm], attribute, {**row, "layer_base": base}, reasons, resampled
            )
        others = [its for its in numbers if its.name != "critical_layer"]
        yield from score_row("scores", others, tables[norm], attribute, row, reasons, resampled)
        for reads in ("scores", "positions", "masked", "right", "wrong"):
            yield from score_row(reads, claims_of(reads), tables[norm], attribute, row, reasons, resampled)


def score_row(
    reads: Reads,
    subjects: Sequence[Claim | Quantity],
    table: Measured,
    attribute: Attribute,
    row: Mapping,
    reasons: Reasons,
    resampled: Mapping,
) -> Iterator[dict]:
    evidence, reason = None, reasons.get(row["label_space"], "")
    if not reason:
        try:
            evidence = evidence_for(reads, table, attribute.name, row["label_space"], row.get("layer_base"), {})
        except NotMeasured as error:
            reason = str(error)
    yield from rows_of(subjects, evidence, row, reason, resampled)


def rows_of(
    subjects: Sequence[Claim | Quantity], evidence: Evidence | None, row: Mapping, reason: str, resampled: Mapping
) -> Iterator[dict]:
    if not subjects:
        return
    found = [None] * len(subjects)
    if evidence is not None:
        found = evidence.find_all([its.measure for its in subjects], **resampled)
    for subject, finding in zip(subjects, found, strict=True):
        its = {**row, "claim": subject.name}
        if isinstance(subject, Claim):
            its |= {"words": subject.words, "source": subject.source, "condition": subject.condition}
        if finding is None:
            yield {**its, "reason": reason}
        elif not np.isfinite(finding.measured):
            yield {**its, "n": finding.n, "reason": "undefined on these clips"}
        else:
            holds = subject.holds(finding.measured) if isinstance(subject, Claim) else None
            numbers = {"effect": finding.measured, "low": finding.low, "high": finding.high, "n": finding.n}
            yield {**its, **numbers, "holds": holds}
