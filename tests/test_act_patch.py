"""`lalm_lens.patching`: against TransformerLens' own functions on the same model, and what it adds against hooks."""

import inspect
from functools import cache as remembered
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from reference import chirps, hf_batch, tiny_hf
from torch.testing import assert_close
from transformer_lens import patching as theirs

from lalm_lens import patching as ours
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.corrupt import silence
from lalm_lens.datasets import read_folder
from lalm_lens.engine.branches import Branch
from lalm_lens.engine.plan import run_branches
from lalm_lens.errors import InputError
from lalm_lens.inputs import Inputs
from lalm_lens.interventions import Patch
from lalm_lens.loading import from_hf
from lalm_lens.runs import Run, Source

pytestmark = pytest.mark.numbers

FAMILY = sorted(name for name in vars(theirs) if name.startswith("get_act_patch_") and "direct_path" not in name)
EXTRA = {f"get_act_patch_{name}" for name in ("resid_post", "mlp_post_by_pos", "by_region", "encoder")}
ENTRIES = "get_act_patch_attn_head_pattern_dest_src_pos"  # a run for each pair of positions: compared on a sample
EVERY = [name for name in FAMILY if name.endswith("every")]
WHOLE = [name for name in FAMILY if name != ENTRIES]


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, 17] - logits[0, -1, 120]


def everywhere(logits: torch.Tensor) -> torch.Tensor:
    """Reads every position, each with a weight of its own."""
    weight = torch.linspace(0.5, 2, logits.shape[1])
    return (logits[0].log_softmax(-1)[:, 33] * weight).mean()


METRICS = {"last": (difference, -1), "all positions": (everywhere, None)}
BOTH = {name: metric for name, (metric, _) in METRICS.items()}


def heard(duration_s: float, n_text_after: int) -> tuple[Inputs, Inputs]:
    """The same words about two sounds."""
    clean, corrupted = (hf_batch(chirps([duration_s], seed=seed), n_text_after=n_text_after) for seed in (0, 4))
    return Inputs.from_hf(clean), Inputs.from_hf(corrupted | {"input_ids": clean["input_ids"]})


@pytest.fixture(scope="module", params=[4, 2], ids=["own keys", "shared keys"])
def model(request):
    return from_hf(tiny_hf(seed=5, n_kv_heads=request.param, num_hidden_layers=3))


@pytest.fixture(scope="module")
def prompts():
    """Nine positions: 5 words, 2 of audio, 2 words."""
    return heard(0.1, n_text_after=2)


@pytest.fixture(scope="module")
def clean_cache(model, prompts):
    with torch.no_grad():
        return model.run_with_cache(prompts[0])[1]


@pytest.fixture(scope="module")
def their(model, prompts, clean_cache):
    """What TransformerLens' functions return, both metrics of one sweep."""
    bound = model.bind(*prompts)
    parts = {name: getattr(theirs, name) for name in WHOLE if name not in EVERY}

    @remembered
    def swept(name: str) -> theirs.PatchingResult:
        with torch.no_grad():
            return parts[name](bound, bound.tokens[1], clean_cache, BOTH)

    def called(name: str) -> theirs.PatchingResult:
        if name not in EVERY:
            return swept(name)
        with pytest.MonkeyPatch.context() as patch:  # theirs puts together what its other functions returned before
            for part in parts:
                patch.setattr(theirs, part, lambda *args, part=part, **options: swept(part))
            return getattr(theirs, name)(bound, bound.tokens[1], clean_cache, BOTH)

    return called


@pytest.fixture
def outcomes(monkeypatch) -> list:
    """What has run."""
    seen = []

    def spied(*args, **options):
        seen.append(run_branches(*args, **options))
        return seen[-1]

    monkeypatch.setattr(ours, "run_branches", spied)
    return seen


def test_the_family_is_theirs_and_more():
    assert {name for name in vars(ours) if name.startswith("get_act_patch_")} == {*FAMILY, *EXTRA}
    for name in FAMILY:
        order, their_order = (list(inspect.signature(getattr(its, name)).parameters)[:4] for its in (ours, theirs))
        assert order == their_order
        assert getattr(ours, name).__doc__


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", WHOLE)
def test_every_function_gives_what_theirs_gives(model, prompts, clean_cache, their, outcomes, name, metric):
    function, at = METRICS[metric]
    found = getattr(ours, name)(model, prompts[1], clean_cache, function, logits_at=at, engine="sweep")
    expected = their(name)[metric].values
    assert_close(found, expected)
    assert expected.std() > 1e-4, "nothing was patched"
    assert {outcome.engine for outcome in outcomes} == {"sweep"}
    assert all(outcome.cost.forwards < 0.9 * outcome.cost.n_branches for outcome in outcomes)


