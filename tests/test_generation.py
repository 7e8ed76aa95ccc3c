"""Generation: token by token as transformers, with hooks at absolute positions."""

import pytest
import torch
from reference import chirps, hf_batch, hf_states
from torch.testing import assert_close
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.datasets import read_folder
from lalm_lens.errors import HookError, InputError
from lalm_lens.generation import Sampling
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import Patch
from lalm_lens.loading import from_hf, stop_tokens
from lalm_lens.nn.kv_cache import KeyValueCache

N_NEW = 12
WINDOWS = {
    "full": {},
    "window 1": {"use_sliding_window": True, "sliding_window": 1, "layer_types": ["sliding_attention"] * 4},
    "window 20": {"use_sliding_window": True, "sliding_window": 20, "layer_types": ["sliding_attention"] * 4},
    "mixed": {
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


@pytest.fixture(scope="module", params=WINDOWS)
def models(request, pair):
    return pair(seed=6, **WINDOWS[request.param])


@pytest.fixture(scope="module")
def ours(pair):
    return pair(seed=7)[1]


@pytest.fixture(scope="module")
def batch():
    return hf_batch(chirps([0.9, 0.5, 0.3]))


@pytest.fixture(scope="module")
def inputs(batch):
    return Inputs.from_hf(batch)


def hf_tokens(hf, batch: dict, **how: object) -> torch.Tensor:
    """What transformers' own `generate` adds, without its cache, which is wrong for a sliding window of 1."""
    with torch.no_grad():
        out = hf.generate(**batch, max_new_tokens=N_NEW, use_cache=False, pad_token_id=0, eos_token_id=None, **how)
    return out[:, batch["input_ids"].shape[1] :]


def test_greedy_tokens_are_hfs(models, batch, inputs):
    hf, ours = models
    generated = ours.generate(inputs, N_NEW, stop_tokens=())
    assert torch.equal(generated.tokens, hf_tokens(hf, batch, do_sample=False))
    assert len(set(generated.tokens.flatten().tolist())) > 3, "a constant answer compares nothing"


def test_sampled_tokens_are_hfs(models, batch, inputs):
    hf, ours = models
    torch.manual_seed(3)
    theirs = hf_tokens(hf, batch, do_sample=True, temperature=1.7, top_k=40, top_p=0.9)
    mine = ours.generate(inputs, N_NEW, sampling=Sampling(1.7, top_k=40, top_p=0.9, seed=3), stop_tokens=())
    assert torch.equal(mine.tokens, theirs)
    again = ours.generate(inputs, N_NEW, sampling=Sampling(1.7, seed=4), stop_tokens=())
    assert not torch.equal(again.tokens, theirs)


def test_log_probabilities_are_those_of_one_forward_over_everything(models, batch, inputs):
    hf, ours = models
    generated = ours.generate(inputs, N_NEW, stop_tokens=())
    whole = batch | {
        "input_ids": torch.cat([batch["input_ids"], generated.tokens], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(generated.tokens)], 1),
    }
    logits, _ = hf_states(hf, whole)
    log_p = logits[:, -N_NEW - 1 : -1].log_softmax(-1).gather(-1, generated.tokens[..., None])[..., 0]
    assert_close(generated.log_probs, log_p)


def test_a_row_ends_at_a_stop_token_and_is_padded(ours, inputs):
    free = ours.generate(inputs, N_NEW, stop_tokens=())
    row = free.tokens[0].tolist()
    end = next(n for n in range(2, N_NEW) if row[n] not in row[:n])
    stop = row[end]
    stopped = ours.generate(inputs, N_NEW, stop_tokens=(stop,))
    for row, (tokens, is_token) in enumerate(zip(stopped.tokens, stopped.is_token, strict=True)):
        hits = (free.tokens[row] == stop).nonzero()
        n_kept = int(hits[0]) + 1 if len(hits) else N_NEW
        assert is_token.tolist() == [n < n_kept for n in range(len(tokens))]
        assert torch.equal(tokens[is_token], free.tokens[row, :n_kept])
        assert (tokens[~is_token] == 0).all()
        assert torch.equal(stopped.log_probs[row] == 0, ~is_token)
    alone = Inputs(inputs.tokens[:1], inputs.attention_mask[:1], inputs.mel[:1], inputs.n_frames[:1])
    assert ours.generate(alone, N_NEW, stop_tokens=(stop,)).tokens.shape == (1, end + 1), (
        "it went on after the last row ended"
    )


def test_the_tiny_model_answers_as_under_transformers(tiny_lalm, tmp_path):
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM, dtype=torch.float32)
    processor = tiny_lalm.processor
    attribute = ATTRIBUTES["animal"]
    samples = read_folder(write_clips(tmp_path, "animal", 5, seed=21))
    waveforms = [sample.waveform[: 16_000 + 1_600 * n] for n, sample in enumerate(samples)]
    prompts = [processor.prompt(attribute, processor.n_frames(waveform)) for waveform in waveforms]
    generated = tiny_lalm.generate(processor.inputs(prompts, waveforms), 5)
    text = AutoProcessor.from_pretrained(TINY_LALM).apply_chat_template(
        [
            {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": attribute.options()}]},
            {"role": "assistant", "content": [{"type": "text", "text": attribute.prefix}]},
        ],
        continue_final_message=True,
    )
    batch = AutoProcessor.from_pretrained(TINY_LALM)(
        text=[text] * 5, audio=[w.numpy() for w in waveforms], sampling_rate=16_000, return_tensors="pt", padding=True
    )
    theirs = hf.generate(**batch, max_new_tokens=5, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(generated.tokens, theirs)
    assert sum(f" {sample.label}." == text for sample, text in zip(samples, generated.texts, strict=True)) >= 4
    assert repr(generated).startswith("Generated([' dog.'")


def test_a_cached_run_is_the_whole_run(models, inputs):
    """In pieces of several positions and of one."""
    _, ours = models
    embedded = ours.embed_inputs(inputs)
    with torch.no_grad():
        whole = ours(inputs)
        kv_cache, pieces = KeyValueCache(), []
        for start, stop in ((0, 13), (13, 20), (20, 21), (21, inputs.tokens.shape[1])):
            piece = embedded.embed[:, start:stop]
            pieces.append(ours(piece, attention_mask=inputs.attention_mask[:, start:stop], kv_cache=kv_cache))
            assert kv_cache.n_pos == stop
    assert_close(torch.cat(pieces, 1)[inputs.attention_mask], whole[inputs.attention_mask])


def test_explicit_attention_over_a_cache_agrees(ours, inputs):
    def generate(hooks):
        return ours.generate(inputs, N_NEW, stop_tokens=(), fwd_hooks=hooks)

    widths = []
    look = [(lambda name: name.endswith("hook_pattern"), lambda state, hook: widths.append(state.shape[-2:]))]
    assert_close(generate(look).log_probs, generate(()).log_probs)
    alone = Inputs(inputs.tokens[:1], inputs.attention_mask[:1], inputs.mel[:1], inputs.n_frames[:1])  # no padding
    plain = ours.generate(alone, N_NEW, stop_tokens=())
    assert_close(ours.generate(alone, N_NEW, stop_tokens=(), fwd_hooks=look).log_probs, plain.log_probs)
    n_pos = inputs.tokens.shape[1]
    assert widths[-1] == (1, n_pos + N_NEW - 1)


def test_a_failed_forward_leaves_the_cache_as_it_was(ours):
    tokens = torch.randint(10, 200, (1, 9))
    kv_cache = KeyValueCache()

    def fail(state, hook):
        raise RuntimeError("on purpose")

    with torch.no_grad():
        whole = ours(tokens)
        ours(tokens[:, :6], kv_cache=kv_cache)
        for name in ("blocks.2.hook_resid_pre", "ln_final.hook_scale"):
            with pytest.raises(RuntimeError, match="on purpose"):
                ours.run_with_hooks(tokens[:, 6:], kv_cache=kv_cache, fwd_hooks=[(name, fail)])
            assert kv_cache.n_pos == 6
        for passed in (2, 500):
            patch = Patch("resid_post", 1, (passed,), torch.zeros(1, 64))
            with pytest.raises(HookError, match="computes positions 6 to 8"):
                ours.run_with_hooks(tokens[:, 6:], kv_cache=kv_cache, fwd_hooks=[patch.hook()])
        assert_close(ours(tokens[:, 6:], kv_cache=kv_cache), whole[:, 6:])
    with pytest.raises(InputError, match="needs every block"):
        ours(tokens, kv_cache=kv_cache, stop_at_layer=2)


def test_hooks_are_told_where_they_are(ours, inputs):
    seen = []
    ours.generate(
        inputs,
        4,
        stop_tokens=(),
        fwd_hooks=[("blocks.1.hook_resid_post", lambda state, hook: seen.append((hook.ctx["offset"], state.shape[1])))],
    )
    n_pos = inputs.tokens.shape[1]
    assert seen == [(0, n_pos), (n_pos, 1), (n_pos + 1, 1), (n_pos + 2, 1)]
    assert not ours.list_hooks()
    assert not any(point.ctx for point in ours.hook_points())


def test_a_hook_may_run_the_model_itself(ours, inputs):
    patch = Patch("resid_post", 1, (3,), torch.zeros(1, 64))
    seen = []
    inner = {"running": False}

    def nested(state, hook):
        if not inner["running"]:
            inner["running"] = True
            ours(torch.randint(10, 200, (1, 9)))
            inner["running"] = False
            seen.append(hook.ctx["offset"])

    with torch.no_grad():
        alone = ours.run_with_hooks(inputs, fwd_hooks=[patch.hook()])
        both = ours.run_with_hooks(inputs, fwd_hooks=[("blocks.0.hook_resid_pre", nested), patch.hook()])
    assert seen == [0]
    assert_close(both, alone)


@pytest.mark.parametrize("back", [-5, -1, 0, 2], ids=["in the prompt", "its last", "first new", "third new"])
def test_a_patch_acts_at_its_absolute_position_alone(ours, inputs, back):
    """The same as one forward over prompt and answer with the same patch."""
    n_pos = inputs.tokens.shape[1]
    patch = Patch("resid_post", 1, (n_pos + back,), 3 * torch.randn(3, 1, 64, generator=torch.manual_seed(0)))
    patched = ours.generate(inputs, N_NEW, stop_tokens=(), fwd_hooks=[patch.hook()])
    plain = ours.generate(inputs, N_NEW, stop_tokens=())
    first = max(0, back + 1)
    assert torch.equal(patched.tokens[:, :first], plain.tokens[:, :first])
    assert not torch.allclose(patched.log_probs[:, first], plain.log_probs[:, first])
    whole = Inputs(
        torch.cat([inputs.tokens, patched.tokens], 1),
        torch.cat([inputs.attention_mask, patched.is_token], 1),
        inputs.mel,
        inputs.n_frames,
    )
    with torch.no_grad():
        logits = ours.run_with_hooks(whole, fwd_hooks=[patch.hook()])[:, -N_NEW - 1 : -1]
    log_p = logits.log_softmax(-1).gather(-1, patched.tokens[..., None])[..., 0]
    assert_close(patched.log_probs, log_p)


def test_a_patch_that_never_acts_is_refused(ours, inputs):
    n_pos = inputs.tokens.shape[1]
    late = Patch("resid_post", 1, (n_pos + 3,), torch.zeros(1, 64))
    with pytest.raises(HookError, match="never computed"):
        ours.generate(inputs, 4, fwd_hooks=[late.hook()])
    with pytest.raises(HookError, match="never computed"):
        ours.run_with_hooks(inputs, fwd_hooks=[late.hook()])
    ours.generate(inputs, 5, stop_tokens=(), fwd_hooks=[late.hook()])
    for positions, rows in (((), 0), ((-1,), 1), ((2, 2), 2), ((1, 2), 1)):
        with pytest.raises(InputError, match="positions"):
            Patch("resid_post", 1, positions, torch.zeros(rows, 64)).hook()
    assert not ours.list_hooks()


def test_the_encoder_is_heard_once_and_its_hooks_act(ours, inputs):
    seen = []

    def louder(state, hook):
        seen.append(hook.name)
        return 2 * state

    name = "audio_encoder.blocks.0.hook_resid_post"
    changed = ours.generate(inputs, 4, stop_tokens=(), fwd_hooks=[(name, louder)])
    assert seen == [name]
    assert not torch.allclose(changed.log_probs, ours.generate(inputs, 4, stop_tokens=()).log_probs)
    with pytest.raises(HookError, match="would not fire"):
        ours.generate(ours.embed_inputs(inputs), 4, fwd_hooks=[(name, louder)])
    with pytest.raises(HookError, match="would not fire"), ours.hooks(fwd_hooks=[(name, louder)]):
        ours.generate(ours.embed_inputs(inputs), 4)
    with pytest.raises(HookError, match="nearest are"):
        ours.generate(inputs, 4, fwd_hooks=[("blocks.1.hook_resid_pots", louder)])


@pytest.mark.parametrize(
    ("configs", "stops"),
    [
        (({"eos_token_id": [5, 7]}, {"eos_token_id": 3}), (5, 7)),
        (({}, {"eos_token_id": 3}), (3,)),
        (({"eos_token_id": None}, {"text_config": {"eos_token_id": 0}}), (0,)),
        (({}, {"text_config": None}), ()),
    ],
)
def test_stop_tokens_are_the_checkpoints(configs, stops):
    assert stop_tokens(*configs) == stops


def test_a_model_from_memory_stops_where_its_own_does(pair):
    hf, _ = pair()
    hf.generation_config.eos_token_id = [9, 11]
    assert from_hf(hf).stop_tokens == (9, 11)


def test_what_cannot_be_generated_is_refused(ours, inputs):
    with pytest.raises(InputError, match="no room for 600"):
        ours.generate(inputs, 600)
    with pytest.raises(InputError, match="1 or more"):
        ours.generate(inputs, 0)
    for sampling in (Sampling(temperature=0.0), Sampling(top_p=1.5), Sampling(top_k=0)):
        with pytest.raises(InputError, match="cannot be drawn from"):
            ours.generate(inputs, 2, sampling=sampling)
