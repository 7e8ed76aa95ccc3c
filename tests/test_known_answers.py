"""Models whose causal traces are known beforehand, from what their attention windows let through."""

from collections.abc import Callable

import pandas as pd
import pytest
import torch
from jaxtyping import Bool, Float
from reference import chirps, hf_batch
from torch import Tensor

from lalm_lens.assets import TINY_LALM_PLANTED, TINY_LALM_RELAY
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.corrupt import silence
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.inputs import Embedded, Inputs
from lalm_lens.light_cone import light_cone as cone_of
from lalm_lens.loading import from_pretrained
from lalm_lens.model import HookedLALM

pytestmark = pytest.mark.numbers

N_CLIPS = 4
PLANTED_BLOCK = 4
RELAY_WINDOW = 20


# --- what can reach what ------------------------------------------------------------------------------------


def may_look(n_pos: int, window: int | None) -> Bool[Tensor, "query_pos key_pos"]:
    back = torch.arange(n_pos)[:, None] - torch.arange(n_pos)
    return (back >= 0) & (back < (window or n_pos))


def reachable(windows: tuple[int | None, ...], is_audio: Bool[Tensor, " pos"]) -> Bool[Tensor, "layer pos"]:
    """Which states the audio has reached and the last position is still reached by; the first row is the embedding."""
    looks = [may_look(len(is_audio), window).float() for window in windows]
    heard, heeded = [is_audio], [torch.arange(len(is_audio)) == len(is_audio) - 1]
    for look in looks:
        heard.append(look @ heard[-1].float() > 0)
    for look in reversed(looks):
        heeded.insert(0, heeded[0].float() @ look > 0)
    return torch.stack(heard) & torch.stack(heeded)


def behind(is_audio: Bool[Tensor, " pos"]) -> Bool[Tensor, " pos"]:
    return torch.arange(len(is_audio)) > is_audio.nonzero().max()


def light_cone(n_layers: int, window: int, is_audio: Bool[Tensor, " pos"]) -> Bool[Tensor, "layer pos"]:
    """i <= a + (l + 1)(W - 1) and n - i <= (L - 1 - l)(W - 1), for positions i behind the last audio position a."""
    layer, pos = torch.arange(-1, n_layers)[:, None], torch.arange(len(is_audio))
    a, n = int(is_audio.nonzero().max()), len(is_audio) - 1
    return (pos <= a + (layer + 1) * (window - 1)) & (n - pos <= (n_layers - 1 - layer) * (window - 1))


def is_audio(model: HookedLALM, inputs: Inputs) -> Bool[Tensor, " pos"]:
    return inputs.tokens[0] == model.lalm_cfg.audio_token


def repeated(embedded: Embedded, n: int) -> Embedded:
    return Embedded(embedded.embed.expand(n, -1, -1), embedded.attention_mask.expand(n, -1))


@torch.no_grad()
def matters(model: HookedLALM, clean: Inputs, silent: Inputs) -> Bool[Tensor, "layer pos"]:
    """Whether one clean state behind the audio changes any bit of the last logits of the silent run.

    Row r of a patched batch is compared with row r of the same batch unpatched: a sum may be rounded differently in
    another row or in a batch of another shape.
    """
    where = torch.eye(clean.tokens.shape[1], dtype=torch.bool)[behind(is_audio(model, clean))]  # [batch, pos]
    heard, unheard = (repeated(model.embed_inputs(inputs), len(where)) for inputs in (clean, silent))
    names = ["hook_embed", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers))]
    _, states = model.run_with_cache(heard, names_filter=names, logits_at=-1)
    unpatched = model(unheard, logits_at=-1)
    changed = []
    for name in names:
        patch = restore(states[name], where)
        patched = model.run_with_hooks(unheard, fwd_hooks=[(name, patch)], logits_at=-1)
        changed.append(((patched != unpatched).any(-1) & where).any(0))
    return torch.stack(changed)


def restore(clean: Float[Tensor, "batch pos d_model"], where: Bool[Tensor, "batch pos"]) -> Callable:
    return lambda state, hook: torch.where(where[..., None], clean, state)


# --- random weights -----------------------------------------------------------------------------------------

N_LAYERS, N_TEXT_AFTER = 4, 14


@pytest.mark.parametrize(
    ("window", "full"),
    [
        (6, ()),
        (5, ()),  # three positions wide in most blocks
        (4, ()),  # too narrow: the sound never arrives
        (1, (2,)),  # planted
        (4, (0, 2)),
    ],
)
def test_in_random_models_all_that_is_reached_matters_and_nothing_else(pair, window, full):
    kinds = ["full_attention" if layer in full else "sliding_attention" for layer in range(N_LAYERS)]
    model = pair(seed=5, use_sliding_window=True, sliding_window=window, layer_types=kinds)[1]
    clip = chirps([1.3])[0]
    clean, silent = (Inputs.from_hf(hf_batch([w], n_text_after=N_TEXT_AFTER)) for w in (clip, torch.zeros_like(clip)))
    audio = is_audio(model, clean)
    expected = reachable(tuple(None if layer in full else window for layer in range(N_LAYERS)), audio) & behind(audio)
    assert expected.any() == (window > 4 or bool(full))
    assert torch.equal(matters(model, clean, silent), expected)