def test_every_entry_of_every_pattern(model, prompts, clean_cache, outcomes):
    sweep, n_pos = getattr(ours, ENTRIES), prompts[1].tokens.shape[1]
    found = {
        name: sweep(model, prompts[1], clean_cache, metric, logits_at=at, engine="sweep")
        for name, (metric, at) in METRICS.items()
    }
    chosen, index = sampled(found["last"], 60, ("layer", "head_index", "dest_pos", "src_pos"))
    setter, bound = theirs.layer_head_dest_src_pos_pattern_patch_setter, model.bind(*prompts)
    with torch.no_grad():
        expected = theirs.generic_activation_patch(
            bound, bound.tokens[1], clean_cache, BOTH, setter, "pattern", index_df=index
        )
    for name in METRICS:
        assert_close(found[name].flatten()[chosen], expected[name].values)
        assert expected[name].values.std() > 1e-4, "nothing was patched"
    unseen = found["last"].numel() * (n_pos - 1) / n_pos / 2
    assert all(outcome.n_skipped >= unseen for outcome in outcomes)


def sampled(values: torch.Tensor, n: int, axes: tuple[str, ...]) -> tuple[torch.Tensor, pd.DataFrame]:
    """Some places of a result: in the flat one, and as TransformerLens wants them."""
    chosen = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(0))[:n]
    index = torch.unravel_index(chosen, values.shape)
    return chosen, pd.DataFrame({axis: at.tolist() for axis, at in zip(axes, index, strict=True)})


@pytest.mark.parametrize("name", ["resid_post", "attn_head_k_by_pos", "attn_head_pattern_all_pos", "block_every"])
def test_engines_and_kinds_of_clean_runs_agree(model, prompts, clean_cache, name):
    function = getattr(ours, f"get_act_patch_{name}")
    clean, corrupted = (Run(inputs) for inputs in prompts)
    by_hooks = function(model, corrupted, clean_cache, difference, engine="hooks")
    assert_close(function(model, corrupted, clean, difference, engine="sweep", token_budget=20), by_hooks)
    states = {name: state[0] for name, state in clean_cache.items()}
    with torch.no_grad():
        assert_close(function(model, model.embed_inputs(prompts[1]), states, difference), by_hooks)


@pytest.mark.parametrize("site", ["resid_post", "z", "k", "pattern"])
def test_a_cache_counts_positions_from_the_end_with_and_without_batch(model, prompts, clean_cache, site):
    states = {name: state[0] for name, state in clean_cache.items()}
    sources = [Source(cache, positions=(-1,)) for cache in (clean_cache.cache_dict, states, Run(prompts[0]))]
    branches = [Branch(Run(prompts[1]), (Patch(site, 1, (-1,), source),)) for source in sources]
    values = run_branches(model, branches).values
    assert_close(values, values[:1].expand_as(values))


def test_residual_streams_hand_over_to_each_other(model, prompts, clean_cache):
    after = ours.get_act_patch_resid_post(model, prompts[1], clean_cache, difference)
    before = ours.get_act_patch_resid_pre(model, prompts[1], clean_cache, difference)
    assert_close(after[:-1], before[1:])
    with torch.no_grad():
        assert_close(after[-1, -1], difference(model(prompts[0])))


def test_metrics_may_return_numbers_of_any_kind(model, prompts, clean_cache):
    tensors = ours.get_act_patch_resid_post(model, prompts[1], clean_cache, lambda logits: difference(logits).double())
    assert tensors.dtype == torch.float64
    floats = ours.get_act_patch_resid_post(model, prompts[1], clean_cache, lambda logits: difference(logits).item())
    assert_close(floats, tensors.float())
    ranks = ours.get_act_patch_resid_post(model, prompts[1], clean_cache, lambda logits: logits[0, -1].argmax())
    assert ranks.dtype == torch.float32
    shapes = set()
    ours.get_act_patch_mlp_out(
        model, prompts[1], clean_cache, lambda logits: shapes.add(tuple(logits.shape)) or 0.0, logits_at=(-1, 3)
    )
    assert shapes == {(1, 2, 260)}


