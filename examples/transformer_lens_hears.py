"""TransformerLens' own activation patching and logit lens on a prompt with a sound in it; then an answer under a patch.

python examples/transformer_lens_hears.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformer_lens import patching
from transformer_lens.tools.analysis import logit_lens

import lalm_lens
from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips


@torch.no_grad()
def main() -> None:
    model, attribute = lalm_lens.from_pretrained(TINY_LALM), lalm_lens.ATTRIBUTES["animal"]
    with TemporaryDirectory() as folder:
        samples = lalm_lens.read_folder(write_clips(Path(folder), "animal", n=6, seed=5))
    hen, processor = samples[-1], model.processor
    assert processor is not None
    prompt = processor.prompt(attribute, processor.n_frames(hen.waveform))
    clean, silent = (
        processor.inputs([prompt], [waveform]) for waveform in (hen.waveform, lalm_lens.silence(hen.waveform))
    )
    bound = model.bind(clean, silent)  # TransformerLens passes tokens alone; these say what is heard
    clean_tokens, silent_tokens = bound.tokens
    target = model.to_single_token(f" {hen.label}")

    _, cache = model.run_with_cache(clean)
    recovered = patching.get_act_patch_attn_out(
        bound, silent_tokens, cache, lambda logits: logits[0, -1].softmax(-1)[target]
    )
    layer, pos = divmod(int(recovered.argmax()), recovered.shape[1])
    print(f"strongest: attention of block {layer} at {prompt.positions[pos].token!r}, p = {recovered.max():.3f}")

    lens = logit_lens(bound, clean_tokens)
    for label, logits in zip(lens.labels, lens.values, strict=True):
        print(f"{label:>10}  {model.to_single_str_token(int(logits[0].argmax()))!r}")

    heard = lalm_lens.Patch("resid_post", 1, (len(prompt) - 1,), cache["resid_post", 1][:, -1:])
    print("silence:", model.generate(silent, 3).texts)
    print("silence, one state of the clean run:", model.generate(silent, 3, fwd_hooks=[heard.hook()]).texts)


if __name__ == "__main__":
    main()
