"""Causal tracing of audio-text fusion (arXiv 2603.13768, section 3).

Three runs: *clean* hears the clip, *corrupted* hears something else of the same length (silence), *patched* is the
corrupted run with chosen states replaced by the clean run's. How much of the answer comes back is the recovery rate

    RR = (m_patched - m_corrupted) / (m_clean - m_corrupted)

with m the probability of the true label's first token at the last position, over the whole vocabulary, or another
metric of `lalm_lens.metrics`. 0 is no recovery, 1 is full; values outside [0, 1] are real and kept. In the other
direction, `noise`, clean and corrupted change places: what is then found is how much of the answer a patch destroys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import pandas as pd
from tqdm import tqdm

from lalm_lens.attributes import Attribute, Form, attribute_named
from lalm_lens.audio import Waveform, check_sounding
from lalm_lens.corrupt import Corrupted, Corruption, Silence
from lalm_lens.datasets import Sample, seen
from lalm_lens.engine.plan import Engine
from lalm_lens.engine.recorded import Recorded
from lalm_lens.errors import AudioError, InputError
from lalm_lens.experiments.asked import both_prompts, check_asked, processor_of, question_columns, read_of
from lalm_lens.experiments.cells import Cell, Grid, cells, len_prompt
from lalm_lens.experiments.moment import Search, find_moments
from lalm_lens.experiments.recovery import Case, Direction, Recovery, recover
from lalm_lens.interventions import BlockSite
from lalm_lens.metrics import Answer, Metric, Predict, is_right
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import Processor, Prompt
from lalm_lens.results import EMBED_LAYER, CausalTrace, GridKind
from lalm_lens.runs import Run
from lalm_lens.shapes import typed
from lalm_lens.transcripts import Own, Reading, Side

Audio = Literal["whole", "windows", "coarse-to-fine"]
Traced = tuple[Sample, str, Case]  # what is traced, what the corrupted run hears, how


@dataclass(frozen=True)
class Settings:
    """What is asked, what is patched and what is read: the same for all clips."""

    attribute: Attribute
    form: Form
    grid: Grid
    corruption: Corruption
    metric: Metric
    predict: Predict
    direction: Direction
    label_space: bool
    engine: Engine
    token_budget: int | None
    n_together: int
    search: Search | None
    transcript: Reading | None  # of a model whose prompt holds one
    voice_activity: bool

    @property
    def how(self) -> dict:
        names = ("metric", "direction", "engine", "token_budget")
        return {name: getattr(self, name) for name in names}


@typed
def causal_trace(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    form: Form = "P3",
    site: BlockSite = "resid_post",
    corruption: Corruption = Silence(),  # noqa: B008  it is frozen
    metric: Metric = "probability",
    predict: Predict = "labels",
    direction: Direction = "denoise",
    label_space: bool = True,
    kinds: Sequence[GridKind] | None = None,
    audio: Audio | Search = "whole",
    window_s: float | int = 1.0,
    n_neurons: int = 128,
    engine: Engine = "auto",
    token_budget: int | None = None,
    n_together: int = 8,
    transcript: Reading | str | None = None,
    transcript_is: Side | None = None,
    voice_activity: bool = False,
    progress: bool = True,
) -> CausalTrace:
    """Trace when and where the model fuses each clip with the question (sections 3.2, 3.3).

    Layer-wise: the states of all text positions of one layer (kind `layer`), and of all audio positions (kind
    `audio_layer`); token-wise: one text position after the audio (kind `token`); `kinds` may ask for windows of
    `window_s` seconds as well, of the audio positions (`audio_window`) or in the encoder's blocks (`encoder_window`).
    `audio="windows"` adds the former; "coarse-to-fine", or a `Search`, looks for the moment that decided, by windows of
    the audio embeddings that are halved where the effect is, to one position (kind `moment`): with `kinds=()` for that
    alone.
    `site` is the state that is patched, in every block, and for the residual stream the merged embedding beside it; at
    `q k v z pattern` it is one head's, at `post` that of `n_neurons` neurons. `engine` and `token_budget` are those of
    `Plan`; `n_together` clips go through the model in one sweep and share what they have in common, as silence of the
    same length. A sample is `kept` unless the clean run is wrong, the corrupted run is right, or its metric is not
    below the clean one (section 3.1); what is not kept is traced as well and keeps its rows. A prediction is the
    largest logit among the labels' first tokens, or with `predict="vocab"` in the whole vocabulary.
    Where the prompt holds a transcript of the clip (DeSTA), both runs read a "filler" of its length, or `transcript` is
    "clean", "placeholder", "own", any other text, or one of `lalm_lens.transcripts`. It counts as audio, or with
    `transcript_is="text"` as text. A sample's own transcript comes before Whisper's; with `voice_activity` a clip
    without speech says nothing. Under "own" the runs differ in length, and no state of a transcript can be patched: by
    default there is no `audio_layer`.

    Raises `PromptError` for a prompt without a needed part, for labels that cannot be told apart or are not the
    attribute's and for a transcript where the model reads none, `AudioError` for a clip that the model cannot hear,
    `DataError` for a clip that comes twice or has no other clip to be corrupted by, `InputError` if a run is not finite
    or a transcript of another length would be patched.
    """
    attribute = attribute_named(attribute) if isinstance(attribute, str) else attribute
    read = read_of(model, transcript, transcript_is, voice_activity)
    grid = Grid(site, None if kinds is None else tuple(kinds), float(window_s), n_neurons, transcript_is or "audio")
    if kinds is None and isinstance(read, Own):
        grid = replace(grid, kinds=tuple(kind for kind in grid.chosen if kind != "audio_layer"))
    if audio == "windows":
        grid = replace(grid, kinds=(*grid.chosen, "audio_window"))
    search = Search(float(window_s)) if audio == "coarse-to-fine" else audio if isinstance(audio, Search) else None
    rest = (corruption, metric, predict, direction, label_space, engine, token_budget, n_together, search)
    settings = Settings(attribute, form, grid, *rest, read, voice_activity)
    check(model, samples, settings)
    frames, recorded = [], Recorded(model)
    with tqdm(total=len(samples), desc=f"tracing {attribute.name}", unit="clip", disable=not progress) as bar:
        for together in chunks(model, samples, settings):
            frames += frames_of(model, together, settings, recorded, progress)
            recorded.keep(case.corrupted for _, _, case in together)
            bar.update(len(together))
    return CausalTrace.concat(frames)


def frames_of(
    model: HookedLALM, together: Sequence[Traced], settings: Settings, recorded: Recorded, progress: bool
) -> Iterator[pd.DataFrame]:
    """One table for each map, and one for each search."""
    cases = [case for _, _, case in together]
    maps, moments = [], []
    if settings.grid.chosen:
        maps = recover(model, cases, **settings.how, recorded=recorded, progress=progress)
    if settings.search is not None:
        moments = find_moments(model, cases, settings.search, **settings.how, recorded=recorded, progress=progress)
    for n, its in enumerate(together):
        yield from (frame_of(model, *its, found[n], settings) for found in (maps, moments) if found)


def check(model: HookedLALM, samples: Sequence[Sample], settings: Settings) -> None:
    """Everything that can be known to be wrong before the long work begins."""
    check_asked(model, samples, settings.attribute, [settings.label_space])
    if not settings.grid.chosen and settings.search is None:
        raise InputError('Nothing is traced: name kinds, or look for a moment with audio="coarse-to-fine".')
    if settings.n_together < 1:
        raise InputError(f"n_together is a number of clips, 1 or more; got {settings.n_together}.")
    processor = processor_of(model)
    for sample in samples:
        refuse_unheard(sample)
        heard = settings.corruption.of(sample, samples)
        refuse_unaligned(sample, *prompts_of(processor, sample, heard, settings), settings.grid)


def refuse_unaligned(sample: Sample, clean: Prompt, corrupted: Prompt, grid: Grid) -> None:
    """A state of the transcript has no counterpart in a transcript of another length."""
    if len(clean) != len(corrupted) and grid.of_transcript:
        lengths = [int(prompt.is_region("transcript").sum()) for prompt in (clean, corrupted)]
        raise InputError(
            f"The transcript of {sample.name} has {lengths[0]} tokens in the clean run and {lengths[1]} in the "
            "corrupted one, so a state of the one has no place in the other: "
            f"{', '.join(grid.of_transcript)} at {grid.site} cannot be patched. Leave them out of the kinds, or let "
            "both runs read the same transcript."
        )


def refuse_unheard(sample: Sample) -> None:
    if not sample.is_heard:
        raise AudioError(f"{sample.name} has no clip that could be corrupted. Leave it out.")
    check_sounding(sample.waveform, sample.name)


def prompts_of(processor: Processor, sample: Sample, heard: Corrupted, settings: Settings) -> tuple[Prompt, Prompt]:
    """Of the clean and the corrupted run."""
    asked = settings.attribute, settings.form, settings.transcript, settings.voice_activity
    return both_prompts(processor, sample, heard, *asked)


def answer_of(processor: Processor, label: str, settings: Settings) -> Answer:
    first = processor.label_tokens(settings.attribute.labels, settings.label_space)
    others = tuple(token for other, token in first.items() if other != label)
    whole = processor.answer_tokens(label, settings.label_space)
    return Answer(whole if settings.metric == "label_score" else whole[:1], others)


def chunks(model: HookedLALM, samples: Sequence[Sample], settings: Settings) -> Iterator[list[Traced]]:
    """Some samples at a time. Those whose answers are read at more tokens than others' go by themselves."""
    runs: dict[tuple, Run] = {}
    for start in range(0, len(samples), settings.n_together):
        traced = [
            case_of(model, sample, samples, settings, runs) for sample in samples[start : start + settings.n_together]
        ]
        for _, alike in groupby(traced, lambda its: len(its[2].answer.tokens)):
            yield list(alike)
        last = {case.corrupted for _, _, case in traced}
        runs = {key: run for key, run in runs.items() if run in last}