def test_neurons_are_patched_together(model, prompts, clean_cache):
    every = ours.get_act_patch_mlp_post_by_pos(model, prompts[1], clean_cache, difference)
    assert_close(every, ours.get_act_patch_mlp_out(model, prompts[1], clean_cache, difference))
    few = ours.get_act_patch_mlp_post_by_pos(model, prompts[1], clean_cache, difference, neurons=(3, 40))

    def restore(state, hook):
        state[:, 6, [3, 40]] = clean_cache[hook.name][:, 6, [3, 40]]
        return state

    with torch.no_grad():
        logits = model.run_with_hooks(prompts[1], fwd_hooks=[("blocks.1.mlp.hook_post", restore)])
    assert_close(few[1, 6], difference(logits))
    assert (few - every).abs().max() > 1e-3


def test_padding_changes_nothing(model, prompts):
    padded = [pad_left(inputs, 3) for inputs in prompts]
    for name in ("resid_pre", "attn_head_pattern_by_pos"):
        function = getattr(ours, f"get_act_patch_{name}")
        expected = function(model, prompts[1], Run(prompts[0]), everywhere, logits_at=None)
        found = function(model, padded[1], Run(padded[0]), everywhere, logits_at=None)
        assert_close(found[..., 3:], expected)
        assert (found[..., :3] == found[..., :1]).all()


def pad_left(inputs: Inputs, n: int) -> Inputs:
    tokens, mask = (torch.nn.functional.pad(each, (n, 0)) for each in (inputs.tokens, inputs.attention_mask))
    return Inputs(tokens, mask, inputs.mel, inputs.n_frames)


@pytest.fixture(scope="module")
def hen(tiny_lalm, tmp_path_factory):
    """Runs of a clip and of silence in the shipped model, and the log-probability of the clip's label."""
    sample = read_folder(write_clips(tmp_path_factory.mktemp("clips"), "animal", 6, seed=5))[-1]
    processor = tiny_lalm.processor
    prompt = processor.prompt(ATTRIBUTES["animal"], processor.n_frames(sample.waveform))
    waveforms = (sample.waveform, silence(sample.waveform))
    clean, silent = (Run(processor.inputs([prompt], [waveform]), prompt) for waveform in waveforms)
    target = processor.label_tokens(ATTRIBUTES["animal"].labels)[sample.label]
    return clean, silent, lambda logits: logits[0, -1].log_softmax(-1)[target]


@pytest.fixture(scope="module")
def hen_cache(tiny_lalm, hen):
    with torch.no_grad():
        return tiny_lalm.run_with_cache(hen[0].inputs)[1]


def restored(model, run: Run, cache, name: str, positions) -> torch.Tensor:
    """Logits of a run with a plain hook that puts clean states there."""

    def restore(state, hook):
        state[:, list(positions)] = cache[hook.name][:, list(positions)]
        return state

    with torch.no_grad():
        return model.run_with_hooks(run.inputs, fwd_hooks=[(name, restore)])


def test_on_the_shipped_model_and_a_sound_it_is_theirs_too(tiny_lalm, hen, hen_cache):
    clean, silent, metric = hen
    bound = tiny_lalm.bind(clean.inputs, silent.inputs)
    by_pos = ours.get_act_patch_resid_pre(tiny_lalm, silent, clean, metric, engine="sweep")
    heads = ours.get_act_patch_attn_head_out_all_pos(tiny_lalm, silent, hen_cache, metric, engine="sweep")
    chosen, index = sampled(by_pos, 40, ("layer", "pos"))
    with torch.no_grad():
        expected = theirs.generic_activation_patch(
            bound, bound.tokens[1], hen_cache, metric, theirs.layer_pos_patch_setter, "resid_pre", index_df=index
        )
        assert_close(heads, theirs.get_act_patch_attn_head_out_all_pos(bound, bound.tokens[1], hen_cache, metric))
    assert_close(by_pos.flatten()[chosen], expected)
    assert by_pos.std() > 0.1


def test_regions_are_those_of_the_prompt(tiny_lalm, hen, hen_cache):
    clean, silent, metric = hen
    values, regions = ours.get_act_patch_by_region(tiny_lalm, silent, clean, metric, engine="sweep")
    assert regions[:3] == ("text_before", "audio_tag", "audio")
    assert regions[-1] == "last"
    assert values.shape == (tiny_lalm.cfg.n_layers, len(regions))
    for layer, region in ((0, "audio"), (3, "object"), (5, "last")):
        logits = restored(tiny_lalm, silent, hen_cache, f"blocks.{layer}.hook_resid_post", silent.region(region))
        assert_close(values[layer, regions.index(region)], metric(logits))
    by_site = ours.get_act_patch_by_region(tiny_lalm, silent, hen_cache, metric, site="attn_out", engine="hooks")
    assert_close(by_site.values, ours.get_act_patch_by_region(tiny_lalm, silent, clean, metric, site="attn_out").values)
    assert not torch.allclose(by_site.values, values)


