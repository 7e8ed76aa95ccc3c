"""docs/adding_a_model.md is the real conversion, and what it says runs."""

import re
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, QUESTION
from reference import chirps
from torch.testing import assert_close

import lalm_lens.loading
from conversions.audioflamingo3 import AUDIO_FLAMINGO_3
from lalm_lens.cli import main
from lalm_lens.inputs import Inputs

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "adding_a_model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_page_shows_the_real_file():
    real = (ROOT / "conversions" / "audioflamingo3.py").read_text(encoding="utf-8")
    told = {"from .": "from conversions.", "(hf: Mapping[str, Any]) -> LALMConfig": "(hf)", "AUDIO_FLAMINGO_3": "MINE"}
    for ours, in_page in told.items():
        assert ours in real
        real = real.replace(ours, in_page)
    imports, rows, config, conversion, use = BLOCKS
    for block in (rows, config, conversion, *imports.split("\n\n")):
        assert block.strip() in real
    assert "conversion=MINE" in use


def test_a_conversion_of_ones_own_opens_the_model(tmp_path, monkeypatch, capsys):
    """Where nothing built in knows it."""
    family = FAMILIES["audioflamingo3"]
    hf = family.save(tmp_path)
    monkeypatch.setattr(lalm_lens.loading, "our_conversions", dict)
    page = {"folder": tmp_path}
    exec("\n".join(BLOCKS), page)
    assert page["MINE"] is not AUDIO_FLAMINGO_3
    batch = family.batch(family.processor(), chirps([1.1]), [QUESTION])
    with torch.no_grad():
        assert_close(page["model"](Inputs.from_hf(batch)), hf(**batch, use_cache=False).logits)
    assert "agrees with transformers in torch.float32" in capsys.readouterr().out


def test_the_command_line_takes_a_conversion_of_ones_own(tmp_path, monkeypatch, capsys):
    FAMILIES["audioflamingo3"].save(tmp_path / "tiny")
    (tmp_path / "my_model.py").write_text("\n".join(BLOCKS[:4]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(lalm_lens.loading, "our_conversions", dict)
    for command in ("info", "verify"):
        monkeypatch.setattr(sys, "argv", ["lalm-lens", command, "tiny", "--conversion", "my_model:MINE"])
        with pytest.raises(SystemExit) as done:
            main()
        assert not done.value.code
    assert "agrees with transformers in torch.float32" in capsys.readouterr().out
    for wrong in ("my_model", "my_model:ROWS", "no_such_model:MINE", ""):
        monkeypatch.setattr(sys, "argv", ["lalm-lens", "info", "tiny", "--conversion", wrong])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 2
        assert "module:NAME" in capsys.readouterr().err


def test_the_smallest_conversion_is_small():
    files = list((ROOT / "conversions").glob("[!_]*.py"))
    assert min(len(path.read_text(encoding="utf-8").splitlines()) for path in files) < 80
