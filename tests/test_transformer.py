"""The hooked model: partial forwards, hooks, views of weights, and what is refused."""

import pytest
import torch
from reference import chirps, hf_batch
from torch.testing import assert_close
from transformer_lens import ActivationCache

from lalm_lens.errors import HookError, InputError
from lalm_lens.inputs import Embedded, Inputs
from lalm_lens.model import HookedLALM
from lalm_lens.transformer import HookedTransformer


@pytest.fixture(scope="module")
def ours(pair):
    return pair()[1]


@pytest.fixture(scope="module")
def inputs():
    return Inputs.from_hf(hf_batch(chirps([1.2, 0.6])))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_a_run_can_stop_and_start_at_any_layer(ours, inputs):
    logits, cache = ours.run_with_cache(inputs, names_filter=lambda name: name.endswith("resid_pre"))
    for layer in range(ours.cfg.n_layers):
        resid = ours(inputs, stop_at_layer=layer)
        assert_close(resid, cache["resid_pre", layer], rtol=0, atol=0)
        again = ours(resid, start_at_layer=layer, attention_mask=inputs.attention_mask)
        assert_close(again, logits, rtol=0, atol=0)


def test_stopping_saves_the_blocks_above(ours, inputs):
    _, cache = ours.run_with_cache(inputs, stop_at_layer=2)
    assert "blocks.1.hook_resid_post" in cache
    assert "blocks.2.hook_resid_pre" not in cache


@pytest.mark.parametrize("at", [-1, slice(-3, None), torch.tensor([0, 5, 7])])
def test_logits_at_are_those_of_the_whole_run(ours, inputs, at):
    whole = ours(inputs)
    expected = whole[:, [at]] if isinstance(at, int) else whole[:, at]
    assert_close(ours(inputs, logits_at=at), expected)


def test_the_encoder_runs_once_for_many_decoder_runs(ours, inputs):
    runs = []
    with ours.hooks(fwd_hooks=[("audio_encoder.hook_out", lambda out, hook: runs.append(1))]):
        embedded = ours.embed_inputs(inputs)
    first, second = ours(embedded), ours(embedded)
    assert runs == [1]
    assert_close(first, ours(inputs))
    assert_close(first, second, rtol=0, atol=0)


def test_hook_embed_is_the_whole_input_of_block_0(ours, inputs):
    _, cache = ours.run_with_cache(inputs)
    assert_close(cache["hook_embed"], cache["resid_pre", 0], rtol=0, atol=0)
    is_audio = inputs.tokens == ours.lalm_cfg.audio_token
    assert_close(cache["hook_embed"][is_audio], cache["hook_audio_embed"], rtol=0, atol=0)


def test_the_residual_stream_is_the_sum_of_its_parts(ours, inputs):
    _, cache = ours.run_with_cache(inputs)
    parts = cache.decompose_resid(layer=None, mode="all")
    assert_close(parts.sum(0), cache["resid_post", -1])


def test_run_with_cache_gives_an_activation_cache_of_every_live_hook_point(ours, inputs):
    _, cache = ours.run_with_cache(inputs)
    assert isinstance(cache, ActivationCache)
    off = {
        f"blocks.{layer}.{name}"
        for layer in range(ours.cfg.n_layers)
        for name in (
            "hook_mlp_in",
            *(f"attn.hook_{each}" for each in ("result", "attn_in", "q_input", "k_input", "v_input")),
        )
    }
    assert set(cache.keys()) == set(ours.hook_dict) - off


SWITCHES = ("attn_result", "split_qkv_input", "attn_in", "hook_mlp_in")


@pytest.fixture
def switched(pair):
    """A model in which every head has keys of its own, with some of its switches on."""
    model = pair(seed=5, n_kv_heads=4)[1]

    def on(*switches: str) -> HookedLALM:
        for switch in SWITCHES:
            getattr(model, f"set_use_{switch}")(False)
        for switch in switches:
            getattr(model, f"set_use_{switch}")(True)
        return model

    return on


