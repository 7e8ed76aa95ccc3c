"""DeSTA2 and DeSTA2.5 against Whisper, BERT and Llama of transformers, and what is done with them."""

import json
import pickle
import re
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from desta import GOLDEN, LLAMA3, SHAPES, Connector, Reference, Shape
from engine_cases import assert_same, branches
from reference import chirps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from conversions._llama import rope
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.cli import main
from lalm_lens.config import ConfigReader, Llama3Rope, Rope
from lalm_lens.datasets import Sample
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import Plan
from lalm_lens.errors import AudioError, ConversionError, DataError, HookError, InputError
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.golden import verify_golden, verify_original
from lalm_lens.info import info
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import Knockout, Patch, Scale
from lalm_lens.loading import ABOUT, Files, from_hf, from_pretrained, our_conversions, skeleton
from lalm_lens.model import HookedLALM
from lalm_lens.nn.rope import ROTARY
from lalm_lens.readouts import Logits
from lalm_lens.runs import Run, Source
from lalm_lens.verify import verify
from lalm_lens.weights import Drop, Layout, StateDict, Table, check, export, load

NAMES = Path(__file__).parent / "tensor_names"
PARTLY_ON_DISK = {"blocks.1": "disk", "adapter": "disk", "audio_encoder.blocks.1": "disk", "": "cpu"}


@dataclass(frozen=True)
class Opened:
    """A saved checkpoint of several parts, as transformers' models and as ours."""

    name: str
    folder: Path
    parts: dict[str, Path]
    theirs: Reference
    ours: HookedLALM

    def inputs(self, n_prompts: int = 3) -> Inputs:
        """Left-padded prompts, each with a clip."""
        generator = torch.Generator().manual_seed(3)
        audio = [self.ours.lalm_cfg.audio_token] * self.theirs.shape.n_queries
        n_after = [9, 4, 6][:n_prompts]
        tokens = torch.zeros(n_prompts, 6 + len(audio) + max(n_after), dtype=torch.long)
        is_token = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, n in enumerate(n_after):
            words = torch.randint(5, 400, (6 + n,), generator=generator).tolist()
            tokens[row, -6 - len(audio) - n :] = torch.tensor([*words[:6], *audio, *words[6:]])
            is_token[row, -6 - len(audio) - n :] = True
        mel = torch.randn(n_prompts, self.theirs.shape.n_mels, 200, generator=generator)
        return Inputs(tokens, is_token, mel, torch.full((n_prompts,), 200))


def open_tiny(name: str, folder: Path) -> Opened:
    theirs = Reference.of(SHAPES[name])
    parts = theirs.save(folder)
    return Opened(name, folder, parts, theirs, from_pretrained(folder, parts=parts))


@pytest.fixture(scope="module", params=SHAPES)
def every(request, tmp_path_factory) -> Opened:
    return open_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=["desta2_tiny", "desta25_tiny"])
def opened(request, tmp_path_factory) -> Opened:
    return open_tiny(request.param, tmp_path_factory.mktemp(request.param))


def test_logits_and_every_state_match_transformers(every):
    inputs, audio_token = every.inputs(), every.ours.lalm_cfg.audio_token
    with torch.no_grad():
        logits, cache = every.ours.run_with_cache(inputs)
    for row, is_token in enumerate(inputs.attention_mask):
        theirs = every.theirs.states(inputs.tokens[row, is_token][None], inputs.mel[row, None], audio_token)
        assert_close(logits[row, is_token], theirs["logits"][0])
        assert_close(cache["hook_embed"][row, is_token], theirs["embed"][0])
        for layer in range(every.ours.cfg.n_layers):
            assert_close(cache["resid_post", layer][row, is_token], theirs[f"decoder.{layer}"][0])
        for layer in range(every.ours.lalm_cfg.encoder.n_layers):
            assert_close(cache[f"audio_encoder.blocks.{layer}.hook_resid_post"][row], theirs[f"encoder.{layer}"][0])
        n_taps = len(every.theirs.shape.taps)
        for tap in range(n_taps):
            assert_close(cache["audio_encoder.hook_out"][row, :, tap], theirs[f"tap.{tap}"][0])
        for layer in range(every.theirs.shape.n_qformer):
            ours = cache[f"adapter.blocks.{layer}.hook_normalized_resid_post"][row * n_taps + n_taps - 1]
            assert_close(ours, theirs[f"qformer.{layer}"][0])
        assert_close(cache["adapter.hook_out"][row], theirs["audio"][0])


@pytest.mark.parametrize("low", [1.0, 0.25])
@pytest.mark.parametrize("trained", [64, 8192])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_llama3_rates_are_those_of_transformers(theta, trained, low):
    said = {"factor": 8.0, "low_freq_factor": low, "high_freq_factor": 4.0, "original_max_position_embeddings": trained}
    hf = LlamaConfig(head_dim=128, rope_parameters={"rope_theta": theta, "rope_type": "llama3", **said})
    old = {"rope_theta": theta, "rope_scaling": {"type": "llama3", **said}}
    for section in ({"rope_parameters": hf.rope_parameters}, old, {"rope_scaling": hf.rope_parameters}):
        ours = ROTARY[Llama3Rope](rope(ConfigReader(section, "config.json")), 128)
        theirs = LlamaRotaryEmbedding(hf)
        assert torch.equal(ours.rates(torch.device("cpu")), theirs.inv_freq)
        positions = torch.tensor([[0, 1, 77, 9000]])
        rotation = ours(positions, torch.float32)
        assert_close((rotation.cos[:, :, 0], rotation.sin[:, :, 0]), theirs(torch.zeros(1), positions))


