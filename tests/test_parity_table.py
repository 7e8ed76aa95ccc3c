"""The table of models in the README is what its script measures."""

import re

import parity_table
import pytest
from families import FAMILIES
from parity_table import BEGIN, END, PARTS, README, differences, write
from test_families import DURATIONS_S


def rows(text: str) -> dict[str, list[float]]:
    table = text.partition(BEGIN)[2].partition(END)[0]
    found = re.findall(r"^\| .* \(`(\w+)`\) \| (.*) \|$", table, re.MULTILINE)
    return {name: [float(number) for number in numbers.split(" | ")] for name, numbers in found}


def test_the_readme_has_a_row_for_every_model_and_small_numbers():
    found = rows(README.read_text(encoding="utf-8"))
    assert set(found) == set(FAMILIES)
    for *numbers, largest_logit in found.values():
        assert len(numbers) == len(PARTS)
        assert max(numbers) < 1e-5
        assert largest_logit > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_measured_is_what_stands_there(name):
    """Rounding differs from machine to machine, but not by this much."""
    measured, (*written, _) = differences(name, n_kv_heads=2), rows(README.read_text(encoding="utf-8"))[name]
    assert parity_table.DURATIONS_S == DURATIONS_S
    for part, number in zip(PARTS, written, strict=True):
        assert 0 < measured[part] < 3 * number


def test_only_the_place_of_the_table_is_written(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Mine\n{BEGIN}old\n{END}\nby hand\n")
    write(readme, "| new |\n")
    assert readme.read_text() == f"# Mine\n{BEGIN}\n| new |\n\n{END}\nby hand\n"
    readme.write_text("# Mine\n")
    with pytest.raises(AssertionError, match="no place for the table"):
        write(readme, "| new |\n")
