"""The logit lens: against HF's own states, norm and head, and TransformerLens' lens."""

from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES
from reference import chirps, hf_batch, hf_embeds, hf_states
from torch.testing import assert_close
from transformer_lens.tools import analysis

from lalm_lens import Attribute, Knockout, LogProbs, Run, logit_lens, run_branches
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.engine.branches import Branch
from lalm_lens.errors import AudioError, DataError, HookError, InputError, PromptError
from lalm_lens.experiments import lens as lens_module
from lalm_lens.experiments.lens import Reading, lens
from lalm_lens.experiments.logit_lens import LogitLens
from lalm_lens.inputs import Inputs
from lalm_lens.loading import from_pretrained

TOKENS = (17, 3, 200)


@pytest.fixture(scope="module")
def random_pair(pair):
    """A random model, and two prompts of different lengths, the shorter one behind padding."""
    return *pair(seed=3), hf_batch(chirps([1.4, 0.7]))


@pytest.fixture(scope="module")
def samples(folders) -> list[Sample]:
    """No two of one length."""
    clips = read_folder(folders["animal"])
    return [replace(clip, waveform=clip.waveform[: len(clip.waveform) - 2_500 * n]) for n, clip in enumerate(clips)]


# --- one batch of a random model ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
def test_every_layer_is_hfs_state_through_hfs_norm_and_head(random_pair, norm):
    hf, ours, batch = random_pair
    where = batch["attention_mask"].bool()
    where[:, 2] = False  # some positions are not read
    said = lens(ours, Inputs.from_hf(batch), where, Reading(TOKENS, top_k=3, norm=norm, embed=True))
    _, states = hf_states(hf, batch)
    layers = [hf_embeds(hf, batch), *(states[f"decoder.{layer}"] for layer in range(4))]
    assert said.logit.shape == (5, int(where.sum()), len(TOKENS) + 3)
    for layer, state in enumerate(layers):
        with torch.no_grad():
            logits = hf.lm_head(hf.model.language_model.norm(state) if norm else state)[where]
        asked = logits[:, list(TOKENS)]
        assert_close(said.logit[layer, :, :3], asked)
        assert_close(said.log_prob[layer, :, :3], logits.log_softmax(-1)[:, list(TOKENS)])
        assert_close(said.rank[layer, :, :3], (logits[:, None] > asked[..., None]).sum(-1))
        largest = np.argsort(-logits.numpy(), axis=-1)[:, :3]
        assert np.array_equal(said.token[layer, :, 3:].numpy(), largest)
        assert_close(said.logit[layer, :, 3:], logits.gather(-1, torch.tensor(largest)))
        assert said.rank[layer, :, 3:].tolist() == [[0, 1, 2]] * len(logits)


def test_the_last_layer_is_the_models_own_prediction(random_pair):
    _, ours, batch = random_pair
    inputs = Inputs.from_hf(batch)
    said = lens(ours, inputs, inputs.attention_mask, Reading(tuple(range(260))))
    with torch.no_grad():
        logits = ours(inputs)[inputs.attention_mask]
    assert_close(said.logit[-1], logits)
    assert_close(said.log_prob[-1], logits.log_softmax(-1))


def test_transformer_lens_reads_the_same(random_pair):
    _, ours, batch = random_pair
    inputs = Inputs.from_hf({name: its[:1] for name, its in batch.items()})
    bound = ours.bind(inputs)
    theirs = analysis.logit_lens(
        bound, bound.tokens[0], positions=slice(None), targets=list(TOKENS), return_type="log_probs"
    )
    said = lens(ours, inputs, inputs.attention_mask, Reading(TOKENS, embed=True))
    assert theirs.labels == ["0_pre", "1_pre", "2_pre", "3_pre", "final_post"]
    assert_close(said.log_prob, theirs.values[:, 0])
    assert_close(said.rank, theirs.readout.target_ranks[:, 0])


