"""Token shift: against what is counted from HF's own logits."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from reference import chirps
from test_omni import seeing  # noqa: F401
from torch.testing import assert_close

from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import Form
from lalm_lens.datasets import Sample, read_folder, unheard
from lalm_lens.errors import DataError, InputError, PromptError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.token_shift import CATEGORIES, TokenShift, category, token_shift
from lalm_lens.inputs import Inputs
from lalm_lens.loading import from_hf, from_pretrained

HOW = {"attribute": "animal", "progress": False}
N_NEW = 5


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    return read_folder(write_clips(tmp_path_factory.mktemp("clips"), "animal", 3, seed=11))


@pytest.fixture(scope="module")
def perturbed(random_pair):
    """HF's model with some noise on the weights, and ours of it."""
    hf, ours = random_pair
    other = copy.deepcopy(hf)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.006 * torch.randn(weight.shape, generator=generator)
    return other, from_hf(other, ours.processor.hf)


@pytest.fixture(scope="module")
def shift(random_pair, perturbed, samples) -> TokenShift:
    return token_shift(random_pair[1], perturbed[1], samples, base_hears="clip", max_new_tokens=N_NEW, form="P2", **HOW)


def inputs_of(model, sample: Sample, form: Form) -> Inputs:
    inputs = Question.about(model, [sample], "animal", form, True).run(sample).inputs
    assert isinstance(inputs, Inputs)
    return inputs


