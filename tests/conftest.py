"""Options and fixtures that more than one test file needs."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may need the network
os.environ["PIP_NO_INDEX"] = "1"  # nor install anything, as TransformerLens' bridge does where it misses torchvision

import pytest
import shape_checks  # noqa: F401  before anything imports lalm_lens
import torch
from filelock import FileLock
from reference import randomise, tiny_hf
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.datasets import read_folder
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.loading import from_pretrained
from lalm_lens.model import HookedLALM
from lalm_lens.results import CausalTrace

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", type=Path, default=HERE / "golden", help="folder of golden sets to compare with")
    parser.addoption(
        "--allow-missing", default="", help="comma-separated golden sets or arrays that need not be compared"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much the golden tests compared, gathered from all workers."""
    reports = [r for group in terminalreporter.stats.values() for r in group if getattr(r, "when", "") == "call"]
    compared = [dict(r.user_properties)["compared"] for r in reports if "compared" in dict(r.user_properties)]
    if compared:
        terminalreporter.write_line(f"compared {sum(compared)} arrays in {len(compared)} sets")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays; looking through it again and again takes a tenth of the time


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """A tiny random HF model and ours, loaded from the files it was saved to."""

    def make(seed: int = 0, **config: object) -> tuple[Qwen2AudioForConditionalGeneration, HookedLALM]:
        folder = tmp_path_factory.mktemp("tiny")
        hf = tiny_hf(seed, **config)
        hf.save_pretrained(folder)
        return hf, from_pretrained(folder)

    return make


@pytest.fixture(scope="session")
def tiny_lalm() -> HookedLALM:
    return from_pretrained(TINY_LALM)


@pytest.fixture(scope="session")
def random_pair(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Qwen2AudioForConditionalGeneration, HookedLALM]:
    """The tiny model's tokenizer and shapes with random weights: HF's, eager, and ours."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(3)
    hf = randomise(Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM, dtype=torch.float32))
    hf.tie_weights()
    hf.save_pretrained(folder)
    AutoProcessor.from_pretrained(TINY_LALM).save_pretrained(folder)
    eager = Qwen2AudioForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = from_pretrained(folder)
    ours.stop_tokens = ()  # nothing ends an answer of random tokens
    return eager, ours


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four clips of each attribute."""
    root = tmp_path_factory.mktemp("clips")
    return {name: write_clips(root / name, name, 4, seed=11) for name in ATTRIBUTES}


@pytest.fixture(scope="session")
def traces(
    tiny_lalm: HookedLALM, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> dict[str, CausalTrace]:
    """Made once, by the worker that asks first."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    with FileLock(root / "traces.lock"):
        paths = {name: root / f"{name}.parquet" for name in folders}
        for name, path in paths.items():
            if not path.exists():
                causal_trace(tiny_lalm, read_folder(folders[name]), attribute=name, progress=False).save(path)
    return {name: CausalTrace.load(path) for name, path in paths.items()}
