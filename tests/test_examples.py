"""The examples run, and say what they are there to show."""

import runpy
from pathlib import Path

import pytest

from lalm_lens.study import Study

EXAMPLES = Path(__file__).parent.parent / "examples"
SLOW = {"transformer_lens_hears.py"}
SAYS = {
    "trace_one_clip.py": "CausalTrace(",
    "transformer_lens_hears.py": "silence, one state of the clean run: (' hen.',)",
}


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_every_study_can_be_read(path):
    study = Study.read(path)
    assert study.experiments
    assert {name for dataset in study.datasets for name in dataset.attributes} <= set(study.attributes)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.stress] * (name in SLOW)) for name in SAYS])
def test_an_example_says_what_it_shows(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out
