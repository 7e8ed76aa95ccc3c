"""What would do nothing in silence raises instead, and says what to do."""

import pytest
import torch
from accelerate import cpu_offload
from reference import chirps, hf_batch
from torch.testing import assert_close

from lalm_lens import hooks
from lalm_lens.errors import HookError, InputError, LensError
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import Patch


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


def test_a_filter_that_matches_nothing_is_refused(ours, inputs):
    with pytest.raises(HookError, match="matches no hook point"):
        ours.run_with_cache(inputs, names_filter=lambda name: name == "nothing")
    with pytest.raises(HookError, match="matches no hook point"):
        ours.run_with_hooks(inputs, fwd_hooks=[(lambda name: False, print)])


def test_hooks_are_as_strict_as_a_run_with_hooks(ours):
    for name, says in (("blocks.1.hook_resid_pots", "nearest are"), (lambda name: False, "matches no hook point")):
        with pytest.raises(HookError, match=says), ours.hooks(fwd_hooks=[(name, lambda state, hook: state)]):
            pytest.fail("a hook that never fires was accepted")
    assert not ours.list_hooks()


def test_a_permanent_hook_on_the_encoder_waits_for_runs_that_hear(pair, inputs):
    model = pair()[1]
    before = model(inputs)
    model.add_perma_hook("audio_encoder.hook_out", lambda state, hook: 2 * state)
    model(torch.randint(10, 200, (1, 5)))
    assert not torch.allclose(model(inputs), before)


@pytest.mark.parametrize(
    ("point", "switch"),
    [
        ("attn.hook_result", "attn_result"),
        ("attn.hook_attn_in", "attn_in"),
        ("attn.hook_k_input", "split_qkv_input"),
        ("hook_mlp_in", "hook_mlp_in"),
    ],
)
def test_a_hook_that_is_switched_off_is_refused(ours, inputs, point, switch):
    for names in (f"blocks.0.{point}", lambda name: name.endswith(point)):
        hook = [(names, lambda state, hook: state)]
        with pytest.raises(HookError, match=f"set_use_{switch}"):
            ours.run_with_hooks(inputs, fwd_hooks=hook)
        with pytest.raises(HookError, match=f"set_use_{switch}"), ours.hooks(fwd_hooks=hook):
            ours(inputs)
    ours.hook_dict[f"blocks.0.{point}"].add_hook(lambda state, hook: state)  # past the model's own interface
    with pytest.raises(HookError, match=f"set_use_{switch}"):
        ours(inputs)
    ours.reset_hooks()


def test_an_encoder_hook_that_would_not_fire_is_refused(ours, inputs):
    hook = [("audio_encoder.blocks.0.hook_resid_post", lambda state, hook: state)]
    for silent in (ours.embed_inputs(inputs), torch.randint(10, 200, (1, 5))):
        with pytest.raises(HookError, match="would not fire"):
            ours.run_with_hooks(silent, fwd_hooks=hook)
        with pytest.raises(HookError, match="would not fire"), ours.hooks(fwd_hooks=hook):
            ours(silent)
        _, cache = ours.run_with_cache(silent)  # without a filter it caches what fires
        assert "hook_embed" in cache
        assert not [name for name in cache.cache_dict if name.startswith(("audio_encoder", "adapter"))]


def test_assigning_a_tensor_copies_and_a_parameter_is_refused(pair):
    attn = pair(seed=3)[1].blocks[0].attn
    new = torch.randn_like(attn.W_Q)
    attn.W_Q = new
    assert torch.equal(attn.W_Q, new)
    x = torch.randn(2, 3, attn.q_proj.in_features)
    assert_close(attn.q_proj(x).unflatten(-1, (4, 16)), torch.einsum("bpd,hde->bphe", x, new) + attn.b_Q)
    with pytest.raises(LensError, match="assign a tensor"):
        attn.W_Q = torch.nn.Parameter(torch.ones_like(attn.W_Q))
    with pytest.raises(LensError, match="has shape"):
        attn.W_Q = torch.zeros(3)
    with pytest.raises(LensError, match="no bias"):
        attn.b_O = torch.zeros_like(attn.b_O)


def test_text_alone_is_not_embedded_past_an_encoder_hook(ours):
    tokens = torch.randint(10, 200, (1, 5))
    hook = [("audio_encoder.blocks.0.hook_resid_post", lambda state, hook: state)]
    with pytest.raises(HookError, match="holds no audio"), ours.hooks(fwd_hooks=hook):
        ours.embed_inputs(Inputs(tokens, torch.ones_like(tokens).bool()))


def test_an_unknown_hook_is_refused_with_the_nearest_names(ours, inputs):
    for call in (
        lambda: ours.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_resid_pots", print)]),
        lambda: ours.run_with_cache(inputs, names_filter="blocks.1.hook_resid_pots"),
        lambda: ours.run_with_cache(inputs, names_filter=["blocks.1.hook_resid_pots"]),
        lambda: ours.add_hook("blocks.1.hook_resid_pots", print),
    ):
        with pytest.raises(HookError, match=r"nearest are blocks\.1\.hook_resid_post"):
            call()


def test_caching_hooks_are_as_strict(ours):
    for make in (ours.get_caching_hooks, ours.add_caching_hooks):
        with pytest.raises(HookError, match="nearest are hook_embed"):
            make("hook_embedd")
        with pytest.raises(HookError, match="matches no hook point"):
            make(lambda name: False)
    assert not ours.list_hooks()