def test_every_hook_point_changes_the_output(switched, inputs):
    edited = set()
    for switches in (("attn_result", "split_qkv_input", "hook_mlp_in"), ("attn_in",)):
        model = switched(*switches)
        before = model(inputs)
        for name in model.live(inputs) - edited:
            after = model.run_with_hooks(inputs, fwd_hooks=[(name, lambda state, hook: state * 1.5)])
            assert not torch.allclose(after[inputs.attention_mask], before[inputs.attention_mask]), name
            edited.add(name)
    assert edited == set(model.hook_dict)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_no_number_and_its_hook_points_fire(switched, inputs, switch):
    plain, before = switched().run_with_cache(inputs)
    model = switched(switch)
    logits, cache = model.run_with_cache(inputs)
    assert_close(logits, plain)
    new = set(cache.keys()) - set(before.keys())
    names = {
        "attn_result": {"attn.hook_result"},
        "split_qkv_input": {"attn.hook_q_input", "attn.hook_k_input", "attn.hook_v_input"},
        "attn_in": {"attn.hook_attn_in"},
        "hook_mlp_in": {"hook_mlp_in"},
    }
    assert new == {f"blocks.{layer}.{name}" for layer in range(model.cfg.n_layers) for name in names[switch]}
    for name in new - {f"blocks.{layer}.attn.hook_result" for layer in range(4)}:
        layer, copies = int(name.split(".")[1]), cache[name]
        source = cache["resid_mid" if switch == "hook_mlp_in" else "resid_pre", layer]
        assert_close(copies, source if switch == "hook_mlp_in" else source[:, :, None].expand_as(copies))


def test_one_heads_query_input_reaches_that_head_alone(switched, inputs):
    model = switched("split_qkv_input")

    def double(state, hook):
        state[:, :, 1] *= 2  # in place: the other heads have copies of their own
        return state

    _, before = model.run_with_cache(inputs)
    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_q_input", double)]):
        _, after = model.run_with_cache(inputs, reset_hooks_end=False)
    model.reset_hooks()
    changed = (after["q", 2] != before["q", 2]).flatten(0, 1).any(-1).any(0)
    assert changed.tolist() == [False, True, False, False]
    for name in ("k", "v", "resid_pre"):
        assert_close(after[name, 2], before[name, 2])


def test_an_edit_of_what_the_mlp_reads_is_no_edit_of_the_stream(switched, inputs):
    def zero(state, hook):
        state.zero_()

    model = switched("hook_mlp_in")
    with model.hooks(fwd_hooks=[("blocks.2.hook_mlp_in", zero)]):
        _, cache = model.run_with_cache(inputs, reset_hooks_end=False)
    model.reset_hooks()
    assert not cache["mlp_out", 2].any()
    assert_close(cache["resid_post", 2], cache["resid_mid", 2])
    assert cache["resid_mid", 2].any()


@pytest.mark.parametrize("first", SWITCHES)
@pytest.mark.parametrize("second", SWITCHES)
def test_turning_one_switch_off_leaves_the_others_on(switched, inputs, first, second):
    model = switched(first)
    if second != first:
        getattr(model, f"set_use_{second}")(False)
    _, cache = model.run_with_cache(inputs)
    on = {name for name in model.hook_dict if model.switch_of(name) is None}
    assert model.switched_on() == on
    assert set(cache.keys()) == on
    before = model(inputs)
    new = on - switched().live(inputs)
    switched(first)
    for name in new:
        assert not torch.allclose(
            model.run_with_hooks(inputs, fwd_hooks=[(name, lambda state, hook: 0 * state)]), before
        ), name


def test_pos_slice_takes_positions_wherever_they_are(switched, inputs):
    model = switched("attn_result", "split_qkv_input")
    _, whole = model.run_with_cache(inputs, names_filter=lambda name: name.startswith(("blocks", "hook_embed", "ln_")))
    for chosen, kept in (((3, 9), slice(3, 9)), ([1, 5], [1, 5])):
        _, some = model.run_with_cache(
            inputs,
            names_filter=lambda name: name.startswith(("blocks", "hook_embed", "ln_")),
            pos_slice=chosen,
        )
        for name, state in some.items():
            full = whole[name]
            by_query = name.endswith(("attn_scores", "pattern"))
            assert_close(state, full[:, :, kept] if by_query else full[:, kept], msg=name)
    with pytest.raises(InputError, match="positions of the prompt"):
        model.run_with_cache(inputs, pos_slice=-1)


def test_switches_that_exclude_each_other_or_the_model_are_refused(switched, ours):
    with pytest.raises(InputError, match=r"set_use_split_qkv_input\(False\)"):
        switched("split_qkv_input").set_use_attn_in(True)
    with pytest.raises(InputError, match=r"set_use_attn_in\(False\)"):
        switched("attn_in").set_use_split_qkv_input(True)
    with pytest.raises(InputError, match="4 heads share 2 keys"):
        ours.set_use_attn_in(True)