@pytest.mark.parametrize("window", [1, 2, 5, 6, 20])
def test_with_one_window_the_reach_is_a_light_cone(window):
    audio = torch.arange(60) // 20 == 1
    windows = (window,) * 8
    assert torch.equal(reachable(windows, audio) & behind(audio), light_cone(8, window, audio) & behind(audio))


# --- the trained models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict[str, list[Sample]]:
    root = tmp_path_factory.mktemp("clips")
    return {name: read_folder(write_clips(root / name, name, N_CLIPS, seed=11)) for name in ATTRIBUTES}


TRAINED = {TINY_LALM_PLANTED: (1, 1, 1, 1, None, 1, 1, 1), TINY_LALM_RELAY: (RELAY_WINDOW,) * 8}


@pytest.fixture(scope="module", params=TRAINED, ids=lambda folder: folder.name)
def trained(request) -> tuple[HookedLALM, tuple[int | None, ...]]:
    return from_pretrained(request.param), TRAINED[request.param]


def kept_rows(model: HookedLALM, samples: dict[str, list[Sample]], name: str) -> pd.DataFrame:
    kept = causal_trace(model, samples[name], attribute=name, progress=False).kept
    assert set(kept.kind) == {"layer", "audio_layer", "token"}, "no clip was kept: nothing is compared"
    assert set(kept.layer) == set(range(-1, model.cfg.n_layers))
    return kept


def heard_and_silent(model: HookedLALM, name: str, sample: Sample) -> tuple[Inputs, Inputs]:
    prompt = model.processor.prompt(ATTRIBUTES[name], model.processor.n_frames(sample.waveform))
    waveforms = sample.waveform, silence(sample.waveform)
    return tuple(model.processor.inputs([prompt], [waveform]) for waveform in waveforms)


@pytest.fixture(scope="module")
def planted() -> HookedLALM:
    return from_pretrained(TINY_LALM_PLANTED)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_planted_text_hears_from_the_planted_block_on_and_at_the_last_position_only(planted, samples, name):
    rows = kept_rows(planted, samples, name)
    heard, last = rows.layer >= PLANTED_BLOCK, rows.text_index == -1
    for kind, expected in {"layer": heard, "audio_layer": ~heard, "token": heard & last}.items():
        wrong = (rows.recovery - expected.astype(float)).abs() > 1e-4
        assert not wrong[rows.kind == kind].any(), rows[wrong & (rows.kind == kind)]


@pytest.mark.parametrize("name", ["gender", "animal"])
def test_in_trained_models_no_bit_changes_where_nothing_is_reached(trained, samples, name):
    model, windows = trained
    clean, silent = heard_and_silent(model, name, samples[name][0])
    audio = is_audio(model, clean)
    changed = matters(model, clean, silent)
    assert changed.any()
    assert not (changed & ~reachable(windows, audio)).any()
    assert torch.equal(cone_of(model.decoder_cfg.windows, audio), reachable(windows, audio)[1:])


@pytest.fixture(scope="module", params=["language", "animal"])
def relayed(request, samples) -> tuple[HookedLALM, str, pd.DataFrame]:
    """The relay model and its token rows about one attribute."""
    model = from_pretrained(TINY_LALM_RELAY)
    rows = kept_rows(model, samples, request.param)
    return model, request.param, rows[rows.kind == "token"]


def test_relay_recovers_nothing_outside_the_light_cone(relayed, samples):
    model, name, rows = relayed
    clean, _ = heard_and_silent(model, name, samples[name][0])
    cone = light_cone(model.cfg.n_layers, RELAY_WINDOW, is_audio(model, clean))
    inside = [bool(cone[layer + 1, pos]) for layer, pos in zip(rows.layer, rows.position, strict=True)]
    outside = rows[[not cell for cell in inside]]
    assert len(outside) > len(rows) / 4
    assert (outside.recovery == 0).all()


def test_relay_hears_through_the_options(relayed):
    """The last position is out of the audio's sight; what it answers has been on the words of the options."""
    _, name, rows = relayed
    assert -rows.text_index.min() > RELAY_WINDOW  # even the first word behind the audio is out of its sight
    mean = rows.pivot_table("recovery", "layer", "text_index")
    word = rows.drop_duplicates("text_index").set_index("text_index")
    strongest = mean.idxmax(axis="columns")
    for layer, at in strongest.items():
        print(f"{name} {layer:2d} {word.token[at]!r} at {at}: {mean.loc[layer, at]:.3f}")
    assert word.region[strongest[1]] == "object"
    assert mean.loc[1].max() > 0.8
    assert mean.loc[1, -1] < mean.loc[1].max() - 0.3
    assert (mean.loc[3:, -1] > 0.8).all()
