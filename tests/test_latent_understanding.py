"""Latent understanding: against words decoded from HF's own states, and counts made by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from reference import hf_states
from transformers import Qwen2AudioForConditionalGeneration

from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.errors import DataError, InputError, PromptError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.concepts import AnyOf, ExactWord, FirstToken
from lalm_lens.experiments.latent_understanding import LatentUnderstanding, latent_understanding
from lalm_lens.inputs import Inputs

HOW = {"attribute": "animal", "progress": False}
LABELS = ATTRIBUTES["animal"].labels
N_LAYERS = 8


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    return read_folder(write_clips(tmp_path_factory.mktemp("clips"), "animal", 6, seed=11))


@pytest.fixture(scope="module")
def heard(tiny_lalm, samples) -> LatentUnderstanding:
    return latent_understanding(tiny_lalm, samples, top_k=5, places=("audio", "last"), **HOW)


@pytest.mark.parametrize("norm", [True, False])
def test_positions_that_name_a_label_are_those_of_hfs_states(tiny_lalm, samples, norm):
    """The words of HF's states, one by one, decoded and compared as text."""
    hf = Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM, dtype=torch.float32).eval()
    some = samples[:2]
    frame = latent_understanding(tiny_lalm, some, top_k=5, norm=norm, **HOW).frame
    n_found = 0
    for sample in some:
        run = Question.about(tiny_lalm, some, "animal", "P3", True).run(sample)
        assert isinstance(run.inputs, Inputs)
        with torch.no_grad():
            _, states = hf_states(hf, run.inputs.to_hf("feature_attention_mask"))
        rows = frame[frame["sample"] == sample.name].set_index(["layer", "option"])
        for layer in range(N_LAYERS):
            state = states[f"decoder.{layer}"][0, run.region("audio")[0] : run.region("audio")[-1] + 1]
            logits = hf.lm_head(hf.model.language_model.norm(state) if norm else state)
            top = [[tiny_lalm.tokenizer.decode([n]).strip().lower() for n in row] for row in logits.topk(5).indices]
            for label in LABELS:
                n_named = sum(label in words for words in top)
                n_found += n_named
                assert tuple(rows.loc[(layer, label), ["n_at", "n_named"]]) == (len(state), n_named)
    assert n_found > 20, "or nothing has been compared"


def table(named: dict[str, tuple[str, dict[str, list[int]]]]) -> LatentUnderstanding:
    """Of clips: their label, and how many positions name each label in each layer."""
    rows = [
        {"sample": clip, "label": label, "option": option, "layer": layer, "n_named": n, "n_at": 9, "place": "audio"}
        for clip, (label, options) in named.items()
        for option, counts in options.items()
        for layer, n in enumerate(counts)
    ]
    same = {name: "x" for name, kind in LatentUnderstanding.COLUMNS.items() if kind == "str" and name not in rows[0]}
    return LatentUnderstanding.concat([pd.DataFrame(rows).assign(label_space=True, norm=True, top_k=1, **same)])


def test_the_score_is_of_its_own_label_and_the_control_of_other_clips():
    counted = table(
        {
            "a": ("dog", {"dog": [0, 2], "cat": [1, 0], "pig": [0, 0]}),
            "b": ("dog", {"dog": [0, 0], "cat": [0, 1], "pig": [1, 0]}),
            "c": ("cat", {"dog": [0, 1], "cat": [0, 0], "pig": [0, 9]}),
            "d": ("pig", {"dog": [1, 0], "cat": [0, 0], "pig": [0, 3]}),
        }
    )
    (all_layers,) = counted.scores().to_dict("records")
    assert all_layers["score"] == 2 / 4  # a, d
    # a: cat of c, not pig of d; b: both; c: the dogs of a and b, and the pig; d: the dogs, not the cat.
    assert all_layers["control"] == pytest.approx(np.mean([1 / 2, 1, 1, 2 / 3]))
    assert all_layers["difference"] == pytest.approx(all_layers["score"] - all_layers["control"])
    assert counted.scores(layers=[0]).score[0] == 0
    assert counted.scores(min_positions=3).score[0] == 1 / 4  # d
    by_layer = counted.by_layer().set_index("layer")
    assert by_layer.score.tolist() == [0, 2 / 4]
    assert by_layer.control.tolist() == pytest.approx([np.mean([1 / 2, 1 / 2, 0, 2 / 3]), np.mean([0, 1 / 2, 1, 0])])


