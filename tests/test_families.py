"""Every model against transformers' own class, from sound and words on: what tests/families.py has an entry for."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from engine_cases import LOGITS_AND_LOG_PROBS, assert_same, branches
from families import FAMILIES, PARTS, QUESTION, REAL, Family, as_theirs
from reference import chirps, hf_states
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, PreTrainedModel

from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.datasets import Sample
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import Plan
from lalm_lens.errors import AudioError, ConversionError, InputError
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.info import info
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import Patch, Scale
from lalm_lens.loading import from_hf, from_pretrained, our_conversions, skeleton
from lalm_lens.model import HookedLALM
from lalm_lens.readouts import Logits
from lalm_lens.runs import Run, Source
from lalm_lens.verify import verify
from lalm_lens.weights import Drop, Layout, Row, StateDict, Table, check, choose_layout, export, load

NAMES = Path(__file__).parent / "tensor_names"
DURATIONS_S = [2.0, 0.8, 1.37]  # an odd number of encoder states among them
QUESTIONS = [QUESTION, "Which animal?", "Is it loud, or is it quiet?", "And now?", "Or is it?"]
GENDER = ATTRIBUTES["gender"]
PARTLY_ON_DISK = {"blocks.1": "disk", "audio_encoder": "disk", "": "cpu"}


@dataclass(frozen=True)
class Opened:
    """A saved checkpoint, as HF's model and as ours."""

    name: str
    family: Family
    folder: Path
    hf: PreTrainedModel
    ours: HookedLALM

    def clips(self) -> list[Tensor]:
        longer = [3.1, 2.01] if self.family.longest_s > 2 else []  # of two windows; 10 ms make no token by themselves
        return chirps(DURATIONS_S + longer)

    def batch(self) -> dict[str, Tensor]:
        """Left-padded, by HF's processor."""
        clips = self.clips()
        return self.family.batch(self.family.processor(), clips, QUESTIONS[: len(clips)])


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request, tmp_path_factory) -> Opened:
    folder, family = tmp_path_factory.mktemp(request.param), FAMILIES[request.param]
    hf = family.save(folder)
    return Opened(request.param, family, folder, hf, from_pretrained(folder))


def test_every_conversion_has_an_entry():
    of_hf = {name for name, conversion in our_conversions().items() if conversion.hf_class is not None}
    assert set(FAMILIES) == of_hf - set(PARTS)
    assert {config["model_type"] for config in REAL.values()} == set(FAMILIES)


