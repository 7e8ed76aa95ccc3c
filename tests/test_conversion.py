"""Checkpoints: exact both ways, and refused by name when anything does not fit."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from reference import randomise, tiny_hf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

import lalm_lens.loading
from conversions._llama import DECODER, windows
from conversions.qwen2_audio import PUBLISHED, ROWS, TRANSFORMERS_5
from lalm_lens.assets import TINY_LALM
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.config import ConfigReader, DecoderConfig, Rope
from lalm_lens.errors import ConversionError, PromptError
from lalm_lens.loading import from_pretrained, our_conversions
from lalm_lens.transformer import HookedTransformer
from lalm_lens.weights import Checkpoint, Drop, Layout, Rule, Table, Tied, assign, export, load, onto


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint in the published layout."""
    tiny_hf().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()} | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, section: str | None, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config[section] if section else config).update(changes)
    path.write_text(json.dumps(config))


def test_a_round_trip_is_exact(folder):
    model, stored = from_pretrained(folder), load_file(folder / "model.safetensors")
    exported = dict(export(model, ROWS, PUBLISHED))
    assert exported.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(exported[name], tensor), name


def test_both_layouts_load_and_give_the_same_model(folder, tmp_path_factory):
    published = from_pretrained(folder)
    other = tmp_path_factory.mktemp("tf5")
    (other / "config.json").write_text((folder / "config.json").read_text())
    as_in_transformers_5 = {name: tensor.clone() for name, tensor in export(published, ROWS, TRANSFORMERS_5)}
    assert as_in_transformers_5.keys() == tiny_hf().state_dict().keys()
    save_file(as_in_transformers_5, other / "model.safetensors")
    for (name, a), (_, b) in zip(published.named_parameters(), from_pretrained(other).named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_shards_load_like_one_file(folder):
    whole = from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    for n, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name].clone() for name in part}, folder / f"model-0000{n}-of-00002.safetensors")
    for a, b in zip(whole.parameters(), from_pretrained(folder).parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_index_names_the_files_to_read(folder):
    names = sorted(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "shard-1.safetensors")
    save_file({"another.format": torch.zeros(1)}, folder / "consolidated.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "shard-1.safetensors")}))
    from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "shard-2.safetensors")}))
    with pytest.raises(ConversionError, match=r"names shard-2\.safetensors, which is not in the folder"):
        from_pretrained(folder)


def test_every_parameter_is_loaded_and_none_is_left_on_meta(folder):
    model = from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    "name", sorted(load_file(Path(__file__).parent / "golden/qwen2_audio/checkpoint/model.safetensors"))
)
def test_any_one_missing_tensor_is_refused_by_name(folder, name):
    rewrite(folder, **{name: None})
    with pytest.raises(ConversionError, match="1 missing: " + name.replace(".", r"\.")):
        from_pretrained(folder)


def test_an_extra_and_a_misshapen_tensor_are_refused_by_name(folder):
    rewrite(folder, **{"audio_tower.layers.0.self_attn.k_proj.bias": torch.zeros(32)})
    with pytest.raises(ConversionError, match=r"1 unknown: audio_tower\.layers\.0\.self_attn\.k_proj\.bias"):
        from_pretrained(folder)
    rewrite(folder, **{"audio_tower.layers.0.self_attn.k_proj.bias": None, "audio_tower.conv1.bias": torch.zeros(7)})
    with pytest.raises(ConversionError, match=r"audio_tower\.conv1\.bias is \(7,\), expected \(32,\)"):
        from_pretrained(folder)