def case_of(
    model: HookedLALM, sample: Sample, samples: Sequence[Sample], settings: Settings, runs: dict[tuple, Run]
) -> Traced:
    processor = processor_of(model)
    heard, answer = settings.corruption.of(sample, samples), answer_of(processor, sample.label, settings)
    prompts = prompts_of(processor, sample, heard, settings)
    forced, of_corrupted = (processor.begun(prompt, answer.tokens[:-1]) for prompt in prompts)

    def run_of(key: tuple, prompt: Prompt, waveform: Waveform) -> Run:
        if key not in runs:
            runs[key] = Run(processor.inputs([prompt], [waveform], **seen([sample])), prompt)
        return runs[key]

    clean = run_of((sample.name, forced.tokens), forced, sample.waveform)  # marked by its own label: no other's
    pictures = sample.name if sample.is_seen else None
    silence = (of_corrupted.tokens, heard.waveform.numpy().tobytes(), pictures)  # of one length is one run for all
    corrupted = run_of(silence, of_corrupted, heard.waveform)
    return sample, heard.name, Case(clean, corrupted, answer, cells(model, settings.grid, clean))


def frame_of(
    model: HookedLALM, sample: Sample, heard: str, case: Case, recovery: Recovery, settings: Settings
) -> pd.DataFrame:
    """One row per patched run."""
    assert case.clean.prompt is not None
    is_right_in = {name: is_right(its, case.answer, settings.predict) for name, its in recovery.logits.items()}
    about = {
        **question_columns(model, sample, settings.attribute, settings.form, settings.label_space),
        "seed": getattr(settings.corruption, "seed", None),
        "corruption": heard,
        **transcript_columns(settings),
        "metric": settings.metric,
        "predict": settings.predict,
        "direction": settings.direction,
        "engine": recovery.engine,
        **exclusions(recovery, is_right_in["clean"], is_right_in["corrupted"]),
        **{name: getattr(recovery, name) for name in ("p_clean", "p_corrupted", "m_clean", "m_corrupted", "noise")},
    }
    return pd.DataFrame([{**about, **row} for row in rows_of(recovery, case.clean.prompt, len_prompt(case.clean))])


