"""A transformers model in memory becomes ours on the same weights, or is refused with advice."""

from collections.abc import Callable

import pytest
import torch
from reference import chirps, hf_batch, hf_states, tiny_hf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, Qwen2AudioForConditionalGeneration

import lalm_lens
from lalm_lens.assets import TINY_LALM
from lalm_lens.errors import ConversionError
from lalm_lens.inputs import Inputs
from lalm_lens.loading import from_hf


def test_it_computes_what_hf_computes_on_the_same_storage():
    hf = tiny_hf()
    ours = lalm_lens.from_hf(hf)
    batch = hf_batch(chirps([2.0, 0.8]))
    their_logits, _ = hf_states(hf, batch)
    is_token = batch["attention_mask"].bool()
    with torch.no_grad():
        assert_close(ours(Inputs.from_hf(batch))[is_token], their_logits[is_token])
    theirs = {p.data_ptr() for p in hf.parameters()}
    assert {p.data_ptr() for p in ours.parameters()} == theirs
    assert ours.processor is None
    assert not ours.training


def test_an_edit_of_one_is_an_edit_of_the_other():
    hf = tiny_hf()
    ours = from_hf(hf)
    ours.blocks[1].attn.W_Q = torch.zeros_like(ours.blocks[1].attn.W_Q)
    assert not hf.model.language_model.layers[1].self_attn.q_proj.weight.any()
    with torch.no_grad():
        hf.lm_head.weight.fill_(3.0)
    assert (ours.W_U == 3).all()


def test_dtype_stays_and_a_processor_is_taken_along():
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM, dtype=torch.bfloat16).train()
    ours = from_hf(hf, AutoProcessor.from_pretrained(TINY_LALM))
    assert {p.dtype for p in ours.parameters()} == {ours.cfg.dtype} == {torch.bfloat16}
    assert len(ours.processor.prompt(lalm_lens.ATTRIBUTES["gender"], n_frames=100)) > 25
    assert ours.cfg.model_name == "tiny_lalm"
    assert hf.training


class Lora(nn.Module):
    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer


def wrap(hf: Qwen2AudioForConditionalGeneration) -> None:
    hf.lm_head = Lora(hf.lm_head)


def to_meta(hf: Qwen2AudioForConditionalGeneration) -> None:
    hf.lm_head.to("meta")


def to_another_device(hf: Qwen2AudioForConditionalGeneration) -> None:
    with FakeTensorMode():
        hf.lm_head.weight = nn.Parameter(torch.empty(260, 64, device="cuda"))


def quantise(hf: Qwen2AudioForConditionalGeneration) -> None:
    hf.lm_head.weight = nn.Parameter(torch.zeros(260, 64, dtype=torch.int8), requires_grad=False)


def ask_for_other_arithmetic(hf: Qwen2AudioForConditionalGeneration) -> None:
    hf.config.text_config.logit_softcapping = 30.0


def grow(hf: Qwen2AudioForConditionalGeneration) -> None:
    hf.resize_token_embeddings(300)
    hf.config.text_config.vocab_size = 260


REFUSED = {
    "is wrapped by PEFT: .*merge_and_unload": wrap,
    r"is offloaded .* \(1 of 90 tensors, e\.g\. lm_head\.weight\)": to_meta,
    "is split over devices: load it on one": to_another_device,
    "is quantised": quantise,
    "mixes dtypes": lambda hf: hf.lm_head.half(),
    "does not know: logit_softcapping": ask_for_other_arithmetic,
    r"2 of another shape: lm_head\.weight is \(300, 64\), expected \(260, 64\)": grow,
    r"1 unknown: model\.audio_tower\.extra\.weight": lambda hf: hf.model.audio_tower.add_module(
        "extra", nn.Linear(2, 2, bias=False)
    ),
    r"1 missing: model\.language_model\.norm\.weight": lambda hf: delattr(hf.model.language_model.norm, "weight"),
}


@pytest.mark.parametrize(("message", "spoil"), REFUSED.items(), ids=[call.__name__ for call in REFUSED.values()])
def test_what_cannot_be_shared_is_refused(message: str, spoil: Callable):
    hf = tiny_hf()
    spoil(hf)
    with pytest.raises(ConversionError, match=message):
        from_hf(hf)


def test_another_kind_of_model_is_refused():
    with pytest.raises(ConversionError, match="no conversion for model type 'llama'"):
        from_hf(LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=9)))
    with pytest.raises(ConversionError, match="Linear is no transformers model"):
        from_hf(nn.Linear(2, 2))
    with pytest.raises(ConversionError, match=r"missing: .*lm_head"):
        from_hf(tiny_hf().model)