def test_a_write_to_an_offloaded_weight_is_refused(pair, inputs):
    model = pair(seed=3)[1]
    before, new = model(inputs), torch.randn_like(model.blocks[0].attn.W_Q)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert_close(model(inputs), before)  # it still runs; its weights are brought in for each layer and go again
    for write in (
        lambda: setattr(model.blocks[0].attn, "W_Q", new),
        lambda: model.blocks[0].attn.W_Q.zero_(),
        lambda: model.blocks[0].mlp.W_in,
        lambda: model.W_E,
    ):
        with pytest.raises(LensError, match="offloaded"):
            write()
    assert_close(model(inputs), before)


class Linear4bit(torch.nn.Linear):
    """Stands for every quantised layer that is a subclass of Linear."""


class Packed(torch.Tensor):
    """Stands for every quantised tensor that hides in a plain Linear."""


@pytest.mark.parametrize("kind", ["subclass", "wrapper", "parametrised", "packed tensor", "integers"])
def test_a_view_of_a_quantised_or_wrapped_linear_is_refused(pair, kind):
    attn = pair(seed=3)[1].blocks[0].attn
    if kind == "subclass":
        attn.q_proj = Linear4bit(64, 64)
    elif kind == "wrapper":
        attn.q_proj = torch.nn.Sequential(attn.q_proj)
    elif kind == "parametrised":
        torch.nn.utils.parametrizations.weight_norm(attn.q_proj)
    elif kind == "packed tensor":
        packed = attn.q_proj.weight.detach().as_subclass(Packed)
        attn.q_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    else:
        attn.q_proj.weight = torch.nn.Parameter(attn.q_proj.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(LensError, match="Merge or unwrap it"):
        _ = attn.W_Q
    with pytest.raises(LensError, match="Merge or unwrap it"):
        attn.W_Q = torch.zeros(4, 64, 16)


def test_gradients_are_not_cached_without_a_scalar_to_take_them_of(ours, inputs):
    with pytest.raises(InputError, match="cache_activation_and_gradient"):
        ours.run_with_cache(inputs, incl_bwd=True)


@pytest.mark.parametrize("part", ["", "audio_encoder.", "blocks."])
def test_a_cache_that_would_not_fit_is_refused_before_the_run(ours, inputs, monkeypatch, part):
    _, cache = ours.run_with_cache(inputs, names_filter=lambda name: name.startswith(part))
    kept = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in cache.values()}
    estimate = ours.cache_bytes(set(cache.keys()), inputs)
    assert 0.95 < estimate / sum(kept.values()) < 1.2
    monkeypatch.setattr(hooks, "free_bytes", lambda device: estimate - 1)
    with pytest.raises(InputError, match=r"free on cpu\. Name what you need"):
        ours.run_with_cache(inputs, names_filter=lambda name: name.startswith(part))
    ours.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_resid_post") and name.startswith(part))


def test_a_flag_of_the_config_switches_nothing(pair, inputs):
    model = pair()[1]
    model.cfg.use_attn_result = True
    with pytest.raises(HookError, match="set_use_attn_result"):
        model.run_with_cache(inputs, names_filter="blocks.0.attn.hook_result")


def test_every_write_through_tl_parameters_arrives_or_is_of_a_copy_that_it_names(pair, inputs):
    model = pair(seed=4)[1]
    for name in model.tl_parameters():
        if name.endswith(("W_K", "W_V", "b_K", "b_V")):  # shared by heads: repeated, so a copy, as its docstring says
            continue
        before, weight = model(inputs), model.tl_parameters()[name]
        if name == "unembed.b_U" or name.endswith(("b_O", "b_in", "b_out")):  # not there in this model
            with pytest.raises(RuntimeError, match="single memory location"):
                weight.add_(1)
        else:
            weight.mul_(1.5)
            assert not torch.allclose(model(inputs), before), name
    own_keys = pair(seed=4, n_kv_heads=4)[1]
    before = own_keys(inputs)
    own_keys.tl_parameters()["blocks.1.attn.W_K"].mul_(1.5)
    assert not torch.allclose(own_keys(inputs), before)


def test_a_weight_that_is_not_there_is_not_made_up(pair):
    model = pair()[1]
    with pytest.raises(LensError, match=r"no W_q\. Its weights are W_K, W_O, W_Q"):
        model.blocks[0].attn.W_q = torch.zeros(4, 64, 16)


def test_text_does_not_lose_the_audio_that_it_names(tiny_lalm):
    for call in (tiny_lalm, lambda text: tiny_lalm.generate(text, 2)):
        with pytest.raises(InputError, match="placeholders"):
            call("<|AUDIO|> The speaker's gender is")
    with pytest.raises(InputError, match="texts need none"):
        tiny_lalm("The speaker", attention_mask=torch.ones(1, 2, dtype=torch.bool))


def test_permanent_hooks_that_never_fire_are_refused(pair, inputs):
    model = pair()[1]
    bound = model.bind(inputs)
    for add in (bound.add_hook, bound.add_perma_hook):
        for name in ("hook_audio_embed", lambda name: name.startswith("audio_encoder")):
            with pytest.raises(HookError, match="would not fire"):
                add(name, lambda state, hook: 0 * state)
    model.set_use_attn_result(True)
    model.add_perma_hook("blocks.0.attn.hook_result", lambda state, hook: 0 * state)
    model.set_use_attn_result(False)
    with pytest.raises(HookError, match="set_use_attn_result"):
        model(inputs)


@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (5, 1, 64), (2, 64)])
def test_a_patch_that_does_not_fit_is_refused(ours, inputs, shape):
    with pytest.raises(InputError, match=r"does not fit|as many rows"):
        ours.run_with_hooks(inputs, fwd_hooks=[Patch("resid_post", 1, (7,), torch.zeros(shape)).hook()])