def test_head_results_sum_to_the_attention_output(ours, inputs):
    plain = ours(inputs)
    ours.set_use_attn_result(True)
    try:
        logits, cache = ours.run_with_cache(inputs)
    finally:
        ours.set_use_attn_result(False)
    assert_close(logits, plain)
    assert_close(cache["blocks.1.attn.hook_result"].sum(2), cache["blocks.1.hook_attn_out"])


def test_hooks_are_gone_after_an_exception(ours, inputs):
    def fail(state, hook):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        ours.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_resid_post", fail)])
    assert not ours.list_hooks()


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("blocks.1.hook_resid_post", {"start_at_layer": 2}),
        ("hook_embed", {"start_at_layer": 0}),
        ("blocks.2.hook_resid_pre", {"stop_at_layer": 2}),
        ("blocks.3.mlp.hook_post", {"stop_at_layer": -1}),
        ("ln_final.hook_scale", {"stop_at_layer": 4}),
    ],
)
def test_a_hook_outside_of_the_run_is_refused(ours, inputs, name, layers):
    resid = ours(inputs, stop_at_layer=layers["start_at_layer"]) if "start_at_layer" in layers else inputs
    hook = [(name, lambda state, hook: state)]
    with pytest.raises(HookError, match="would not fire"):
        ours.run_with_hooks(resid, fwd_hooks=hook, **layers)
    with pytest.raises(HookError, match="would not fire"):
        ours.run_with_cache(resid, names_filter=name, **layers)
    with pytest.raises(HookError, match="would not fire"), ours.hooks(fwd_hooks=hook):
        ours(resid, **layers)
    assert not ours.list_hooks()


def test_a_filter_selects_among_what_the_run_passes(ours, inputs):
    seen = []
    hook = [(lambda name: name.endswith("hook_resid_post"), lambda state, hook: seen.append(hook.name))]
    ours.run_with_hooks(ours.embed_inputs(inputs), fwd_hooks=hook, stop_at_layer=2)
    assert seen == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    _, cache = ours.run_with_cache(inputs, names_filter=hook[0][0], stop_at_layer=1)
    assert sorted(cache.keys()) == [
        *(f"audio_encoder.blocks.{n}.hook_resid_post" for n in (0, 1)),
        "blocks.0.hook_resid_post",
    ]
    with pytest.raises(HookError, match="list of hook names is empty"):
        ours.run_with_cache(inputs, names_filter=[])


def test_hooks_that_edit_in_place_leave_the_callers_tensors_alone(ours, inputs):
    def zero(state, hook):
        state[:, :5] = 0
        return state

    embedded = ours.embed_inputs(inputs)
    resid = ours(embedded, stop_at_layer=2)
    for given, kept, name, start in (
        (embedded, embedded.embed, "blocks.0.hook_resid_pre", None),
        (embedded, embedded.embed, "hook_embed", None),
        (resid, resid, "blocks.2.hook_resid_pre", 2),
    ):
        before = kept.clone()
        ours.run_with_hooks(given, fwd_hooks=[(name, zero)], start_at_layer=start)
        assert torch.equal(kept, before), name


def test_layers_that_are_not_there_are_refused(ours, inputs):
    for layers in ({"stop_at_layer": 5}, {"start_at_layer": -5}):
        with pytest.raises(InputError, match="this model has 4 blocks"):
            ours(inputs, **layers)
    with pytest.raises(InputError, match="is behind"):
        ours(inputs, start_at_layer=3, stop_at_layer=1)


def test_a_batch_of_several_has_no_batch_dimension_to_remove(ours, inputs):
    with pytest.raises(InputError, match="Run one at a time"):
        ours.run_with_cache(inputs, remove_batch_dim=True)
    alone = Inputs(*(x[:1] for x in (inputs.tokens, inputs.attention_mask, inputs.mel, inputs.n_frames)))
    _, cache = ours.run_with_cache(alone, remove_batch_dim=True)
    assert cache["resid_post", 0].shape == (alone.tokens.shape[1], ours.cfg.d_model)