def test_a_whole_lens_is_one_forward_and_never_holds_many_logits(random_pair, monkeypatch):
    _, ours, batch = random_pair
    inputs, where = Inputs.from_hf(batch), torch.ones_like(batch["attention_mask"], dtype=torch.bool)
    where &= inputs.attention_mask
    at_once = lens(ours, inputs, where, Reading(TOKENS, top_k=2))
    monkeypatch.setattr(lens_module, "AT_ONCE", 7 * 260 + 1)
    passed, rows = [], []
    handles = [
        block.register_forward_hook(lambda module, args, out, layer=layer: passed.append(layer))
        for layer, block in enumerate(ours.blocks)
    ]
    handles.append(ours.unembed.register_forward_hook(lambda module, args, out: rows.append(out.shape[1])))
    try:
        in_parts = lens(ours, inputs, where, Reading(TOKENS, top_k=2))
    finally:
        for handle in handles:
            handle.remove()
    assert passed == [0, 1, 2, 3]
    assert max(rows) == 7
    assert sum(rows) == 4 * int(where.sum())
    for ours_, theirs in zip(in_parts, at_once, strict=True):
        assert_close(ours_, theirs)


def test_what_is_not_finite_or_not_there_is_refused(pair, random_pair):
    _, ours, batch = random_pair
    inputs = Inputs.from_hf(batch)
    for reading, message in (
        (Reading(), "top_k of 260"),
        (Reading((260,)), r"260 tokens, counted from 0; got \[260\]"),
        (Reading(top_k=261), "top_k=261"),
    ):
        with pytest.raises(InputError, match=message):
            lens(ours, inputs, inputs.attention_mask, reading)
    broken = pair(seed=4)[1]
    broken.unembed.linear.weight.data[3] = torch.inf
    with pytest.raises(InputError, match="logits are not finite"):
        lens(broken, inputs, inputs.attention_mask, Reading(TOKENS))


# --- clips ------------------------------------------------------------------------------------------------------