def hf_log_p(hf, inputs, answer: torch.Tensor) -> torch.Tensor:
    """What one whole forward expects in the place of each token of an answer."""
    batch = inputs.to_hf("feature_attention_mask")
    batch["input_ids"] = torch.cat([batch["input_ids"], answer[None]], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        logits = hf(**batch, use_cache=False).logits[0, -len(answer) - 1 : -1]
    return logits.double().log_softmax(-1)


def assert_counted(rows: pd.DataFrame, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """A table of one clip, against the log-probabilities of model and base."""
    assert len(rows) == len(ours)
    for step, row in enumerate(rows.itertuples()):
        order = theirs[step].argsort(descending=True).tolist()
        rank = order.index(row.token_id) + 1
        assert row.step == step
        assert row.rank == rank
        assert row.category == ("unshifted" if rank == 1 else "marginal" if rank in (2, 3) else "shifted")
        assert row.rank_model == ours[step].argsort(descending=True).tolist().index(row.token_id) + 1
    tokens = torch.tensor(rows.token_id.to_numpy())[:, None]
    for name, log_p in (("model", ours), ("base", theirs)):
        assert_close(
            torch.tensor(rows[f"log_p_{name}"].to_numpy()), log_p.gather(1, tokens)[:, 0], rtol=1e-4, atol=1e-5
        )
    kl = torch.nn.functional.kl_div(theirs, ours, reduction="none", log_target=True).sum(-1)
    assert_close(torch.tensor(rows.kl.to_numpy()), kl, rtol=1e-3, atol=1e-6)


def test_ranks_and_kl_are_those_counted_from_hfs_logits(random_pair, perturbed, samples, shift):
    (hf, ours), (hf_base, _) = random_pair, perturbed
    assert set(shift.frame.category) == set(CATEGORIES), "noise moves some tokens, and not all"
    for sample in samples:
        rows = shift.frame[shift.frame["sample"] == sample.name]
        inputs = inputs_of(ours, sample, "P2")
        written = hf.generate(
            **inputs.to_hf("feature_attention_mask"), max_new_tokens=N_NEW, do_sample=False, eos_token_id=None
        )[0, -N_NEW:]
        assert rows.token_id.tolist() == written.tolist()
        assert_counted(rows, *(hf_log_p(each, inputs, written) for each in (hf, hf_base)))
    assert (shift.frame.rank_model == 1).all()


def test_a_model_is_not_shifted_against_itself(tiny_lalm, samples):
    same = token_shift(tiny_lalm, from_pretrained(TINY_LALM), samples, base_hears="clip", **HOW)
    assert (same.frame.category == "unshifted").all()
    assert (same.frame.kl == 0).all()
    assert (same.frame.log_p_model == same.frame.log_p_base).all()
    (total,) = same.shares().to_dict("records")
    assert (total["unshifted"], total["unshifted_low"], total["unshifted_high"], total["kl"]) == (1, 1, 1, 0)
    assert total["n_tokens"] == len(same.frame) > len(samples)


@pytest.mark.parametrize("base_hears", ["silence", "nothing"])
def test_without_the_clip_the_name_of_what_is_heard_is_shifted(tiny_lalm, samples, base_hears):
    """The base reads silence, or a prompt without a clip; the words behind the name follow from the name."""
    without = token_shift(tiny_lalm, tiny_lalm, samples, base_hears=base_hears, **HOW)
    for sample in samples:
        rows = without.frame[without.frame["sample"] == sample.name]
        instead = (
            unheard(sample) if base_hears == "nothing" else replace(sample, waveform=torch.zeros_like(sample.waveform))
        )
        answer = torch.tensor(rows.token_id.to_numpy())
        both = []
        for each in (sample, instead):
            inputs = inputs_of(tiny_lalm, each, "P3")
            tokens = torch.cat([inputs.tokens, answer[None]], 1)
            inputs = replace(inputs, tokens=tokens, attention_mask=torch.ones_like(tokens).bool())
            with torch.no_grad():
                both.append(tiny_lalm(inputs)[0, -len(answer) - 1 : -1].double().log_softmax(-1))
        assert_counted(rows, *both)
    assert without.named.frame.step.eq(0).all()
    assert without.named.frame.option.tolist() == [sample.label for sample in samples]
    assert without.named.shares().kl[0] > 1 > without.frame[without.frame.option.isna()].kl.max()


def test_given_texts_are_read_as_they_stand(tiny_lalm, samples):
    texts = {sample.name: f" {name}." for sample, name in zip(samples, ("dog", "Rooster", "dogs"), strict=True)}
    given = token_shift(tiny_lalm, tiny_lalm, samples, base_hears="clip", texts=texts, **HOW)
    written = given.frame.groupby("sample", sort=False).token.agg("".join)
    assert written.to_dict() == texts
    named = given.named.frame.groupby("sample", sort=False).agg({"option": "first", "token": "".join})
    assert named.option.tolist() == ["dog", "rooster"], "dogs is another word"
    assert named.token.str.strip().tolist() == ["dog", "Rooster"]
    assert given.frame.is_given.all()
    assert (given.frame["rank"] == given.frame.rank_model).all()
    assert (given.frame["rank"] > 1).any()


def test_omni_without_its_clip(seeing):  # noqa: F811
    _, ours = seeing
    clips = [Sample(f"{n}.wav", "male", clip) for n, clip in enumerate(chirps([0.9, 1.3]))]
    how = {"attribute": "gender", "max_new_tokens": 3, "progress": False}
    assert (token_shift(ours, ours, clips, base_hears="clip", **how).frame.kl == 0).all()
    assert (token_shift(ours, ours, clips, **how).frame.kl > 0).all()


def test_shares_are_of_tokens_and_intervals_over_clips(shift):
    frame = shift.frame
    (total,) = shift.shares(n_resamples=4000).to_dict("records")
    for name in CATEGORIES:
        assert total[name] == pytest.approx((frame.category == name).mean())
    assert total["kl"] == pytest.approx(frame.kl.mean())
    clips = [rows.kl.to_numpy() for _, rows in frame.groupby("sample")]
    rng = np.random.default_rng(0)
    drawn = [np.concatenate([clips[n] for n in rng.integers(0, len(clips), len(clips))]).mean() for _ in range(4000)]
    assert np.allclose([total["kl_low"], total["kl_high"]], np.percentile(drawn, [2.5, 97.5]), rtol=0.05)
    steps = shift.shares(["step"])
    assert steps.step.tolist() == list(range(N_NEW))
    assert (steps[list(CATEGORIES)].sum(axis=1) - 1).abs().max() < 1e-9
    assert [category(rank) for rank in (1, 2, 3, 4, 99)] == ["unshifted", *["marginal"] * 2, *["shifted"] * 2]


def test_the_table_and_its_picture(shift, tmp_path):
    path = shift.save(tmp_path / "shift.parquet")
    pd.testing.assert_frame_equal(TokenShift.load(path).to_frame(), shift.to_frame())
    assert "3 clips" in repr(shift)
    whole, by_step, kl = shift.plot().axes
    assert [bar.get_height() for bar in whole.patches] == pytest.approx(
        shift.shares()[list(CATEGORIES)].iloc[0].tolist()
    )
    assert len(by_step.patches) == 3 * N_NEW
    assert kl.lines[0].get_ydata().tolist() == shift.shares(["step"]).kl.tolist()
    both = TokenShift.concat([shift.frame, shift.frame.assign(base_hears="silence")])
    with pytest.raises(DataError, match="more than one base_hears: clip; silence"):
        both.shares()
    assert "silence" in repr(both)
    with pytest.raises(DataError, match="No token is left"):
        TokenShift(shift.frame[:0]).shares()


def test_what_cannot_be_ranked_is_refused(tiny_lalm, seeing, samples):  # noqa: F811
    with pytest.raises(InputError, match="has another tokenizer or vocabulary"):
        token_shift(tiny_lalm, seeing[1], samples, **HOW)
    with pytest.raises(DataError, match=r"There is no text of cat_000\.wav"):
        token_shift(tiny_lalm, tiny_lalm, samples, texts={"dog_000.wav": " dog"}, **HOW)
    with pytest.raises(PromptError, match=r"The text of dog_000\.wav is empty"):
        token_shift(tiny_lalm, tiny_lalm, samples[:1], texts={"dog_000.wav": ""}, **HOW)
    for hears in ("silence", "nothing"):
        with pytest.raises(DataError, match="so none can be left out"):
            token_shift(tiny_lalm, tiny_lalm, [unheard(samples[0])], base_hears=hears, **HOW)