def test_a_layer_too_many_is_refused(folder):
    set_config(folder, "text_config", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(ConversionError, match=r"12 unknown: language_model\.model\.layers\.3\."):
        from_pretrained(folder)


@pytest.mark.parametrize("section", [None, "audio_config", "text_config"])
def test_an_unknown_config_key_is_refused_by_name(folder, section):
    set_config(folder, section, logit_softcapping=30.0)
    with pytest.raises(ConversionError, match="does not know: logit_softcapping"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("text_config", {"hidden_act": "gelu"}),
        ("text_config", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("text_config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}),
        ("text_config", {"tie_word_embeddings": True}),
        ("text_config", {"layer_types": ["sliding_attention"] * 4}),
        ("text_config", {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 4}),
        ("text_config", {"num_key_value_heads": 3}),
        ("audio_config", {"activation_function": "relu"}),
        ("audio_config", {"scale_embedding": True}),
        ("audio_config", {"encoder_attention_heads": 0}),
        ("text_config", {"layer_types": ["full_attention"] * 3}),
        ("text_config", {"layer_types": 3}),
        ("text_config", {"num_attention_heads": "4"}),
        (None, {"text_config": "qwen2"}),
        (None, {"model_type": ["qwen2_audio"]}),
        (None, {"model_type": "never_heard_of"}),
    ],
    ids=str,
)
def test_a_config_that_asks_for_other_arithmetic_is_refused(folder, section, change):
    set_config(folder, section, **change)
    with pytest.raises(ConversionError):
        from_pretrained(folder)


def test_the_published_config_of_the_7b_is_understood():
    published = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "audio_config": {"model_type": "qwen2_audio_encoder", "init_std": 0.02, "num_mel_bins": 128},
        "audio_token_index": 151646,
        "ignore_index": -100,
        "model_type": "qwen2_audio",
        "text_config": {
            "bos_token_id": 151643,
            "intermediate_size": 11008,
            "max_position_embeddings": 8192,
            "model_type": "qwen2",
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000,
            "sliding_window": 32768,
            "torch_dtype": "bfloat16",
            "use_mrope": False,
            "vocab_size": 156032,
        },
        "torch_dtype": "bfloat16",
        "vocab_size": 156032,
    }
    cfg = our_conversions()["qwen2_audio"].config(published)
    decoder = cfg.decoder
    assert (decoder.n_layers, decoder.d_model, decoder.n_heads, decoder.n_kv_heads) == (32, 4096, 32, 32)
    assert (decoder.d_head, decoder.d_mlp, decoder.eps, decoder.rope.theta) == (128, 11008, 1e-5, 1e4)
    assert set(decoder.windows) == {None}
    assert (cfg.encoder.n_layers, cfg.encoder.d_model, cfg.encoder.n_frames) == (32, 1280, 3000)


@pytest.mark.parametrize(
    "asked",
    [
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 2},
        {"use_sliding_window": False, "sliding_window": 5},
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 3},
        {},
    ],
    ids=str,
)
def test_windows_are_those_of_qwen2config(asked):
    hf = Qwen2Config(num_hidden_layers=6, **asked)
    theirs = tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types)
    assert windows(ConfigReader(asked, "text_config"), 6) == theirs


def test_a_decoder_without_biases_matches_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
    hf = randomise(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))).eval()
    cfg = DecoderConfig(
        n_layers=2,
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        d_head=8,
        d_mlp=48,
        d_vocab=60,
        n_ctx=64,
        eps=hf.config.rms_norm_eps,
        rope=Rope(10_000.0),
        qkv_bias=False,
        windows=(None, None),
    )
    ours = HookedTransformer(cfg)
    table = Table((*(rule.under(hf="model.") for rule in DECODER), Rule("lm_head.weight", "unembed.linear.weight")))
    for name, tensor in hf.state_dict().items():
        assign(ours, table.find(name)[1][0], tensor)
    tokens = torch.randint(0, 60, (2, 11))
    with torch.no_grad():
        assert_close(ours(tokens), hf(tokens, use_cache=False).logits)


