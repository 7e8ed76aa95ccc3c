"""Data flows one way: a module imports only from what stands before it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = (
    "errors draws shapes attributes config nn placement offload fingerprints encoders adapters audio_length audio "
    "transcribe inputs positions pieces prompts datasets corrupt counterfactual audio_visual conflict alme "
    "transcripts axes hooks bridge_config words named_weights generation transformer light_cone model marked seeing "
    "weights loading verify golden info runs windows interventions readouts engine patching attribution metrics "
    "aggregates similarity proportions plots tables lens_plots representation_plots pathway_plots conflict_plots "
    "pair_plots heard_plots specification_plots results experiments discovery units study planning runner ray_runner "
    "study_results trace_page report assets reproduce demo commands cli __init__ __main__"
).split()
FOR_CONVERSIONS = {"config", "errors", "weights", "nn", "encoders", "adapters", "prompts"}

OURS = sorted((ROOT / "lalm_lens").rglob("*.py"))
CONVERSIONS = sorted((ROOT / "conversions").glob("*.py"))


def part(path: Path) -> str:
    """The first folder or file of a module inside the package."""
    return path.relative_to(ROOT / "lalm_lens").parts[0].removesuffix(".py")


def imported(path: Path, package: str) -> set[str]:
    """The parts of `package` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert path in CONVERSIONS or not getattr(node, "level", 0), f"{path.name} imports relatively: {node}"
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.split(".")[0] == package:
                found.add((name.split(".")[1:] or [alias.name for alias in node.names])[0])
    return found


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_before_it(path):
    mine = ORDER.index(part(path))
    late = {name for name in imported(path, "lalm_lens") if ORDER.index(name) > mine}
    assert not late, f"{path.name} imports {late}, which stand after it"


@pytest.mark.parametrize("path", CONVERSIONS, ids=lambda path: path.name)
def test_a_conversion_imports_only_the_parts_made_for_it(path):
    assert imported(path, "lalm_lens") <= FOR_CONVERSIONS


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_loading_knows_the_conversions(path):
    assert part(path) == "loading" or not imported(path, "conversions")


def test_remote_code_is_never_trusted():
    calls = [
        keyword
        for path in OURS + CONVERSIONS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code"
    ]
    assert calls
    assert all(ast.literal_eval(keyword.value) is False for keyword in calls)


def test_the_front_door_opens_without_the_heavy_packages():
    heavy = ("torch", "transformers", "transformer_lens", "pandas", "matplotlib")
    code = f"import sys, lalm_lens.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_of_the_front_door_is_there():
    import lalm_lens

    assert sorted(lalm_lens.__all__) == sorted(lalm_lens._HOME)
    for name in lalm_lens.__all__:
        assert getattr(lalm_lens, name) is not None
