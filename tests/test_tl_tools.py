"""TransformerLens' own tools on prompts with audio: unmodified, and against what they should compute."""

from collections import Counter

import pandas as pd
import pytest
import torch
from reference import chirps, hf_batch, hf_states
from torch.testing import assert_close
from transformer_lens import SVDInterpreter, patching
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.head_detector import detect_head
from transformer_lens.model_protocol import TransformerLensModelWithWeights
from transformer_lens.tools.analysis import attribution_patching, interchange, logit_lens
from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution
from transformer_lens.tools.analysis.projection_kernel import attention_head_subspace_affinity

from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.corrupt import silence
from lalm_lens.datasets import read_folder
from lalm_lens.errors import ConversionError, InputError, PromptError
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import Patch
from lalm_lens.transformer import HookedTransformer

pytestmark = pytest.mark.numbers

TARGET = 77


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1].log_softmax(-1)[:, TARGET].mean()


@pytest.fixture(scope="module", params=[2, 4], ids=["shared keys", "own keys"])
def models(request, pair):
    return pair(seed=1, n_kv_heads=request.param)


@pytest.fixture(scope="module")
def hf(models):
    return models[0]


@pytest.fixture(scope="module")
def ours(models):
    return models[1]


@pytest.fixture(scope="module")
def batch():
    return hf_batch(chirps([0.5]))


@pytest.fixture(scope="module")
def clean(batch):
    return Inputs.from_hf(batch)


@pytest.fixture(scope="module")
def corrupted(clean):
    """The same words about another sound: only the audio tells them apart."""
    return Inputs.from_hf(hf_batch(chirps([0.5], seed=4)) | {"input_ids": clean.tokens})


@pytest.fixture(scope="module")
def bound(ours, clean, corrupted):
    return ours.bind(clean, corrupted)


@pytest.fixture(scope="module")
def caches(ours, clean, corrupted):
    with torch.no_grad():
        return [ours.run_with_cache(inputs)[1] for inputs in (clean, corrupted)]


def test_tokens_of_a_bound_model_carry_the_audio(ours, bound, clean, corrupted):
    assert torch.equal(clean.tokens, corrupted.tokens)
    for tokens, inputs in zip(bound.tokens, (clean, corrupted), strict=True):
        assert_close(bound(tokens), ours(inputs))
    both = torch.cat(bound.tokens)
    assert_close(bound(both.flip(0)), torch.cat([ours(corrupted), ours(clean)]))
    assert_close(ours.bind(clean)(clean.tokens), ours(clean))
    with pytest.raises(InputError, match="2 of the prompts that were bound"):
        bound(clean.tokens)
    with pytest.raises(InputError, match="0 of the prompts that were bound"):
        bound(clean.tokens.flip(1))
    with pytest.raises(InputError, match="Nothing to bind"):
        ours.bind()


def test_padding_stays_padding_when_bound(ours):
    inputs = Inputs.from_hf(hf_batch(chirps([0.9, 0.4])))
    bound = ours.bind(inputs)
    assert_close(bound(bound.tokens[0])[inputs.attention_mask], ours(inputs)[inputs.attention_mask])
    assert_close(bound(bound.tokens[0][1:])[:, -1], ours(inputs)[1:, -1])
    assert_close(bound(inputs.tokens[1:])[:, -1], ours(inputs)[1:, -1])
    assert_close(bound(inputs.tokens)[inputs.attention_mask], ours(inputs)[inputs.attention_mask])


def test_a_padded_row_of_words_stays_padded_when_bound(ours, clean):
    words = torch.cat([torch.zeros(1, 20, dtype=torch.long), torch.randint(10, 200, (1, 6))], 1)[
        :, : clean.tokens.shape[1]
    ]
    both = Inputs(
        torch.cat([clean.tokens, words]),
        torch.cat([clean.attention_mask, torch.arange(words.shape[1])[None] >= 20]),
        clean.mel,
        clean.n_frames,
    )
    for tokens in (both.tokens, ours.bind(both).tokens[0]):
        assert_close(ours.bind(both)(tokens)[both.attention_mask], ours(both)[both.attention_mask])


