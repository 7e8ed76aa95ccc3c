"""Qwen-Audio against models rebuilt from its tensors (tests/qwen.py); the golden sets are of the authors' own code."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import qwen
import tiktoken
import torch
from engine_cases import assert_same, branches, kinds
from engine_cases import embedded as random_run
from reference import chirps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedConfig, PreTrainedModel, WhisperFeatureExtractor

from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.config import DynamicNTK
from lalm_lens.datasets import Sample
from lalm_lens.encoders.whisper import n_states
from lalm_lens.engine.plan import Plan
from lalm_lens.errors import ConversionError, InputError, PromptError
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.info import info
from lalm_lens.inputs import Embedded, Inputs
from lalm_lens.interventions import Knockout, Patch, Scale
from lalm_lens.loading import from_hf, from_pretrained, our_conversions, skeleton
from lalm_lens.model import HookedLALM
from lalm_lens.nn.kv_cache import KeyValueCache
from lalm_lens.pieces import Turn
from lalm_lens.prompts import CutClip, qwen_processor
from lalm_lens.prompts.qwen import MARKS, QwenConverter
from lalm_lens.readouts import Logits
from lalm_lens.runs import Run, Source
from lalm_lens.verify import verify
from lalm_lens.weights import StateDict, Table, check, choose_layout, export, load

HERE = Path(__file__).parent
REAL_WORDS = HERE.parents[1] / "shared" / "tokenizers" / "qwen_audio"
GENDER = ATTRIBUTES["gender"]
DURATIONS_S = [2.0, 0.81, 1.37]
N_TRAINED = 8  # of the models that are asked beyond it


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return qwen.save(tmp_path_factory.mktemp("qwen") / "short")


@pytest.fixture(scope="module")
def ours(folder) -> HookedLALM:
    return from_pretrained(folder)


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> HookedLALM:
    """The same weights, trained on few positions."""
    model = from_pretrained(qwen.save(tmp_path_factory.mktemp("qwen") / "long", seq_length=N_TRAINED))
    assert model.decoder_cfg.rope == DynamicNTK(10_000.0, N_TRAINED)
    return model


def asked(model: HookedLALM, clips: list[Tensor]) -> Inputs:
    processor = model.processor
    return processor.inputs([processor.prompt(GENDER, processor.n_frames(clip)) for clip in clips], clips)


def heard(model: HookedLALM, clip: Tensor) -> Run:
    prompt = model.processor.prompt(GENDER, model.processor.n_frames(clip))
    return Run(model.processor.inputs([prompt], [clip]), prompt)


# --- short prompts: the whole model of transformers' parts -----------------------------------------------------


def test_every_clip_of_a_batch_is_heard_and_answered_as_it_is_alone(ours):
    clips = chirps(DURATIONS_S)
    inputs = asked(ours, clips)
    assert inputs.mel.shape[-1] == 200, "features end with the longest clip"
    with torch.no_grad():
        logits, cache = ours.run_with_cache(inputs)
    mel = WhisperFeatureExtractor(feature_size=80)([clip.numpy() for clip in clips], 16_000, return_tensors="pt")
    for row, clip in enumerate(clips):
        n_frames, real = len(clip) // 160, inputs.attention_mask[row]
        theirs = qwen.heard(mel["input_features"][row], n_frames)
        for name, hook in (
            ("encoder.0", "audio_encoder.blocks.0.hook_resid_post"),
            ("encoder.out", "audio_encoder.hook_out"),
            ("projected", "adapter.hook_out"),
        ):
            assert_close(cache[hook][row, : len(theirs[name])], theirs[name])
        embed = qwen.embedded(inputs.tokens[row, real].tolist(), mel["input_features"][row], n_frames)
        assert_close(cache["hook_embed"][row, real], embed)
        out = qwen.qwen2()(inputs_embeds=embed[None], output_hidden_states=True)
        for layer in range(3):
            assert_close(cache["resid_post", layer][row, real], out.hidden_states[layer + 1][0])
        assert_close(logits[row, real], out.logits[0])
    assert not inputs.attention_mask.all(), "nothing is padded"
    audio = cache["hook_audio_embed"]
    assert len(audio) == sum((len(clip) // 160 + 1) // 2 // 2 for clip in clips)


def test_silence_behind_a_clip_is_not_heard(ours):
    inputs = asked(ours, chirps([0.81]))
    louder = torch.cat([inputs.mel, torch.full_like(inputs.mel, 3.0)], dim=-1)
    with torch.no_grad():
        assert_close(ours(replace(inputs, mel=louder)), ours(inputs))


def test_features_are_those_of_the_original():
    for name in ("qwen_audio", "qwen_audio_long"):
        files = load_file(HERE / "golden" / name / "inputs.safetensors")
        mel, n_frames = CutClip().features(WhisperFeatureExtractor(feature_size=80), [files["waveform"]])
        assert n_states(int(n_frames)) == files["input_audio_lengths"][0, 0]
        assert mel.shape[-1] == 2 * files["input_audio_lengths"][0, 0]
        assert_close(mel, files["clean.input_features"][..., : mel.shape[-1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_samples", [480, 639, 640, 799, 800, 12_799, 479_999, 480_000])
def test_a_clip_has_as_many_tokens_as_in_the_original(ours, n_samples):
    n_frames = ours.processor.n_frames(torch.zeros(n_samples))
    assert n_frames == n_samples // 160
    states = torch.nn.functional.conv1d(torch.zeros(1, 1, n_frames), torch.zeros(1, 1, 3), stride=2, padding=1)
    n_audio = torch.nn.functional.avg_pool1d(states, 2).shape[-1]
    prompt = ours.processor.prompt(GENDER, n_frames)
    assert prompt.tokens.count(qwen.START - 3312) == n_audio == sum(p.region == "audio" for p in prompt.positions)


def test_what_stands_between_the_marks_is_no_matter(ours):
    inputs = asked(ours, chirps([0.81]))
    begin, end = (int((inputs.tokens[0] == mark).nonzero()) for mark in (qwen.START, qwen.START + 1))
    tokens = inputs.tokens.clone()
    tokens[0, begin + 1 : end] = torch.arange(end - begin - 1)
    with torch.no_grad():
        assert torch.equal(ours(replace(inputs, tokens=tokens)), ours(inputs))
        embed = ours.embed_inputs(inputs).embed[0]
    assert torch.equal(embed[[begin, end]], ours.audio_marks.weight)
    with pytest.raises(InputError, match=r"have \[2\] audio placeholders and the clips make \[\]"):
        ours(torch.tensor([[5, qwen.START, 6, 7, qwen.START + 1, 8]]))


def test_a_bound_model_hears(ours):
    inputs = asked(ours, chirps(DURATIONS_S[:2]))
    bound = ours.bind(inputs)
    with torch.no_grad():
        assert_close(bound(bound.tokens[0])[inputs.attention_mask], ours(inputs)[inputs.attention_mask])
        alone = asked(ours, chirps(DURATIONS_S[:1]))
        assert_close(bound(inputs.tokens[:1, -alone.tokens.shape[1] :]), ours(alone))


def test_states_of_the_residual_stream_add_up(ours):
    with torch.no_grad():
        _, cache = ours.run_with_cache(asked(ours, chirps([1.37])))
    assert_close(cache.decompose_resid(mode="full").sum(0), cache["resid_post", ours.cfg.n_layers - 1])


# --- prompts beyond the trained length: by hand in float64 -----------------------------------------------------


def words(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, qwen.N_PIECES, (n,), generator=torch.Generator().manual_seed(seed))


def handmade(tokens: Tensor, n_prompt: int | None = None, n_trained: int = N_TRAINED) -> Tensor:
    return qwen.by_hand(qwen.state()["transformer.wte.weight"][tokens], n_trained, n_prompt or len(tokens))


def test_the_base_grows_in_steps(long):
    steps = [long.rotary.kind(n) for n in (1, 8, 9, 16, 17, 32, 33, 64, 65)]
    assert steps == [1, 1, 3, 3, 7, 7, 15, 15, 31]


@pytest.mark.parametrize("n", [8, 9, 16, 17, 33, 70])
def test_a_long_prompt_has_the_logits_of_float64(long, n):
    with torch.no_grad():
        assert_close(long(words(n)[None])[0].double(), handmade(words(n)), rtol=1e-4, atol=1e-4)


def test_prompts_of_a_batch_are_stretched_each_by_its_own_length(long):
    rows = [words(33, 1), words(7, 2), words(20, 3)]
    tokens = torch.stack([torch.nn.functional.pad(row, (33 - len(row), 0)) for row in rows])
    is_token = torch.tensor([[False] * (33 - len(row)) + [True] * len(row) for row in rows])
    with torch.no_grad():
        logits = long(tokens, attention_mask=is_token)
    for its, real, row in zip(logits, is_token, rows, strict=True):
        assert_close(its[real].double(), handmade(row), rtol=1e-4, atol=1e-4)


def test_each_of_the_two_is_needed(long):
    """Or the tests above compare nothing."""
    tokens = words(20)[None]
    with torch.no_grad():
        logits = long(tokens)
        short = skeleton(qwen.config(), our_conversions()["qwen"], "short")
        whole, scheme = long.rotary, long.rotary.scheme
        for other in (scheme, type(whole)(short.rotary.scheme, N_TRAINED)):
            long.rotary = other
            assert (long(tokens) - logits).abs().max() > 0.05
        long.rotary = whole
        assert torch.equal(long(tokens), logits)


@pytest.mark.parametrize("n_prompt", [6, 8, 17])
def test_what_is_written_leaves_the_base_as_the_prompt_made_it(long, n_prompt):
    prompt, written = words(n_prompt), words(n_prompt)
    for _ in range(14):
        written = torch.cat([written, handmade(written, n_prompt)[-1].argmax()[None]])
    generated = long.generate(prompt[None], 14, stop_tokens=())
    assert generated.tokens[0].tolist() == written[n_prompt:].tolist()
    assert len(set(generated.tokens[0].tolist())) > 2, "a constant answer compares nothing"
    said = handmade(written, n_prompt).log_softmax(-1)[torch.arange(n_prompt - 1, len(written) - 1), written[n_prompt:]]
    assert_close(generated.log_probs[0].double(), said, rtol=1e-4, atol=1e-4)


def test_padded_prompts_are_continued_as_they_are_alone(long):
    rows = [words(19, 1), words(7, 2)]
    embeds = [qwen.state()["transformer.wte.weight"][row] for row in rows]
    embed = torch.stack([torch.nn.functional.pad(its, (0, 0, 19 - len(its), 0)) for its in embeds])
    is_token = torch.tensor([[True] * 19, [False] * 12 + [True] * 7])
    together = long.generate(Embedded(embed, is_token), 8, stop_tokens=())
    for row, tokens in enumerate(rows):
        alone = long.generate(tokens[None], 8, stop_tokens=())
        assert torch.equal(together.tokens[row], alone.tokens[0])
        assert_close(together.log_probs[row], alone.log_probs[0])


def test_a_cache_goes_on_from_the_first_piece_and_a_layer_from_the_last(long):
    tokens, cache = words(30)[None], KeyValueCache()
    with torch.no_grad():
        pieces = [long(tokens[:, start : start + 10], kv_cache=cache) for start in (0, 10, 20)]
        assert_close(torch.cat(pieces, 1)[0].double(), handmade(tokens[0], n_prompt=10), rtol=1e-4, atol=1e-4)
        middle = long(tokens, stop_at_layer=2)
        assert_close(long(middle, start_at_layer=2), long(tokens))
        assert_close(long(tokens[:, :12])[0].double(), handmade(tokens[0, :12]), rtol=1e-4, atol=1e-4)


# --- both engines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["resid_post", "q", "k", "pattern", "z"])
def test_changes_of_long_prompts_are_the_same_in_both_engines(long, site):
    base, clean, longer = random_run(1), random_run(2), random_run(3, 40)
    with torch.no_grad():
        _, cache = long.run_with_cache(
            clean.inputs, names_filter=lambda name: name.endswith(f"hook_{site}"), return_cache_object=True
        )
    assert_same(long, branches(base, *kinds(long, site, 1, base, clean, longer, cache)))


def test_runs_of_several_lengths_and_padded_ones_go_together(long):
    lengths = (7, 16, 40, 18)
    runs = [random_run(seed, n_pos) for seed, n_pos in enumerate(lengths)]
    embed = torch.nn.functional.pad(runs[3].inputs.embed, (0, 0, 5, 0))
    runs.append(Run(Embedded(embed, torch.arange(23)[None] >= 5)))
    assert len({long.rotary.kind(n) for n in lengths}) == 4
    changes = (
        Scale("resid_post", 1, (-4,), factor=0.0),
        Knockout((1, 2), (-1,), (-6,)),
        Scale("k", 2, (-5,), factor=2.0),
    )
    assert_same(long, [branch for run in runs for branch in branches(run, *changes)])


def test_both_engines_trace_alike(long):
    traced = [
        causal_trace(
            long,
            [Sample("a.wav", "female", chirps([0.81])[0])],
            attribute="gender",
            form="P1",
            kinds=("layer", "audio_layer", "token", "encoder_window"),
            window_s=0.4,
            engine=engine,
            progress=False,
        ).to_frame()
        for engine in ("sweep", "hooks")
    ]
    swept, hooked = (torch.tensor(frame.p_patched.to_numpy()) for frame in traced)
    assert_close(swept, hooked, rtol=1e-4, atol=1e-9)
    moved = traced[0].assign(by=(traced[0].p_patched - traced[0].p_corrupted).abs() / traced[0].p_corrupted)
    assert (moved.groupby("kind").by.max() > 1e-3).all()


def test_all_states_of_an_encoder_block_bring_all_back(long):
    clip = chirps([1.37])[0]
    clean, silent = heard(long, clip), heard(long, torch.zeros_like(clip))
    everything = Patch("resid_post", 1, range(69), Source(clean), stack="audio_encoder")
    half = Patch("resid_post", 0, range(30), Source(clean), stack="audio_encoder")
    out = Patch("adapter_out", 0, range(34), Source(clean))
    assert_same(long, branches(silent, everything, half, out))
    theirs = Plan(long, branches(clean, Scale("resid_post", 0, (-1,), factor=1.0)), Logits()).run().base[0]
    there = Plan(long, branches(silent, everything, half, out), Logits()).run().values
    assert_close(there[0], theirs)
    assert_close(there[2], theirs)
    assert (there[1] - theirs).abs().max() > 1e-3


def test_a_spread_model_says_the_same(folder, ours):
    spread = from_pretrained(
        folder, device_map={"blocks.1": "disk", "audio_marks": "disk", "audio_encoder": "disk", "": "cpu"}
    )
    with torch.no_grad():
        inputs = asked(ours, chirps([0.81]))
        assert_close(spread(inputs), ours(inputs))


# --- the checkpoint ----------------------------------------------------------------------------------------------


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def test_a_round_trip_is_exact_of_one_file_and_of_several(folder, ours, tmp_path):
    conversion, stored = our_conversions()["qwen"], qwen.state()
    exported = dict(export(ours, conversion.rows(ours.lalm_cfg), conversion.layouts[0]))
    assert exported.keys() == stored.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in exported.items())
    sharded, names = copied(folder, tmp_path), sorted(stored)
    (sharded / "model.safetensors").unlink()
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, its in halves.items():
        save_file({name: stored[name] for name in its}, sharded / file)
    index = {"weight_map": {name: file for file, its in halves.items() for name in its}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for one, other in zip(ours.named_parameters(), from_pretrained(sharded).named_parameters(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


def test_fused_tensors_are_not_copied(ours):
    q, k, v = (getattr(ours.blocks[0].attn, f"{name}_proj").weight for name in "qkv")
    assert q.data_ptr() + q.nbytes == k.data_ptr() == v.data_ptr() - k.nbytes
    assert_close(ours.W_Q[0], q.view(4, 16, 64).transpose(1, 2))


def test_any_tensor_too_few_too_many_or_misshapen_is_refused_by_name(ours):
    conversion, whole = our_conversions()["qwen"], qwen.state()
    model = skeleton(qwen.config(), conversion, "empty")
    table = Table(conversion.rows(model.lalm_cfg))
    layout = choose_layout(whole, table, conversion.layouts)
    check(model, StateDict("whole", whole), table, layout)
    for name, tensor in whole.items():
        rest = {other: its for other, its in whole.items() if other != name}
        with pytest.raises(ConversionError, match=f"1 missing: {re.escape(name)}\\. "):
            check(model, StateDict("less", rest), table, layout)
        for wrong in (tensor[1:], tensor[:0]):
            with pytest.raises(ConversionError, match=f"1 of another shape: {re.escape(name)} is "):
                check(model, StateDict("odd", {**rest, name: wrong}), table, layout)
        beside = re.sub(r"\.h\.0\.|blocks\.0\.", lambda match: match[0].replace("0", "7"), f"{name}")
        beside = beside if beside != name else f"{name}_more"
        with pytest.raises(ConversionError, match=f"1 unknown: {re.escape(beside)}\\. "):
            check(model, StateDict("more", {**whole, beside: tensor}), table, layout)


REAL = {
    **qwen.config(hidden_size=4096, intermediate_size=22016, num_attention_heads=32, num_hidden_layers=32),
    "kv_channels": 128,
    "vocab_size": 155947,
    "attn_dropout_prob": 0.0,
    "emb_dropout_prob": 0.0,
    "onnx_safe": None,
    "bf16": False,
    "fp16": False,
    "fp32": False,
    "scale_attn_weights": True,
    "tokenizer_type": "QWenTokenizer",
    "audio": qwen.CONFIG["audio"]
    | {"n_state": 1280, "n_head": 20, "n_layer": 32, "output_dim": 4096, "audio_start_id": 155163},
}


def test_the_real_architecture_converts():
    conversion = our_conversions()["qwen"]
    listed = (HERE / "tensor_names" / "qwen_audio_published.txt").read_text().split()
    shapes = qwen.shapes(REAL)
    assert {re.sub(r"\.\d+\.", ".{i}.", name) for name in shapes} == set(listed)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    model = skeleton(REAL, conversion, "real")
    load(model, StateDict("real", tensors), conversion.rows(model.lalm_cfg), conversion.layouts, lambda _, t: t)
    exported = export(model, conversion.rows(model.lalm_cfg), conversion.layouts[0])
    assert {name: tensor.shape for name, tensor in exported} == {name: t.shape for name, t in tensors.items()}
    cfg = model.lalm_cfg
    assert (cfg.audio_token, cfg.audio_marks, cfg.decoder.d_mlp) == (151851, (155163, 155164), 11008)
    assert (cfg.decoder.n_ctx, cfg.decoder.log_n, cfg.decoder.eps) == (8192, 2048, 1e-5)
    assert 8.3e9 < sum(p.numel() for p in model.parameters()) < 8.5e9


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (None, "no_bias", False),
        (None, "rotary_pct", 0.5),
        (None, "use_dynamic_ntk", False),
        (None, "use_logn_attn", False),
        (None, "tie_word_embeddings", True),
        (None, "use_cache_quantization", True),
        (None, "kv_channels", 32),
        (None, "intermediate_size", 191),
        (None, "seq_length", 1),
        (None, "num_attention_heads", 5),
        (None, "visual", {"layers": 48}),
        ("audio", "avg_pool", False),
        ("audio", "add_audio_bos_eos_token", False),
        ("audio", "output_dim", 63),
        ("audio", "n_head", 5),
        ("audio", "audio_start_id", None),
        ("audio", "causal", True),
    ],
)
def test_a_config_that_asks_for_other_arithmetic_is_refused(section, key, value):
    changed = json.loads(json.dumps(qwen.CONFIG))
    (changed[section] if section else changed)[key] = value
    convert = our_conversions()["qwen"].config
    convert(qwen.CONFIG)
    with pytest.raises(ConversionError):
        convert(changed)


@pytest.mark.parametrize("key", ["layer_norm_epsilon", "seq_length", "n_state", "audio_start_id"])
def test_what_a_config_leaves_out_is_not_guessed(key):
    section = {name: value for name, value in qwen.CONFIG["audio"].items() if name != key}
    config = {name: value for name, value in qwen.config(audio=section).items() if name != key}
    with pytest.raises(ConversionError, match=f"config.json does not say {key}, which"):
        our_conversions()["qwen"].config(config)


def test_a_qwen_without_ears_is_refused():
    deaf = {key: value for key, value in qwen.CONFIG.items() if key != "audio"}
    for config in (deaf, deaf | {"audio": None}):
        with pytest.raises(ConversionError, match="no section `audio`: this Qwen hears nothing"):
            our_conversions()["qwen"].config(config)


def test_code_of_a_checkpoint_never_runs(folder, ours):
    assert {path.name for path in folder.glob("*.py")} == {
        f"{name}_qwen.py" for name in ("modeling", "tokenization", "configuration")
    }
    assert ours.processor is not None
    assert ours.stop_tokens == (qwen.N_PIECES, 151644, 151645)


def test_verify_and_info_say_what_they_can(folder):
    with pytest.raises(ConversionError, match="transformers has no class for a qwen model"):
        verify(folder)
    described = info(folder)
    assert described.n_audio == 750
    assert "longer clips are refused" in repr(described)


def test_the_original_in_memory_shares_its_weights(ours):
    """Somebody's own installation of it: `from_hf` reads tensors and config, and no code."""

    class QWenConfig(PreTrainedConfig):
        model_type = "qwen"

    class QWen(PreTrainedModel):
        config_class = QWenConfig

        def __init__(self, config: QWenConfig):
            super().__init__(config)
            for name, tensor in qwen.state().items():
                *path, leaf = name.split(".")
                owner: nn.Module = self
                for part in path:
                    if part not in dict(owner.named_children()):
                        owner.add_module(part, nn.Module())
                    owner = owner.get_submodule(part)
                owner.register_parameter(leaf, nn.Parameter(tensor.clone()))

    original = QWen(QWenConfig.from_dict(qwen.config(use_flash_attn="auto", softmax_in_fp32=False)))
    opened = from_hf(original, ours.processor.hf)
    inputs = asked(ours, chirps([0.81]))
    with torch.no_grad():
        assert torch.equal(opened(inputs), ours(inputs))
        original.state_dict()["transformer.h.1.attn.c_attn.bias"][:64] += 1
        assert_close(opened.b_Q[1], ours.b_Q[1] + 1)


