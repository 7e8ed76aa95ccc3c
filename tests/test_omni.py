"""Qwen2.5-Omni's Thinker against transformers' own, with sounds, images, videos, and videos that are heard."""

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from engine_cases import LOGITS_AND_LOG_PROBS, assert_same, branches
from families import FAMILIES
from omni import (
    AUDIO,
    LAYERS,
    PATCH,
    VIDEO,
    Batch,
    Clip,
    Image,
    Part,
    Thinker,
    Video,
    Words,
    extractor,
    hf_positions,
    hf_states,
    tiny_config,
    tiny_omni,
)
from reference import chirps, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import WhisperFeatureExtractor

from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.encoders.vision import Frames
from lalm_lens.engine.plan import Plan
from lalm_lens.errors import AudioError, ConversionError, HookError, InputError, PromptError
from lalm_lens.info import info
from lalm_lens.inputs import Embedded, Images, Inputs, Videos
from lalm_lens.interventions import Knockout, Patch, Scale
from lalm_lens.loading import from_hf, from_pretrained, one_dtype, our_conversions, plain_state
from lalm_lens.nn.kv_cache import KeyValueCache
from lalm_lens.positions import positions_of
from lalm_lens.prompts import WholeClip
from lalm_lens.readouts import Logits
from lalm_lens.runs import OWN, Run, Source
from lalm_lens.seeing import SeeingLALM
from lalm_lens.verify import verify
from lalm_lens.weights import export

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


def test_a_second_of_video_is_as_long_as_the_config_says():
    config = tiny_config()
    config.position_id_per_seconds = 13
    hf, batch = Thinker(config), Batch(SEEN).hf()
    theirs, _ = hf_positions(hf, batch, is_heard=False)
    inputs = Inputs.from_hf(batch)
    positions = positions_of(inputs, from_hf(hf).lalm_cfg)
    assert torch.equal(positions[:, inputs.attention_mask], theirs[:, inputs.attention_mask])


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
    there = inputs.to_hf("feature_attention_mask")
    assert there.keys() == batch.keys()
    for name, tensor in batch.items():
        assert torch.equal(there[name], tensor), name
    if kind != "sounds":
        placed = replace(inputs, positions=ours.positions_of(inputs)).to_hf("feature_attention_mask")
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


def test_a_change_of_the_vision_tower_is_seen_in_both_engines(ours):
    """An image and a clip; then two videos and an image, whose row is the first."""
    image, many = Run(alone("pictures", 0)), Run(alone("pictures", 1))
    assert ours.perceived(many.inputs, "vision_encoder") == [(80, 20, 20)] + [(16, 4, 4)] * 3 + [(12, 3, 3)] * 2
    other = replace(image, inputs=replace(image.inputs, images=noisy(image.inputs.images)))
    every = Patch("resid_post", LAYERS["vision"] - 1, range(24), Source(other), stack="vision_encoder")
    its = branches(
        image,
        every,
        Patch("adapter_out", 0, range(6), Source(other), stack="vision_encoder"),
        Scale("z", 0, (3, 4), factor=0.0, heads=(1,), stack="vision_encoder"),
        (Scale("mlp_out", 1, (5,), factor=2.0, stack="vision_encoder"), Scale("adapter_in", 0, (2,), factor=0.0)),
    )
    rows = [Scale("resid_post", 0, (2,), factor=0.0, stack="vision_encoder", row=row) for row in range(6)]
    found = assert_same(ours, its + branches(many, *rows))
    seen = Plan(ours, branches(other, every), LOGITS_AND_LOG_PROBS).run().values[0]
    assert_close(found.values[:2], torch.stack([seen, seen]))
    assert all((moved - base).abs().max() > 1e-4 for moved, base in zip(found.values, found.base, strict=True))
    for says, change in {
        "has 6 rows in this run": replace(rows[0], row=None),
        "There are 6 rows": replace(rows[0], row=6),
        "There are 12 positions of vision_encoder": replace(rows[5], positions=(12,)),
        f"There are {LAYERS['vision']} layers in the vision": replace(rows[0], layer=LAYERS["vision"]),
    }.items():
        with pytest.raises(InputError, match=says):
            Plan(ours, branches(many, change))
    with pytest.raises(InputError, match="sees its images again, and this one holds none"):
        Plan(ours, branches(Run(alone("sounds", 0)), rows[0]))


