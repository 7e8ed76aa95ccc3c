"""Qwen2.5-Omni's Thinker against transformers' own, with sounds, images, videos, and videos that are heard."""

from dataclasses import replace

import pytest
import torch
from omni import (
    LAYERS,
    Batch,
    Clip,
    Image,
    Part,
    Video,
    Words,
    hf_positions,
    hf_states,
    tiny_omni,
)
from torch.testing import assert_close

from lalm_lens.inputs import Inputs
from lalm_lens.loading import from_hf
from lalm_lens.nn.kv_cache import KeyValueCache
from lalm_lens.positions import positions_of
from lalm_lens.seeing import SeeingLALM

SOUNDS = [[Words(5), Clip(duration_s), Words(6)] for duration_s in (2.0, 0.3, 0.5, 1.37, 3.1)]
SEEN: list[list[Part]] = [
    [Words(3), Image(4, 6), Words(4), Clip(0.8), Words(5)],
    [Words(6), Video(3, 4, 4, 0.7), Words(2), Image(10, 8), Words(1), Video(2, 2, 6), Words(3)],
    [Words(2), Clip(0.4), Words(7)],
    [Image(2, 2), Words(1)],
]
HEARD: list[list[Part]] = [
    [Words(3), Video(4, 4, 4, 1.0, sound_s=3.1), Words(2), Image(4, 6), Words(4)],
    [Words(4), Clip(0.5), Words(1), Video(5, 2, 4, 1.0, sound_s=1.2), Words(3)],
    [Video(1, 10, 12, 2.0, sound_s=0.6), Words(2), Video(3, 2, 2, 0.3, sound_s=2.5), Words(2)],
]
PROMPTS = {"sounds": SOUNDS, "pictures": SEEN, "videos that are heard": HEARD}


@pytest.fixture(scope="module")
def hf():
    return tiny_omni()


@pytest.fixture(scope="module")
def ours(hf) -> SeeingLALM:
    model = from_hf(hf)
    assert isinstance(model, SeeingLALM)
    return model