def test_the_last_position_of_the_last_layer_names_what_is_answered(heard, samples):
    """There the lens is the model, which hears all of these clips rightly."""
    last = heard.by_layer().query("place == 'last'")
    assert last.score.iloc[-1] == 1
    rows = heard.frame.query("place == 'last'")
    assert (rows.n_at == 1).all()
    assert set(heard.frame.query("place == 'audio'").n_at) == {40}
    assert len(heard.frame) == len(samples) * 2 * N_LAYERS * len(LABELS)


def test_rules_say_which_tokens_count(tiny_lalm, heard, samples):
    decode, processor = tiny_lalm.tokenizer.decode, tiny_lalm.processor
    exact = ExactWord().tokens(processor, LABELS)
    for token in range(tiny_lalm.decoder_cfg.d_vocab):
        word = decode([token])
        names = {label for label, tokens in exact.items() if token in tokens}
        cased = {label for label in LABELS if word.removeprefix(" ") in (label, label.capitalize(), label.upper())}
        assert names == cased, word
    first = FirstToken().tokens(processor, LABELS)
    assert {label: decode(list(tokens)) for label, tokens in first.items()} == {label: f" {label}" for label in LABELS}
    both = AnyOf({**{label: [label] for label in LABELS}, "dog": ["dog", "animal"]})
    assert both.tokens(processor, LABELS)["dog"] == exact["dog"] | ExactWord().tokens(processor, ["animal"])["animal"]
    same = latent_understanding(
        tiny_lalm, samples, rule=AnyOf({label: [label] for label in LABELS}), top_k=5, places=("audio", "last"), **HOW
    )
    pd.testing.assert_frame_equal(same.frame.drop(columns="rule"), heard.frame.drop(columns="rule"))
    assert same.frame.rule[0].startswith("any of dog: dog; cat: cat")


def test_the_table_and_its_picture(heard, tmp_path):
    path = heard.save(tmp_path / "heard.parquet")
    pd.testing.assert_frame_equal(LatentUnderstanding.load(path).to_frame(), heard.to_frame())
    assert repr(heard).startswith("LatentUnderstanding(tiny_lalm, animal, first token with the space before it, top 5)")
    audio, last = heard.plot().axes
    for ax, place in ((audio, "audio"), (last, "last")):
        curve = heard.by_layer().query("place == @place")
        assert ax.get_title().startswith(f"{place} (n = 6)")
        assert ax.lines[0].get_ydata().tolist() == curve.score.tolist()
        assert ax.lines[1].get_ydata().tolist() == curve.control.tolist()
    both = LatentUnderstanding.concat([heard.frame, heard.frame.assign(rule="first token")])
    with pytest.raises(DataError, match="more than one rule"):
        both.scores()
    with pytest.raises(DataError, match="The table has no layer 8, only 0 to 7"):
        heard.scores(layers=[8])


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ({"top_k": 0}, InputError, "top_k is 1 or more"),
        ({"places": ("image",)}, InputError, "No position of this prompt is 'image'"),
        ({"rule": AnyOf({"dog": ["dog"]})}, PromptError, "No words are given for 'cat'"),
        ({"rule": AnyOf({label: ["rhinoceros"] for label in LABELS})}, PromptError, "No token is the word 'dog', or"),
        ({"rule": AnyOf({label: ["dog"] for label in LABELS})}, PromptError, "are named by the same token"),
    ],
    ids=str,
)
def test_what_cannot_be_found_is_refused(tiny_lalm, samples, what, error, says):
    with pytest.raises(error, match=says):
        latent_understanding(tiny_lalm, samples, **HOW, **what)


def test_clips_of_one_label_have_nothing_to_be_compared_with(tiny_lalm, samples):
    with pytest.raises(DataError, match="All clips are of one label"):
        latent_understanding(tiny_lalm, samples[:1], **HOW)