def transcript_columns(settings: Settings) -> dict[str, str | bool]:
    if settings.transcript is None:
        return {}
    return {
        "transcript": settings.transcript.name,
        "transcript_is": settings.grid.transcript_is,
        "voice_activity": settings.voice_activity,
    }


def exclusions(recovery: Recovery, clean_right: bool, corrupted_right: bool) -> dict[str, bool | str]:
    """The paper's exclusions, and the first that applies (section 3.1)."""
    against = {
        "clean_wrong": not clean_right,
        "corrupted_right": corrupted_right,
        "no_gap": recovery.m_clean <= recovery.m_corrupted,
    }
    status = next((reason for reason, applies in against.items() if applies), "kept")
    return {
        "status": status,
        "clean_right": clean_right,
        "corrupted_right": corrupted_right,
        "has_gap": not against["no_gap"],
    }


def rows_of(recovery: Recovery, prompt: Prompt, n_pos: int) -> Iterator[dict]:
    numbers = zip(recovery.p_patched.tolist(), recovery.m_patched.tolist(), recovery.rate.tolist(), strict=True)
    for cell, (p_patched, m_patched, rate) in zip(recovery.cells, numbers, strict=True):
        yield {
            "kind": cell.kind,
            "site": "embed" if cell.layer == EMBED_LAYER else cell.site,
            "layer": cell.layer,
            "is_correct": False,
            **unit_columns(cell),
            **(token_columns(prompt, cell.positions[0], n_pos) if cell.kind == "token" else {}),
            "p_patched": p_patched,
            "m_patched": m_patched,
            "recovery": rate,
        }


def unit_columns(cell: Cell) -> dict:
    """What of the state is patched, and the stretch of the clip it holds."""
    start_s, end_s = cell.span_s or (None, None)
    neurons = None if cell.neurons is None else f"{cell.neurons[0]}-{cell.neurons[-1]}"
    return {
        "head": None if cell.heads is None else cell.heads[0],
        "neurons": neurons,
        "start_s": start_s,
        "end_s": end_s,
    }


def token_columns(prompt: Prompt, pos: int, n_pos: int) -> dict:
    position = prompt.positions[pos]
    return {
        "position": pos,
        "text_index": pos - n_pos,
        "token": position.token,
        "region": position.region,
        "segment": position.segment,
        "option": position.label,
        "is_correct": position.is_correct,
    }
