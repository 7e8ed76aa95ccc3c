"""Qwen2.5-Omni's Thinker against transformers' own, with sounds, images, videos, and videos that are heard."""

from dataclasses import replace

import pytest
import torch
from engine_cases import LOGITS_AND_LOG_PROBS, assert_same, branches
from omni import AUDIO, LAYERS, VIDEO, Batch, Clip, Image, Part, Video, Words, hf_positions, hf_states, tiny_omni
from torch import Tensor
from torch.testing import assert_close

from lalm_lens.engine.plan import Plan
from lalm_lens.errors import HookError, InputError
from lalm_lens.inputs import Embedded, Images, Inputs, Videos
from lalm_lens.interventions import Knockout, Patch, Scale
from lalm_lens.loading import from_hf
from lalm_lens.nn.kv_cache import KeyValueCache
from lalm_lens.positions import positions_of
from lalm_lens.runs import OWN, Run, Source
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


# --- what is done with a model -------------------------------------------------------------------------------


def alone(kind: str, row: int) -> Inputs:
    """One prompt of a batch, left-padded by two."""
    prompts = Batch([PROMPTS[kind][row], [Words(Batch([PROMPTS[kind][row]]).padded["input_ids"].shape[1] + 2)]])
    inputs = Inputs.from_hf(prompts.hf())
    return replace(inputs, tokens=inputs.tokens[:1], attention_mask=inputs.attention_mask[:1])


def embedded(ours: SeeingLALM, inputs: Inputs) -> Embedded:
    with torch.no_grad():
        return ours.embed_inputs(inputs)


def test_the_engines_agree_where_pictures_are_seen(ours):
    """Runs with three positions for a token, with others, and with one, all in one sweep."""
    runs = [Run(alone(kind, row)) for kind, row in [("pictures", 0), ("pictures", 1), ("videos that are heard", 0)]]
    runs += [Run(alone("sounds", 1)), Run(embedded(ours, alone("pictures", 0)))]
    assert len({run.n_pos for run in runs}) > 2
    changes = [
        [
            Patch("resid_post", 1, (n_pos - 12, n_pos - 3), torch.randn(2, 64)),
            Patch("q", 2, (n_pos - 5,), torch.randn(1, 4, 16)),
            Patch("k", 0, (4, n_pos - 8), torch.randn(2, 2, 16)),
            Scale("z", 1, range(3, n_pos - 2), factor=0.2),
            Patch("resid_pre", 1, (n_pos - 2,), Source(OWN, layer=0, positions=(n_pos - 4,))),
            Knockout((0, 2), queries=(-1, -6), keys=range(5, 9)),
        ]
        for n_pos in (run.n_pos for run in runs)
    ]
    its = [branch for run, each in zip(runs, changes, strict=True) for branch in branches(run, *each)]
    torch.manual_seed(0)
    outcome = assert_same(ours, its)
    first = outcome.values[: len(changes[0])]
    for one, same in zip(first, outcome.values[-len(changes[-1]) :], strict=True):
        assert one.shape == same.shape
    assert_same(ours, its[: len(changes[0])], token_budget=40)


def test_a_change_of_the_encoder_is_heard_in_both_engines(ours):
    silent, clean = Run(alone("pictures", 0)), Run(alone("pictures", 2))
    n_states = 40
    heard = Patch("resid_post", 0, range(n_states), torch.randn(n_states, 32), stack="audio_encoder")
    some = Scale("attn_out", 1, (3, 17), factor=0.0, stack="audio_encoder")
    out = Patch("adapter_out", 0, (0, 5), torch.randn(2, 64))
    found = assert_same(ours, branches(silent, heard, some, out) + branches(clean, some))
    base = Plan(ours, branches(silent, heard), LOGITS_AND_LOG_PROBS).run().base
    assert all((value - base[0]).abs().max() > 1e-3 for value in found.values[:3])


@pytest.mark.parametrize("kind", PROMPTS)
def test_the_residual_stream_adds_up(ours, kind):
    inputs = alone(kind, 1)
    with torch.no_grad():
        _, cache = ours.run_with_cache(inputs)
    parts = cache.decompose_resid(mode="full")
    assert_close(parts.sum(0), cache["resid_post", LAYERS["text"] - 1])
    for tower, n_layers in (("audio_encoder", LAYERS["audio"]), ("vision_encoder", LAYERS["vision"])):
        for name in (f"{tower}.blocks.{layer}" for layer in range(n_layers)):
            if f"{name}.hook_resid_pre" in cache:
                added = cache[f"{name}.hook_attn_out"] + cache[f"{name}.hook_mlp_out"]
                assert_close(cache[f"{name}.hook_resid_pre"] + added, cache[f"{name}.hook_resid_post"])


