"""The table of models in the README is what its script measures."""

import re

import pytest
from families import FAMILIES
from parity_table import BEGIN, END, GOLDEN, PARTS, README, beside_hf, beside_original, worst, write


def rows(text: str) -> dict[str, dict[str, float]]:
    table = text.partition(BEGIN)[2].partition(END)[0]
    found = re.findall(r"^\| .* \(`(\w+)`\) \| (.*) \|$", table, re.MULTILINE)
    columns = (*PARTS, "largest logit")
    lines = {name: zip(columns, numbers.split(" | "), strict=True) for name, numbers in found}
    return {name: {part: float(number) for part, number in line if number != "-"} for name, line in lines.items()}


def test_the_readme_has_a_row_for_every_model_and_small_numbers():
    found = rows(README.read_text(encoding="utf-8"))
    assert set(found) == set(FAMILIES) | set(GOLDEN)
    for name, numbers in found.items():
        assert numbers.pop("largest logit") > 1
        assert ("vision encoder" in numbers) == name.startswith("qwen2_5_omni")
        assert max(numbers.values()) < (2e-5 if name in GOLDEN else 1e-5)


@pytest.mark.parametrize("name", [*FAMILIES, *GOLDEN])
def test_what_is_measured_is_what_stands_there(name):
    """Rounding differs from machine to machine, but not by this much."""
    measured = worst(beside_hf(name, 2) if name in FAMILIES else beside_original(name))
    written = rows(README.read_text(encoding="utf-8"))[name]
    assert measured.keys() == written.keys()
    assert all(0 < measured[part] < 3 * written[part] for part in measured)


def test_only_the_place_of_the_table_is_written(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Mine\n{BEGIN}old\n{END}\nby hand\n")
    write(readme, "| new |\n")
    assert readme.read_text() == f"# Mine\n{BEGIN}\n| new |\n\n{END}\nby hand\n"
    readme.write_text("# Mine\n")
    with pytest.raises(AssertionError, match="no place for the table"):
        write(readme, "| new |\n")