def test_a_bound_model_is_the_model_itself(ours, bound, clean):
    assert isinstance(bound, TransformerLensModelWithWeights)
    assert bound.blocks is ours.blocks
    assert bound.cfg is ours.cfg
    assert "bound to" in repr(bound)
    seen = []
    with ours.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda state, hook: seen.append(1))]):
        bound.run_with_hooks(bound.tokens[0], fwd_hooks=[("blocks.1.hook_resid_pre", lambda state, hook: None)])
        bound(bound.tokens[0])
    assert len(seen) == 2, "a hook of the model was lost when the bound one took its own away"
    bound.eval()
    assert not ours.training
    assert_close(bound(clean), ours(clean))


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_activation_patching_agrees_with_patches(ours, bound, corrupted, caches, site):
    sweep = getattr(patching, f"get_act_patch_{site}")
    with torch.no_grad():
        theirs = sweep(bound, bound.tokens[1], caches[0], metric)
        mine = torch.empty_like(theirs)
        for layer in range(ours.cfg.n_layers):
            for pos in range(corrupted.tokens.shape[1]):
                patch = Patch(site, layer, (pos,), caches[0][site, layer][:, [pos]])
                mine[layer, pos] = metric(ours.run_with_hooks(corrupted, fwd_hooks=[patch.hook()]))
    assert_close(theirs, mine)
    assert theirs.std() > 1e-4, "nothing was patched"


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out"])
def test_a_causal_trace_is_what_their_patching_measures(tiny_lalm, tmp_path, site):
    """On the shipped model, from the sound file on: the probability of the true label in 40 patched runs."""
    samples = read_folder(write_clips(tmp_path, "animal", 2, seed=8))
    trace = causal_trace(tiny_lalm, samples, attribute="animal", site=site, progress=False).to_frame()
    sample, processor = samples[0], tiny_lalm.processor
    prompt = processor.prompt(ATTRIBUTES["animal"], processor.n_frames(sample.waveform))
    clean, silent = (processor.inputs([prompt], [w]) for w in (sample.waveform, silence(sample.waveform)))
    bound = tiny_lalm.bind(clean, silent)
    target = processor.label_tokens(ATTRIBUTES["animal"].labels)[sample.label]
    rows = trace[(trace["sample"] == sample.name) & (trace.kind == "token") & (trace.site == site)]
    rows = pd.concat([rows[rows.text_index == -1], rows.sample(32, random_state=0)])
    with torch.no_grad():
        theirs = patching.generic_activation_patch(
            bound,
            bound.tokens[1],
            tiny_lalm.run_with_cache(clean)[1],
            lambda logits: logits[0, -1].double().softmax(-1)[target],
            patching.layer_pos_patch_setter,
            site,
            index_df=rows[["layer", "position"]].astype(int).rename(columns={"position": "pos"}),
        )
    assert_close(theirs.double(), torch.tensor(rows.p_patched.to_numpy()), rtol=0, atol=2e-6)
    assert theirs.std() > 0.01


@pytest.mark.parametrize("part", ["q", "k", "v", "z", "pattern"])
def test_head_patching_moves_the_metric_as_a_hook_does(ours, bound, corrupted, caches, part):
    name = {"z": "out"}.get(part, part)
    with torch.no_grad():
        theirs = getattr(patching, f"get_act_patch_attn_head_{name}_all_pos")(bound, bound.tokens[1], caches[0], metric)
        for layer, head in ((0, 0), (2, 1)):

            def restore(state, hook, head=head):
                at = (slice(None), head) if part == "pattern" else (slice(None), slice(None), head)
                state[at] = caches[0][hook.name][at]
                return state

            hook = (f"blocks.{layer}.attn.hook_{part}", restore)
            assert_close(theirs[layer, head], metric(ours.run_with_hooks(corrupted, fwd_hooks=[hook])))
    assert theirs.std() > 1e-5, "nothing was patched"


def test_a_direct_path_patch_is_one_edge(ours, bound, corrupted, caches):
    with torch.no_grad():
        theirs = patching.get_act_patch_direct_path(bound, bound.tokens[1], *caches, metric, 0, 1)
        delta = (caches[0]["z", 0] - caches[1]["z", 0])[:, :, 1] @ ours.blocks[0].attn.W_O[1]
        ours.set_use_split_qkv_input(True)
        try:
            for layer, head in ((1, 0), (3, 2)):

                def add(state, hook, head=head):
                    state[:, :, head] += delta
                    return state

                hook = (f"blocks.{layer}.attn.hook_q_input", add)
                assert_close(theirs[layer, head], metric(ours.run_with_hooks(corrupted, fwd_hooks=[hook])))
        finally:
            ours.set_use_split_qkv_input(False)
    assert not ours.cfg.use_split_qkv_input
    assert theirs[1:].std() > 1e-4