def same(ours: LogitLens, theirs: LogitLens) -> None:
    pd.testing.assert_frame_equal(ours.frame, theirs.frame, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def at_audio(tiny_lalm, samples) -> LogitLens:
    lens_of = logit_lens(tiny_lalm, samples, attribute="animal", positions="audio", top_k=2, embed=True, progress=False)
    assert lens_of.frame["sample"].nunique() == len(samples)
    return lens_of


def test_the_table_says_what_every_stretch_of_sound_decodes_to(tiny_lalm, samples, at_audio):
    frame, labels = at_audio.to_frame(), ATTRIBUTES["animal"].labels
    for sample in samples:
        rows = frame[frame["sample"] == sample.name]
        n_frames = -(-len(sample.waveform) // 160)
        n_audio = ((n_frames - 1) // 2 + 1 - 2) // 2 + 1
        assert len(rows) == 9 * n_audio * (len(labels) + 2)
        assert (rows.label == sample.label).all()
        places = rows.drop_duplicates("position")
        assert places.start_s.tolist() == pytest.approx([0.04 * n for n in range(n_audio)])
        assert places.end_s.tolist() == pytest.approx([0.04 * (n + 1) for n in range(n_audio)])
        assert set(places.token) == {"<|AUDIO|>"}
        assert (places.position.diff().dropna() == 1).all()
    assert sorted(frame.layer.unique()) == list(range(-1, 8))
    asked = frame[frame.kind == "label"]
    assert (asked.word == " " + asked.option).all()  # each label is one token of this model
    assert frame[frame.kind == "top"].option.isna().all()
    assert np.allclose(np.exp(frame.log_prob), frame.probability)
    top = at_audio.top()
    assert len(top) == 9 * len(frame.drop_duplicates(["sample", "position"]))
    both = asked.merge(top, on=["sample", "layer", "position"], suffixes=("", "_top"))
    assert (both.logit <= both.logit_top + 1e-5).all()
    assert ((both["rank"] == 0) == (both.token_id == both.token_id_top)).all()


def test_clips_together_say_what_each_says_alone(tiny_lalm, samples, at_audio):
    assert at_audio.frame.groupby("sample").position.nunique().nunique() == len(samples)  # there is padding
    alone = logit_lens(
        tiny_lalm,
        samples,
        attribute="animal",
        positions="audio",
        top_k=2,
        embed=True,
        token_budget=1,
        progress=False,
    )
    keys = ["sample", "layer", "position", "kind", "token_id"]
    ours, theirs = (its.frame[its.frame.kind == "label"].sort_values(keys) for its in (at_audio, alone))
    pd.testing.assert_frame_equal(ours.drop(columns="rank"), theirs.drop(columns="rank"), rtol=1e-4, atol=1e-5)
    assert alone.top().word.tolist() == at_audio.top().word.tolist()


def test_where_memory_runs_out_fewer_clips_go_together(tiny_lalm, samples, monkeypatch):
    def read() -> LogitLens:
        return logit_lens(tiny_lalm, samples, attribute="animal", progress=False)

    expected, sizes = read(), []

    def short_of_memory(model, inputs, *args, **kwargs):
        sizes.append(len(inputs.tokens))
        if len(inputs.tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lens(model, inputs, *args, **kwargs)

    monkeypatch.setattr(lens_module, "lens", short_of_memory)
    same(read(), expected)
    assert sizes[0] == 4
    assert sizes.count(1) == 4


def test_the_penultimate_state_is_the_last_of_the_prompt_without_its_last_word(tiny_lalm, samples):
    whole, how = ATTRIBUTES["animal"], {"labels": ATTRIBUTES["animal"].labels, "top_k": 3, "progress": False}
    cut = Attribute(whole.name, whole.question, whole.labels, whole.prefix.removesuffix(" is"))
    named = logit_lens(tiny_lalm, samples, attribute=whole, positions="attribute", **how)
    ended = logit_lens(tiny_lalm, samples, attribute=cut, **how)
    assert set(named.frame.token) == set(ended.frame.token) == {" animal"}
    columns = ["sample", "layer", "kind", "token_id", "logit", "log_prob", "position"]
    pd.testing.assert_frame_equal(named.frame[columns], ended.frame[columns], rtol=1e-4, atol=1e-5)


def test_knockouts_in_a_batch_are_those_of_each_prompt(tiny_lalm, samples):
    knockouts = Knockout(range(2, 8), (-1,), "audio"), Knockout((3,), "attribute", "early", heads=(1,))
    found = logit_lens(tiny_lalm, samples, attribute="animal", knockouts=knockouts, progress=False)
    assert set(found.frame.knockout) == {
        "-1 without audio, layers 2 to 7; attribute without early, layers 3, heads 1",
    }
    processor, labels = tiny_lalm.processor, ATTRIBUTES["animal"].labels
    tokens = tuple(processor.label_tokens(labels).values())
    runs = []
    for sample in samples:
        prompt = processor.prompt(ATTRIBUTES["animal"], processor.n_frames(sample.waveform))
        runs.append(Run(processor.inputs([prompt], [sample.waveform]), prompt))
    outcome = run_branches(tiny_lalm, [Branch(run, knockouts) for run in runs], LogProbs(tokens=tokens), engine="hooks")
    last = found.frame[(found.frame.layer == 7) & (found.frame.kind == "label")]
    ours = torch.tensor(last.log_prob.to_numpy()).reshape(len(samples), len(labels))
    assert_close(ours, outcome.values[:, 0].double(), rtol=1e-4, atol=1e-4)
    assert (outcome.values - outcome.base).abs().max() > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_in_batches(name, tmp_path):
    """Clips in several windows, or none that are padded: the last layer is what each clip's own run predicts."""
    FAMILIES[name].save(tmp_path)
    model, attribute = from_pretrained(tmp_path), ATTRIBUTES["gender"]
    processor, lengths_s = model.processor, [0.7, min(2.7, model.processor.n_samples / 16_000)]
    clips = [Sample(f"{n}.wav", "male", clip) for n, clip in enumerate(chirps(lengths_s))]
    found = logit_lens(model, clips, attribute=attribute, positions="last", top_k=1, progress=False)
    tokens = list(processor.label_tokens(attribute.labels).values())
    for clip in clips:
        prompt = processor.prompt(attribute, processor.n_frames(clip.waveform))
        with torch.no_grad():
            logits = model(processor.inputs([prompt], [clip.waveform]), logits_at=-1)[0, 0]
        rows = found.frame[(found.frame["sample"] == clip.name) & (found.frame.layer == model.cfg.n_layers - 1)]
        assert rows.kind.tolist() == ["label", "label", "top"]
        assert_close(torch.tensor(rows.logit.to_numpy()[:2]), logits[tokens].double(), rtol=1e-4, atol=1e-4)
        assert rows.token_id.iloc[2] == logits.argmax()
    if model.processor.n_samples > 2.7 * 16_000:
        heard = logit_lens(model, clips, attribute=attribute, positions="audio", top_k=1, progress=False)
        ends = heard.frame.groupby("sample").end_s.max()
        assert ends["1.wav"] >= 2.7 - 0.1


def test_labels_may_be_others_or_none(tiny_lalm, samples):
    of_words = logit_lens(tiny_lalm, samples[:1], attribute="animal", labels=["male", "sad"], top_k=0, progress=False)
    assert of_words.frame.option.tolist() == ["male", "sad"] * 8
    none = logit_lens(tiny_lalm, samples[:1], attribute="animal", labels=(), top_k=1, progress=False)
    assert set(none.frame.kind) == {"top"}
    with pytest.raises(DataError, match="give top_k=1"):
        of_words.top()
    assert "LogitLens(16 words; tiny_lalm, 1 clips, layers 0 to 7, 1 positions)" in repr(of_words)
    assert "at the last layer" in repr(none)


def test_what_cannot_be_read_is_refused(tiny_lalm, pair, samples):
    def read(model=tiny_lalm, clips=samples, **how):
        logit_lens(model, clips, **{"attribute": "animal", "progress": False, **how})

    with pytest.raises(InputError, match="No position of this prompt is 'image'"):
        read(positions="image")
    with pytest.raises(InputError, match="Positions are from 0"):
        read(positions=(999,))
    with pytest.raises(InputError, match="token budget"):
        read(token_budget=0)
    with pytest.raises(InputError, match="8 layers, counted from 0"):
        read(knockouts=(Knockout((8,), (-1,), "audio"),))
    with pytest.raises(InputError, match="no key to look at"):
        read(knockouts=(Knockout((0,), (0,), (0,)),))
    with pytest.raises(DataError, match="listed 2 times"):
        read(clips=[samples[0], samples[0]])
    with pytest.raises(PromptError, match="score them with the space before them"):
        read(label_space=False)
    with pytest.raises(AudioError, match=r"a\.wav of 3\.00 s"):
        read(clips=[Sample("a.wav", "dog", chirps([3.0])[0])])
    with pytest.raises(InputError, match="without tokenizer"):
        read(pair()[1])
    tiny_lalm.add_perma_hook("blocks.0.hook_resid_post", lambda state, hook: state * 0)
    try:
        with pytest.raises(HookError, match="would be part of every run"):
            read()
    finally:
        tiny_lalm.reset_hooks(including_permanent=True)


def test_the_map_shows_the_top_word_of_every_state(at_audio, samples):
    name = samples[1].name
    top = at_audio.top()
    top = top[top["sample"] == name]
    ax = at_audio.plot(name).axes[0]
    (image,) = ax.images
    grid = top.pivot(index="layer", columns="position", values="probability").to_numpy()
    assert image.get_array().ravel().tolist() == pytest.approx(grid.ravel().tolist())
    words = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in ax.texts}
    at = sorted(top.position.unique())
    for layer, (x, position) in product((-1, 3), enumerate(at)):
        word = top[(top.layer == layer) & (top.position == position)].word.iloc[0]
        assert words[layer + 1, x] == word.replace(" ", "\N{OPEN BOX}").replace("\n", "\\n")[:9]
    assert ax.get_xticklabels()[1].get_text() == "0.04 s"
    assert [label.get_text() for label in ax.get_yticklabels()][:2] == ["embed", "0"]
    mixed = LogitLens.concat([at_audio.frame, at_audio.frame.assign(norm=False)])
    with pytest.raises(DataError, match="more than one norm: True; False"):
        mixed.plot(name)
    with pytest.raises(DataError, match=r"no clip 'b\.wav'"):
        at_audio.plot("b.wav")


def test_a_lens_is_saved_and_loaded(at_audio, tmp_path):
    path = at_audio.save(tmp_path / "lens.parquet")
    pd.testing.assert_frame_equal(LogitLens.load(path).to_frame(), at_audio.to_frame())
    pd.DataFrame({"a": [1]}).to_parquet(path)
    with pytest.raises(DataError, match="is not a logit lens: it has no column model"):
        LogitLens.load(path)
