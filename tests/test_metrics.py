"""Metrics: against direct computation from Hugging Face's logits, labels of several tokens included."""

import math
from typing import get_args

import pytest
import torch
from reference import chirps, hf_embeds, hf_patched, hf_state
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from lalm_lens.assets import TINY_LALM
from lalm_lens.attributes import Attribute
from lalm_lens.corrupt import OtherClip, Silence, WhiteNoise
from lalm_lens.datasets import Sample
from lalm_lens.errors import DataError, PromptError
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.metrics import METRICS, Answer, Metric, is_right, log_probabilities

pytestmark = pytest.mark.numbers

LABELS = ("someone unheard of", "male", "female", "a hen")  # the first and last have several tokens
OWN = Attribute("who", "Who is it?", LABELS, "Answer:")
SAMPLES = [
    Sample(f"{n}.wav", label, clip)
    for n, (label, clip) in enumerate(zip(("someone unheard of", "female"), chirps([1.0, 0.8]), strict=True))
]
USER = {"P1": "", "P2": OWN.question, "P3": f"{OWN.question} Possible options: {', '.join(LABELS)}."}
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n{user}<|im_end|>\n<|im_start|>assistant\n{prefix}"
)


@pytest.fixture(scope="module")
def hf() -> Qwen2AudioForConditionalGeneration:
    return Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY_LALM)


def softmax(logits: list[float]) -> list[float]:
    exp = [math.exp(logit - max(logits)) for logit in logits]
    return [each / sum(exp) for each in exp]


def direct(metric: str, logits: torch.Tensor, label: list[int], others: list[int], rival: int) -> float:
    """A metric of the last `len(label)` rows of logits, with Python's own arithmetic."""
    rows = logits.tolist()
    first = rows[0]
    if metric == "probability":
        return softmax(first)[label[0]]
    if metric == "log_probability":
        return math.log(softmax(first)[label[0]])
    if metric == "logit_difference":
        return first[label[0]] - first[rival]
    if metric == "label_probability":
        return softmax([first[token] for token in [label[0], *others]])[0]
    return sum(math.log(softmax(row)[token]) for row, token in zip(rows, label, strict=True))


@pytest.mark.parametrize(
    ("metric", "site", "direction", "form", "space", "corruption"),
    [
        ("probability", "resid_mid", "noise", "P2", True, Silence()),
        ("log_probability", "resid_pre", "denoise", "P1", False, OtherClip(seed=1)),
        ("logit_difference", "resid_post", "noise", "P3", True, OtherClip(seed=1)),
        ("logit_difference", "attn_out", "denoise", "P2", False, Silence()),
        ("label_probability", "mlp_out", "denoise", "P3", True, OtherClip(seed=1)),
        ("label_score", "resid_post", "denoise", "P3", True, Silence()),
        ("label_score", "attn_out", "noise", "P1", False, OtherClip(seed=1)),
    ],
    ids=str,
)
def test_traces_match_plain_hf(tiny_lalm, hf, processor, metric, site, direction, form, space, corruption):
    frame = causal_trace(
        tiny_lalm,
        SAMPLES,
        attribute=OWN,
        form=form,
        site=site,
        corruption=corruption,
        metric=metric,
        direction=direction,
        label_space=space,
        n_together=2,
        progress=False,
    ).to_frame()
    tokens = [processor.tokenizer(" " * space + label).input_ids for label in LABELS]
    silence = torch.zeros_like(SAMPLES[0].waveform)
    heard = silence if corruption == Silence() else torch.cat([SAMPLES[1].waveform, silence])[: len(silence)]
    text = PROMPT.format(user=USER[form], prefix=OWN.prefix)
    batches = []
    for waveform in (SAMPLES[0].waveform, heard):
        batch = dict(processor(text=text, audio=waveform.numpy(), sampling_rate=16_000, return_tensors="pt"))
        n_pos = batch["input_ids"].shape[1]
        if metric == "label_score":
            batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([tokens[0][:-1]])], 1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batches.append(batch)
    n_read = len(tokens[0]) if metric == "label_score" else 1
    with torch.no_grad():
        logits = [hf(**batch, use_cache=False).logits[0, -n_read:] for batch in batches]
    others = [ids[0] for ids in tokens[1:]]
    rival = max(others, key=lambda token: float(logits[1][0, token]))
    clean, corrupted = (direct(metric, each, tokens[0], others, rival) for each in logits)
    ours = frame[frame["sample"] == "0.wav"]
    assert abs(ours.m_clean.iloc[0] - clean) < 2e-5
    assert abs(ours.m_corrupted.iloc[0] - corrupted) < 2e-5
    assert (ours.has_gap == (clean > corrupted)).all()
    assert (ours.clean_right == all(logits[0][0, tokens[0][0]] > logits[0][0, token] for token in others)).all()
    rows = ours[(ours.kind != "token") | (ours.text_index >= -3)].sample(12, random_state=0)
    (source, base), (m_source, m_base) = (batches, (clean, corrupted))
    if direction == "noise":
        source, base, m_source, m_base = base, source, m_base, m_source
    is_audio = source["input_ids"] == hf.config.audio_token_index
    is_prompt = torch.arange(is_audio.shape[1]) < n_pos
    for row in rows.itertuples():
        where = {"layer": ~is_audio & is_prompt, "audio_layer": is_audio}.get(row.kind)
        if where is None:
            where = (torch.arange(is_audio.shape[1]) == row.position)[None]
        state = hf_embeds(hf, source) if row.site == "embed" else hf_state(hf, source, row.layer, site)
        patched = hf_patched(hf, base, row.layer, where, state, site, n_read)
        m_patched = direct(metric, patched.view(n_read, -1), tokens[0], others, rival)
        assert abs(row.m_patched - m_patched) < 5e-5
        assert abs(row.recovery - (m_patched - m_base) / (m_source - m_base)) < 5e-5 / abs(m_source - m_base)


