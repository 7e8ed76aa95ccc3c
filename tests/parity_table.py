"""Measure every model beside what it is made after, and write the table in the README.

    make parity-table

float32 on the CPU. Models of transformers: tiny random checkpoints in the published format, two groupings of heads,
`verify`. Models that transformers has no class for: what their authors' code computed, tests/golden, `verify_golden`.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
import transformers
from families import FAMILIES

from lalm_lens.golden import verify_golden
from lalm_lens.loading import our_conversions
from lalm_lens.verify import verify

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- written by tests/parity_table.py -->\n", "<!-- end of the table -->"
PARTS = {
    "audio encoder": "audio_encoder.blocks",
    "vision encoder": "vision_encoder.blocks",
    "adapters": "adapter|vision_adapter",
    "decoder": "blocks",
    "logits": "logits",
}
GOLDEN = {"DestaModel": ("DeSTA2", "desta2"), "desta25": ("DeSTA2.5", "desta25"), "qwen": ("Qwen-Audio", "qwen_audio")}


def beside_hf(name: str, n_kv_heads: int) -> pd.DataFrame:
    with TemporaryDirectory() as folder:
        FAMILIES[name].save(Path(folder), n_kv_heads, num_key_value_heads=n_kv_heads)
        return verify(folder).frame


def beside_original(name: str) -> pd.DataFrame:
    folder = HERE / "golden" / GOLDEN[name][1]
    config = json.loads((folder / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    stored = json.loads((folder / "meta.json").read_text(encoding="utf-8")).get("subfolders", {})
    parts = {
        part.name: folder / "checkpoint" / stored[config[part.id_key]].split()[0]
        for part in our_conversions()[name].parts
    }
    return verify_golden(folder / "checkpoint", folder, parts=parts or None).frame


def worst(frame: pd.DataFrame) -> dict[str, float]:
    """The largest difference in each part that was compared, and how large logits are."""
    places = frame.what.str.removeprefix("clean ").str.removeprefix("corrupted ")
    found = {part: frame.difference[places.str.match(rf"(?:{which})(?:\.\d+)?$")] for part, which in PARTS.items()}
    numbers = {part: float(differences.max()) for part, differences in found.items() if len(differences)}
    return {**numbers, "largest logit": float(frame.largest[places == "logits"].max())}


def row(title: str, name: str, measured: dict[str, float]) -> str:
    numbers = " | ".join(f"{measured[part]:.1e}" if part in measured else "-" for part in PARTS)
    return f"| {title} (`{name}`) | {numbers} | {measured['largest logit']:.1f} |"


def table() -> str:
    lines = [f"| model | {' | '.join(PARTS)} | largest logit |", f"|---|{'---|' * (len(PARTS) + 1)}"]
    for name, family in FAMILIES.items():
        frames = [beside_hf(name, n_kv_heads) for n_kv_heads in (4, 2)]
        lines.append(row(family.title, name, worst(pd.concat(frames))))
    lines += [row(title, name, worst(beside_original(name))) for name, (title, _) in GOLDEN.items()]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    return "\n".join(
        [
            *lines,
            "",
            f"Largest absolute difference from {versions}: float32, CPU, tiny random models.",
            "DeSTA and Qwen-Audio: from what their authors' code computed, as it is stored in `tests/golden`.",
            "",
        ]
    )


def write(readme: Path, text: str) -> None:
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    assert rest.count(END) == 1, f"{readme} has no place for the table"
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(README, table())