@pytest.mark.parametrize("n_kv_heads", [4, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_match_for_other_groups_of_heads(name, n_kv_heads):
    family = FAMILIES[name]
    hf = family.build(seed=1, num_key_value_heads=n_kv_heads)
    batch = family.batch(family.processor(), chirps([1.1, 0.4]), QUESTIONS[:2])
    is_token = batch["attention_mask"].bool()
    with torch.no_grad():
        assert_close(from_hf(hf)(Inputs.from_hf(batch))[is_token], hf(**batch, use_cache=False).logits[is_token])


def test_logits_and_every_state_match_hf(opened):
    batch = opened.batch()
    their_logits, theirs = hf_states(opened.hf, batch)
    is_token = batch["attention_mask"].bool()
    assert not is_token.all(), "nothing is padded"
    with torch.no_grad():
        logits, cache = opened.ours.run_with_cache(Inputs.from_hf(batch))
    assert_close(logits[is_token], their_logits[is_token])
    for layer in range(opened.ours.cfg.n_layers):
        assert_close(cache["resid_post", layer][is_token], theirs[f"decoder.{layer}"][is_token])
    for layer in range(opened.ours.lalm_cfg.encoder.n_layers):
        ours = cache[f"audio_encoder.blocks.{layer}.hook_resid_post"]
        assert_close(as_theirs(ours, theirs[f"encoder.{layer}"], batch), theirs[f"encoder.{layer}"])
    for name, hook in (("encoder_norm", "audio_encoder.hook_out"), ("projector", "adapter.hook_out")):
        assert_close(as_theirs(cache[hook], theirs[name], batch), theirs[name])
    assert len(cache["hook_audio_embed"]) == (batch["input_ids"] == opened.ours.lalm_cfg.audio_token).sum()


def test_without_audio_it_is_a_language_model(opened):
    tokens = torch.randint(30, 240, (2, 17), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert_close(opened.ours(tokens), opened.hf(input_ids=tokens, use_cache=False).logits)


def test_it_says_what_hf_says(opened):
    batch = opened.batch()
    generated = opened.ours.generate(Inputs.from_hf(batch), 12, stop_tokens=())
    theirs = opened.hf.generate(**batch, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(generated.tokens, theirs[:, batch["input_ids"].shape[1] :])
    assert len(set(generated.tokens.flatten().tolist())) > 2, "a constant answer compares nothing"


def test_hf_takes_what_our_processor_makes(opened):
    processor, clips = opened.ours.processor, opened.clips()
    prompts = [processor.prompt(GENDER, processor.n_frames(clip)) for clip in clips]
    inputs = processor.inputs(prompts, clips)
    conversion = our_conversions()[opened.name]
    with torch.no_grad():
        theirs = opened.hf(**inputs.to_hf(conversion.frame_mask), use_cache=False).logits
        assert_close(opened.ours(inputs)[inputs.attention_mask], theirs[inputs.attention_mask])


def test_features_are_those_of_hf(opened):
    processor, batch = opened.ours.processor, Inputs.from_hf(opened.batch())
    mel, n_frames = processor.hearing.features(processor.hf.feature_extractor, opened.clips())
    assert torch.equal(mel, batch.mel)
    assert torch.equal(n_frames, batch.n_frames)


@pytest.mark.parametrize("form", ["P1", "P2", "P3"])
@pytest.mark.parametrize("duration_s", [0.03, 1.37, 2.0, 2.01, 5.0])
def test_prompts_have_the_tokens_of_hf(opened, form, duration_s):
    if duration_s > opened.family.longest_s:
        duration_s = opened.family.longest_s
    (clip,), processor = chirps([duration_s]), opened.ours.processor
    said = {"P1": None, "P2": GENDER.question, "P3": GENDER.options(GENDER.labels)}[form]
    theirs = opened.family.prompt(opened.family.processor(), clip, said, GENDER.prefix)
    prompt = processor.prompt(GENDER, processor.n_frames(clip), form)
    assert list(prompt.tokens) == theirs
    assert [p.region for p in prompt.positions].count("last") == 1
    is_audio = [token == opened.ours.lalm_cfg.audio_token for token in prompt.tokens]
    assert prompt.is_region("audio").tolist() == is_audio


def test_objects_are_where_they_are(opened):
    processor = opened.ours.processor
    prompt = processor.prompt(GENDER, 137, answer="female")
    assert "".join(p.token for p in prompt.positions if p.region == "object") == " male female"
    assert "".join(p.token for p in prompt.positions if p.is_correct) == " female"
    assert "".join(p.token for p in prompt.positions if p.region == "attribute") == " gender"
    assert prompt.positions[-1].token == " is"
    assert sum(p.region == "audio" for p in prompt.positions) == opened.family.n_audio


# --- conversion ----------------------------------------------------------------------------------------------


def test_a_round_trip_is_exact(opened):
    conversion, stored = our_conversions()[opened.name], load_file(opened.folder / "model.safetensors")
    rows, layout = conversion.rows(opened.ours.lalm_cfg), conversion.layouts[0]
    exported = dict(export(opened.ours, rows, layout))
    assert exported.keys() == kept(stored, rows, layout)
    for name, tensor in exported.items():
        assert torch.equal(stored[name], tensor), name


def kept(names: Iterable[str], rows: tuple[Row, ...], layout: Layout) -> set[str]:
    """The tensors that are not dropped by name."""
    table = Table(rows)
    return {name for name in names if not isinstance(table.find(layout.to_table(name))[0], Drop)}


def test_every_layout_loads(opened, tmp_path):
    conversion = our_conversions()[opened.name]
    state = opened.hf.state_dict()
    (tmp_path / "config.json").write_text((opened.folder / "config.json").read_text())
    for layout in conversion.layouts:
        tensors = {layout.to_disk(name): tensor.clone() for name, tensor in state.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        loaded = from_pretrained(tmp_path)
        for (name, ours), again in zip(opened.ours.named_parameters(), loaded.parameters(), strict=True):
            assert torch.equal(ours, again), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_model_has_the_dtypes_of_hf(opened, dtype):
    conversion = our_conversions()[opened.name]
    hf = opened.family.hf.from_pretrained(opened.folder, dtype=dtype)
    theirs = {name: tensor.dtype for name, tensor in hf.state_dict().items()}
    assert dtype in theirs.values()
    everywhere = from_pretrained(opened.folder, dtype=dtype)
    stored = from_pretrained(opened.folder, dtype=dtype, device_map=PARTLY_ON_DISK)
    rows, plain = conversion.rows(everywhere.lalm_cfg), conversion.layouts[-1]
    for ours in (everywhere, stored, from_hf(hf)):
        stays = {name: theirs[name] for name in kept(theirs, rows, plain)}
        assert {name: tensor.dtype for name, tensor in export(ours, rows, plain)} == stays
    of_hf = {tensor.data_ptr() for name, tensor in hf.state_dict().items() if name in stays}
    assert {p.data_ptr() for p in from_hf(hf).parameters()} == of_hf
    inputs = Inputs.from_hf(opened.batch())
    with torch.no_grad():
        assert torch.equal(everywhere(inputs), stored(inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_verify_agrees_in_narrow_types(opened, dtype):
    verification = verify(opened.folder, dtype=dtype)
    assert verification.passed, verification


def collapsed(names: object) -> set[str]:
    return {re.sub(r"\.\d+\.", ".{i}.", name) for name in names}


def test_any_one_missing_or_added_tensor_is_refused_by_name(opened):
    conversion = our_conversions()[opened.name]
    model = skeleton(json.loads((opened.folder / "config.json").read_text()), conversion, "tiny")
    rows = Table(conversion.rows(model.lalm_cfg))
    for layout in conversion.layouts:
        whole = {layout.to_disk(name): tensor for name, tensor in opened.hf.state_dict().items()}
        assert choose_layout(whole, rows, conversion.layouts) == layout
        check(model, StateDict("whole", whole), rows, layout)
        for name in kept(whole, conversion.rows(model.lalm_cfg), layout):
            rest = {other: tensor for other, tensor in whole.items() if other != name}
            with pytest.raises(ConversionError, match=f"model: 1 missing: {re.escape(name)}\\. "):
                check(model, StateDict("cut", rest), rows, layout)
            beside = name.removesuffix(".weight") + ".bias" if name.endswith(".weight") else f"{name}_scale"
            if beside not in whole:
                with pytest.raises(ConversionError, match=f"model: 1 unknown: {re.escape(beside)}\\. "):
                    check(model, StateDict("more", {**whole, beside: torch.zeros(3)}), rows, layout)


@pytest.mark.parametrize("name", REAL)
def test_the_real_architecture_converts(name):
    """Every tensor of the published size, without its numbers."""
    config = REAL[name]
    conversion = our_conversions()[config["model_type"]]
    with torch.device("meta"):
        hf = FAMILIES[config["model_type"]].hf(AutoConfig.for_model(**config))
    state = hf.state_dict()
    for layout, listed in zip(conversion.layouts, ("published", "tf523"), strict=True):
        tensors = {layout.to_disk(name): tensor for name, tensor in state.items()}
        names = (NAMES / f"{config['model_type']}_{listed}.txt").read_text().split()
        assert collapsed(tensors) == set(names)
        ours = skeleton(config, conversion, name)
        load(ours, StateDict(name, tensors), conversion.rows(ours.lalm_cfg), conversion.layouts, lambda _, t: t)
        exported = export(ours, conversion.rows(ours.lalm_cfg), layout)
        stays = kept(tensors, conversion.rows(ours.lalm_cfg), layout)
        assert {name: tensor.shape for name, tensor in exported} == {name: tensors[name].shape for name in stays}


# What transformers 4 wrote into each section of a config.json, whatever the model.
WRITTEN_BY_4 = {
    **dict.fromkeys(("architectures", "bad_words_ids", "bos_token_id", "eos_token_id", "finetuning_task", "prefix")),
    **dict.fromkeys(("cross_attention_hidden_size", "decoder_start_token_id", "pad_token_id", "sep_token_id")),
    **dict.fromkeys(("forced_bos_token_id", "suppress_tokens", "begin_suppress_tokens", "task_specific_params")),
    **dict.fromkeys(("add_cross_attention", "is_decoder", "is_encoder_decoder", "tie_encoder_decoder"), False),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "torchscript", "use_bfloat16"), False),
    **dict.fromkeys(("length_penalty", "repetition_penalty", "temperature", "top_p", "typical_p"), 1.0),
    "pruned_heads": {},
    "id2label": {"0": "LABEL_0"},
    "_name_or_path": "",
    "torch_dtype": "bfloat16",
    "top_k": 50,
    "chunk_size_feed_forward": 0,
    "max_length": 20,
    "return_dict": True,
    "initializer_range": 0.02,
}


@pytest.mark.parametrize("name", REAL)
def test_a_config_that_says_everything_is_read_as_one_that_says_little(name):
    """As transformers 5 writes it, and with all that transformers 4 wrote into every section."""
    thin = REAL[name]
    conversion = our_conversions()[thin["model_type"]]
    full = json.loads(AutoConfig.for_model(**thin).to_json_string())
    older = {
        key: {**WRITTEN_BY_4, **value} if key.endswith("_config") else value
        for key, value in {**WRITTEN_BY_4, **full}.items()
    }
    for section in {"audio_config", "vision_config"} & set(older):
        older[section]["tie_word_embeddings"] = True
    if thin["model_type"] == "voxtral":  # HF's converter takes it over from Mistral's file
        older["text_config"]["sliding_window"] = None
    assert conversion.config(full) == conversion.config(thin)
    assert conversion.config(older) == conversion.config(thin)
    if thin["model_type"] == "qwen2_5_omni_thinker":
        whole = {
            "model_type": "qwen2_5_omni",
            "thinker_config": older,
            "hidden_size": older["text_config"]["hidden_size"],
        }
        read = our_conversions()["qwen2_5_omni"].config(whole)
        assert replace(read, model_type=thin["model_type"]) == conversion.config(thin)


@pytest.mark.parametrize("name", REAL)
def test_sizes_are_those_that_hf_reads_from_a_config(name):
    """Published configs leave out what is the default, and the defaults of HF's classes differ by model."""
    config = REAL[name]
    ours, hf = our_conversions()[config["model_type"]].config(config), AutoConfig.for_model(**config)
    text, audio = hf.text_config, hf.audio_config
    decoder, encoder = ours.decoder, ours.encoder
    heads = decoder.n_heads, decoder.n_kv_heads, decoder.d_head
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert heads == (text.num_attention_heads, text.num_key_value_heads, d_head)
    sizes = decoder.n_layers, decoder.d_model, decoder.d_mlp, decoder.d_vocab, decoder.n_ctx
    names = "num_hidden_layers hidden_size intermediate_size vocab_size max_position_embeddings"
    assert sizes == tuple(getattr(text, name) for name in names.split())
    assert (decoder.eps, decoder.rope.theta) == (text.rms_norm_eps, text.rope_parameters["rope_theta"])
    names = "encoder_layers d_model encoder_attention_heads encoder_ffn_dim num_mel_bins max_source_positions"
    assert tuple(vars(encoder).values()) == (
        *(getattr(audio, name) for name in names.split()),
        getattr(audio, "n_window", None),
    )


@pytest.mark.parametrize("section", [None, "audio_config", "text_config"])
def test_an_unknown_config_key_is_refused_by_name(opened, section):
    config = json.loads((opened.folder / "config.json").read_text())
    (config[section] if section else config)["logit_softcapping"] = 30.0
    with pytest.raises(ConversionError, match="does not know: logit_softcapping"):
        our_conversions()[opened.name].config(config)


OTHER_ARITHMETIC = [
    ("text_config", "hidden_act", "gelu"),
    ("text_config", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
    ("text_config", "tie_word_embeddings", True),
    ("text_config", "num_key_value_heads", 3),
    ("text_config", "model_type", "gemma"),
    ("audio_config", "activation_function", "relu"),
    ("audio_config", "scale_embedding", True),
    ("audio_config", "num_key_value_heads", 2),
    (None, "tie_word_embeddings", True),
]
OF_ONE = {
    "qwen2_audio": [],
    "audioflamingo3": [(None, "projector_hidden_act", "relu"), (None, "projector_bias", False)],
    "voxtral": [
        (None, "projector_hidden_act", "relu"),
        (None, "audio_token_id", None),
        (None, "hidden_size", 65),
        ("text_config", "attention_bias", True),
        ("text_config", "mlp_bias", True),
        ("audio_config", "intermediate_size", 100),
        ("audio_config", "max_source_positions", 102),
    ],
    "qwen2_5_omni_thinker": [
        (None, "vision_start_token_id", None),
        (None, "image_token_index", "<|IMAGE|>"),
        (None, "position_id_per_seconds", 0),
        ("audio_config", "output_dim", 63),
        ("audio_config", "n_window", 101),
        ("text_config", "rope_parameters", {"mrope_section": [4, 4, 4], "rope_type": "default"}),
        ("text_config", "rope_parameters", {"mrope_section": 8, "rope_type": "default"}),
        ("text_config", "rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("vision_config", "hidden_act", "gelu"),
        ("vision_config", "out_hidden_size", 63),
        ("vision_config", "num_heads", 3),
        ("vision_config", "rope_parameters", {"rope_type": "yarn"}),
        ("vision_config", "fullatt_block_indexes", [7]),
        ("vision_config", "window_size", 4),
        ("vision_config", "in_chans", 4),
        ("vision_config", "patch_size", [4, 4]),
        ("vision_config", "logit_softcapping", 30.0),
    ],
}
UNASKED = {  # keys that say nothing in a model, or that it follows: see `test_a_tied_head_is_the_embedding`
    "qwen2_5_omni_thinker": [("text_config", "tie_word_embeddings", True), (None, "tie_word_embeddings", True)]
}


def test_a_config_that_asks_for_other_arithmetic_is_refused(opened):
    config = json.loads((opened.folder / "config.json").read_text())
    convert = our_conversions()[opened.name].config
    convert(config)
    names = ("d_model", "hidden_size") if "d_model" in config["audio_config"] else ("hidden_size", "d_model")
    odd, contradicting = (("audio_config", name, 31) for name in names)
    for section, key, value in [*OTHER_ARITHMETIC, *OF_ONE[opened.name], odd, contradicting]:
        if (section, key, value) in UNASKED.get(opened.name, []):
            continue
        changed = json.loads(json.dumps(config))
        (changed[section] if section else changed)[key] = value
        try:
            convert(changed)
        except ConversionError:
            continue
        pytest.fail(f"{section}: {key} = {value} was taken")


def test_features_that_are_padded_on_the_left_are_refused(opened):
    batch = opened.batch()
    mask = our_conversions()[opened.name].frame_mask
    if mask is not None:
        batch = {**batch, mask: batch[mask].flip(-1)}
        with pytest.raises(InputError, match="Features are padded on the right"):
            Inputs.from_hf(batch)
    processor = opened.family.processor()
    processor.feature_extractor.padding_side = "left"
    try:
        with pytest.raises(ConversionError, match="pads on the left, and encoders hear a clip from its first frame"):
            from_hf(opened.hf, processor)
    finally:
        processor.feature_extractor.padding_side = "right"


# --- what is done with a model -------------------------------------------------------------------------------


def heard(opened: Opened, clip: Tensor) -> Run:
    processor = opened.ours.processor
    prompt = processor.prompt(GENDER, processor.n_frames(clip))
    return Run(processor.inputs([prompt], [clip]), prompt)


def test_states_of_the_residual_stream_add_up(opened):
    with torch.no_grad():
        _, cache = opened.ours.run_with_cache(heard(opened, chirps([1.37])[0]).inputs)
    parts = cache.decompose_resid(mode="full")
    assert_close(parts.sum(0), cache["resid_post", opened.ours.cfg.n_layers - 1])


def test_both_engines_trace_alike(opened):
    sample = Sample("a.wav", "female", chirps([1.37])[0])
    traced = [
        causal_trace(
            opened.ours,
            [sample],
            attribute="gender",
            form="P1",
            kinds=("layer", "audio_layer", "token", "encoder_window"),
            window_s=0.7,
            engine=engine,
            progress=False,
        ).to_frame()
        for engine in ("sweep", "hooks")
    ]
    assert [set(frame.engine) for frame in traced] == [{"sweep"}, {"hooks"}]
    ours, theirs = (torch.tensor(frame.p_patched.to_numpy()) for frame in traced)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-9)
    assert {"layer", "audio_layer", "token", "encoder_window"} == set(traced[0].kind)
    moved = traced[0].assign(by=(traced[0].p_patched - traced[0].p_corrupted).abs() / traced[0].p_corrupted)
    assert (moved.groupby("kind").by.max() > 1e-3).all()


def test_all_states_of_an_encoder_block_bring_all_back(opened):
    clip = chirps([1.37])[0]
    clean, silent = heard(opened, clip), heard(opened, torch.zeros_like(clip))
    n_states = opened.ours.lalm_cfg.encoder.n_ctx if opened.name == "voxtral" else 69
    everything = Patch("resid_post", 1, range(n_states), Source(clean), stack="audio_encoder")
    half = Patch("resid_post", 0, range(n_states // 2), Source(clean), stack="audio_encoder")
    out = Patch("adapter_out", 0, range(opened.family.n_audio), Source(clean))
    found = assert_same(opened.ours, branches(silent, everything, half, out))
    theirs = Plan(opened.ours, [Branch(clean)], Logits()).run().values[0]
    there = Plan(opened.ours, branches(silent, everything, half, out), Logits()).run().values
    assert_close(there[0], theirs)
    assert_close(there[2], theirs)
    assert (there[1] - theirs).abs().max() > 1e-3
    assert len(found.values) == 3


def test_each_window_of_a_long_clip_is_patched_by_itself(opened):
    if opened.family.longest_s <= 2:
        with pytest.raises(AudioError, match="is too long: this model hears 2"):
            heard(opened, chirps([3.1])[0])
        return
    clip = chirps([3.1])[0]
    clean, silent = heard(opened, clip), heard(opened, torch.zeros_like(clip))
    rows = opened.ours.perceived(clean.inputs, "audio_encoder")
    n_rows = 1 if opened.name == "qwen2_5_omni" else 2
    assert len(rows) == n_rows
    every = [
        Patch("resid_post", 1, range(n), Source(clean), stack="audio_encoder", row=row)
        for row, (n, _, _) in enumerate(rows)
    ]
    out = [Patch("adapter_out", 0, range(n), Source(clean), row=row) for row, (_, _, n) in enumerate(rows)]
    scale = Scale("attn_out", 0, (3,), factor=0.0, stack="audio_encoder", row=n_rows - 1)
    its = branches(silent, tuple(every), tuple(out), *every, scale)
    found = assert_same(opened.ours, its).values
    theirs = Plan(opened.ours, [Branch(clean)], LOGITS_AND_LOG_PROBS).run().values[0]
    assert_close(found[0], theirs)
    assert_close(found[1], theirs)
    assert n_rows == 1 or all((each - theirs).abs().max() > 1e-3 for each in found[2:])
    with pytest.raises(InputError, match=f"There are {n_rows} rows of audio_encoder.blocks.0.hook_attn_out"):
        Plan(opened.ours, branches(silent, replace(scale, row=n_rows)), Logits()).run()
    if n_rows == 2:
        with pytest.raises(InputError, match="has 2 rows in this run: say which one is changed, as row=0"):
            Plan(opened.ours, branches(silent, replace(scale, row=None)), Logits()).run()
        taken = branches(heard(opened, chirps([1.37])[0]), replace(every[0], row=None, positions=(0,)))
        with pytest.raises(InputError, match="has 2 rows in the run that it is taken from"):
            Plan(opened.ours, taken, Logits())


def test_a_clip_over_the_limit_is_refused(opened):
    longest = int(opened.family.longest_s * 16_000)
    processor = opened.ours.processor
    processor.check_audible(torch.ones(longest), "A clip")
    with pytest.raises(AudioError, match="is too long: this model hears"):
        processor.check_audible(torch.ones(longest + 1), "A clip")


def test_other_audio_than_the_prompts_have_places_for_is_refused(opened):
    clip = chirps([1.37])[0]
    inputs = heard(opened, clip).inputs
    fewer = Inputs(inputs.tokens[:, :-12], inputs.attention_mask[:, :-12], inputs.mel[[0, 0]], inputs.n_frames[[0, 0]])
    with pytest.raises(InputError, match=r"audio placeholders and the clips make \[\d+, \d+\] audio embeddings"):
        opened.ours(fewer)


@pytest.mark.parametrize("other", FAMILIES)
def test_the_processor_of_another_model_is_refused(opened, other):
    processor = FAMILIES[other].processor()
    if other == opened.name:
        assert from_hf(opened.hf, processor).processor is not None
        return
    with pytest.raises(ConversionError, match=r"belongs to another model: .*token"):
        from_hf(opened.hf, processor)


def test_a_tokenizer_with_the_placeholder_elsewhere_is_refused(opened):
    processor = opened.ours.processor
    processor.check()
    with pytest.raises(ConversionError, match=r"belongs to another model: .* token 7"):
        replace(processor, cfg=replace(processor.cfg, audio_token=7)).check()


def test_a_bound_model_hears(opened):
    inputs = Inputs.from_hf(opened.batch())
    bound = opened.ours.bind(inputs)
    with torch.no_grad():
        assert_close(bound(bound.tokens[0])[inputs.attention_mask], opened.ours(inputs)[inputs.attention_mask])


def test_verify_agrees(opened):
    verification = verify(opened.folder)
    assert verification.passed, verification
    vision = opened.ours.lalm_cfg.vision
    n_blocks = opened.ours.cfg.n_layers + opened.ours.lalm_cfg.encoder.n_layers
    assert len(verification.frame) == n_blocks + 3 + (0 if vision is None else vision.n_layers + 1)
    assert (verification.frame.difference < 1e-4).all()


def test_info_describes_it(opened):
    described = info(opened.folder)
    assert sum(described.n_parameters.values()) == sum(p.numel() for p in opened.ours.parameters())
    assert described.n_audio == opened.ours.audio_encoder.n_audio(200)
    assert ("longer clips in windows of that" in repr(described)) == (opened.family.longest_s > 2)
    assert described.hooks["adapter.hook_out"] == "clip, pos, d_model"
