"""Causal tracing of audio-text fusion (arXiv 2603.13768, section 3).

Three runs: *clean* hears the clip, *corrupted* hears something else of the same length (silence), *patched* is the
corrupted run with chosen states replaced by the clean run's. How much of the answer comes back is the recovery rate

    RR = (m_patched - m_corrupted) / (m_clean - m_corrupted)

with m the probability of the true label's first token at the last position, over the whole vocabulary, or another
metric of `lalm_lens.metrics`. 0 is no recovery, 1 is full; values outside [0, 1] are real and kept. In the other
direction, `noise`, clean and corrupted change places: what is then found is how much of the answer a patch destroys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
from tqdm import tqdm

from lalm_lens.attributes import Attribute, Form, attribute_named
from lalm_lens.audio import check_audible
from lalm_lens.corrupt import Corruption, Silence
from lalm_lens.datasets import Sample, refuse_repeated
from lalm_lens.errors import AudioError, HookError, InputError, PromptError
from lalm_lens.experiments.patching import Site, run
from lalm_lens.experiments.recovery import Direction, Recovery, recover
from lalm_lens.metrics import Answer, Metric, Predict, is_right
from lalm_lens.model import HookedLALM
from lalm_lens.pieces import user_pieces
from lalm_lens.prompts import Processor, Prompt
from lalm_lens.results import EMBED_LAYER, CausalTrace
from lalm_lens.shapes import typed


@dataclass(frozen=True)
class Plan:
    """What is asked, what is patched and what is read: the same for all clips."""

    attribute: Attribute
    form: Form
    site: Site
    corruption: Corruption
    metric: Metric
    predict: Predict
    direction: Direction
    label_space: bool
    batch_size: int


@typed
def causal_trace(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    form: Form = "P3",
    site: Site = "resid_post",
    corruption: Corruption = Silence(),  # noqa: B008  it is frozen
    metric: Metric = "probability",
    predict: Predict = "labels",
    direction: Direction = "denoise",
    label_space: bool = True,
    batch_size: int = 32,
    progress: bool = True,
) -> CausalTrace:
    """Trace when and where the model fuses each clip with the question (sections 3.2, 3.3).

    Layer-wise: the states of all text positions of one layer (kind `layer`), and of all audio positions (kind
    `audio_layer`); token-wise: one text position after the audio (kind `token`). `site` is the state that is patched,
    in every block, and for the residual stream the merged embedding beside it. `batch_size` patched runs share a
    forward. A sample is `kept` unless the clean run is wrong, the corrupted run is right, or its metric is not below
    the clean one (section 3.1); what is not kept is traced as well and keeps its rows. A prediction is the largest
    logit among the labels' first tokens, or with `predict="vocab"` in the whole vocabulary.

    Raises `PromptError` for a prompt without a needed part and for labels that cannot be told apart or are not the
    attribute's, `AudioError` for a clip that the model cannot hear, `DataError` for a clip that comes twice or has no
    other clip to be corrupted by, `InputError` if a run is not finite.
    """
    attribute = attribute_named(attribute) if isinstance(attribute, str) else attribute
    plan = Plan(attribute, form, site, corruption, metric, predict, direction, label_space, batch_size)
    check(model, samples, plan)
    with tqdm(samples, desc=f"tracing {attribute.name}", unit="clip", disable=not progress) as bar:
        frames = [trace_sample(model, sample, samples, plan) for sample in bar]
    return CausalTrace.concat(frames)


def check(model: HookedLALM, samples: Sequence[Sample], plan: Plan) -> None:
    """Everything that can be known to be wrong before the long work begins."""
    refuse_foreign_hooks(model)
    refuse_repeated(samples)
    if plan.batch_size < 1:
        raise InputError(f"batch_size is a number of patched runs, 1 or more; got {plan.batch_size}.")
    processor, labels = processor_of(model), plan.attribute.labels
    if len(labels) < 2:
        raise PromptError(f"An answer is right or wrong among two labels or more; got {list(labels)}.")
    processor.label_tokens(labels, plan.label_space)
    for sample in samples:
        check_audible(sample.waveform, processor.hf.feature_extractor, sample.name)
        if not sample.waveform.any():
            raise AudioError(f"{sample.name} is digital silence, so there is nothing to hear in it. Leave it out.")
        if sample.label not in labels:
            raise PromptError(
                f"{sample.name} is labelled {sample.label!r}, which is not an option of {plan.attribute.name}: "
                f"{', '.join(labels)}."
            )
        prompt_of(processor, sample, plan)
        plan.corruption.of(sample, samples)


def refuse_foreign_hooks(model: HookedLALM) -> None:
    attached = model.list_hooks()
    if attached:
        raise HookError(
            f"A hook on {min(attached)} would be part of every run. `model.reset_hooks(including_permanent=True)` "
            "removes it."
        )


def processor_of(model: HookedLALM) -> Processor:
    if model.processor is None:
        raise InputError(
            "This checkpoint came without tokenizer and feature extractor, so no prompt can be made: save the "
            "processor of the model into the same folder."
        )
    return model.processor


def prompt_of(processor: Processor, sample: Sample, plan: Plan) -> Prompt:
    return processor.prompt(plan.attribute, processor.n_frames(sample.waveform), plan.form, answer=sample.label)


def answer_of(processor: Processor, label: str, plan: Plan) -> Answer:
    first = processor.label_tokens(plan.attribute.labels, plan.label_space)
    others = tuple(token for other, token in first.items() if other != label)
    whole = processor.answer_tokens(label, plan.label_space)
    return Answer(whole if plan.metric == "label_score" else whole[:1], others)


def trace_sample(model: HookedLALM, sample: Sample, samples: Sequence[Sample], plan: Plan) -> pd.DataFrame:
    processor = processor_of(model)
    prompt, answer = prompt_of(processor, sample, plan), answer_of(processor, sample.label, plan)
    corrupted_clip = plan.corruption.of(sample, samples)
    forced = processor.begun(prompt, answer.tokens[:-1])
    clean, corrupted = (
        run(model, processor.inputs([forced], [waveform]), plan.site, n_read=len(answer.tokens))
        for waveform in (sample.waveform, corrupted_clip.waveform)
    )
    recovery = recover(
        model,
        clean,
        corrupted,
        prompt.is_region("audio"),
        answer,
        metric=plan.metric,
        site=plan.site,
        direction=plan.direction,
        batch_size=plan.batch_size,
    )
    about = {
        "model": model.cfg.model_name,
        "attribute": plan.attribute.name,
        "sample": sample.name,
        "label": sample.label,
        "form": plan.form,
        "question": said_by_user(plan.attribute, plan.form),
        "labels": ", ".join(plan.attribute.labels),
        "prefix": plan.attribute.prefix,
        "seed": getattr(plan.corruption, "seed", None),
        "label_space": plan.label_space,
        "corruption": corrupted_clip.name,
        "metric": plan.metric,
        "predict": plan.predict,
        "direction": plan.direction,
        **exclusions(recovery, *(is_right(each.logits[0], answer, plan.predict) for each in (clean, corrupted))),
        **{name: getattr(recovery, name) for name in ("p_clean", "p_corrupted", "m_clean", "m_corrupted", "noise")},
    }
    return pd.DataFrame([{**about, **row} for row in rows_of(recovery, prompt, plan.site)])


def said_by_user(attribute: Attribute, form: Form) -> str:
    return "".join(piece.text for piece in user_pieces(attribute, form, attribute.labels))


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


def rows_of(recovery: Recovery, prompt: Prompt, site: Site) -> Iterator[dict]:
    """One row per patch."""
    numbers = zip(recovery.p_patched.tolist(), recovery.m_patched.tolist(), recovery.rate.tolist(), strict=True)
    for patch, (p_patched, m_patched, rate) in zip(recovery.patches, numbers, strict=True):
        yield {
            "kind": patch.kind,
            "site": "embed" if patch.layer == EMBED_LAYER else site,
            "layer": patch.layer,
            "is_correct": False,
            **(token_columns(prompt, int(patch.where.nonzero())) if patch.kind == "token" else {}),
            "p_patched": p_patched,
            "m_patched": m_patched,
            "recovery": rate,
        }


def token_columns(prompt: Prompt, pos: int) -> dict:
    position = prompt.positions[pos]
    return {
        "position": pos,
        "text_index": pos - len(prompt),
        "token": position.token,
        "region": position.region,
        "segment": position.segment,
        "option": position.label,
        "is_correct": position.is_correct,
    }
