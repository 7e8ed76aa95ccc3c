"""Ours against transformers, live, float32, at the default tolerance of `assert_close`: logits and every state."""

import pytest
import torch
from reference import chirps, hf_batch, hf_states
from torch.testing import assert_close

from lalm_lens.inputs import Inputs

DURATIONS_S = [2.0, 0.8, 1.37]  # one left-padded batch, an odd number of encoder states among them
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}


WIDE_HEADS = {"n_kv_heads": 2, "head_dim": 24}  # not d_model / n_heads


@pytest.mark.parametrize(
    "text", [{"n_kv_heads": 4}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, SLIDING, WIDE_HEADS], ids=str
)
def test_logits_and_every_state_match_hf(pair, text):
    hf, ours = pair(**text)
    batch = hf_batch(chirps(DURATIONS_S))
    their_logits, theirs = hf_states(hf, batch)
    is_token = batch["attention_mask"].bool()
    with torch.no_grad():
        logits, cache = ours.run_with_cache(Inputs.from_hf(batch))
    assert_close(logits[is_token], their_logits[is_token])
    for layer in range(hf.config.text_config.num_hidden_layers):
        assert_close(cache["resid_post", layer][is_token], theirs[f"decoder.{layer}"][is_token])
    for layer in range(hf.config.audio_config.encoder_layers):
        assert_close(cache[f"audio_encoder.blocks.{layer}.hook_resid_post"], theirs[f"encoder.{layer}"])
    assert_close(cache["audio_encoder.hook_out"], theirs["encoder_norm"])
    assert_close(cache["adapter.hook_out"], theirs["projector"])


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_logits_match_hf_without_audio(pair, n_kv_heads):
    hf, ours = pair(n_kv_heads=n_kv_heads)
    tokens = torch.randint(10, 240, (3, 21), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert_close(ours(tokens), hf(input_ids=tokens, use_cache=False).logits)


def test_logits_match_hf_without_audio_in_a_padded_batch(pair):
    hf, ours = pair()
    tokens = torch.randint(10, 240, (2, 12), generator=torch.Generator().manual_seed(6))
    is_token = torch.ones_like(tokens).bool()
    is_token[0, :5] = False
    with torch.no_grad():
        theirs = hf(input_ids=tokens, attention_mask=is_token.long(), use_cache=False).logits
        assert_close(ours(tokens, attention_mask=is_token)[is_token], theirs[is_token])


def test_tiny_lalm_matches_hf(tiny_lalm):
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    from lalm_lens.assets import TINY_LALM
    from lalm_lens.attributes import ATTRIBUTES

    hf = Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(TINY_LALM)
    clips = chirps(DURATIONS_S)
    prompts = [
        tiny_lalm.processor.prompt(attribute, tiny_lalm.processor.n_frames(clip))
        for attribute, clip in zip(ATTRIBUTES.values(), clips, strict=False)
    ]
    ours = tiny_lalm.processor.inputs(prompts, clips)
    batch = {
        "input_ids": ours.tokens,
        "attention_mask": ours.attention_mask.long(),
        **processor.feature_extractor(
            [clip.numpy() for clip in clips], sampling_rate=16_000, padding="max_length", return_tensors="pt"
        ),
    }
    batch["feature_attention_mask"] = (torch.arange(ours.mel.shape[-1]) < ours.n_frames[:, None]).long()
    their_logits, theirs = hf_states(hf, {**batch, "attention_mask": ours.attention_mask.long()})
    with torch.no_grad():
        logits, cache = tiny_lalm.run_with_cache(ours)
    assert_close(logits[ours.attention_mask], their_logits[ours.attention_mask])
    for layer in range(hf.config.text_config.num_hidden_layers):
        assert_close(cache["resid_post", layer][ours.attention_mask], theirs[f"decoder.{layer}"][ours.attention_mask])
    for layer in range(hf.config.audio_config.encoder_layers):
        assert_close(cache[f"audio_encoder.blocks.{layer}.hook_resid_post"], theirs[f"encoder.{layer}"])
    assert_close(cache["adapter.hook_out"], theirs["projector"])


def test_explicit_attention_agrees_with_the_fused_kernel(pair):
    _, ours = pair(**SLIDING)
    inputs = Inputs.from_hf(hf_batch(chirps(DURATIONS_S)))
    listening = [(name, lambda pattern, hook: pattern) for name in ours.hook_dict if name.endswith("hook_pattern")]
    with torch.no_grad():
        fused, explicit = ours(inputs), ours.run_with_hooks(inputs, fwd_hooks=listening)
    assert_close(explicit[inputs.attention_mask], fused[inputs.attention_mask])


def test_left_padding_does_not_move_the_answer(pair):
    _, ours = pair()
    clips = chirps(DURATIONS_S)
    together = Inputs.from_hf(hf_batch(clips))
    with torch.no_grad():
        batched = ours(together, logits_at=-1)
        for row in range(len(clips)):
            real = together.attention_mask[row]
            alone = Inputs(
                together.tokens[row, real][None],
                real[real][None],
                together.mel[row, None],
                together.n_frames[row, None],
            )
            assert_close(ours(alone, logits_at=-1)[0], batched[row])


def test_norms_round_where_hf_rounds():
    """Before the multiplication by w. After it, a quarter of the bf16 values differ."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    from lalm_lens.nn.norm import RMSNorm

    theirs, ours = Qwen2RMSNorm(256, eps=1e-6).bfloat16(), RMSNorm(256, eps=1e-6).bfloat16()
    w, x = 1 + 0.3 * torch.randn(256), torch.randn(4, 50, 256).bfloat16()
    for norm, name in ((theirs, "weight"), (ours, "w")):
        getattr(norm, name).data.copy_(w)
    assert (ours(x) == theirs(x)).float().mean() > 0.999


def test_a_wide_dtype_stays_wide(pair):
    hf, ours = pair()
    batch = hf_batch(chirps([1.0]))
    wide = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    with torch.no_grad():
        theirs = hf.double()(**wide, use_cache=False).logits
        mine = ours.double()(Inputs.from_hf(wide))
    assert mine.dtype == torch.float64
    assert_close(mine, theirs, rtol=0, atol=1e-6)  # far below float32's noise; HF's own RMSNorm rounds to float32


def test_inputs_go_to_hf_and_back():
    batch = hf_batch(chirps(DURATIONS_S))
    there = Inputs.from_hf(batch).to_hf("feature_attention_mask")
    assert there.keys() == batch.keys()
    for name, tensor in batch.items():
        assert torch.equal(there[name], tensor), name
    text = Inputs(batch["input_ids"], batch["attention_mask"].bool()).to_hf("feature_attention_mask")
    assert text.keys() == {"input_ids", "attention_mask"}
