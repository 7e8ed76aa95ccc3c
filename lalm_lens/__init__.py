"""Large audio language models, opened: hooked transformers that hear, and the published analyses of them.

The names below are the front door. They are imported when they are first used, so that the command line answers at
once: `import transformer_lens` alone takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lalm_lens import patching, transcripts
    from lalm_lens.attributes import ATTRIBUTES, Attribute
    from lalm_lens.audio import read_audio
    from lalm_lens.corrupt import OtherClip, Silence, WhiteNoise, silence
    from lalm_lens.datasets import Sample, cut_to, read_folder, read_sample
    from lalm_lens.engine.branches import Branch
    from lalm_lens.engine.plan import Plan, run_branches
    from lalm_lens.errors import LensError
    from lalm_lens.experiments.attention_knockout import AttentionKnockout, attention_knockout, audio_knockout
    from lalm_lens.experiments.attention_share import AttentionShare, attention_share
    from lalm_lens.experiments.causal_trace import causal_trace
    from lalm_lens.experiments.enrich import Enrichment, enrich
    from lalm_lens.experiments.information_score import InformationScore, information_score
    from lalm_lens.experiments.knockout_generation import KnockoutGeneration, knockout_generation
    from lalm_lens.experiments.logit_lens import LogitLens, logit_lens
    from lalm_lens.experiments.moment import Search
    from lalm_lens.experiments.object_effect import ObjectEffect, object_effect
    from lalm_lens.experiments.resolution import critical_layer, resolution_correlation
    from lalm_lens.experiments.specification import Specification, specification_curve
    from lalm_lens.generation import Sampling
    from lalm_lens.inputs import Embedded, Inputs
    from lalm_lens.interventions import Add, Knockout, Patch, Recompute, Scale
    from lalm_lens.loading import from_hf, from_pretrained
    from lalm_lens.model import HookedLALM
    from lalm_lens.readouts import Logits, LogProbs, Probabilities, Resid, Score
    from lalm_lens.reproduce import Reproduction, evaluate_claims, reproduce
    from lalm_lens.results import CausalTrace
    from lalm_lens.runs import OWN, Run, Source
    from lalm_lens.transformer import HookedTransformer

_HOME = {
    "ATTRIBUTES": "attributes",
    "OWN": "runs",
    "Add": "interventions",
    "AttentionKnockout": "experiments.attention_knockout",
    "AttentionShare": "experiments.attention_share",
    "Attribute": "attributes",
    "Branch": "engine.branches",
    "CausalTrace": "results",
    "Embedded": "inputs",
    "Enrichment": "experiments.enrich",
    "HookedLALM": "model",
    "HookedTransformer": "transformer",
    "InformationScore": "experiments.information_score",
    "Inputs": "inputs",
    "Knockout": "interventions",
    "KnockoutGeneration": "experiments.knockout_generation",
    "LensError": "errors",
    "LogProbs": "readouts",
    "LogitLens": "experiments.logit_lens",
    "Logits": "readouts",
    "ObjectEffect": "experiments.object_effect",
    "OtherClip": "corrupt",
    "Patch": "interventions",
    "Plan": "engine.plan",
    "Probabilities": "readouts",
    "Recompute": "interventions",
    "Reproduction": "reproduce",
    "Resid": "readouts",
    "Run": "runs",
    "Sample": "datasets",
    "Sampling": "generation",
    "Scale": "interventions",
    "Score": "readouts",
    "Search": "experiments.moment",
    "Silence": "corrupt",
    "Source": "runs",
    "Specification": "experiments.specification",
    "WhiteNoise": "corrupt",
    "attention_knockout": "experiments.attention_knockout",
    "attention_share": "experiments.attention_share",
    "audio_knockout": "experiments.attention_knockout",
    "causal_trace": "experiments.causal_trace",
    "critical_layer": "experiments.resolution",
    "cut_to": "datasets",
    "enrich": "experiments.enrich",
    "evaluate_claims": "reproduce",
    "from_hf": "loading",
    "from_pretrained": "loading",
    "information_score": "experiments.information_score",
    "knockout_generation": "experiments.knockout_generation",
    "logit_lens": "experiments.logit_lens",
    "object_effect": "experiments.object_effect",
    "patching": "patching",
    "read_audio": "audio",
    "read_folder": "datasets",
    "read_sample": "datasets",
    "reproduce": "reproduce",
    "resolution_correlation": "experiments.resolution",
    "run_branches": "engine.plan",
    "silence": "corrupt",
    "specification_curve": "experiments.specification",
    "transcripts": "transcripts",
}

__all__ = [
    "ATTRIBUTES",
    "OWN",
    "Add",
    "AttentionKnockout",
    "AttentionShare",
    "Attribute",
    "Branch",
    "CausalTrace",
    "Embedded",
    "Enrichment",
    "HookedLALM",
    "HookedTransformer",
    "InformationScore",
    "Inputs",
    "Knockout",
    "KnockoutGeneration",
    "LensError",
    "LogProbs",
    "LogitLens",
    "Logits",
    "ObjectEffect",
    "OtherClip",
    "Patch",
    "Plan",
    "Probabilities",
    "Recompute",
    "Reproduction",
    "Resid",
    "Run",
    "Sample",
    "Sampling",
    "Scale",
    "Score",
    "Search",
    "Silence",
    "Source",
    "Specification",
    "WhiteNoise",
    "attention_knockout",
    "attention_share",
    "audio_knockout",
    "causal_trace",
    "critical_layer",
    "cut_to",
    "enrich",
    "evaluate_claims",
    "from_hf",
    "from_pretrained",
    "information_score",
    "knockout_generation",
    "logit_lens",
    "object_effect",
    "patching",
    "read_audio",
    "read_folder",
    "read_sample",
    "reproduce",
    "resolution_correlation",
    "run_branches",
    "silence",
    "specification_curve",
    "transcripts",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"lalm_lens has no {name!r}")
    module = import_module(f"lalm_lens.{_HOME[name]}")
    return module if name == _HOME[name] else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
