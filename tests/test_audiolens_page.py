"""What docs/audiolens.md says runs."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "audiolens.md"


def test_the_snippets_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 6
    written = {path.name for path in tmp_path.glob("*.png")}
    assert written >= {
        "words.png",
        "forms.png",
        "places.png",
        "enriched.png",
        "resolution.png",
        "enrichment_emotion.png",
    }
    assert len(names["enriched"].frame.query("split == 'test' and arm == 'chosen' and factor == 0")) == 6
