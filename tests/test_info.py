"""What `info` says of a config is what the model then is and costs."""

import json

import pytest
import torch
from reference import chirps

import lalm_lens.loading
from lalm_lens.assets import TINY_LALM
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.axes import axes_of
from lalm_lens.errors import ConversionError
from lalm_lens.info import CACHED, DTYPES, collapsed, info
from lalm_lens.loading import from_pretrained

SEVEN_B = {  # as on the Hub
    "model_type": "qwen2_audio",
    "audio_token_index": 151646,
    "audio_config": {"model_type": "qwen2_audio_encoder", "num_mel_bins": 128},
    "text_config": {
        "model_type": "qwen2",
        "intermediate_size": 11008,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "sliding_window": 32768,
        "vocab_size": 156032,
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_bytes_are_those_of_a_real_run(dtype):
    model = from_pretrained(TINY_LALM, dtype=DTYPES[dtype])
    clips = chirps([2.0])
    prompt = model.processor.prompt(ATTRIBUTES["gender"], model.processor.n_frames(clips[0]))
    n_text = sum(position.region != "audio" for position in prompt.positions)
    predicted = info(TINY_LALM, n_text=n_text)
    assert predicted.n_audio == len(prompt) - n_text == 50
    for what, chosen in CACHED.items():
        with torch.no_grad():
            _, cache = model.run_with_cache(model.processor.inputs([prompt], clips), names_filter=chosen)
        storages = {state.untyped_storage().data_ptr(): state.untyped_storage() for state in cache.values()}
        assert predicted.cache_bytes[what][dtype] == sum(storage.nbytes() for storage in storages.values()) > 0


def test_axes_and_parameters_are_those_of_the_model():
    model = from_pretrained(TINY_LALM)
    described = info(TINY_LALM)
    assert sum(described.n_parameters.values()) == sum(p.numel() for p in model.parameters())
    assert described.n_parameters["adapter"] == 96 * 128 + 128
    for switch in (model.set_use_attn_result, model.set_use_split_qkv_input, model.set_use_hook_mlp_in):
        switch(True)
    clips = chirps([1.0])
    prompt = model.processor.prompt(ATTRIBUTES["gender"], 100)
    with torch.no_grad():
        _, cache = model.run_with_cache(model.processor.inputs([prompt], clips))
    assert set(cache) == {name for name in model.hook_dict if not name.endswith("hook_attn_in")}  # heads share keys
    for name, state in cache.items():
        by_head = name.startswith("blocks.") and ".ln1." in name  # ln1 runs on each head's own copy
        assert len(axes_of(name).split(", ")) + by_head == state.ndim, name


def test_blocks_are_taken_together(tiny_lalm):
    hooks = collapsed(tiny_lalm.hook_dict)
    assert hooks["blocks.{0..7}.hook_resid_post"] == "batch, pos, d_model"
    assert hooks["audio_encoder.blocks.{0..1}.attn.hook_pattern"] == "clip, head, query_pos, key_pos"
    assert hooks["hook_audio_embed"] == "audio_pos, d_model"
    assert len(hooks) == 53


def test_the_7b_is_described_without_its_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B))
    described = info(tmp_path)
    assert sum(described.n_parameters.values()) == 8_397_094_912  # the tensors of the published checkpoint
    assert (described.heard_s, described.n_audio) == (30, 750)
    decoder, encoder = 32 * 810 * 4096 * 4, 32 * 1500 * 1280 * 4
    assert described.cache_bytes["every resid_post"] == {
        "float32": decoder + encoder,
        "bfloat16": (decoder + encoder) // 2,
    }
    assert 15e9 < described.cache_bytes["everything"]["float32"] < 60e9
    shown = repr(described)
    assert "hears          30 s: 750 audio tokens, 25 a second" in shown
    assert "weights             33,588.4 MB  16,794.2 MB" in shown
    assert "blocks.{0..31}.hook_resid_post" in shown


def test_only_the_config_is_fetched_from_the_hub(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SEVEN_B))
    asked = []
    monkeypatch.setattr(
        lalm_lens.loading,
        "snapshot_download",
        lambda name, allow_patterns, **_: asked.append(allow_patterns) or str(tmp_path),
    )
    assert info("someone/some-model").model_name == "someone/some-model"
    assert asked == [["config.json"]]


def test_a_config_that_cannot_be_converted_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SEVEN_B, "soft": 1}))
    with pytest.raises(ConversionError, match="does not know: soft"):
        info(tmp_path)
