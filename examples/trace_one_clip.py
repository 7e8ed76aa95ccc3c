"""Make one sound file, trace it, and print where the answer comes back.

python examples/trace_one_clip.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import lalm_lens
from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips


def main() -> None:
    model = lalm_lens.from_pretrained(TINY_LALM)
    with TemporaryDirectory() as folder:
        samples = lalm_lens.read_folder(write_clips(Path(folder), "animal", n=9, seed=5))
    trace = lalm_lens.causal_trace(model, samples[:1], attribute="animal")
    rows = trace.to_frame()
    print(trace)
    print(
        rows[rows.kind == "layer"][["layer", "p_clean", "p_corrupted", "p_patched", "recovery"]].to_string(index=False)
    )


if __name__ == "__main__":
    main()
