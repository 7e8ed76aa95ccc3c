"""Measure every model of tests/families.py against transformers, and write the table in the README.

    make parity-table

float32 on the CPU, tiny random checkpoints in the published format, two groupings of heads: the largest absolute
difference of each part, over all of its states that are no padding.
"""

from pathlib import Path

import torch
import transformers
from families import FAMILIES, QUESTION, Family, as_theirs
from reference import chirps, hf_states
from torch import Tensor

from lalm_lens.inputs import Inputs
from lalm_lens.loading import from_hf
from lalm_lens.model import HookedLALM

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- written by tests/parity_table.py -->\n", "<!-- end of the table -->"
PARTS = ("encoder blocks", "adapter", "decoder blocks", "logits")
DURATIONS_S = [2.0, 0.8, 1.37]


def differences(name: str, n_kv_heads: int) -> dict[str, float]:
    """The largest difference in each part, and how large logits are."""
    family: Family = FAMILIES[name]
    hf = family.build(seed=n_kv_heads, num_key_value_heads=n_kv_heads)
    batch = family.batch(family.processor(), chirps(DURATIONS_S), [QUESTION, "Which animal?", "Is it loud?"])
    is_token, (logits, theirs) = batch["attention_mask"].bool(), hf_states(hf, batch)
    ours, cache = states(from_hf(hf), batch)

    def largest(a: Tensor, b: Tensor) -> float:
        return float((as_theirs(a, b, batch) - b).abs().max())

    encoder = [n for n in theirs if n.startswith("encoder.")]
    decoder = [n for n in theirs if n.startswith("decoder.")]
    return {
        "encoder blocks": max(largest(cache[n], theirs[n]) for n in encoder),
        "adapter": largest(cache["projector"], theirs["projector"]),
        "decoder blocks": max(largest(cache[n][is_token], theirs[n][is_token]) for n in decoder),
        "logits": largest(ours[is_token], logits[is_token]),
        "largest logit": float(logits[is_token].abs().max()),
    }


@torch.no_grad()
def states(model: HookedLALM, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Ours, by the names of `hf_states`."""
    logits, cache = model.run_with_cache(Inputs.from_hf(batch))
    encoder = {
        f"encoder.{n}": cache[f"audio_encoder.blocks.{n}.hook_resid_post"]
        for n in range(model.lalm_cfg.encoder.n_layers)
    }
    decoder = {f"decoder.{n}": cache[f"blocks.{n}.hook_resid_post"] for n in range(model.cfg.n_layers)}
    return logits, {**encoder, **decoder, "projector": cache["adapter.hook_out"]}


def table() -> str:
    lines = [f"| model | {' | '.join(PARTS)} | largest logit |", f"|---|{'---|' * (len(PARTS) + 1)}"]
    for name, family in FAMILIES.items():
        runs = [differences(name, n_kv_heads) for n_kv_heads in (4, 2)]
        worst = {part: max(run[part] for run in runs) for part in runs[0]}
        numbers = " | ".join(f"{worst[part]:.1e}" for part in PARTS)
        lines.append(f"| {family.title} (`{name}`) | {numbers} | {worst['largest logit']:.1f} |")
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    return "\n".join(
        [*lines, "", f"Largest absolute difference from {versions}: float32, CPU, tiny random models.", ""]
    )


def write(readme: Path, text: str) -> None:
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    assert rest.count(END) == 1, f"{readme} has no place for the table"
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(README, table())