def assert_states_match(hf, ours: SeeingLALM, prompts: Batch) -> None:
    batch = prompts.hf()
    their_logits, theirs = hf_states(hf, batch, **prompts.flags())
    inputs = Inputs.from_hf(batch)
    is_token = inputs.attention_mask
    with torch.no_grad():
        logits, cache = ours.run_with_cache(inputs)
    assert_close(logits[is_token], their_logits[is_token])
    for layer in range(LAYERS["text"]):
        assert_close(cache["resid_post", layer][is_token], theirs[f"text.{layer}"][is_token])
    n_frames = inputs.n_frames
    states = cache["audio_encoder.hook_embed"].shape[1]
    is_sound = torch.arange(states) < ((n_frames - 1) // 2 + 1)[:, None]
    is_audio = torch.arange(states // 2) < ours.audio_encoder.n_audio(n_frames)[:, None]
    for layer in range(LAYERS["audio"]):
        assert_close(cache[f"audio_encoder.blocks.{layer}.hook_resid_post"][is_sound], theirs[f"audio.{layer}"])
    assert_close(cache["audio_encoder.hook_out"][is_audio], theirs["audio_norm"])
    assert_close(cache["adapter.hook_out"][is_audio], theirs["audio_adapter"])
    assert cache["audio_encoder.hook_out"].isfinite().all()
    pictures = [its for its in (inputs.images, inputs.videos) if its is not None]
    if not pictures:
        return
    frames = ours.vision_encoder.frames(torch.cat([its.grid for its in pictures]))
    for layer in range(LAYERS["vision"]):
        name = f"vision_encoder.blocks.{layer}.hook_resid_post"
        assert_close(cache[name][frames.is_patch], theirs[f"vision.{layer}"])
        assert cache[name].isfinite().all()
    assert_close(cache["vision_adapter.hook_out"][frames.is_token], theirs["vision_adapter"])
    assert_close(cache["hook_vision_embed"], theirs["vision_adapter"])


@pytest.mark.parametrize("kind", PROMPTS)
def test_logits_and_every_state_match_hf(hf, ours, kind):
    assert_states_match(hf, ours, Batch(PROMPTS[kind]))


@pytest.mark.parametrize(
    "config",
    [
        {"n_window": 100, "num_key_value_heads": 1},
        {"n_window": 7, "num_key_value_heads": 4},  # a pair of states from two windows
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ],
    ids=str,
)
def test_other_windows_and_groups_of_heads_match_hf(config):
    hf = tiny_omni(seed=1, **config)
    assert_states_match(hf, from_hf(hf), Batch([*SOUNDS, SEEN[0]]))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("is_heard", [False, True])
def test_positions_are_those_of_hf(hf, ours, seed, is_heard):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def part() -> Part:
        match draw(0, 2):
            case 0:
                return Clip(draw(1, 35) / 10)
            case 1:
                return Image(2 * draw(1, 4), 2 * draw(1, 9))
            case _:
                sound_s = draw(1, 39) / 10 if is_heard else None
                return Video(draw(1, 5), 2 * draw(1, 3), 2 * draw(1, 30), draw(1, 13) / 7, sound_s)

    rows = [[Words(draw(1, 3)), *(each for _ in range(draw(0, 3)) for each in (part(), Words(draw(1, 4))))]]
    rows += [[Words(2), Image(2, 4), Words(draw(1, 9))], [Words(30)]]
    prompts = Batch(rows, seed)
    batch = prompts.hf()
    theirs, ahead = hf_positions(hf, batch, is_heard)
    inputs = Inputs.from_hf(batch)
    positions = positions_of(inputs, ours.lalm_cfg)
    assert torch.equal(positions[:, inputs.attention_mask], theirs[:, inputs.attention_mask])
    n_tokens = inputs.attention_mask.sum(-1, keepdim=True)
    assert torch.equal(positions.amax((0, 2))[:, None] + 1 - n_tokens, ahead)


def test_without_pictures_positions_are_counted(ours):
    assert ours.positions_of(Inputs.from_hf(Batch(SOUNDS).hf())) is None


@pytest.mark.parametrize("kind", PROMPTS)
def test_it_writes_what_hf_writes(hf, ours, kind):
    prompts = Batch(PROMPTS[kind])
    batch = prompts.hf()
    greedily = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    theirs = hf.generate(**batch, **prompts.flags(), **greedily, output_logits=True, return_dict_in_generate=True)
    generated = ours.generate(Inputs.from_hf(batch), 8, stop_tokens=())
    assert torch.equal(generated.tokens, theirs.sequences[:, batch["input_ids"].shape[1] :])
    assert_close(generated.log_probs, torch.stack(theirs.logits, dim=1).log_softmax(-1).amax(-1))


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_cache_goes_on_where_a_whole_run_would(ours, kind):
    inputs = Inputs.from_hf(Batch(PROMPTS[kind]).hf())
    new = torch.randint(10, 240, (len(inputs.tokens), 3), generator=torch.Generator().manual_seed(3))
    longer = replace(
        inputs,
        tokens=torch.cat([inputs.tokens, new], dim=1),
        attention_mask=torch.cat([inputs.attention_mask, torch.ones_like(new).bool()], dim=1),
    )
    kv_cache = KeyValueCache()
    with torch.no_grad():
        ours(inputs, kv_cache=kv_cache)
        with pytest.raises(ZeroDivisionError):  # a forward that fails counts for nothing
            ours.run_with_hooks(
                new[:, :1] + 1,
                positions=torch.full((3, len(new), 1), 900),
                kv_cache=kv_cache,
                fwd_hooks=[("blocks.1.hook_resid_pre", lambda resid, hook: resid / (0 // 0))],
            )
        steps = [ours(new[:, [0]], kv_cache=kv_cache), ours(new[:, 1:], kv_cache=kv_cache)]
        assert_close(torch.cat(steps, dim=1), ours(longer, logits_at=slice(-3, None)))


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_run_goes_on_in_the_middle(ours, kind):
    inputs = Inputs.from_hf(Batch(PROMPTS[kind]).hf())
    places = {"attention_mask": inputs.attention_mask, "positions": ours.positions_of(inputs)}
    with torch.no_grad():
        logits = ours(inputs)
        resid = ours(inputs, stop_at_layer=1)
        assert_close(ours(resid, start_at_layer=1, **places), logits)
        embedded = ours.embed_inputs(inputs)
        assert_close(ours(embedded), logits)
        assert_close(ours(embedded.embed, **places), logits)
        there = replace(inputs, positions=places["positions"])
        assert_close(ours(there), logits)
        if kind != "sounds":
            counted = ours(resid, start_at_layer=1, attention_mask=inputs.attention_mask)
            assert (counted - logits)[inputs.attention_mask].abs().max() > 1e-2


@pytest.mark.parametrize("kind", PROMPTS)
def test_inputs_go_to_hf_and_back(hf, ours, kind):
    prompts = Batch(PROMPTS[kind])
    batch = prompts.hf()
    inputs = Inputs.from_hf({**batch, **prompts.flags()})
    there = inputs.to_hf()
    assert there.keys() == batch.keys()
    for name, tensor in batch.items():
        assert torch.equal(there[name], tensor), name
    if kind != "sounds":
        placed = replace(inputs, positions=ours.positions_of(inputs)).to_hf()
        with torch.no_grad():
            assert_close(hf(**placed, use_cache=False).logits, hf(**batch, **prompts.flags(), use_cache=False).logits)
        assert torch.equal(Inputs.from_hf(placed).positions, placed["position_ids"])