def test_the_logit_lens_is_hfs_states_through_hfs_head(hf, ours, bound, batch, caches):
    _, states = hf_states(hf, batch)
    with torch.no_grad():
        lens = logit_lens(bound, bound.tokens[0], positions=slice(None))
        cached = caches[0].logit_lens(positions=slice(None))
        for layer in range(ours.cfg.n_layers):
            expected = hf.lm_head(hf.model.language_model.norm(states[f"decoder.{layer}"]))
            for each in (lens, cached):
                at = next(n for n, label in enumerate(each.labels) if label in (f"{layer + 1}_pre", "final_post"))
                assert_close(each.values[at], expected)


def test_every_part_of_the_residual_stream_adds_up_at_audio_positions(ours, clean, caches):
    is_audio = clean.tokens[0] == ours.lalm_cfg.audio_token
    cache = caches[0]
    whole = cache["resid_post", -1]
    for parts in (
        cache.decompose_resid(),
        cache.get_full_resid_decomposition(expand_neurons=False),
        cache.get_full_resid_decomposition(expand_neurons=True),
    ):
        assert_close(parts.sum(0)[:, is_audio], whole[:, is_audio])
        assert_close(parts.sum(0), whole)
    assert_close(cache.accumulated_resid()[-1], whole)
    assert_close(
        cache.stack_neuron_results(layer=-1).sum(0) + cache.stack_head_results(layer=-1).sum(0) + cache["hook_embed"],
        whole,
    )


def test_logit_attribution_adds_up_to_the_logit_everywhere(ours, bound, clean, caches):
    logits = ours(clean)
    tokens = torch.full_like(clean.tokens, TARGET)
    parts = caches[0].decompose_resid()
    assert_close(caches[0].logit_attrs(parts, tokens).sum(0), logits[..., TARGET])
    theirs = direct_logit_attribution(bound, bound.tokens[0], answer_tokens=TARGET, pos=-1)
    assert_close(theirs.attribution.sum(0).squeeze(), logits[0, -1, TARGET])


def test_attribution_patching_is_the_first_order_effect(ours, bound, clean, corrupted, caches):
    theirs = attribution_patching.attribution_patch(bound, *bound.tokens, metric)
    with torch.enable_grad():
        grads = {}
        names = ["hook_embed", "blocks.2.hook_mlp_out", "blocks.1.attn.hook_z"]
        hooks = [(name, lambda grad, hook: grads.update({hook.name: grad})) for name in names]
        with ours.hooks(bwd_hooks=hooks):
            metric(ours(ours.embed_inputs(corrupted))).backward()
    ours.zero_grad()
    effect = {name: (caches[0][name] - caches[1][name]) * grads[name] for name in names}
    found = Counter()
    for node, score in theirs.node_scores.items():
        found[node.kind, node.layer, node.head] += score
    expected = {
        ("embed", None, None): effect["hook_embed"].sum(),
        ("mlp_out", 2, None): effect["blocks.2.hook_mlp_out"].sum(),
        **{("attn_head_out", 1, head): effect["blocks.1.attn.hook_z"][:, :, head].sum() for head in range(4)},
    }
    for node, score in expected.items():
        assert_close(torch.tensor(found[node]), score.item() * torch.ones(()), rtol=1e-4, atol=1e-6)
    assert found["embed", None, None] != 0, "the audio was not there"


def test_edge_attribution_runs_where_heads_have_keys_of_their_own(ours, bound):
    config = attribution_patching.EdgeAttributionConfig(granularity="edge")
    if ours.decoder_cfg.n_kv_heads < ours.decoder_cfg.n_heads:
        with pytest.raises(ValueError, match="GQA"):
            attribution_patching.attribution_patch(bound, *bound.tokens, metric, config=config)
    else:
        edges = attribution_patching.attribution_patch(bound, *bound.tokens, metric, config=config).top_edges(20)
        assert all(score != 0 for *_, score in edges)
    assert not ours.cfg.use_attn_result
    assert not ours.cfg.use_hook_mlp_in