def test_a_tensor_in_two_files_and_a_quantised_one_are_refused(folder):
    whole = folder / "model.safetensors"
    whole.rename(folder / "a.safetensors")
    save_file({"audio_tower.conv1.bias": torch.zeros(32)}, folder / "b.safetensors")
    with pytest.raises(ConversionError, match=r"audio_tower\.conv1\.bias is in two files"):
        from_pretrained(folder)
    (folder / "b.safetensors").unlink()
    (folder / "a.safetensors").rename(whole)
    rewrite(folder, **{"audio_tower.conv1.bias": torch.zeros(32, dtype=torch.int8)})
    with pytest.raises(ConversionError, match="I8: quantised"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", None),
        ("processor_config.json", "[]"),
        ("processor_config.json", None),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
    ],
)
def test_a_broken_processor_is_refused(tmp_path, file, content):
    shutil.copytree(TINY_LALM, tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    if content is not None:
        (tmp_path / "model" / file).write_text(content)
    with pytest.raises(ConversionError, match="cannot be read"):
        from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("template", ["{% if %}", "{{ nothing.at.all }}", "{{ messages[0]['content'] }}"])
def test_a_broken_chat_template_is_refused(tmp_path, template):
    shutil.copytree(TINY_LALM, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    model = from_pretrained(tmp_path / "model")
    with pytest.raises(PromptError):
        model.processor.prompt(ATTRIBUTES["gender"], n_frames=20)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[]"])
def test_a_broken_index_is_refused(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConversionError, match="Download it again"):
        from_pretrained(folder)


def test_a_model_is_called_by_its_folder_or_its_hub_id(folder, monkeypatch):
    assert from_pretrained(folder).cfg.model_name == folder.name
    monkeypatch.setattr(lalm_lens.loading, "snapshot_download", lambda *args, **kwargs: str(folder))
    assert from_pretrained("someone/some-model").cfg.model_name == "someone/some-model"


def test_files_that_are_no_checkpoint_are_refused(folder, tmp_path_factory):
    with pytest.raises(ConversionError, match="no model at"):
        from_pretrained(folder / "nowhere" / "at" / "all")
    with pytest.raises(ConversionError, match=r"no config\.json"):
        from_pretrained(tmp_path_factory.mktemp("empty"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ConversionError, match="not a whole safetensors file"):
        from_pretrained(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="a pickle can run code"):
        from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="not JSON"):
        from_pretrained(folder)


def test_a_foreign_conversions_package_is_told_apart(monkeypatch):
    import conversions

    monkeypatch.setattr(conversions, "OWNER", "someone else")
    with pytest.raises(ConversionError, match="Another package called `conversions`"):
        lalm_lens.loading.our_conversions()


class Little(nn.Module):
    """Two parameters, enough for every kind of row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, device="meta")
        self.inner = nn.Linear(3, 3, bias=False, device="meta")


LITTLE = (
    Rule("wte.weight", "table.weight"),
    Rule("h.{i}.w", "inner.weight"),
    Tied("head.weight", to="wte.weight"),
    Drop("talker.*", why="it speaks"),
)


def loaded(folder: Path, tensors: dict[str, torch.Tensor], layout: Layout) -> Little:
    model = Little()
    save_file(tensors, folder / "model.safetensors")
    with ExitStack() as stack:
        load(model, Checkpoint.open(folder, stack), LITTLE, (layout,), onto(torch.device("cpu"), torch.float32))
    return model


def test_rows_may_tie_and_drop(tmp_path):
    layout = Layout((("model.", ""),))
    table, w = torch.randn(5, 3), torch.randn(3, 3)
    tensors = {"model.wte.weight": table, "model.h.0.w": w, "model.head.weight": table.clone(), "talker.x": w.clone()}
    model = loaded(tmp_path, tensors, layout)
    assert_close(model.table.weight.data, table)
    assert_close(model.inner.weight.data, w)
    with pytest.raises(ConversionError, match="said to be tied"):
        loaded(tmp_path, {**tensors, "model.head.weight": table + 1}, layout)


def test_a_tensor_that_two_rows_claim_is_our_own_mistake():
    with pytest.raises(AssertionError, match="matches two rows"):
        Table(
            (Rule("a.{i}", "x"), Drop("a.*", why="")),
        ).find("a.1")
