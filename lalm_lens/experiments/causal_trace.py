"""Causal tracing of audio-text fusion (arXiv 2603.13768, section 3).

Three runs: *clean* hears the clip, *corrupted* hears silence of the same length, *patched* is the corrupted run with
chosen states replaced by the clean run's. How much of the answer comes back is the recovery rate

    RR = (p_patched - p_corrupted) / (p_clean - p_corrupted)

with p the probability of the true label's token at the last position, over the whole vocabulary. 0 is no recovery,
1 is full; values outside [0, 1] are real and kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

from lalm_lens.attributes import Attribute, attribute_named
from lalm_lens.audio import check_audible
from lalm_lens.corrupt import silence
from lalm_lens.datasets import Sample, refuse_repeated
from lalm_lens.errors import AudioError, HookError, InputError, PromptError
from lalm_lens.inputs import Inputs
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import Processor, Prompt
from lalm_lens.results import EMBED_LAYER, CausalTrace, Kind, Status
from lalm_lens.shapes import typed

Site = Literal["resid_post"]


@dataclass(frozen=True)
class Patch:
    """One patched run: where clean states go into the corrupted run. `layer` -1 is the merged embedding."""

    kind: Kind
    layer: int
    where: Bool[Tensor, " pos"]


@dataclass(frozen=True)
class Run:
    """An unpatched run of one prompt: what went in, the states along the way, what came out at the last position."""

    embed: Float[Tensor, "1 pos d_model"]
    cache: ActivationCache
    logits: Float[Tensor, " d_vocab"]


@dataclass(frozen=True)
class Recovery:
    """The numbers of one example: `p_patched` belongs to `patches`, one to one."""

    p_clean: float
    p_corrupted: float
    patches: list[Patch]
    p_patched: Float[Tensor, " patch"]


@typed
def causal_trace(
    model: HookedLALM,
    samples: Sequence[Sample],
    *,
    attribute: str | Attribute,
    site: Site = "resid_post",
    batch_size: int = 32,
    progress: bool = True,
) -> CausalTrace:
    """Trace when and where the model fuses each clip with the question (sections 3.2, 3.3).

    Layer-wise: the states of all text positions of one layer (kind `layer`), and of all audio positions (kind
    `audio_layer`); token-wise: one text position after the audio (kind `token`). `site` is the state that is patched,
    in every block, and the merged embedding beside it. `batch_size` patched runs share a forward. A sample is `kept`
    unless the clean run is wrong, the corrupted run is right, or its probability is not below the clean one
    (section 3.1); what is not kept is traced as well and keeps its rows. A prediction is the largest logit among the
    labels. Raises `PromptError` for a label that the attribute does not have, `AudioError` for a clip that the model
    cannot hear, `DataError` for a clip that comes twice, `InputError` if a run is not finite.
    """
    refuse_foreign_hooks(model)
    refuse_repeated(samples)
    if batch_size < 1:
        raise InputError(f"batch_size is a number of patched runs, 1 or more; got {batch_size}.")
    attribute = attribute_named(attribute) if isinstance(attribute, str) else attribute
    processor = processor_of(model)
    label_tokens = processor.label_tokens(attribute.labels)
    for sample in samples:  # all of them, before the long work begins
        check_audible(sample.waveform, processor.hf.feature_extractor, sample.name)
        if not sample.waveform.any():
            raise AudioError(f"{sample.name} is digital silence, which is what the corrupted run hears. Leave it out.")
        if sample.label not in label_tokens:
            raise PromptError(
                f"{sample.name} is labelled {sample.label!r}, which is not an option of {attribute.name}: "
                f"{', '.join(attribute.labels)}."
            )
    with tqdm(samples, desc=f"tracing {attribute.name}", unit="clip", disable=not progress) as bar:
        frames = [trace_sample(model, sample, attribute, label_tokens, site, batch_size) for sample in bar]
    return CausalTrace.concat(frames)


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


def trace_sample(
    model: HookedLALM,
    sample: Sample,
    attribute: Attribute,
    label_tokens: dict[str, int],
    site: Site,
    batch_size: int,
) -> pd.DataFrame:
    processor = processor_of(model)
    prompt = processor.prompt(attribute, processor.n_frames(sample.waveform), answer=sample.label)
    clean, corrupted = (
        run(model, processor.inputs([prompt], [waveform]), site)
        for waveform in (sample.waveform, silence(sample.waveform))
    )
    target = label_tokens[sample.label]
    recovery = recover(model, clean, corrupted, prompt.is_region("audio"), target, site, batch_size)
    options = torch.tensor(list(label_tokens.values()))
    status = status_of(recovery, clean.logits[options], corrupted.logits[options], options.tolist().index(target))
    about = {"model": model.cfg.model_name, "attribute": attribute.name, "sample": sample.name, "label": sample.label}
    rows = rows_of(recovery, prompt, site)
    return pd.DataFrame([{**about, "status": status, **row} for row in rows])


def run(model: HookedLALM, inputs: Inputs, site: Site) -> Run:
    """One prompt through encoder and decoder; the encoder does not run again for its patched runs."""
    with torch.no_grad():
        embedded = model.embed_inputs(inputs.to(model.W_E.device))
        logits, cache = model.run_with_cache(
            embedded,
            names_filter=lambda name: name.startswith("blocks.") and name.endswith((site, "resid_pre")),
            logits_at=-1,
        )
    if not logits.isfinite().all():
        narrow = model.cfg.dtype == torch.float16
        advice = "Load the model as bfloat16 or float32." if narrow else "The weights of this checkpoint are broken."
        raise InputError(f"The logits are not finite in {model.cfg.dtype}. {advice}")
    return Run(embedded.embed, cache, logits[0, -1])


@typed
def recover(
    model: HookedLALM,
    clean: Run,
    corrupted: Run,
    is_audio: Bool[Tensor, " pos"],
    target: int,
    site: Site = "resid_post",
    batch_size: int = 32,
) -> Recovery:
    """Every patched run of one example. The reference executor: one hook, the patches of a layer batched."""
    patches = list(patches_of(is_audio, model.cfg.n_layers))
    p_patched = torch.empty(len(patches), dtype=torch.float64)
    for layer in range(EMBED_LAYER, model.cfg.n_layers):
        of_layer = [n for n, patch in enumerate(patches) if patch.layer == layer]
        for chunk in chunks(of_layer, batch_size):
            where = torch.stack([patches[n].where for n in chunk]).to(clean.embed.device)
            p_patched[chunk] = probability(patched_logits(model, clean, corrupted, layer, where, site), target)
    return Recovery(
        float(probability(clean.logits, target)), float(probability(corrupted.logits, target)), patches, p_patched
    )


def patches_of(is_audio: Bool[Tensor, " pos"], n_layers: int) -> Iterator[Patch]:
    """Text is every position outside the audio, chat template and audio tags included."""
    after_audio = int(is_audio.nonzero().max()) + 1
    one_hot = torch.eye(len(is_audio), dtype=torch.bool)
    for layer in range(EMBED_LAYER, n_layers):
        yield Patch("layer", layer, ~is_audio)
        yield Patch("audio_layer", layer, is_audio)
        yield from (Patch("token", layer, where) for where in one_hot[after_audio:])


@torch.no_grad()
def patched_logits(
    model: HookedLALM, clean: Run, corrupted: Run, layer: int, where: Bool[Tensor, "batch pos"], site: Site
) -> Float[Tensor, "batch d_vocab"]:
    """The corrupted run from `layer` on, with the clean states where `where` says, at the last position."""
    if layer == EMBED_LAYER:
        inputs, start, hook = corrupted.embed, None, ("hook_embed", restore(clean.embed, where))
    else:
        name = f"blocks.{layer}.hook_{site}"
        inputs, start, hook = corrupted.cache["resid_pre", layer], layer, (name, restore(clean.cache[name], where))
    inputs = inputs.expand(len(where), -1, -1)
    return model.run_with_hooks(inputs, start_at_layer=start, logits_at=-1, fwd_hooks=[hook])[:, -1]


def restore(
    clean: Float[Tensor, "1 pos d_model"], where: Bool[Tensor, "batch pos"]
) -> Callable[[Float[Tensor, "batch pos d_model"], HookPoint], Float[Tensor, "batch pos d_model"]]:
    return lambda state, hook: torch.where(where[..., None], clean, state)


def probability(logits: Float[Tensor, "*batch d_vocab"], target: int) -> Float[Tensor, "*batch"]:
    # float64: a recovery rate divides differences of probabilities, which may both be close to 1. On the CPU, because
    # not every accelerator has it.
    return logits.cpu().double().softmax(-1)[..., target]


def status_of(
    recovery: Recovery, clean: Float[Tensor, " label"], corrupted: Float[Tensor, " label"], true: int
) -> Status:
    """The paper's exclusions, the first that applies (section 3.1)."""
    if clean.argmax() != true:
        return "clean_wrong"
    if corrupted.argmax() == true:
        return "corrupted_right"
    return "kept" if recovery.p_clean > recovery.p_corrupted else "no_gap"


def rows_of(recovery: Recovery, prompt: Prompt, site: Site) -> Iterator[dict]:
    """One row per patch."""
    gap = recovery.p_clean - recovery.p_corrupted
    for patch, p_patched in zip(recovery.patches, recovery.p_patched.tolist(), strict=True):
        difference = p_patched - recovery.p_corrupted
        yield {
            "kind": patch.kind,
            "site": "embed" if patch.layer == EMBED_LAYER else site,
            "layer": patch.layer,
            **(token_columns(prompt, int(patch.where.nonzero())) if patch.kind == "token" else {}),
            "p_clean": recovery.p_clean,
            "p_corrupted": recovery.p_corrupted,
            "p_patched": p_patched,
            "recovery": difference / gap if gap else float("nan"),
        }


def token_columns(prompt: Prompt, pos: int) -> dict:
    position = prompt.positions[pos]
    return {
        "position": pos,
        "text_index": pos - len(prompt),
        "token": position.token,
        "region": position.region,
        "segment": position.segment,
    }


def chunks(items: list[int], size: int) -> Iterable[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