def test_windows_of_the_encoder(tiny_lalm, hen, hen_cache):
    clean, silent, metric = hen
    n_states = -(-int(clean.inputs.n_frames) // 2)
    values = ours.get_act_patch_encoder(tiny_lalm, silent.inputs, hen_cache, metric, engine="sweep")
    assert values.shape == (tiny_lalm.lalm_cfg.encoder.n_layers, -(-n_states // 50))
    for layer, window in ((0, 0), (1, 1)):
        positions = range(50 * window, min(50 * window + 50, n_states))
        name = f"audio_encoder.blocks.{layer}.hook_resid_post"
        assert_close(values[layer, window], metric(restored(tiny_lalm, silent, hen_cache, name, positions)))
    whole = ours.get_act_patch_encoder(tiny_lalm, silent, clean, metric, window_s=9, site="resid_pre")
    with torch.no_grad():
        assert_close(whole[0, 0], metric(tiny_lalm(clean.inputs)))
    assert_close(
        ours.get_act_patch_encoder(tiny_lalm, silent, clean, metric, window_s=0.5, site="mlp_out", engine="hooks"),
        ours.get_act_patch_encoder(tiny_lalm, silent, clean, metric, window_s=0.5, site="mlp_out", engine="sweep"),
    )


def test_the_example_in_the_docs_runs(tiny_lalm, hen):
    text = (Path(__file__).parent.parent / "docs" / "patching.md").read_text(encoding="utf-8")
    clean, silent, _ = hen
    names = {
        "model": tiny_lalm,
        "prompt": clean.prompt,
        "waveform": clean.inputs,
        "silence": silent.inputs,
        "target": 9,
    }
    names["processor"] = SimpleNamespace(inputs=lambda prompts, waveforms: waveforms[0])
    exec(text.split("```python")[1].split("```")[0], names)
    assert names["values"].shape == (tiny_lalm.cfg.n_layers, len(names["regions"]))


def test_what_does_not_fit_is_refused(model, prompts, clean_cache):
    corrupted = prompts[1]
    longer = heard(0.1, n_text_after=3)[0]
    other = pad_left(heard(0.1, n_text_after=1)[0], 1)
    with torch.no_grad():
        _, of_longer = model.run_with_cache(longer)
    for function in (ours.get_act_patch_resid_pre, ours.get_act_patch_attn_head_pattern_all_pos):
        for wrong in (Run(longer), of_longer, of_longer.cache_dict):
            with pytest.raises(InputError, match="The clean prompt has 10 positions"):
                function(model, corrupted, wrong, difference)
    with pytest.raises(InputError, match="8 positions and 1 of padding"):
        ours.get_act_patch_resid_pre(model, corrupted, Run(other), difference)
    with pytest.raises(InputError, match=r"does not hold blocks\.0\.hook_resid_pre"):
        ours.get_act_patch_resid_pre(model, corrupted, {}, difference)
    with pytest.raises(InputError, match="one number for each patched run"):
        ours.get_act_patch_resid_pre(model, corrupted, clean_cache, lambda logits: logits[0, -1])
    with pytest.raises(InputError, match=r"There are .* neurons"):
        ours.get_act_patch_mlp_post_by_pos(model, corrupted, clean_cache, difference, neurons=(96,))
    with pytest.raises(InputError, match="with its prompt"):
        ours.get_act_patch_by_region(model, corrupted, clean_cache, difference)
    with pytest.raises(InputError, match="longer than 0 s"):
        ours.get_act_patch_encoder(model, corrupted, clean_cache, difference, window_s=-1)
    for deaf in (Run(model.embed_inputs(corrupted)), Inputs(torch.ones(1, 4).long(), torch.ones(1, 4).bool())):
        with pytest.raises(InputError, match="hears a clip"):
            ours.get_act_patch_encoder(model, deaf, clean_cache, difference)
    two = Inputs.from_hf(hf_batch(chirps([0.1, 0.1]), n_text_after=2))
    with pytest.raises(InputError, match="A run is of one prompt"):
        ours.get_act_patch_resid_pre(model, two, clean_cache, difference)
    with pytest.raises(InputError, match="this cache holds 2"), torch.no_grad():
        ours.get_act_patch_resid_pre(model, corrupted, model.run_with_cache(two)[1], difference)
