"""What an experiment cannot do is refused in one line, before the work begins."""

import pytest
import torch

from lalm_lens import (
    Add,
    LensError,
    Scale,
    Search,
    ablate,
    attention_knockout,
    audio_minus_silence,
    back_patch,
    causal_trace,
    convergence,
    critical_layer,
    enrich,
    knockout_generation,
    latent_understanding,
    neuron_gain,
    patchscope,
    scale_attention,
    steer,
    suppression,
)
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.errors import InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.attention_knockout import AttentionKnockout

NAN = float("nan")
HOW = {"attribute": "emotion", "progress": False}


@pytest.fixture(scope="module")
def samples(folders) -> list[Sample]:
    return read_folder(folders["emotion"])


@pytest.fixture(scope="module")
def direction(tiny_lalm, samples):
    return audio_minus_silence(tiny_lalm, samples[:1], attribute="emotion")


@pytest.fixture(scope="module")
def knocked(tiny_lalm, samples) -> AttentionKnockout:
    return attention_knockout(tiny_lalm, samples[:2], layers=["all"], **HOW)


def refused(function, *args, **how) -> str:
    """What it says: in one line, which ends as a sentence does."""
    with pytest.raises(LensError) as error:
        function(*args, **how)
    said = str(error.value)
    assert "\n" not in said
    assert said.endswith(".")
    return said


@pytest.mark.parametrize("layers", [(9,), (-1,), range(9)], ids=str)
def test_layers_that_there_are_not(tiny_lalm, samples, direction, layers):
    says = "There are 8 layers"
    assert says in refused(steer, tiny_lalm, samples, direction=direction, layers=layers, **HOW)
    assert says in refused(ablate, tiny_lalm, samples, units=[(layer, (0,)) for layer in layers], **HOW)
    for experiment in (attention_knockout, knockout_generation, scale_attention):
        assert says in refused(experiment, tiny_lalm, samples, layers=[tuple(layers)], **HOW)


@pytest.mark.parametrize("head", [4, -1])
def test_heads_and_neurons_that_there_are_not(tiny_lalm, samples, head):
    assert "There are 4 heads" in refused(ablate, tiny_lalm, samples, units=[(0, (head,))], **HOW)
    neurons = {"of": "neurons", "units": [(0, (0, 9999))]}
    assert "neurons, counted from 0; got [9999]" in refused(ablate, tiny_lalm, samples, **neurons, **HOW)
    for experiment in (attention_knockout, knockout_generation, scale_attention):
        assert "There are 4 heads" in refused(experiment, tiny_lalm, samples, heads=(head,), **HOW)


@pytest.mark.parametrize(
    ("experiment", "what", "says"),
    [
        (attention_knockout, {"layers": ()}, "No layers are chosen"),
        (knockout_generation, {"layers": ()}, "No layers are chosen"),
        (scale_attention, {"layers": ()}, "No layers are chosen"),
        (scale_attention, {"factors": ()}, "Nothing is changed"),
        (neuron_gain, {"gains": ()}, "Nothing is changed"),
        (ablate, {"units": [(0, ())]}, "Nothing is taken out"),
        (latent_understanding, {"places": ()}, "Nothing is read"),
        (suppression, {"places": ()}, "The verdict is read at the last position"),
        (suppression, {"places": ("object",)}, "The verdict is read at the last position"),
    ],
)
def test_nothing_to_do(tiny_lalm, samples, experiment, what, says):
    assert says in refused(experiment, tiny_lalm, samples, **what, **HOW)


def test_steering_by_nothing(tiny_lalm, samples, direction):
    for what in ({"factors": ()}, {"layers": ()}):
        assert "Nothing is changed" in refused(steer, tiny_lalm, samples, direction=direction, **what, **HOW)


@pytest.mark.parametrize("factor", [NAN, float("inf")])
def test_factors_that_are_no_numbers(tiny_lalm, samples, direction, factor):
    assert "finite number" in refused(steer, tiny_lalm, samples, direction=direction, factors=(factor,), **HOW)
    assert "finite number" in refused(Scale, "resid_post", 0, (0,), factor=factor)
    assert "finite number" in refused(Add, "resid_post", 0, (0,), torch.zeros(1, 128), factor=factor)


def test_attention_is_not_multiplied_by_less_than_nothing(tiny_lalm, samples):
    how = {"normalisation": "behind", "layers": ["all"], **HOW}
    assert "below 0 it would be none; got -1" in refused(scale_attention, tiny_lalm, samples, factors=(1, -1), **how)
    assert len(scale_attention(tiny_lalm, samples[:1], factors=(0,), **how).frame) == 1


@pytest.mark.parametrize("window_s", [0.0, -1.0, NAN, float("inf")])
def test_windows_that_hold_nothing(tiny_lalm, samples, window_s):
    assert "longer than 0 s" in refused(causal_trace, tiny_lalm, samples, audio="windows", window_s=window_s, **HOW)
    assert "longer than 0 s" in refused(Search, window_s)


@pytest.mark.parametrize("n_neurons", [0, -1])
def test_groups_of_no_neurons(tiny_lalm, samples, n_neurons):
    assert "hold nothing" in refused(ablate, tiny_lalm, samples, of="neurons", n_neurons=n_neurons, **HOW)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"top_k": 0}, "top_k is 1 or more"),
        ({"top_k": 10**9}, "top_k is 1 or more"),
        ({"layers": ()}, "No state is put anywhere"),
        ({"target_layers": ()}, "No state is put anywhere"),
        ({"target_layers": (8,)}, "There are 8 layers in the decoder that reads"),
    ],
)
def test_a_patchscope_of_nothing(tiny_lalm, samples, what, says):
    run = Question.about(tiny_lalm, samples, "emotion", "P3", True).run(samples[0])
    assert says in refused(patchscope, tiny_lalm, run, "a text", progress=False, **what)


@pytest.mark.parametrize("experiment", [back_patch, convergence, enrich, neuron_gain])
def test_a_seed_below_0(tiny_lalm, samples, experiment):
    assert "A seed is a whole number" in refused(experiment, tiny_lalm, samples, seed=-1, **HOW)


def test_bootstraps_that_draw_nothing(knocked):
    for n_resamples in (0, -1):
        assert "n_resamples is how often" in refused(knocked.effects, n_resamples=n_resamples)
    assert "A seed is a whole number" in refused(knocked.effects, seed=-1)


def test_tables_are_grouped_by_columns_that_they_have(knocked):
    for by in ((), ("nothing",)):
        assert "Rows are grouped by columns of the table" in refused(knocked.effects, by=by)


def test_scores_of_no_labels():
    with pytest.raises(InputError, match="of one label or more; got 0"):
        critical_layer(torch.ones(2, 3).numpy(), 0)


def test_a_layer_named_twice_is_one_state(tiny_lalm, samples):
    run = Question.about(tiny_lalm, samples, "emotion", "P3", True).run(samples[0])
    twice = patchscope(tiny_lalm, run, "a text", layers=(1, 1), positions=(-1, -1), progress=False)
    assert len(twice.frame) == 1
    assert repr(twice).startswith("Patchscope(1 states")
