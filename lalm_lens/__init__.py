"""Large audio language models, opened: hooked transformers that hear, and the published analyses of them.

The names below are the front door. They are imported when they are first used, so that the command line answers at
once: `import transformer_lens` alone takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lalm_lens import patching, transcripts
    from lalm_lens.alme import read_alme
    from lalm_lens.attributes import ATTRIBUTES, Attribute
    from lalm_lens.audio import read_audio
    from lalm_lens.audio_visual import read_audio_visual
    from lalm_lens.conflict import Conflict, ConflictItem, Framing, make_conflict
    from lalm_lens.corrupt import OtherClip, Silence, WhiteNoise, silence
    from lalm_lens.counterfactual import Swapped, swap_audio
    from lalm_lens.datasets import (
        Clip,
        Sample,
        balance,
        cut_to,
        list_dataset,
        list_folder,
        list_hub,
        read_clips,
        read_folder,
        read_sample,
        sakura,
        split,
    )
    from lalm_lens.engine.branches import Branch
    from lalm_lens.engine.plan import Plan, run_branches
    from lalm_lens.errors import LensError
    from lalm_lens.experiments.ablate import Ablation, ablate
    from lalm_lens.experiments.activations import Activations, activations, save_activations
    from lalm_lens.experiments.attention_knockout import AttentionKnockout, attention_knockout, audio_knockout
    from lalm_lens.experiments.attention_share import AttentionShare, attention_share
    from lalm_lens.experiments.audio_sensitivity import AudioSensitivity, audio_sensitivity
    from lalm_lens.experiments.audiolens import AudioLens, audiolens
    from lalm_lens.experiments.back_patch import BackPatch, back_patch
    from lalm_lens.experiments.back_patch_choice import BackPatchChoice
    from lalm_lens.experiments.caption_fidelity import CaptionFidelity, caption_fidelity
    from lalm_lens.experiments.causal_trace import causal_trace
    from lalm_lens.experiments.circuits import Circuits, circuits
    from lalm_lens.experiments.concepts import AnyOf, ExactWord, FirstToken
    from lalm_lens.experiments.convergence import Convergence, convergence
    from lalm_lens.experiments.enrich import Enrichment, enrich
    from lalm_lens.experiments.information_score import InformationScore, information_score
    from lalm_lens.experiments.knockout_generation import KnockoutGeneration, knockout_generation
    from lalm_lens.experiments.latent_understanding import LatentUnderstanding, latent_understanding
    from lalm_lens.experiments.logit_lens import LogitLens, logit_lens
    from lalm_lens.experiments.moment import Search
    from lalm_lens.experiments.nearest_tokens import NearestTokens, nearest_tokens
    from lalm_lens.experiments.neurons import NeuronGain, neuron_gain, neuron_scores
    from lalm_lens.experiments.object_effect import ObjectEffect, object_effect
    from lalm_lens.experiments.patchscope import Patchscope, patchscope
    from lalm_lens.experiments.pathways import Pathways, pathways
    from lalm_lens.experiments.probe import Probe, probe
    from lalm_lens.experiments.resolution import critical_layer, resolution_correlation
    from lalm_lens.experiments.scale_attention import ScaledAttention, scale_attention
    from lalm_lens.experiments.specification import Specification, specification_curve
    from lalm_lens.experiments.steer import (
        Direction,
        Steering,
        audio_minus_silence,
        mean_difference,
        prompt_contrast,
        steer,
    )
    from lalm_lens.experiments.suppression import Suppression, suppression
    from lalm_lens.experiments.text_dominance import TextDominance, compare_dominance, text_dominance
    from lalm_lens.experiments.token_shift import TokenShift, token_shift
    from lalm_lens.generation import Sampling
    from lalm_lens.inputs import Embedded, HeardVideo, Images, Inputs, Videos
    from lalm_lens.interventions import Add, Knockout, Patch, Recompute, Scale, ScaleAttention
    from lalm_lens.loading import from_hf, from_pretrained
    from lalm_lens.model import HookedLALM
    from lalm_lens.readouts import Logits, LogProbs, Probabilities, Resid, Score
    from lalm_lens.reproduce import Reproduction, evaluate_claims, reproduce
    from lalm_lens.results import CausalTrace
    from lalm_lens.runs import OWN, Run, Source
    from lalm_lens.study_results import Results, compare_models, load_results
    from lalm_lens.transcripts import transcribed
    from lalm_lens.transformer import HookedTransformer

_HOME = {
    "ATTRIBUTES": "attributes",
    "Ablation": "experiments.ablate",
    "Activations": "experiments.activations",
    "Add": "interventions",
    "AnyOf": "experiments.concepts",
    "AttentionKnockout": "experiments.attention_knockout",
    "AttentionShare": "experiments.attention_share",
    "Attribute": "attributes",
    "AudioLens": "experiments.audiolens",
    "AudioSensitivity": "experiments.audio_sensitivity",
    "BackPatch": "experiments.back_patch",
    "BackPatchChoice": "experiments.back_patch_choice",
    "Branch": "engine.branches",
    "CaptionFidelity": "experiments.caption_fidelity",
    "CausalTrace": "results",
    "Circuits": "experiments.circuits",
    "Clip": "datasets",
    "Conflict": "conflict",
    "ConflictItem": "conflict",
    "Convergence": "experiments.convergence",
    "Direction": "experiments.steer",
    "Embedded": "inputs",
    "Enrichment": "experiments.enrich",
    "ExactWord": "experiments.concepts",
    "FirstToken": "experiments.concepts",
    "Framing": "conflict",
    "HeardVideo": "inputs",
    "HookedLALM": "model",
    "HookedTransformer": "transformer",
    "Images": "inputs",
    "InformationScore": "experiments.information_score",
    "Inputs": "inputs",
    "Knockout": "interventions",
    "KnockoutGeneration": "experiments.knockout_generation",
    "LatentUnderstanding": "experiments.latent_understanding",
    "LensError": "errors",
    "LogProbs": "readouts",
    "LogitLens": "experiments.logit_lens",
    "Logits": "readouts",
    "NearestTokens": "experiments.nearest_tokens",
    "NeuronGain": "experiments.neurons",
    "OWN": "runs",
    "ObjectEffect": "experiments.object_effect",
    "OtherClip": "corrupt",
    "Patch": "interventions",
    "Patchscope": "experiments.patchscope",
    "Pathways": "experiments.pathways",
    "Plan": "engine.plan",
    "Probabilities": "readouts",
    "Probe": "experiments.probe",
    "Recompute": "interventions",
    "Reproduction": "reproduce",
    "Resid": "readouts",
    "Results": "study_results",
    "Run": "runs",
    "Sample": "datasets",
    "Sampling": "generation",
    "Scale": "interventions",
    "ScaleAttention": "interventions",
    "ScaledAttention": "experiments.scale_attention",
    "Score": "readouts",
    "Search": "experiments.moment",
    "Silence": "corrupt",
    "Source": "runs",
    "Specification": "experiments.specification",
    "Steering": "experiments.steer",
    "Suppression": "experiments.suppression",
    "Swapped": "counterfactual",
    "TextDominance": "experiments.text_dominance",
    "TokenShift": "experiments.token_shift",
    "Videos": "inputs",
    "WhiteNoise": "corrupt",
    "ablate": "experiments.ablate",
    "activations": "experiments.activations",
    "attention_knockout": "experiments.attention_knockout",
    "attention_share": "experiments.attention_share",
    "audio_knockout": "experiments.attention_knockout",
    "audio_minus_silence": "experiments.steer",
    "audio_sensitivity": "experiments.audio_sensitivity",
    "audiolens": "experiments.audiolens",
    "back_patch": "experiments.back_patch",
    "balance": "datasets",
    "caption_fidelity": "experiments.caption_fidelity",
    "causal_trace": "experiments.causal_trace",
    "circuits": "experiments.circuits",
    "compare_dominance": "experiments.text_dominance",
    "compare_models": "study_results",
    "convergence": "experiments.convergence",
    "critical_layer": "experiments.resolution",
    "cut_to": "datasets",
    "enrich": "experiments.enrich",
    "evaluate_claims": "reproduce",
    "from_hf": "loading",
    "from_pretrained": "loading",
    "information_score": "experiments.information_score",
    "knockout_generation": "experiments.knockout_generation",
    "latent_understanding": "experiments.latent_understanding",
    "list_dataset": "datasets",
    "list_folder": "datasets",
    "list_hub": "datasets",
    "load_results": "study_results",
    "logit_lens": "experiments.logit_lens",
    "make_conflict": "conflict",
    "mean_difference": "experiments.steer",
    "nearest_tokens": "experiments.nearest_tokens",
    "neuron_gain": "experiments.neurons",
    "neuron_scores": "experiments.neurons",
    "object_effect": "experiments.object_effect",
    "patching": "patching",
    "patchscope": "experiments.patchscope",
    "pathways": "experiments.pathways",
    "probe": "experiments.probe",
    "prompt_contrast": "experiments.steer",
    "read_alme": "alme",
    "read_audio": "audio",
    "read_audio_visual": "audio_visual",
    "read_clips": "datasets",
    "read_folder": "datasets",
    "read_sample": "datasets",
    "reproduce": "reproduce",
    "resolution_correlation": "experiments.resolution",
    "run_branches": "engine.plan",
    "sakura": "datasets",
    "save_activations": "experiments.activations",
    "scale_attention": "experiments.scale_attention",
    "silence": "corrupt",
    "specification_curve": "experiments.specification",
    "split": "datasets",
    "steer": "experiments.steer",
    "suppression": "experiments.suppression",
    "swap_audio": "counterfactual",
    "text_dominance": "experiments.text_dominance",
    "token_shift": "experiments.token_shift",
    "transcribed": "transcripts",
    "transcripts": "transcripts",
}

__all__ = [
    "ATTRIBUTES",
    "OWN",
    "Ablation",
    "Activations",
    "Add",
    "AnyOf",
    "AttentionKnockout",
    "AttentionShare",
    "Attribute",
    "AudioLens",
    "AudioSensitivity",
    "BackPatch",
    "BackPatchChoice",
    "Branch",
    "CaptionFidelity",
    "CausalTrace",
    "Circuits",
    "Clip",
    "Conflict",
    "ConflictItem",
    "Convergence",
    "Direction",
    "Embedded",
    "Enrichment",
    "ExactWord",
    "FirstToken",
    "Framing",
    "HeardVideo",
    "HookedLALM",
    "HookedTransformer",
    "Images",
    "InformationScore",
    "Inputs",
    "Knockout",
    "KnockoutGeneration",
    "LatentUnderstanding",
    "LensError",
    "LogProbs",
    "LogitLens",
    "Logits",
    "NearestTokens",
    "NeuronGain",
    "ObjectEffect",
    "OtherClip",
    "Patch",
    "Patchscope",
    "Pathways",
    "Plan",
    "Probabilities",
    "Probe",
    "Recompute",
    "Reproduction",
    "Resid",
    "Results",
    "Run",
    "Sample",
    "Sampling",
    "Scale",
    "ScaleAttention",
    "ScaledAttention",
    "Score",
    "Search",
    "Silence",
    "Source",
    "Specification",
    "Steering",
    "Suppression",
    "Swapped",
    "TextDominance",
    "TokenShift",
    "Videos",
    "WhiteNoise",
    "ablate",
    "activations",
    "attention_knockout",
    "attention_share",
    "audio_knockout",
    "audio_minus_silence",
    "audio_sensitivity",
    "audiolens",
    "back_patch",
    "balance",
    "caption_fidelity",
    "causal_trace",
    "circuits",
    "compare_dominance",
    "compare_models",
    "convergence",
    "critical_layer",
    "cut_to",
    "enrich",
    "evaluate_claims",
    "from_hf",
    "from_pretrained",
    "information_score",
    "knockout_generation",
    "latent_understanding",
    "list_dataset",
    "list_folder",
    "list_hub",
    "load_results",
    "logit_lens",
    "make_conflict",
    "mean_difference",
    "nearest_tokens",
    "neuron_gain",
    "neuron_scores",
    "object_effect",
    "patching",
    "patchscope",
    "pathways",
    "probe",
    "prompt_contrast",
    "read_alme",
    "read_audio",
    "read_audio_visual",
    "read_clips",
    "read_folder",
    "read_sample",
    "reproduce",
    "resolution_correlation",
    "run_branches",
    "sakura",
    "save_activations",
    "scale_attention",
    "silence",
    "specification_curve",
    "split",
    "steer",
    "suppression",
    "swap_audio",
    "text_dominance",
    "token_shift",
    "transcribed",
    "transcripts",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"lalm_lens has no {name!r}")
    module = import_module(f"lalm_lens.{_HOME[name]}")
    return module if name == _HOME[name] else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
