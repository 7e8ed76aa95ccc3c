"""The examples run, and say what they are there to show."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SLOW = {"transformer_lens_hears.py"}
SAYS = {
    "trace_one_clip.py": "CausalTrace(",
    "transformer_lens_hears.py": "silence, one state of the clean run: (' hen.',)",
}


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.stress] * (name in SLOW)) for name in SAYS])
def test_an_example_says_what_it_shows(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out
