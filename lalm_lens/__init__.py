"""Large audio language models, opened: hooked transformers that hear, and the published analyses of them.

The names below are the front door. They are imported when they are first used, so that the command line answers at
once: `import transformer_lens` alone takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lalm_lens.attributes import ATTRIBUTES, Attribute
    from lalm_lens.audio import read_audio
    from lalm_lens.corrupt import OtherClip, Silence, WhiteNoise, silence
    from lalm_lens.datasets import Sample, cut_to, read_folder, read_sample
    from lalm_lens.errors import LensError
    from lalm_lens.experiments.causal_trace import causal_trace
    from lalm_lens.generation import Sampling
    from lalm_lens.inputs import Embedded, Inputs
    from lalm_lens.interventions import Patch
    from lalm_lens.loading import from_hf, from_pretrained
    from lalm_lens.model import HookedLALM
    from lalm_lens.results import CausalTrace
    from lalm_lens.transformer import HookedTransformer

_HOME = {
    "ATTRIBUTES": "attributes",
    "Attribute": "attributes",
    "CausalTrace": "results",
    "Embedded": "inputs",
    "HookedLALM": "model",
    "HookedTransformer": "transformer",
    "Inputs": "inputs",
    "LensError": "errors",
    "OtherClip": "corrupt",
    "Patch": "interventions",
    "Sample": "datasets",
    "Sampling": "generation",
    "Silence": "corrupt",
    "WhiteNoise": "corrupt",
    "causal_trace": "experiments.causal_trace",
    "cut_to": "datasets",
    "from_hf": "loading",
    "from_pretrained": "loading",
    "read_audio": "audio",
    "read_folder": "datasets",
    "read_sample": "datasets",
    "silence": "corrupt",
}

__all__ = [
    "ATTRIBUTES",
    "Attribute",
    "CausalTrace",
    "Embedded",
    "HookedLALM",
    "HookedTransformer",
    "Inputs",
    "LensError",
    "OtherClip",
    "Patch",
    "Sample",
    "Sampling",
    "Silence",
    "WhiteNoise",
    "causal_trace",
    "cut_to",
    "from_hf",
    "from_pretrained",
    "read_audio",
    "read_folder",
    "read_sample",
    "silence",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"lalm_lens has no {name!r}")
    return getattr(import_module(f"lalm_lens.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