def test_interchange_reads_and_writes_states_with_audio(ours, bound, clean, corrupted, caches):
    name, last = "blocks.1.hook_resid_post", clean.tokens.shape[1] - 1
    both = torch.cat(bound.tokens)
    positions = torch.tensor([last, last])
    states = interchange.collect_activations(bound, name, both, bound, positions=positions)
    assert_close(states, torch.cat([cache[name][:, -1] for cache in caches]))
    with torch.no_grad():
        swapped = interchange.intervened_logits(
            bound,
            name,
            lambda base, source: source,
            bound.tokens[1],
            states[:1],
            lambda tokens: bound(tokens)[:, -1],
            positions=positions[:1],
        )
        patch = Patch("resid_post", 1, (last,), caches[0][name][:, -1:])
        assert_close(swapped, ours.run_with_hooks(corrupted, fwd_hooks=[patch.hook()])[:, -1])


def test_an_untrained_copy_can_be_made(ours, clean):
    fresh = interchange.reinitialized(ours, seed=0)
    assert not torch.allclose(fresh.W_E, ours.W_E)
    assert fresh(clean).isfinite().all()


def test_heads_are_detected_on_a_prompt_with_audio(tiny_lalm):
    processor, waveform = tiny_lalm.processor, chirps([0.6])[0]
    prompt = processor.prompt(ATTRIBUTES["gender"], processor.n_frames(waveform))
    inputs = processor.inputs([prompt], [waveform])
    bound = tiny_lalm.bind(inputs)
    (text,) = tiny_lalm.to_string(inputs.tokens)
    pattern = torch.eye(len(prompt)).roll(-1, dims=1).tril()
    scores = detect_head(bound, text, pattern, error_measure="abs")
    _, cache = tiny_lalm.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_pattern"))
    for layer, head in ((0, 0), (7, 3)):
        gap = (cache["pattern", layer][0, head] - pattern).abs().sum(-1).mean()
        assert_close(scores[layer, head], 1 - gap, rtol=1e-3, atol=2e-3)