def noisy(images: Images | None) -> Images:
    assert images is not None
    return replace(images, patches=images.patches + torch.randn_like(images.patches))


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
    for hook, kind, row in ((place, "sounds", 0), ("adapter.hook_out", "pictures", 3)):
        with (
            ours.hooks(fwd_hooks=[(hook, lambda state, hook: state)]),
            pytest.raises(HookError, match="would not fire: this run holds no"),
        ):
            ours.embed_inputs(alone(kind, row))
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
    with pytest.raises(InputError, match="This qwen2_audio model hears and does not see"):
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


# --- conversion ----------------------------------------------------------------------------------------------


@pytest.fixture
def whole(hf, tmp_path) -> Path:
    """As it is published: the Thinker inside of a model that also speaks."""
    hf.save_pretrained(tmp_path)
    tensors = {f"thinker.{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {"talker.model.norm.weight": torch.ones(3), "token2wav.code2wav_dit_model.x": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    thinker = json.loads((tmp_path / "config.json").read_text())
    text, vision = thinker["text_config"], thinker["vision_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"}
    del vision["rope_parameters"]
    vision |= {"embed_dim": 32, "in_chans": 3, "spatial_patch_size": PATCH, "tokens_per_second": 25}
    thinker |= {"ignore_index": -100, "vision_token_id": 8, "eos_token_id": 7}
    config = {
        "architectures": ["Qwen2_5OmniModel"],
        "enable_audio_output": True,
        "enable_talker": True,
        "model_type": "qwen2_5_omni",
        "thinker_config": thinker,
        "talker_config": {"model_type": "qwen2_5_omni_talker"},
        "token2wav_config": {"model_type": "qwen2_5_omni_token2wav"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def change(folder: Path, *sections: str, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    inner = config
    for section in sections:
        inner = inner[section]
    inner.update(values)
    (folder / "config.json").write_text(json.dumps(config))


def test_the_thinker_is_taken_out_of_the_whole_model(ours, whole):
    opened = from_pretrained(whole)
    assert opened.lalm_cfg == replace(ours.lalm_cfg, model_type="qwen2_5_omni")
    assert opened.stop_tokens == (7,)
    for (name, a), b in zip(opened.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b), name
    conversion, stored = our_conversions()["qwen2_5_omni"], load_file(whole / "model.safetensors")
    rows = conversion.rows(opened.lalm_cfg)
    as_published, as_in_transformers_5 = (dict(export(opened, rows, layout)) for layout in conversion.layouts)
    dropped = {"thinker.audio_tower.audio_bos_eos_token.weight"}
    dropped |= {name for name in stored if not name.startswith("thinker.")}
    assert len(dropped) == 3
    assert as_published.keys() == stored.keys() - dropped
    assert all(torch.equal(tensor, stored[name]) for name, tensor in as_published.items())
    assert "thinker.model.visual.blocks.0.norm1.weight" in as_in_transformers_5
    save_file({name: tensor.clone() for name, tensor in as_in_transformers_5.items()}, whole / "model.safetensors")
    for (name, a), b in zip(from_pretrained(whole).named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_info_says_what_it_sees_with(ours, whole):
    described = info(whole)
    assert described.n_parameters["vision encoder"] == sum(p.numel() for p in ours.vision_encoder.parameters())
    assert described.n_parameters["vision adapter"] == sum(p.numel() for p in ours.vision_adapter.parameters())
    assert sum(described.n_parameters.values()) == sum(p.numel() for p in ours.parameters())
    assert described.hooks["vision_encoder.blocks.{0..2}.attn.hook_pattern"] == "frame, head, query_pos, key_pos"
    assert described.hooks["hook_vision_embed"] == "vision_pos, d_model"
    assert "vision encoder n_layers 3, d_model 32" in repr(described)
    assert "longer clips as far as the feature extractor goes" in repr(described)


def test_one_tensor_more_or_less_in_the_whole_model_is_refused(whole):
    stored = load_file(whole / "model.safetensors")
    missing = {name: tensor for name, tensor in stored.items() if name != "thinker.visual.merger.ln_q.weight"}
    save_file(missing, whole / "model.safetensors")
    with pytest.raises(ConversionError, match=r"1 missing: thinker\.visual\.merger\.ln_q\.weight"):
        from_pretrained(whole)
    save_file({**stored, "thinker.visual.merger.ln_q.bias": torch.zeros(32)}, whole / "model.safetensors")
    with pytest.raises(ConversionError, match=r"1 unknown: thinker\.visual\.merger\.ln_q\.bias"):
        from_pretrained(whole)
    save_file({**stored, "listener.weight": torch.zeros(32)}, whole / "model.safetensors")
    with pytest.raises(ConversionError, match=r"1 unknown: listener\.weight"):
        from_pretrained(whole)


@pytest.mark.parametrize("sections", [[], ["thinker_config"], ["thinker_config", "vision_config"]], ids=str)
def test_an_unknown_key_of_the_whole_config_is_refused(whole, sections):
    change(whole, *sections, logit_softcapping=30.0)
    with pytest.raises(ConversionError, match="does not know: logit_softcapping"):
        from_pretrained(whole)


def test_a_tied_head_is_the_embedding(tmp_path):
    """Whether the 3B is tied is said by its file alone. Its text_config says true whatever is there."""
    config = tiny_config()
    assert config.text_config.tie_word_embeddings
    config.tie_word_embeddings = True
    torch.manual_seed(5)
    hf = randomise(Thinker(config)).eval()
    hf.tie_weights()
    hf.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    tokens = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert_close(ours(tokens), hf(input_ids=tokens, use_cache=False).logits)
    assert ours.unembed.linear.weight is ours.embed.table.weight
    head = "lm_head.weight"
    stored = load_file(tmp_path / "model.safetensors")
    assert head not in stored
    save_file({**stored, head: stored["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="said to be tied"):
        from_pretrained(tmp_path)
    save_file(stored, tmp_path / "model.safetensors")
    change(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ConversionError, match=r"1 missing: lm_head\.weight"):
        from_pretrained(tmp_path)


# --- prompts -------------------------------------------------------------------------------------------------


def photos(*sizes: tuple[int, int]) -> list[PIL.Image.Image]:
    rng = np.random.default_rng(0)
    return [PIL.Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> tuple[Thinker, SeeingLALM]:
    folder = tmp_path_factory.mktemp("seeing")
    hf = FAMILIES["qwen2_5_omni_thinker"].save(folder)
    return hf, from_pretrained(folder)


def test_prompts_with_images_are_those_of_hf(seeing):
    """Tokens, pixels, features and logits, of HF's own processor."""
    hf, ours = seeing
    pictures, clips, gender = photos((40, 52), (21, 30), (33, 64)), chirps([1.37, 0.6]), ATTRIBUTES["gender"]
    owned = [pictures[:2], pictures[2:]]
    theirs, processor = FAMILIES["qwen2_5_omni_thinker"].processor(), ours.processor
    texts = []
    for its in owned:
        parts = [{"type": "image"}] * len(its) + [{"type": "audio"}, {"type": "text", "text": gender.question}]
        turn = [{"role": "user", "content": parts}]
        texts.append(theirs.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) + gender.prefix)
    batch = theirs(
        text=texts,
        images=pictures,
        audio=[clip.numpy() for clip in clips],
        sampling_rate=16_000,
        text_kwargs={"padding": True},
        return_tensors="pt",
    )
    prompts = [
        processor.prompt(gender, processor.n_frames(clip), "P2", images=processor.see(its))
        for clip, its in zip(clips, owned, strict=True)
    ]
    inputs = processor.inputs(prompts, clips, processor.see(pictures))
    assert torch.equal(inputs.tokens * inputs.attention_mask, batch["input_ids"] * batch["attention_mask"])
    assert torch.equal(inputs.images.patches, batch["pixel_values"])
    assert torch.equal(inputs.images.grid, batch["image_grid_thw"])
    with torch.no_grad():
        logits = hf(**batch, use_cache=False).logits
        assert_close(ours(inputs)[inputs.attention_mask], logits[inputs.attention_mask])
    regions = [region for region, _ in groupby(position.region for position in prompts[0].positions)]
    before = "text_before image_tag image image_tag image image_tag audio_tag audio audio_tag early"
    assert regions[:10] == before.split()
    n_tokens = inputs.images.grid.prod(-1) // 4
    assert [int(prompt.is_region("image").sum()) for prompt in prompts] == [int(n_tokens[:2].sum()), int(n_tokens[2])]


def test_prompts_with_videos_know_where_they_are(seeing):
    """HF's own video processor needs torchvision, so placeholders are counted by hand."""
    hf, ours = seeing
    theirs, processor, gender = FAMILIES["qwen2_5_omni_thinker"].processor(), ours.processor, ATTRIBUTES["gender"]
    images, clip = processor.see(photos((16, 24))), chirps([0.6])[0]
    grid = torch.tensor([[3, 4, 4], [2, 2, 6]])
    videos = Videos(torch.randn(int(grid.prod(-1).sum()), 3 * 2 * PATCH**2), grid, torch.tensor([1.0, 0.5]))
    prompt = processor.prompt(gender, processor.n_frames(clip), "P2", images=images, videos=videos)
    inputs = processor.inputs([prompt], [clip], images, videos)
    kinds = [{"type": "image"}, {"type": "video"}, {"type": "video"}, {"type": "audio"}]
    turn = [{"role": "user", "content": [*kinds, {"type": "text", "text": gender.question}]}]
    text = theirs.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) + gender.prefix
    for mark, times in (("IMAGE", [6]), ("VIDEO", [12, 6]), ("AUDIO", [15])):
        for n in times:
            text = text.replace(f"<|{mark}|>", f"<{mark}>" * n, 1)
        text = text.replace(f"<{mark}>", f"<|{mark}|>")
    assert list(prompt.tokens) == theirs.tokenizer(text)["input_ids"]
    before = "text_before image_tag image image_tag video_tag video video_tag video video_tag audio_tag"
    regions = [region for region, _ in groupby(position.region for position in prompt.positions)]
    assert regions[:10] == before.split()
    with torch.no_grad():
        assert_close(ours(inputs), hf(**inputs.to_hf("feature_attention_mask"), use_cache=False).logits)


def test_both_engines_trace_a_prompt_with_an_image(seeing):
    _, ours = seeing
    processor, clip, gender = ours.processor, chirps([0.9])[0], ATTRIBUTES["gender"]
    images = processor.see(photos((40, 52)))
    prompt = processor.prompt(gender, processor.n_frames(clip), images=images)
    clean, silent = (
        Run(processor.inputs([prompt], [heard], images), prompt) for heard in (clip, torch.zeros_like(clip))
    )
    regions = ("audio", "object", "last")
    its = [Patch("resid_post", layer, region, Source(clean)) for layer in range(3) for region in regions]
    found = assert_same(ours, branches(silent, *its, Patch("resid_post", 0, "image", Source(clean))))
    assert torch.equal(found.values[-1], found.base[0]), "images before the clip are the same in both runs"
    with torch.no_grad():
        back = Plan(ours, branches(silent, Patch("resid_pre", 1, range(len(prompt)), Source(clean))), Logits()).run()
        assert_close(back.values[0], ours(clean.inputs, logits_at=-1)[0])


def test_verify_tells_a_tower_that_sees_wrongly(seeing, tmp_path, monkeypatch):
    seeing[0].save_pretrained(tmp_path)
    FAMILIES["qwen2_5_omni_thinker"].processor().save_pretrained(tmp_path)
    monkeypatch.setattr(Frames, "windows", Frames.whole)
    verification = verify(tmp_path)
    assert "DIFFERS from transformers in torch.float32: first in vision_encoder.blocks.0" in verification.verdict
    is_heard = verification.frame.what.str.startswith(("audio_encoder", "adapter"))
    assert verification.frame.agrees[is_heard].all()


def test_pictures_in_another_order_than_the_prompt_are_refused(seeing):
    """There are as many placeholders as tokens, but not of each picture."""
    _, ours = seeing
    processor, clip, gender = ours.processor, chirps([0.5])[0], ATTRIBUTES["gender"]
    there, back = processor.see(photos((16, 64), (40, 40))), processor.see(photos((40, 40), (16, 64)))
    prompt = processor.prompt(gender, processor.n_frames(clip), images=there)
    with pytest.raises(InputError, match="A picture of 25 tokens has 16 placeholders: give pictures in the order"):
        ours(processor.inputs([prompt], [clip], back))
    assert ours(processor.inputs([prompt], [clip], there)).isfinite().all()


@pytest.mark.parametrize("images", [[], ["photo.png"], [np.zeros((9, 9))], [np.zeros((2, 900, 3), np.uint8)]])
def test_images_that_cannot_be_read_are_refused_in_one_line(seeing, images):
    with pytest.raises(InputError, match=r"cannot read these images \(.*\): give a list of PIL") as caught:
        seeing[1].processor.see(images)
    assert "\n" not in str(caught.value)


def test_what_speaks_may_be_in_another_dtype():
    """HF keeps the part that makes sound in float32, whatever the Thinker is in."""
    whole = nn.Module()
    whole.thinker = tiny_omni().bfloat16()
    whole.token2wav = nn.Linear(3, 3)
    found = one_dtype(plain_state(whole), our_conversions()["qwen2_5_omni"], from_hf(whole.thinker).lalm_cfg)
    assert found.dtype == torch.bfloat16


def test_features_of_a_long_extractor_are_those_of_hf():
    """Qwen2.5-Omni's hears 5 minutes. Clips are not padded to that, and no number differs from HF's."""
    made = WhisperFeatureExtractor(feature_size=16, chunk_length=300)
    clips = chirps([2.0, 0.313, 6.77])
    mel, n_frames = WholeClip().features(made, clips)
    waveforms = [clip.numpy() for clip in clips]
    theirs = made(waveforms, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")
    assert mel.shape == (3, 16, 677)
    assert torch.equal(mel, theirs["input_features"][..., :677])
    assert torch.equal(n_frames, theirs["attention_mask"].sum(-1))


def test_the_limit_of_a_clip_is_that_of_the_extractor(seeing, tmp_path):
    hf, _ = seeing
    theirs = FAMILIES["qwen2_5_omni_thinker"].processor()
    longer = type(theirs)(theirs.image_processor, extractor(), theirs.tokenizer, theirs.chat_template)
    processor = from_hf(hf, longer).processor
    assert processor.n_samples == 4 * 16_000
    with pytest.raises(AudioError, match=r"is too long: this model hears 4\.0 s"):
        processor.check_audible(torch.ones(4 * 16_000 + 1), "A clip")


def test_processors_and_images_that_do_not_fit_are_refused(seeing, tiny_lalm):
    hf, ours = seeing
    theirs = FAMILIES["qwen2_5_omni_thinker"].processor()
    parts = theirs.feature_extractor, theirs.tokenizer, theirs.chat_template
    larger = type(theirs.image_processor)(patch_size=14)
    with pytest.raises(ConversionError, match="belongs to another model: it makes patches of 14 pixels and 2 frames"):
        from_hf(hf, type(theirs)(larger, *parts))
    blind = type(theirs)(theirs.image_processor, *parts)
    blind.image_processor = None
    with pytest.raises(ConversionError, match="has no image processor, and this model sees"):
        from_hf(hf, blind)
    images, gender = ours.processor.see(photos((40, 40))), ATTRIBUTES["gender"]
    with pytest.raises(PromptError, match="This qwen2_audio model hears and does not see"):
        tiny_lalm.processor.see(photos((40, 40)))
    with pytest.raises(PromptError, match="This qwen2_audio model hears and does not see"):
        tiny_lalm.processor.prompt(gender, 100, images=images)
    prompt = ours.processor.prompt(gender, 100, images=images)
    clip = chirps([1.0])
    with pytest.raises(InputError, match="image placeholders and the images make"):
        ours(ours.processor.inputs([prompt], clip))
    with pytest.raises(InputError, match="audio placeholders and the clips make"):
        ours(ours.processor.inputs([prompt], chirps([0.5]), images))
    other = replace(ours.lalm_cfg, vision=replace(ours.lalm_cfg.vision, image_token=3))
    with pytest.raises(
        ConversionError, match=r"<\|IMAGE\|> is token \d+ of its tokenizer, .* sees images where token 3"
    ):
        replace(ours.processor, cfg=other).check()