def test_a_narrow_model_turns_in_float32_and_stays_narrow(long, tmp_path):
    narrow = from_pretrained(qwen.save(tmp_path / "narrow", seq_length=N_TRAINED), dtype=torch.bfloat16)
    rotation = narrow.rotary(torch.arange(20)[None], torch.bfloat16, [20])
    assert (rotation.cos.dtype, rotation.scale.dtype) == (torch.float32, torch.bfloat16)
    tokens = words(20)[None]
    with torch.no_grad():
        logits, cache = narrow.run_with_cache(tokens)
        assert {logits.dtype, cache["rot_q", 1].dtype, cache["rot_k", 1].dtype} == {torch.bfloat16}
        assert (logits.float() - long(tokens)).abs().max() < 0.3, "of 9"


# --- words -------------------------------------------------------------------------------------------------------


def original(folder: Path) -> tiktoken.Encoding:
    """The tokenizer itself, by the package that it is written for."""
    ranks = QwenConverter.load_tiktoken_bpe(str(folder / "qwen.tiktoken"))
    marks = {mark: len(ranks) + n for n, mark in enumerate(MARKS)}
    return tiktoken.Encoding("qwen", pat_str=qwen.PATTERN, mergeable_ranks=ranks, special_tokens=marks)


TEXTS = [
    "What is the gender of the speaker in the speech? Choose from the options male, female.",
    "The speaker's gender is",
    "  two  spaces\n\n and\tlines \r\n of 1234 numbers, I'LL say -- '' ...\n",
    "naïve café, ZÜRICH; 你好 世界 こんにちは 🎧🎵 \u00a0\u2003x",
    "<|en|><|0.00|>here<|30.00|><|audioset_ontology|></audio><audio>x",
]