def test_a_forced_label_of_one_token_scores_its_log_probability(tiny_lalm):
    score, log_p = (
        causal_trace(tiny_lalm, SAMPLES[1:], attribute=OWN, metric=metric, progress=False).to_frame()
        for metric in ("label_score", "log_probability")
    )
    assert (score.m_patched == log_p.m_patched).all()
    assert (score.p_patched == log_p.p_patched).all()


@pytest.mark.parametrize("metric", get_args(Metric))
def test_metrics_read_a_batch_as_they_read_one(metric):
    logits = 3 * torch.randn(5, 2, 40, generator=torch.Generator().manual_seed(3))
    answer = Answer((4, 9), (7, 30, 11)).against(logits[0, 0])
    together = METRICS[metric](log_probabilities(logits, range(40)), answer)
    rival = max((7, 30, 11), key=lambda token: float(logits[0, 0, token]))
    for each, value in zip(logits, together, strict=True):
        label = [4, 9] if metric == "label_score" else [4]
        expected = direct(metric, each.double()[: len(label)], label, [7, 30, 11], rival)
        assert float(value) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("logits", "labels", "vocab"),
    [
        ([0.0, 3.0, 1.0, 2.0], True, True),
        ([9.0, 3.0, 1.0, 2.0], True, False),
        ([0.0, 1.0, 3.0, 2.0], False, False),
        ([0.0, 3.0, 3.0, 2.0], False, False),  # a tie
    ],
)
def test_a_prediction_is_the_largest_logit(logits, labels, vocab):
    answer = Answer((1,), (2, 3))
    assert is_right(torch.tensor(logits), answer, "labels") == labels
    assert is_right(torch.tensor(logits), answer, "vocab") == vocab


def test_a_prediction_in_the_vocabulary_has_more_rivals(tiny_lalm):
    """Of four labels of one clip one is right among the labels; this model wants to say something else altogether."""
    clips = [Sample(label, label, SAMPLES[0].waveform) for label in LABELS]
    labels, vocab = (
        causal_trace(tiny_lalm, clips, attribute=OWN, form="P1", predict=predict, progress=False).to_frame()
        for predict in ("labels", "vocab")
    )
    assert (labels.p_patched == vocab.p_patched).all()
    assert (set(labels.predict), set(vocab.predict)) == ({"labels"}, {"vocab"})
    assert labels[labels.clean_right]["sample"].nunique() == 1
    assert not vocab.clean_right.any()
    assert set(vocab.status) == {"clean_wrong"}


def test_a_trace_of_noise_is_repeatable(tiny_lalm):
    first, again = (
        causal_trace(
            tiny_lalm, order, attribute=OWN, corruption=WhiteNoise(3.0), n_together=1, progress=False
        ).to_frame()
        for order in (SAMPLES, SAMPLES[::-1])
    )
    again = again.sort_values("sample", kind="stable", ignore_index=True)
    assert first.equals(again)
    assert set(first.corruption) == {"white_noise 3 dB"}


def test_questions_that_cannot_be_scored_are_refused(tiny_lalm):
    def trace(labels, samples=SAMPLES[1:], **settings):
        own = Attribute("own", "Who?", labels, "Answer:")
        causal_trace(tiny_lalm, samples, attribute=own, progress=False, **settings)

    with pytest.raises(PromptError, match=r"\['xa', 'xb'\] begin with the same token"):
        trace(("xa", "female", "xb"))
    with pytest.raises(PromptError, match="given 2 times"):
        trace(("female", "male", "female"))
    for labels in ((), ("female",)):
        with pytest.raises(PromptError, match="two labels or more"):
            trace(labels)
    with pytest.raises(DataError, match="all clips are labelled 'female'"):
        trace(("female", "male"), corruption=OtherClip())
