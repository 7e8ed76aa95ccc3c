"""Our cache against that of TransformerLens' own Qwen2-Audio bridge, name by name, on the same weights."""

from copy import deepcopy

import pytest
import torch
from reference import chirps, hf_batch
from torch.testing import assert_close
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from lalm_lens.assets import TINY_LALM
from lalm_lens.inputs import Inputs

# The bridge hooks the words before the audio is merged in; ours is the whole input of block 0.
ELSEWHERE = {"hook_embed"}


@pytest.fixture(scope="module")
def caches(pair):
    hf, ours = pair(seed=2)
    hf.config.architectures = ["Qwen2AudioForConditionalGeneration"]
    batch = hf_batch(chirps([0.9, 0.5]))
    tokenizer = AutoTokenizer.from_pretrained(TINY_LALM)
    # A folder with a processor: where TransformerLens finds none, it installs torchvision, and another torch with it.
    bridge = TransformerBridge.boot_transformers(
        str(TINY_LALM), hf_model=deepcopy(hf), device="cpu", tokenizer=tokenizer
    )
    audio = {name: value for name, value in batch.items() if name != "input_ids"}
    with torch.no_grad():
        their_logits, theirs = bridge.run_with_cache(batch["input_ids"], **audio)
        our_logits, mine = ours.run_with_cache(Inputs.from_hf(batch))
    return batch["attention_mask"].bool(), (their_logits, theirs), (our_logits, mine)


def test_logits_agree(caches):
    is_token, (theirs, _), (mine, _) = caches
    assert_close(mine[is_token], theirs[is_token])


def test_every_activation_that_both_name_agrees(caches):
    is_token, (_, theirs), (_, mine) = caches
    n_audio = torch.tensor([22, 12])  # of 0.9 and 0.5 s
    is_sound = torch.arange(mine["audio_encoder.hook_out"].shape[1]) < n_audio[:, None]
    shared = (set(theirs.keys()) & set(mine.keys())) - ELSEWHERE
    for name in sorted(shared):
        assert mine[name].shape == theirs[name].shape, name
        if name.endswith(("attn_scores", "pattern")):
            rows = is_token[:, None, :, None] & is_token[:, None, None, :]
            rows = (rows & torch.ones_like(rows).tril()).expand_as(
                mine[name]
            )  # HF masks by a large number, ours by -inf
            assert_close(mine[name][rows], theirs[name][rows], msg=lambda text, name=name: f"{name}: {text}")
        elif name == "audio_encoder.hook_out":
            assert_close(mine[name][is_sound], theirs[name][is_sound])
        else:
            assert_close(mine[name][is_token], theirs[name][is_token], msg=lambda text, name=name: f"{name}: {text}")


def test_every_decoder_hook_point_of_ours_was_compared(caches):
    _, (_, theirs), (_, mine) = caches
    decoder = {name for name in mine.keys() if name.startswith(("blocks.", "ln_final."))}  # noqa: SIM118
    assert decoder - set(theirs.keys()) == set()