def tokens_are_those_of_tiktoken(folder: Path, tokenizer) -> None:
    theirs = original(folder)
    assert len(tokenizer) == theirs.n_vocab
    for text in TEXTS:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokens == theirs.encode(text, allowed_special="all")
        assert tokenizer.decode(tokens) == text
    assert tokenizer("cafe\u0301")["input_ids"] == theirs.encode("caf\u00e9")  # composed, as the authors' code does
    n = theirs.n_vocab
    assert [tokenizer.convert_tokens_to_ids(mark) for mark in ("<audio>", "</audio>", MARKS[0])] == [
        n - 2,
        n - 1,
        n - len(MARKS),
    ]


def test_tokens_are_those_of_tiktoken(folder, ours):
    tokens_are_those_of_tiktoken(folder, ours.tokenizer)
    assert len(ours.tokenizer) < ours.cfg.d_vocab
    assert (
        ours.tokenizer.decode([qwen.START, *ours.tokenizer(" male")["input_ids"]], skip_special_tokens=True) == " male"
    )


def test_positions_of_a_prompt_know_what_they_are(ours):
    prompt = ours.processor.prompt(GENDER, 20, answer="female")
    by_region: dict[str, str] = {}
    for position in prompt.positions:
        by_region[position.region] = by_region.get(position.region, "") + position.token
    assert by_region == {
        "text_before": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nAudio 1:",
        "audio_tag": "<audio></audio>",
        "audio": "[[[AUDIO:modality]]]" * 5,
        "template": "\n<|im_end|>\n<|im_start|>assistant\n",
        "early": "What is the gender of the speaker in the speech? Possible options:",
        "object": " male female",
        "object_sep": ",.",
        "late": "The speaker's",
        "attribute": " gender",
        "last": " is",
    }
    assert "".join(p.token for p in prompt.positions if p.is_correct) == " female"
    with pytest.raises(PromptError, match=r"is a mark of the chat template and no word"):
        ours.processor.prompt(replace(GENDER, question="Say <|caption|>"), 20, "P2")