def test_singular_vectors_are_those_of_the_heads_own_circuit(tiny_lalm):
    """Query heads 2 and 3 share the second value head; without expansion they would be out of reach or mistaken."""
    attn, unembed = tiny_lalm.blocks[3].attn, tiny_lalm.W_U
    interpreter = SVDInterpreter(tiny_lalm)
    for head in range(4):
        theirs = interpreter.get_singular_vectors("OV", layer_index=3, head_index=head, num_vectors=1)
        _, _, vh = torch.linalg.svd(attn.W_V[head // 2] @ attn.W_O[head])
        expected = vh[0] @ unembed
        assert_close(theirs[:, 0, 0].abs(), expected.abs(), rtol=1e-3, atol=1e-4)


def test_tl_parameters_are_every_weight_in_transformer_lens_shapes(ours, clean):
    parameters, cfg = ours.tl_parameters(), ours.decoder_cfg
    assert parameters["blocks.1.attn.W_K"].shape == (cfg.n_heads, cfg.d_model, cfg.d_head)
    assert parameters["blocks.1.attn.b_V"].shape == (cfg.n_heads, cfg.d_head)
    group = cfg.n_heads // cfg.n_kv_heads
    assert torch.equal(parameters["blocks.1.attn.W_V"][3], ours.blocks[1].attn.W_V[3 // group])
    counted = {id(p) for name, p in ours.named_parameters() if not name.startswith(("audio_encoder", "adapter"))}
    extra = {"unembed.b_U"} | {f"blocks.{n}.{b}" for n in range(4) for b in ("attn.b_O", "mlp.b_in", "mlp.b_out")}
    assert len(parameters) - len(extra) == len(counted)


def test_head_subspaces_can_be_compared(ours):
    affinity = attention_head_subspace_affinity(ours, target_role="Q")
    assert affinity.scores[affinity.valid_mask].isfinite().all()
    assert [layer for layer, _ in ours.blocks_with("attn")] == list(range(ours.cfg.n_layers))
    assert ours.blocks_with("ssm") == []


def test_biases_add_up(pair):
    ours = pair(seed=1)[1]
    for block in ours.blocks:  # Qwen2 has none there: other decoders do
        for linear in (block.attn.o_proj, block.mlp.out_proj):
            linear.bias = torch.nn.Parameter(torch.randn(64))
    with torch.no_grad():
        expected = sum(ours.blocks[layer].attn.b_O + ours.blocks[layer].mlp.b_out for layer in range(3))
    assert_close(ours.accumulated_bias(3), expected)
    assert_close(ours.accumulated_bias(0, mlp_input=True), ours.blocks[0].attn.b_O)
    attention = sum(block.attn.b_O for block in ours.blocks)
    assert_close(ours.accumulated_bias(4, include_mlp_biases=False), attention)
    with pytest.raises(InputError, match="4 blocks"):
        ours.accumulated_bias(4, mlp_input=True)


def test_words_go_in_and_come_out(tiny_lalm):
    token = tiny_lalm.to_single_token(" female")
    assert tiny_lalm.to_single_str_token(token) == " female"
    assert tiny_lalm.to_str_tokens(" male, female") == [" male", ",", " female"]
    assert tiny_lalm.to_string(tiny_lalm.to_tokens("The speaker")) == ["The speaker"]
    assert_close(tiny_lalm("The speaker"), tiny_lalm(tiny_lalm.to_tokens("The speaker")))
    both = tiny_lalm(["The speaker's gender is", "The speaker"])
    assert_close(both[1, -1], tiny_lalm("The speaker")[0, -1])
    directions = tiny_lalm.tokens_to_residual_directions(" female")
    assert_close(directions, tiny_lalm.ln_final.w * tiny_lalm.W_U[:, token])
    with pytest.raises(PromptError, match="tokens, not one"):
        tiny_lalm.to_single_token(" The speaker")
    with pytest.raises(PromptError, match="what is padding"):
        tiny_lalm.to_tokens(["The speaker", "The"])
    with pytest.raises(PromptError, match="no tokens"):
        tiny_lalm("")
    with pytest.raises(PromptError, match="beginning of a text"):
        tiny_lalm.to_tokens("The", prepend_bos=True)


def test_a_model_without_a_tokenizer_says_so(ours):
    with pytest.raises(InputError, match="without a tokenizer"):
        ours("text")


CFG = {
    "d_model": 32,
    "d_head": 8,
    "n_heads": 4,
    "n_layers": 3,
    "n_ctx": 64,
    "d_vocab": 50,
    "d_mlp": 48,
    "act_fn": "silu",
    "normalization_type": "RMS",
    "gated_mlp": True,
    "final_rms": True,
    "positional_embedding_type": "rotary",
}


def test_a_transformer_lens_config_makes_a_random_model():
    cfg = TransformerBridgeConfig(**CFG, n_key_value_heads=2, seed=3, use_attn_result=True, default_prepend_bos=False)
    model, same = HookedTransformer(cfg), HookedTransformer(cfg)
    tokens = torch.randint(0, 50, (2, 7))
    assert_close(model(tokens), same(tokens), rtol=0, atol=0)
    _, cache = model.run_with_cache(tokens)
    assert cache["blocks.2.attn.hook_result"].shape == (2, 7, 4, 32)
    assert model.W_K.shape == (3, 2, 32, 8)
    assert abs(model.W_E.std() * 32**0.5 / 0.8 - 1) < 0.1
    assert not model.cfg.default_prepend_bos
    again = HookedTransformer(model.cfg)
    assert again.decoder_cfg == model.decoder_cfg


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalization_type", "LN"),
        ("act_fn", "gelu"),
        ("gated_mlp", False),
        ("parallel_attn_mlp", True),
        ("positional_embedding_type", "standard"),
        ("output_logits_soft_cap", 30.0),
        ("attn_scores_soft_cap", 50.0),
        ("rotary_dim", 4),
        ("use_qk_norm", True),
        ("attn_scale", 3.0),
        ("num_experts", 4),
        ("d_vocab_out", 7),
        ("use_hook_tokens", True),
    ],
)
def test_a_transformer_lens_config_that_asks_for_more_is_refused(field, value):
    with pytest.raises(ConversionError, match=field):
        HookedTransformer(TransformerBridgeConfig(**(CFG | {field: value})))


def test_a_transformer_lens_config_says_type_and_rotary_base():
    cfg = TransformerBridgeConfig(**CFG, dtype=torch.float64, rotary_base=500)
    model = HookedTransformer(cfg)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.decoder_cfg.rope.theta == 500.0
    assert model.cfg.default_prepend_bos


def test_local_attention_of_a_transformer_lens_config_is_a_window():
    local = {"use_local_attn": True, "window_size": 5, "attn_types": ["global", "local", "local"]}
    assert HookedTransformer(TransformerBridgeConfig(**CFG, **local)).decoder_cfg.windows == (None, 5, 5)