@pytest.mark.parametrize(
    "said",
    [
        {"rope_type": "yarn", "factor": 8.0},
        {"factor": 8.0},
        {**LLAMA3, "type": "linear"},
        {**LLAMA3, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
        {**LLAMA3, "factor": 0.0},
        {**LLAMA3, "attention_factor": 2.0},
        *({key: value for key, value in LLAMA3.items() if key != left_out} for left_out in list(LLAMA3)[1:]),
    ],
    ids=str,
)
def test_a_rope_that_we_do_not_compute_is_refused(said):
    for name in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ConversionError):
            rope(ConfigReader({name: said}, "config.json"))


# --- conversion ----------------------------------------------------------------------------------------------


def stored_in(opened: Opened) -> dict[str, Tensor]:
    """All tensors of all files, as the table names them."""
    own = opened.folder / "qformer_connector.pth"
    tensors = torch.load(own, weights_only=True) if own.exists() else load_file(opened.folder / "model.safetensors")
    for part, folder in opened.parts.items():
        tensors |= {f"{part}/{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    return tensors


def kept(opened: Opened, names) -> set[str]:
    """Those that are not dropped by name."""
    table = Table(conversion_of(opened).rows(opened.ours.lalm_cfg))
    return {name for name in names if not isinstance(table.find(name)[0], Drop)}


def conversion_of(opened: Opened):
    return our_conversions()[opened.theirs.shape.model_type]


def test_a_round_trip_is_exact(every):
    stored = stored_in(every)
    exported = dict(export(every.ours, conversion_of(every).rows(every.ours.lalm_cfg), Layout()))
    assert exported.keys() == kept(every, stored)
    dropped = {re.sub(r"\d+", "N", name.rpartition(".")[0]) for name in stored.keys() - exported.keys()}
    assert all(
        "decoder" in name or name.endswith(("encoder.layer_norm", "proj_out")) or "layers.N" in name for name in dropped
    )
    for name, tensor in exported.items():
        assert torch.equal(stored[name], tensor), name


def test_any_one_missing_or_added_tensor_is_refused_by_name(opened):
    files = Files.find(opened.folder, None, opened.parts, *ABOUT)
    model = skeleton(files.config, files.conversion, "tiny")
    rows, whole = Table(files.conversion.rows(model.lalm_cfg)), stored_in(opened)
    rows.find, rows.hf_name = cache(rows.find), cache(rows.hf_name)
    check(model, StateDict("whole", whole), rows, Layout())
    names = kept(opened, whole)
    assert {name.partition("/")[0] for name in names if "/" in name} == {"whisper", "llm"}
    for name in names:
        rest = {other: tensor for other, tensor in whole.items() if other != name}
        with pytest.raises(ConversionError, match=f"model: 1 missing: {re.escape(name)}\\. "):
            check(model, StateDict("cut", rest), rows, Layout())
        beside = f"{name}_scale"
        with pytest.raises(ConversionError, match=f"model: 1 unknown: {re.escape(beside)}\\. "):
            check(model, StateDict("more", {**whole, beside: torch.zeros(3)}), rows, Layout())
        bent = {**whole, name: whole[name][None]}
        with pytest.raises(ConversionError, match=f"model: 1 of another shape: {re.escape(name)} is "):
            check(model, StateDict("bent", bent), rows, Layout())


REAL = {
    "desta2": (
        Shape("DestaModel", "openai/whisper-small", (2, 5, 8, 11), 12, n_queries=64, d_encoder=768),
        {"encoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_layers": 12, "decoder_attention_heads": 12},
        {"rope_scaling": None, "max_position_embeddings": 8192},
    ),
    "desta25": (
        Shape("desta25", "openai/whisper-large-v3", (7, 15, 23, 31), 32, 128, 64, 6, d_encoder=1280),
        {"encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "decoder_layers": 32, "decoder_attention_heads": 20},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}, "max_position_embeddings": 131072},
    ),
}
WHISPER = {
    "vocab_size": 51866,
    "max_source_positions": 1500,
    "max_length": 448,
    "suppress_tokens": [],
    "model_type": "whisper",
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_architecture_converts(name):
    """Every tensor of the published sizes, without its numbers, under the published names."""
    shape, of_whisper, of_llama = REAL[name]
    sizes = {"encoder_layers": shape.n_encoder, "d_model": shape.d_encoder, "num_mel_bins": shape.n_mels}
    configs = {"whisper": WHISPER | sizes | of_whisper, "llm": LLAMA | of_llama}
    with torch.device("meta"):
        models = {
            "whisper": WhisperForConditionalGeneration(WhisperConfig(**configs["whisper"])),
            "llm": LlamaForCausalLM(LlamaConfig(**configs["llm"])),
        }
        own = Connector(shape, LLAMA["hidden_size"], of_whisper["encoder_attention_heads"]).state_dict()
    prefix = "" if shape.is_first else "perception.connector."
    own = {f"{prefix}{name}": tensor for name, tensor in own.items()}
    listed = (NAMES / f"{shape.model_type}_published.txt").read_text().split()
    assert {re.sub(r"\.\d+(?=\.|$)", ".{i}", name) for name in own} == set(listed)
    parts = {part: {"config": config} for part, config in configs.items()}
    published = {"model_type": shape.model_type, "parts": parts, "qformer_num_hidden_layers": shape.n_qformer}
    published |= {} if not shape.is_first else {"prompt_size": 64}
    if shape.is_first:
        del published["qformer_num_hidden_layers"]
    conversion = our_conversions()[shape.model_type]
    tensors = own | {f"{part}/{name}": its for part, hf in models.items() for name, its in hf.state_dict().items()}
    ours = skeleton(published, conversion, name)
    load(ours, StateDict(name, tensors), conversion.rows(ours.lalm_cfg), conversion.layouts, lambda _, tensor: tensor)
    cfg = ours.lalm_cfg
    assert cfg.audio_token == (128255 if shape.is_first else 128095)
    assert cfg.qformer.taps == ((2, 5, 8, 11) if shape.is_first else (8, 16, 24, 32))
    assert (cfg.encoder.n_layers, cfg.qformer.n_unheard) == ((11, 1) if shape.is_first else (32, 0))
    assert (cfg.qformer.n_queries, cfg.qformer.n_layers, cfg.decoder.n_ctx) == (
        64,
        shape.n_qformer,
        of_llama["max_position_embeddings"],
    )
    assert isinstance(cfg.decoder.rope, Rope if shape.is_first else Llama3Rope)


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> dict[str, tuple[Path, dict[str, Path]]]:
    """A DeSTA2 and a DeSTA2.5, to be spoilt."""
    return {
        name: (tmp_path / name, Reference.of(SHAPES[name]).save(tmp_path / name))
        for name in ("desta2_tiny", "desta25_tiny")
    }


def set_config(folder: Path, section: str | None = None, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config[section] if section else config).update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["desta2_tiny", "desta25_tiny"])
def test_parts_that_are_missing_or_unknown_are_refused_by_name(saved, name):
    folder, parts = saved[name]
    for part, published in (("whisper", "openai/whisper-tiny"), ("llm", "Llama-3")):
        others = {other: path for other, path in parts.items() if other != part}
        with pytest.raises(
            ConversionError, match=f"The part '{part}' is missing: .*{published}.* --part {part}=FOLDER"
        ):
            from_pretrained(folder, parts=others)
        with pytest.raises(
            ConversionError, match=f"The part '{part}' is missing: There is no model at .*nowhere/at/all"
        ):
            from_pretrained(folder, parts={**parts, part: folder / "nowhere/at/all"})
    with pytest.raises(ConversionError, match="has no part 'llama': its parts are whisper and llm"):
        from_pretrained(folder, parts={**parts, "llama": parts["llm"]})
    with pytest.raises(ConversionError, match=r"whisper: config\.json: model_type = 'llama' is not supported"):
        from_pretrained(folder, parts={"whisper": parts["llm"], "llm": parts["llm"]})
    (parts["llm"] / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"llm holds no \.safetensors file"):
        from_pretrained(folder, parts=parts)


def test_parts_of_a_model_that_has_none_are_refused():
    with pytest.raises(ConversionError, match="A qwen2_audio has no part 'llm': it has none"):
        from_pretrained(GOLDEN / "qwen2_audio" / "checkpoint", parts={"llm": GOLDEN})


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("name", ["desta2_tiny", "desta25_tiny"])
def test_another_whisper_is_refused_by_name(tmp_path, name, copies):
    """What a copy of its config would contradict; and where there is none, what the connector tells."""
    parts = Reference.of(SHAPES[name]).save(tmp_path / "one", copies=copies)
    others = {"n_mels": 128, "n_encoder": 2 if "2_" in name else 3, "d_encoder": 40}
    alone = {
        "n_mels": "hears 128 mel bins, and the connector",
        "n_encoder": "blocks are looked at, and this Whisper has",
    }
    alone["d_encoder"] = "of another shape: .*layer_prompts.*24"
    for size, value in others.items():
        other = Reference.of(replace(SHAPES[name], **{size: value})).save(tmp_path / size)["whisper"]
        says = "contradict each other in " if copies else alone[size]
        with pytest.raises(ConversionError, match=says):
            from_pretrained(tmp_path / "one", parts={**parts, "whisper": other})


OTHER_ARITHMETIC = {
    "desta2_tiny": [
        (None, {"whisper_model_id": "openai/whisper-base"}, "nobody knows what is looked at in 'openai/whisper-base'"),
        ("whisper_config", {"d_model": 48}, "contradict each other in d_model"),
        ("whisper_config", {"scale_embedding": True}, "scale_embedding = True is not supported"),
        ("llama_config", {"rope_parameters": LLAMA3}, "contradict each other in rope"),
        ("llama_config", {"rope_parameters": {"rope_theta": 1e4}}, "contradict each other in rope"),
        ("llama_config", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ],
    "desta25_tiny": [
        (None, {"use_lora": True}, "use_lora = True is not supported"),
        (None, {"connector_mode": "qformer_2"}, "connector_mode = 'qformer_2' is not supported"),
        (None, {"encoder_model_id": "openai/whisper-base"}, "nobody knows what is looked at in 'openai/whisper-base'"),
        (None, {"target_layer_ids": [0, 1, 2]}, "target_layer_ids"),
        (None, {"placeholder_token": "<|reserved_special_token_1|>"}, "placeholder_token = .* is not supported"),
        (None, {"audio_locator": "<audio>"}, "audio_locator = '<audio>' is not supported"),
        ("encoder_config", {"encoder_ffn_dim": 48}, "contradict each other in d_mlp"),
        ("llm_config", {"rms_norm_eps": 1e-6}, "contradict each other in eps"),
        ("llm_config", {"rope_scaling": {**LLAMA3, "factor": 2.0}}, "contradict each other in factor"),
        ("llm_config", {"logit_softcapping": 3.0}, "does not know: logit_softcapping"),
    ],
}


@pytest.mark.parametrize("name", OTHER_ARITHMETIC)
def test_a_config_that_asks_for_other_arithmetic_is_refused(saved, name):
    folder, parts = saved[name]
    whole = (folder / "config.json").read_text()
    of_both = [(None, {"prompt_size": 0}, "prompt_size"), (None, {"logit_softcapping": 3.0}, "does not know: logit")]
    for section, change, says in of_both + OTHER_ARITHMETIC[name]:
        set_config(folder, section, **change)
        with pytest.raises(ConversionError, match=says):
            from_pretrained(folder, parts=parts)
        (folder / "config.json").write_text(whole)
    for part in parts.values():
        set_config(part, logit_softcapping=3.0)
        with pytest.raises(ConversionError, match="does not know: logit_softcapping"):
            from_pretrained(folder, parts=parts)


def test_weights_of_lora_are_refused_by_name(saved):
    folder, parts = saved["desta25_tiny"]
    lora = "llm_model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    tensors = {**load_file(folder / "model.safetensors"), lora: torch.zeros(16, 32)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=f"1 of LoRA, to be merged into what they change: {re.escape(lora)}"):
        from_pretrained(folder, parts=parts)


@pytest.mark.parametrize("part", [None, "llm"])
def test_lora_beside_the_weights_is_refused_by_name(saved, part):
    folder, parts = saved["desta25_tiny"]
    (parts.get(part, folder) / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"holds adapter_model\.safetensors, of LoRA: merge it"):
        from_pretrained(folder, parts=parts)


@pytest.mark.parametrize(("name", "says"), [("desta25_tiny", "is no Llama 3.1"), ("desta2_tiny", "is a Llama 3.1")])
def test_the_llama_of_the_other_is_refused(tmp_path, name, says):
    """Where config.json says nothing of it: its tensors have the same shapes."""
    parts = Reference.of(SHAPES[name]).save(tmp_path / "one", copies=False)
    rope = {} if SHAPES[name].rope else LLAMA3
    other = Reference.of(replace(SHAPES[name], rope=rope)).save(tmp_path / "other", copies=False)["llm"]
    with pytest.raises(ConversionError, match=f"The part 'llm' {says}"):
        from_pretrained(tmp_path / "one", parts={**parts, "llm": other})


def test_the_placeholder_is_found_where_transformers_5_writes_it(saved):
    folder, parts = saved["desta25_tiny"]
    token = from_pretrained(folder, parts=parts).lalm_cfg.audio_token
    AutoTokenizer.from_pretrained(parts["llm"]).save_pretrained(parts["llm"])
    assert "added_tokens_decoder" not in (parts["llm"] / "tokenizer_config.json").read_text()
    assert from_pretrained(folder, parts=parts).lalm_cfg.audio_token == token != 128095


def test_a_tensor_that_is_in_a_part_too_is_refused(saved):
    folder, parts = saved["desta25_tiny"]
    tensors = {**load_file(folder / "model.safetensors"), "llm/model.norm.weight": torch.zeros(32)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=r"llm/model\.norm\.weight is in .*desta25_tiny, and in .*llm too"):
        from_pretrained(folder, parts=parts)


class Writes:
    """Writes a file when it is unpickled by anybody who lets it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_of_a_checkpoint_is_executed(saved, tmp_path):
    folder, parts = saved["desta2_tiny"]
    written, planted = tmp_path / "written", "raise RuntimeError('this was imported')"
    for where in (folder, *parts.values()):
        for name in ("modeling_desta.py", "configuration_desta.py", "tokenization_desta.py", "__init__.py"):
            (where / name).write_text(planted)
        set_config(where, auto_map={"AutoConfig": "configuration_desta.Config", "AutoModel": "modeling_desta.Model"})
    tokenizer = parts["llm"] / "tokenizer_config.json"
    said = json.loads(tokenizer.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization_desta.Mine", None]}}
    tokenizer.write_text(json.dumps(said))
    assert from_pretrained(folder, parts=parts).processor is not None
    plain = torch.load(folder / "qformer_connector.pth", weights_only=True)
    torch.save({**plain, "layer_weights": Writes(written)}, folder / "qformer_connector.pth")
    with pytest.raises(ConversionError, match=r"qformer_connector\.pth is no pickle of plain tensors.*it is not read"):
        from_pretrained(folder, parts=parts)
    assert not written.exists()
    torch.load(folder / "qformer_connector.pth", weights_only=False)
    assert written.exists(), "the pickle is harmless, so it shows nothing"


def broken_pickles() -> dict[str, object]:
    return {
        "a list": [torch.zeros(3)],
        "a whole model": torch.nn.Linear(2, 2),
        "a number": {"layer_weights": 3},
        "numbered": {0: torch.zeros(3)},
        "nested": {"state_dict": {"layer_weights": torch.zeros(3)}},
        "whole numbers": {"layer_weights": torch.zeros(3, dtype=torch.int8)},
        "sparse": {"layer_weights": torch.zeros(3, 3).to_sparse()},
        "nothing": {},
    }


@pytest.mark.parametrize("what", broken_pickles())
def test_a_pickle_that_is_not_plain_tensors_is_refused(saved, what):
    folder, parts = saved["desta2_tiny"]
    torch.save(broken_pickles()[what], folder / "qformer_connector.pth")
    with pytest.raises(
        ConversionError, match=r"qformer_connector\.pth (is no pickle of plain|holds something else than)"
    ):
        from_pretrained(folder, parts=parts)


def test_a_pickle_that_is_cut_off_or_missing_is_refused(saved):
    folder, parts = saved["desta2_tiny"]
    path = folder / "qformer_connector.pth"
    for content in (path.read_bytes()[:5000], b"", pickle.dumps({"layer_weights": 3}, protocol=2), b"text"):
        path.write_bytes(content)
        with pytest.raises(ConversionError, match=r"qformer_connector\.pth"):
            from_pretrained(folder, parts=parts)
    path.unlink()
    with pytest.raises(ConversionError, match=r"has no qformer_connector\.pth, which holds the weights"):
        from_pretrained(folder, parts=parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_in_16_bits_load_in_the_dtype_that_is_asked_for(tmp_path, dtype):
    """Whisper and connector stay in float32, as the authors have them: Llama alone is narrower."""
    theirs = Reference.of(SHAPES["desta25_tiny"])
    parts = theirs.save(tmp_path, narrow=True)
    stored = {name: load_file(path / "model.safetensors") for name, path in parts.items()}
    assert {tensor.dtype for tensor in stored["whisper"].values()} == {torch.float16}
    assert {tensor.dtype for tensor in stored["llm"].values()} == {torch.bfloat16}
    ours = from_pretrained(tmp_path, parts=parts, dtype=dtype)
    of_stage = {name: {p.dtype for p in getattr(ours, name).parameters()} for name, _ in ours.named_children()}
    assert of_stage["audio_encoder"] == of_stage["adapter"] == {torch.float32}
    assert of_stage["blocks"] == of_stage["embed"] == of_stage["unembed"] == {dtype}
    opened = Opened("narrow", tmp_path, parts, theirs, ours)
    with torch.no_grad():
        logits = ours(opened.inputs(1))
        partly = from_pretrained(tmp_path, parts=parts, dtype=dtype, device_map=PARTLY_ON_DISK)(opened.inputs(1))
    assert logits.dtype == dtype
    assert torch.equal(logits, partly)
    theirs = Reference(
        theirs.shape,
        WhisperForConditionalGeneration.from_pretrained(parts["whisper"], dtype=torch.float32).eval(),
        LlamaForCausalLM.from_pretrained(parts["llm"], dtype=dtype).eval(),
        theirs.connector,
    )
    inputs = opened.inputs(1)
    their_logits = theirs.states(inputs.tokens, inputs.mel, ours.lalm_cfg.audio_token)["logits"]
    if dtype == torch.float32:
        assert_close(logits, their_logits)
    else:
        assert (logits - their_logits).abs().max() < 0.1  # logits are about 5, and have 8 bits


# --- what is done with a model -------------------------------------------------------------------------------


def heard(opened: Opened, clip: Tensor) -> Run:
    processor = opened.ours.processor
    prompt = processor.prompt(ATTRIBUTES["gender"], processor.n_frames(clip), transcript=" so she said")
    return Run(processor.inputs([prompt], [clip]), prompt)


def both_runs(opened: Opened) -> tuple[Run, Run]:
    (clip,) = chirps([1.37])
    return heard(opened, clip), heard(opened, torch.zeros_like(clip))


def test_a_clip_has_as_many_tokens_however_long_it_is(opened):
    n_queries = opened.theirs.shape.n_queries
    for clip in chirps([0.1, 1.37, 2.0]):
        run = heard(opened, clip)
        assert len(run.indices("audio")) == n_queries
        assert (run.inputs.tokens == opened.ours.lalm_cfg.audio_token).sum() == n_queries
    with pytest.raises(AudioError, match="is too long: this model hears 2"):
        heard(opened, chirps([2.01])[0])


def test_states_of_the_residual_stream_add_up(opened):
    with torch.no_grad():
        _, cache = opened.ours.run_with_cache(both_runs(opened)[0].inputs)
    assert_close(cache.decompose_resid(mode="full").sum(0), cache["resid_post", opened.ours.cfg.n_layers - 1])


def test_the_parts_of_the_connector_add_up(opened):
    """What each hook holds is what the next part reads."""
    with torch.no_grad():
        _, cache = opened.ours.run_with_cache(opened.inputs(2))
    adapter, n_taps = opened.ours.adapter, len(opened.theirs.shape.taps)
    entering = cache["adapter.hook_queries"]
    for layer, block in enumerate(adapter.blocks):
        at = {name: cache[f"adapter.blocks.{layer}.hook_{name}"] for name in ("attn_out", "cross_attn_out", "mlp_out")}
        sums = [cache[f"adapter.blocks.{layer}.hook_resid_{name}"] for name in ("pre", "mid", "cross", "post")]
        assert torch.equal(sums[0], entering)
        assert_close(sums[1], entering + at["attn_out"])
        assert_close(sums[2], block.ln1(sums[1]) + at["cross_attn_out"])
        assert_close(sums[3], block.ln_cross(sums[2]) + at["mlp_out"])
        entering = cache[f"adapter.blocks.{layer}.hook_normalized_resid_post"]
        assert_close(entering, block.ln2(sums[3]))
        for kind, n_keys in (("attn", opened.theirs.shape.n_queries), ("cross_attn", 100)):
            pattern = cache[f"adapter.blocks.{layer}.{kind}.hook_pattern"]
            assert pattern.shape == (2 * n_taps, 4, opened.theirs.shape.n_queries, n_keys)
            assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    mixture = cache["adapter.hook_mixture"]
    assert_close(mixture.sum(-1), torch.ones(2, opened.theirs.shape.n_queries))
    by_tap = entering.unflatten(0, (2, n_taps)).movedim(1, 2)
    assert_close(cache["adapter.hook_mixed"], (by_tap * mixture[..., None]).sum(2))
    normed = cache["adapter.ln.hook_normalized"] * adapter.ln.w + adapter.ln.b
    assert_close(cache["adapter.hook_out"], normed @ adapter.W + adapter.b)


def test_without_a_hook_on_them_patterns_are_not_made_and_nothing_else_changes(opened):
    inputs = opened.inputs(2)
    names = [name for name in opened.ours.hook_dict if re.fullmatch(r"adapter\..*attn\.hook_pattern", name)]
    assert len(names) == 2 * opened.theirs.shape.n_qformer
    with torch.no_grad():
        looked_at = opened.ours.run_with_hooks(inputs, fwd_hooks=[(name, lambda state, hook: None) for name in names])
        assert_close(looked_at, opened.ours(inputs))


def test_a_hook_on_encoder_or_connector_changes_the_answer(opened):
    inputs = opened.inputs(2)
    last = opened.theirs.shape.taps[-1] - 1 + (not opened.theirs.shape.is_first)
    n_qformer = opened.theirs.shape.n_qformer
    points = [
        *(f"audio_encoder.blocks.{layer}.hook_mlp_out" for layer in range(last + 1)),
        *(f"adapter.blocks.{n}.attn.hook_{x}" for n in range(n_qformer) for x in ("q", "attn_scores", "z")),
        *(f"adapter.blocks.{n}.cross_attn.hook_{x}" for n in range(n_qformer) for x in ("q", "k", "v", "z", "pattern")),
        *(f"adapter.hook_{x}" for x in ("in", "queries", "mixture", "mixed")),
        "audio_encoder.hook_out",
    ]

    def bend(state: Tensor, hook: object) -> Tensor:
        return state * torch.linspace(0, 2, state.shape[-1])

    with torch.no_grad():
        plain = opened.ours(inputs)
        for name in points:
            changed = opened.ours.run_with_hooks(inputs, fwd_hooks=[(name, bend)])
            assert (changed - plain)[inputs.attention_mask].abs().max() > 1e-5, name
    assert f"audio_encoder.blocks.{last + 1}.hook_mlp_out" not in opened.ours.hook_dict, "nothing would hear it"
    with pytest.raises(HookError, match="would not fire"):
        opened.ours.run_with_cache(inputs.tokens, names_filter="adapter.hook_mixture")


def test_one_tap_alone_is_what_its_mixture_weight_says(opened):
    """All weight on one tap: only what that tap saw is heard."""
    inputs, n_taps = opened.inputs(1), len(opened.theirs.shape.taps)
    for tap in range(n_taps):

        def only(mixture: Tensor, hook: object, tap: int = tap) -> Tensor:
            return torch.nn.functional.one_hot(torch.full(mixture.shape[:-1], tap), n_taps).float()

        def silence_others(states: Tensor, hook: object, tap: int = tap) -> Tensor:
            kept = torch.zeros_like(states)
            kept[:, :, tap] = states[:, :, tap]
            return kept

        mixture, states = ("adapter.hook_mixture", only), ("adapter.hook_in", silence_others)
        with torch.no_grad():
            alone, again, other = (
                opened.ours.run_with_hooks(inputs, fwd_hooks=hooks)
                for hooks in ([mixture], [mixture, states], [states])
            )
        assert_close(alone, again)
        assert (alone - other).abs().max() > 1e-4


def test_both_engines_agree(opened):
    clean, silent = both_runs(opened)
    n_queries = opened.theirs.shape.n_queries
    last = opened.ours.lalm_cfg.encoder.n_layers - 1
    changes = [
        Patch("resid_post", 0, "audio", Source(clean)),
        Patch("resid_post", 0, "transcript", Source(clean)),
        Patch("z", 0, (-1,), Source(clean)),
        Patch("adapter_out", 0, range(n_queries), Source(clean)),
        Patch("adapter_in", 0, range(100), Source(clean)),
        Patch("adapter_in", 0, range(40), Source(clean)),
        Patch("resid_post", last, range(100), Source(clean), stack="audio_encoder"),
        Scale("mlp_out", 0, range(60), factor=0.0, stack="audio_encoder"),
        Knockout((0, 1), queries=(-1,), keys="audio"),
    ]
    made = branches(silent, *changes)
    assert_same(opened.ours, made)
    there = Plan(opened.ours, made, Logits()).run()
    whole = Plan(opened.ours, [Branch(clean)], Logits()).run().values[0]
    assert_close(there.values[3], whole)
    assert_close(there.values[4], whole)
    moved = (there.values - there.base).abs().flatten(1).amax(-1)
    assert (moved > 1e-5).all(), moved
    assert (there.values[5] - whole).abs().max() > 1e-4
    entering = torch.zeros(100, len(opened.theirs.shape.taps), opened.theirs.shape.d_encoder)
    assert_same(opened.ours, branches(silent, Patch("adapter_in", 0, range(100), entering)))
    with pytest.raises(InputError, match="does not fit states of shape"):
        Plan(opened.ours, branches(silent, Patch("adapter_in", 0, range(100), entering[:, 0])), Logits()).run()
    with pytest.raises(InputError, match="100 positions need as many rows"):
        Patch("adapter_in", 0, range(100), entering[1:])
    with pytest.raises(InputError, match=r"There are 100 positions of adapter\.hook_in"):
        Plan(opened.ours, branches(silent, Patch("adapter_in", 0, (100,), Source(clean))), Logits())


def test_both_engines_trace_alike(opened):
    sample = Sample("a.wav", "female", chirps([1.37])[0], transcript=" so she said")
    traced = [
        causal_trace(
            opened.ours,
            [sample],
            attribute="gender",
            form="P1",
            kinds=("layer", "audio_layer", "encoder_window"),
            window_s=1.0,
            engine=engine,
            progress=False,
        ).to_frame()
        for engine in ("sweep", "hooks")
    ]
    assert [set(frame.engine) for frame in traced] == [{"sweep"}, {"hooks"}]
    ours, theirs = (torch.tensor(frame.p_patched.to_numpy()) for frame in traced)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-9)
    windows = traced[0][traced[0].kind == "encoder_window"]
    assert len(windows) == 2 * opened.ours.lalm_cfg.encoder.n_layers, "the silence behind the clip is heard too"


def test_audio_positions_that_have_no_place_in_time_are_not_cut_into_windows(opened):
    sample = Sample("a.wav", "female", chirps([1.37])[0], transcript=" so she said")
    for audio in ("windows", "coarse-to-fine"):
        with pytest.raises(InputError, match="have no place in time: each is a query that looks at the whole clip"):
            causal_trace(opened.ours, [sample], attribute="gender", audio=audio, progress=False)


def test_it_says_what_transformers_says(opened):
    inputs = opened.inputs(1)
    embed = opened.theirs.states(inputs.tokens, inputs.mel, opened.ours.lalm_cfg.audio_token)["embed"]
    theirs = opened.theirs.llama.generate(
        inputs_embeds=embed, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    generated = opened.ours.generate(inputs, 12, stop_tokens=())
    assert generated.tokens.tolist() == theirs.tolist()
    assert len(set(generated.tokens.flatten().tolist())) > 2, "a constant answer compares nothing"
    assert opened.ours.stop_tokens == (2,)


def test_a_bound_model_hears(opened):
    inputs = opened.inputs()
    bound = opened.ours.bind(inputs)
    with torch.no_grad():
        assert_close(bound(bound.tokens[0])[inputs.attention_mask], opened.ours(inputs)[inputs.attention_mask])


def test_memory_of_a_cache_is_counted(opened):
    """The connector's states have taps, and patterns over the encoder's positions."""
    inputs = opened.inputs(2)
    with torch.no_grad():
        _, cache = opened.ours.run_with_cache(inputs)
    for prefix in ("adapter.", "audio_encoder.hook_out", "adapter.blocks.0.cross_attn."):
        names = {name for name in cache.cache_dict if name.startswith(prefix) and not name.endswith("hook_resid_pre")}
        real = sum(cache[name].nbytes for name in names)
        if prefix == "adapter.":  # the width of what comes out is the decoder's
            real += cache["adapter.hook_mixed"].nbytes - cache["adapter.hook_out"].nbytes
        assert opened.ours.cache_bytes(names, inputs) == real, prefix


def test_info_describes_it(opened):
    described = info(opened.folder, parts=opened.parts)
    assert sum(described.n_parameters.values()) == sum(p.numel() for p in opened.ours.parameters())
    assert described.n_audio == opened.theirs.shape.n_queries
    assert described.hooks["audio_encoder.hook_out"] == "clip, pos, tap, d_model"
    n = opened.theirs.shape.n_qformer - 1
    pattern = described.hooks[f"adapter.blocks.{{0..{n}}}.cross_attn.hook_pattern"]
    assert pattern == "clip_tap, head, query_pos, state_pos"
    assert "longer clips are refused" in repr(described)
    perception = sum(p.numel() for part in (opened.ours.audio_encoder, opened.ours.adapter) for p in part.parameters())
    assert described.weight_bytes["float32"] == 2 * described.weight_bytes["bfloat16"] - 4 * perception


def test_it_is_not_verified_against_a_class_that_there_is_not(opened):
    with pytest.raises(ConversionError, match=r"transformers has no class for a .* --golden FOLDER"):
        verify(opened.folder)


@pytest.mark.parametrize("name", ["desta2", "desta25", "qwen2_audio"])
def test_verify_compares_with_what_the_original_computed(name, monkeypatch):
    folder, llm = GOLDEN / name, {"desta2": "llama", "desta25": "llm"}.get(name)
    parts = {"whisper": folder / "checkpoint/whisper", "llm": folder / f"checkpoint/{llm}"} if llm else {}
    found = verify_golden(folder / "checkpoint", folder, parts=parts)
    assert found.passed, found
    n_layers = json.loads((folder / "meta.json").read_text())["shapes"]["expected"]["clean.resid_post"][1][0]
    assert len(found.frame) == 2 * (n_layers + 3)
    assert (found.frame.difference > 0).any()
    assert f"agrees with the golden set {folder}" in found.verdict
    if name == "desta2":
        monkeypatch.setattr("lalm_lens.nn.qformer.BERT_EPS", 1e-2)
        found = verify_golden(folder / "checkpoint", folder, parts=parts)
        assert not found.passed
        assert "first in clean adapter" in found.verdict


def test_a_folder_that_is_no_golden_set_of_the_model_is_refused(opened, tmp_path):
    with pytest.raises(DataError, match=r"is no golden set: inputs\.safetensors cannot be read"):
        verify_golden(opened.folder, tmp_path, parts=opened.parts)
    with pytest.raises(InputError, match=r"placeholders and the clips make \[5\] audio embeddings"):
        verify_golden(opened.folder, GOLDEN / "desta25", parts=opened.parts)


@pytest.mark.parametrize("key", ["resid_post", "logits", "projector_output"])
def test_a_golden_set_of_other_shapes_is_refused(tmp_path, key):
    folder = GOLDEN / "desta2"
    parts = {"whisper": folder / "checkpoint/whisper", "llm": folder / "checkpoint/llama"}
    shutil.copy(folder / "inputs.safetensors", tmp_path)
    arrays = load_file(folder / "expected.safetensors")
    save_file(
        {**arrays, f"clean.{key}": arrays[f"clean.{key}"][..., :-1].contiguous()}, tmp_path / "expected.safetensors"
    )
    with pytest.raises(DataError, match="in the golden set"):
        verify_golden(folder / "checkpoint", tmp_path, parts=parts)
    del arrays[f"corrupted.{key}"]
    save_file(arrays, tmp_path / "expected.safetensors")
    with pytest.raises(DataError, match=rf"A golden set has corrupted\.{key}, and this one does not"):
        verify_golden(folder / "checkpoint", tmp_path, parts=parts)


def test_it_is_no_model_in_memory(opened):
    hf = opened.theirs.llama
    with pytest.raises(ConversionError, match="is made of several checkpoints: open it by from_pretrained"):
        from_hf(hf, conversion=conversion_of(opened))


def test_the_original_in_memory_can_be_asked(opened):
    """Llama, Whisper and BERT of transformers stand for it here."""
    one, theirs = opened.inputs(1), opened.theirs
    blocks = theirs.llama.model.layers

    def run(tokens=one.tokens):
        return theirs.states(tokens, one.mel, opened.ours.lalm_cfg.audio_token)["logits"]

    found = verify_original(opened.ours, one, blocks, run)
    assert found.passed, found
    assert len(found.frame) == len(blocks) + 2
    assert "agrees with the original in memory" in found.verdict
    weight = blocks[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[0] += 0.1
        broken = verify_original(opened.ours, one, blocks, lambda: SimpleNamespace(logits=run()))
        weight[0] -= 0.1
    assert "DIFFERS from the original in memory in torch.float32: first in blocks.1" in broken.verdict
    for says, given, asked in (
        (f"has {len(blocks)} decoder blocks, and the original 1", blocks[:1], run),
        ("did not run all of these blocks", [nn.Linear(2, 2)] * len(blocks), run),
        ("give both the same prompts", blocks, lambda: run(one.tokens[:, 1:])),
    ):
        with pytest.raises(DataError, match=says):
            verify_original(opened.ours, one, given, asked)


def test_the_command_line_takes_parts(opened, capsys, monkeypatch):
    given = [text for part, path in opened.parts.items() for text in ("--part", f"{part}={path}")]
    monkeypatch.setattr("sys.argv", ["lalm-lens", "info", str(opened.folder), *given])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    assert f"n_queries {opened.theirs.shape.n_queries}" in capsys.readouterr().out
    golden = GOLDEN / "qwen2_audio"
    monkeypatch.setattr("sys.argv", ["lalm-lens", "verify", str(golden / "checkpoint"), "--golden", str(golden)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None)
    assert "agrees with the golden set" in capsys.readouterr().out
    for wrong in (["--part", "llm"], ["--part", "=x"], [*given, *given]):
        monkeypatch.setattr("sys.argv", ["lalm-lens", "info", str(opened.folder), *wrong])
        with pytest.raises(SystemExit):
            main()
        assert "--part names each part once" in capsys.readouterr().err