def test_audio_and_placeholders_must_match(ours, inputs):
    with pytest.raises(InputError, match="audio placeholders"):
        ours(inputs.tokens)
    with pytest.raises(InputError, match="audio placeholders"):
        ours(Inputs(inputs.tokens[:1], inputs.attention_mask[:1], inputs.mel, inputs.n_frames))
    swapped = Inputs(inputs.tokens, inputs.attention_mask, inputs.mel.flip(0), inputs.n_frames.flip(0))
    with pytest.raises(InputError, match=r"\[30, 15\] audio placeholders and the clips make \[15, 30\]"):
        ours(swapped)
    with pytest.raises(InputError, match="do not give them"):
        ours(inputs, attention_mask=inputs.attention_mask)
    with pytest.raises(InputError, match="padded on the left"):
        Inputs(inputs.tokens, torch.zeros_like(inputs.attention_mask))
    with pytest.raises(InputError, match="NaN"):
        Inputs(inputs.tokens, inputs.attention_mask, inputs.mel * torch.nan, inputs.n_frames)
    with pytest.raises(InputError, match="mel bins"):
        ours(Inputs(inputs.tokens, inputs.attention_mask, inputs.mel[..., :50], inputs.n_frames))
    with pytest.raises(InputError, match="residual stream"):
        ours(torch.randint(10, 200, (1, 5)), start_at_layer=1)


def test_padding_may_hold_anything(ours, inputs):
    embedded = ours.embed_inputs(inputs)
    is_token = inputs.attention_mask
    junk = torch.where(is_token[..., None], embedded.embed, 1e3)
    assert_close(ours(Embedded(junk, is_token))[is_token], ours(embedded)[is_token])


def test_weights_have_transformer_lens_shapes_and_share_memory(ours):
    cfg, attn, mlp = ours.decoder_cfg, ours.blocks[1].attn, ours.blocks[1].mlp
    shapes = {
        attn.W_Q: (cfg.n_heads, cfg.d_model, cfg.d_head),
        attn.W_K: (cfg.n_kv_heads, cfg.d_model, cfg.d_head),
        attn.W_O: (cfg.n_heads, cfg.d_head, cfg.d_model),
        attn.b_V: (cfg.n_kv_heads, cfg.d_head),
        attn.b_O: (cfg.d_model,),
        mlp.W_in: (cfg.d_model, cfg.d_mlp),
        mlp.W_out: (cfg.d_mlp, cfg.d_model),
        ours.W_E: (cfg.d_vocab, cfg.d_model),
        ours.W_U: (cfg.d_model, cfg.d_vocab),
        ours.W_gate: (cfg.n_layers, cfg.d_model, cfg.d_mlp),
    }
    for weight, shape in shapes.items():
        assert weight.shape == shape
    storage = attn.q_proj.weight.untyped_storage().data_ptr()
    assert attn.W_Q.untyped_storage().data_ptr() == storage
    assert ours.W_U.untyped_storage().data_ptr() == ours.unembed.linear.weight.untyped_storage().data_ptr()


def test_views_compute_what_the_model_computes(ours, inputs):
    _, cache = ours.run_with_cache(inputs)
    attn = ours.blocks[2].attn
    x = cache["blocks.2.ln1.hook_normalized"] * ours.blocks[2].ln1.w
    assert_close(torch.einsum("bpd,hde->bphe", x, attn.W_Q) + attn.b_Q, cache["q", 2])
    assert_close(torch.einsum("bphe,hed->bpd", cache["z", 2], attn.W_O) + attn.b_O, cache["attn_out", 2])


def test_cfg_follows_the_weights(pair):
    ours = pair()[1]
    assert ours.cfg.dtype == torch.float32
    ours.to(torch.bfloat16)
    assert ours.cfg.dtype == torch.bfloat16
    assert str(ours.cfg.device) == "cpu"
    assert ours.cfg.n_key_value_heads == 2


def test_a_tied_unembedding_is_the_embedding(ours):
    from dataclasses import replace

    tied = HookedTransformer(replace(ours.decoder_cfg, tied=True))
    assert tied.W_U.data_ptr() == tied.W_E.data_ptr()
    tokens = torch.randint(10, 200, (1, 5))
    resid = tied(tokens, stop_at_layer=tied.cfg.n_layers)
    assert_close(tied(tokens), tied.ln_final(resid) @ tied.W_E.T)


def test_bf16_is_as_close_to_hf_as_hf_is_to_itself(pair):
    hf, ours = pair()
    batch = hf_batch(chirps([1.2, 0.6]))
    is_token = batch["attention_mask"].bool()
    hf.to(torch.bfloat16)
    sdpa = hf(**batch, use_cache=False).logits[is_token].float()
    hf.set_attn_implementation("eager")
    eager = hf(**batch, use_cache=False).logits[is_token].float()
    mine = ours.to(torch.bfloat16)(Inputs.from_hf(batch))[is_token].float()
    own_gap = (eager - sdpa).abs().mean()
    assert (mine - sdpa).abs().mean() <= 1.5 * own_gap + 1e-6
