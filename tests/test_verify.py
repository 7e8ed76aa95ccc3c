"""`verify` agrees with what is right, and names the first place that is not."""

import gc
import shutil
from types import SimpleNamespace

import pytest
import torch
from reference import chirps
from safetensors.torch import load_file, save_file
from torch import nn

import lalm_lens.verify
from lalm_lens.assets import TINY_LALM
from lalm_lens.errors import ConversionError
from lalm_lens.inputs import Inputs
from lalm_lens.loading import from_pretrained
from lalm_lens.model import HookedLALM
from lalm_lens.verify import hf_states, verify

PLACES = [
    *(f"audio_encoder.blocks.{n}" for n in range(2)),
    "adapter",
    "hook_embed",
    *(f"blocks.{n}" for n in range(8)),
    "logits",
]


def test_a_right_model_agrees_everywhere():
    verification = verify(TINY_LALM)
    assert verification.passed
    assert verification.frame.what.tolist() == PLACES
    assert (verification.frame.difference < 1e-4).all()
    assert (verification.frame.hf_difference > 0).all()  # the two attentions of HF did run
    assert "tiny_lalm agrees with transformers in torch.float32" in repr(verification)
    assert verification.verdict in repr(verification)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_right_model_agrees_in_narrow_types_and_about_own_clips(dtype):
    verification = verify(TINY_LALM, dtype=dtype, waveforms=chirps([0.4, 1.9]))
    assert verification.passed, verification
    assert verification.dtype == dtype


SPOILT = {
    "audio_encoder.blocks.0": "audio_encoder.conv1.bias",
    "audio_encoder.blocks.1": "audio_encoder.blocks.1.mlp.out_proj.weight",
    "adapter": "adapter.linear.bias",
    "hook_embed": "embed.table.weight",
    "blocks.0": "blocks.0.ln1.w",
    "blocks.5": "blocks.5.attn.k_proj.weight",
    "logits": "ln_final.w",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", SPOILT)
def test_a_changed_weight_is_found_where_it_first_matters(monkeypatch, place, dtype):
    def spoilt(*args: object, **kwargs: object) -> HookedLALM:
        model = from_pretrained(*args, **kwargs)
        model.get_parameter(SPOILT[place]).data.mul_(2)
        return model

    monkeypatch.setattr(lalm_lens.verify, "from_pretrained", spoilt)
    verification = verify(TINY_LALM, dtype=dtype)
    assert not verification.passed
    assert f"DIFFERS from transformers in {dtype}: first in {place}, in " in verification.verdict
    assert verification.frame.agrees.tolist().index(False) == PLACES.index(place)


def test_huge_channels_are_no_difference(tmp_path):
    """A trained model's residual stream has them; there `assert_close` would refuse what is only rounding."""
    shutil.copytree(TINY_LALM, tmp_path / "model")
    tensors = load_file(TINY_LALM / "model.safetensors")
    tensors["language_model.model.layers.2.mlp.down_proj.weight"][7] *= 1000
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    verification = verify(tmp_path / "model")
    assert verification.passed, verification
    assert verification.frame.difference.max() > 1e-4
    assert verification.frame.largest.max() > 500


def test_a_nan_is_a_difference(monkeypatch):
    def spoilt(*args: object, **kwargs: object) -> HookedLALM:
        model = from_pretrained(*args, **kwargs)
        model.blocks[7].mlp.out_proj.weight.data[0, 0] = torch.nan
        return model

    monkeypatch.setattr(lalm_lens.verify, "from_pretrained", spoilt)
    assert (
        "first in blocks.7, in 2 of 13 places in all (largest difference nan, in blocks.7)" in verify(TINY_LALM).verdict
    )


def test_one_model_at_a_time_is_in_memory(monkeypatch):
    def n_weights() -> int:
        return sum(type(thing) is nn.Parameter for thing in gc.get_objects())

    gc.collect()
    before, seen, load_hf = n_weights(), [], lalm_lens.verify.load_hf
    monkeypatch.setattr(lalm_lens.verify, "load_hf", lambda *args: seen.append(n_weights()) or load_hf(*args))
    gc.disable()  # what is freed now is freed on purpose
    try:
        verify(TINY_LALM)
    finally:
        gc.enable()
    assert seen == [before]


def test_blocks_that_return_tuples_are_read_as_well():
    class Block(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> tuple:
            return hidden_states + 1, None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=self.block(hidden_states=input_ids.float())[0])

    tokens = torch.ones(1, 3, dtype=torch.long)
    model = Model()
    states = hf_states(model, {"blocks.0": model.block}, Inputs(tokens, tokens.bool()).to_hf("feature_attention_mask"))
    assert {name: float(state.mean()) for name, state in states.items()} == {
        "hook_embed": 1,
        "blocks.0": 2,
        "logits": 2,
    }


def test_a_checkpoint_without_a_processor_is_refused(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY_LALM / name, tmp_path / name)
    with pytest.raises(ConversionError, match="no tokenizer and feature extractor"):
        verify(tmp_path)