def test_patterns_of_every_tower_can_be_looked_at(ours):
    inputs = Inputs.from_hf(Batch(SEEN).hf())
    towers = ("audio_encoder", "vision_encoder", "blocks")
    with torch.no_grad():
        fused = ours(inputs)
        logits, cache = ours.run_with_cache(inputs, names_filter=lambda name: name.endswith("hook_pattern"))
    assert_close(logits[inputs.attention_mask], fused[inputs.attention_mask])
    assert {name.split(".")[0] for name in cache} == set(towers)
    for pattern in cache.values():
        assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    windows, whole = (cache[f"vision_encoder.blocks.{layer}.attn.hook_pattern"] for layer in (0, 1))
    places = ours.vision_encoder.frames(inputs.images.grid).places
    is_apart = (places[:, :, None] // 4 != places[:, None] // 4).any(-1)
    n_images, n_patches = len(places), places.shape[1]
    is_real = torch.arange(n_patches) < inputs.images.grid.prod(-1)[:, None]
    is_apart &= is_real[:, :, None] & is_real[:, None]
    assert is_apart.any()
    assert not windows[:n_images, 0, :n_patches, :n_patches][is_apart].any()
    assert (whole[:n_images, 0, :n_patches, :n_patches][is_apart] > 0).all()
    heard = cache["audio_encoder.blocks.1.attn.hook_pattern"]
    assert not heard[0, :, 25:50, :25].any()  # 0.5 s later
    assert not heard[0, :, :25, 25:].any()


def test_a_change_in_the_vision_tower_is_seen(ours):
    """One picture's states put into another's run are what that one's embeddings are."""
    clean, corrupt = (Inputs.from_hf(Batch([[Words(3), Image(4, 6), Words(4)]], seed).hf()) for seed in (1, 2))
    corrupt = replace(clean, images=corrupt.images)
    place = "vision_encoder.blocks.2.hook_resid_post"

    def restore(resid: Tensor, hook: object) -> Tensor:
        return cache[place]

    with torch.no_grad():
        logits, cache = ours.run_with_cache(clean)
        assert_close(ours.run_with_hooks(corrupt, fwd_hooks=[(place, restore)]), logits)
        assert (ours(corrupt) - logits).abs().max() > 1e-2


def test_a_hook_that_nothing_is_seen_by_is_refused(ours):
    place = "vision_encoder.blocks.0.hook_resid_post"
    for inputs in (alone("sounds", 0), embedded(ours, alone("pictures", 0))):
        with pytest.raises(HookError, match=r"vision_encoder\.blocks\.0\.hook_resid_post would not fire"):
            ours.run_with_hooks(inputs, fwd_hooks=[(place, lambda resid, hook: resid)])
    with pytest.raises(HookError, match=r"adapter\.hook_out would not fire: this run holds no audio"):
        ours.run_with_hooks(alone("pictures", 3), fwd_hooks=[("adapter.hook_out", lambda state, hook: state)])
    with torch.no_grad():
        _, cache = ours.run_with_cache(alone("pictures", 3))
    assert "vision_adapter.hook_out" in cache
    assert "adapter.hook_out" not in cache


def test_a_bound_model_sees(ours):
    pictures, sounds = alone("pictures", 0), alone("sounds", 1)
    bound = ours.bind(pictures, sounds)
    with torch.no_grad():
        assert_close(bound(bound.tokens[0])[:, 2:], ours(pictures)[:, 2:])
        assert_close(bound(pictures.tokens)[:, 2:], ours(pictures)[:, 2:])
        assert_close(bound(bound.tokens[0][:, :-3])[:, 2:], ours(pictures)[:, 2:-3])
        assert_close(bound(bound.tokens[1])[:, 2:], ours(sounds)[:, 2:])
        words = torch.arange(20, 31)[None]
        assert_close(bound(words), ours(words))
        with pytest.raises(InputError, match=r"tokens are those of `bound\.tokens` from the first on"):
            bound(bound.tokens[0][:, 1:])
        positions = ours.positions_of(pictures)
        later = bound(bound.tokens[0][:, 2:], positions=positions[:, :, 2:])
        assert_close(later, ours(pictures)[:, 2:])


def test_what_cannot_be_seen_or_heard_is_refused(ours, tiny_lalm):
    seen = alone("pictures", 0)
    images = seen.images
    with pytest.raises(InputError, match=r"\[6\] image placeholders and the images make \[\] image embeddings"):
        ours(replace(seen, images=None))
    wide = Images(torch.cat([images.patches] * 2), torch.tensor([[1, 4, 12]]))
    with pytest.raises(InputError, match=r"\[6\] image placeholders and the images make \[12\] image embeddings"):
        ours(replace(seen, images=wide))
    with pytest.raises(InputError, match=r"Grids of \[\[1, 4, 5\]\] patches do not hold 24 patches"):
        Images(images.patches, torch.tensor([[1, 4, 5]]))
    with pytest.raises(InputError, match="A picture of 3 x 8 patches cannot be cut into squares of 2 x 2"):
        ours(replace(seen, images=Images(images.patches, torch.tensor([[1, 3, 8]]))))
    with pytest.raises(InputError, match="A patch has 96 numbers in this model, got 95"):
        ours(replace(seen, images=Images(images.patches[:, 1:], images.grid)))
    with pytest.raises(InputError, match="The pixels hold NaN"):
        Images(images.patches / 0, images.grid)
    with pytest.raises(InputError, match=r"A patch of a video lasts some time, got \[0\.0\] s"):
        Videos(images.patches, images.grid, torch.zeros(1))
    with pytest.raises(InputError, match="A qwen2_audio model hears and does not see"):
        tiny_lalm(Inputs(torch.full((1, 9), 30), torch.ones(1, 9).bool(), images=images))
    with pytest.raises(InputError, match="The encoder takes 16 mel bins, got 15"):
        ours(replace(seen, mel=seen.mel[:, 1:]))
    batch = Batch(SEEN).hf()
    del batch["video_second_per_grid"]
    with pytest.raises(InputError, match=r"pixel_values_videos come with .* video_second_per_grid is missing"):
        Inputs.from_hf(batch)
    with pytest.raises(InputError, match="one position for each token, not three"):
        tiny_lalm(torch.full((1, 9), 30), positions=torch.zeros(3, 1, 9, dtype=torch.long))
    with pytest.raises(InputError, match="positions are part of `Inputs`"):
        ours(seen, positions=ours.positions_of(seen))
    heard = alone("videos that are heard", 0)
    plain = replace(heard, tokens=heard.tokens.masked_fill(heard.tokens == VIDEO, AUDIO))
    with pytest.raises(InputError, match="audio placeholders"):
        ours(plain)