def test_another_vocabulary_is_refused_and_none_is_no_processor(folder, tmp_path):
    other = copied(folder, tmp_path)
    qwen.write_tiktoken(other, qwen.pieces()[:-1])
    with pytest.raises(ConversionError, match=f"belongs to another model: .* is token {qwen.START - 3313}"):
        from_pretrained(other)
    (other / "qwen.tiktoken").write_text("not base64\n")
    with pytest.raises(ConversionError, match=r"The tokenizer or feature extractor in .* cannot be read"):
        from_pretrained(other)
    (other / "qwen.tiktoken").unlink()
    assert from_pretrained(other).processor is None


@pytest.mark.skipif(not REAL_WORDS.is_dir(), reason="the real vocabulary is not part of the repository")
def test_real_prompts_have_the_tokens_of_the_original():
    cfg, hf = our_conversions()["qwen"].config(REAL), qwen_processor(REAL_WORDS)
    tokens_are_those_of_tiktoken(REAL_WORDS, hf.tokenizer)
    written = our_conversions()["qwen"].template.write(hf, Turn(), GENDER.prefix)
    template = our_conversions()["qwen"].template
    template.check(hf, cfg.audio_token, 750)
    assert len(hf.tokenizer) == 155165
    before = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, 14755, 220, 16, 25]
    after = [198, 151645, 198, 151644, 77091, 198, 785, 18601, 594, 9825, 374]
    assert list(written.tokens) == [*before, 155163, 151851, 155164, *after]
    regions = ["text_before"] * 18 + ["audio_tag", "audio", "audio_tag"] + ["template"] * 6
    assert [p.region for p in written.positions] == [*regions, "late", "late", "late", "attribute", "last"]
    assert hf.tokenizer(" male")["input_ids"] == [8593]
    assert math.isclose(hf.feature_extractor.n_samples, 480_000)
