"""Causal tracing: against plain HF hooks, and by the identities that hold for any weights."""

import pandas as pd
import pytest
import torch
from reference import chirps, hf_embeds, hf_patched, hf_states
from torch.testing import assert_close
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from lalm_lens.assets import TINY_LALM
from lalm_lens.attributes import ATTRIBUTES, Attribute
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.engine.cost import Cost
from lalm_lens.errors import AudioError, DataError, HookError, InputError, PromptError
from lalm_lens.experiments.causal_trace import causal_trace, exclusions
from lalm_lens.experiments.recovery import Recovery
from lalm_lens.loading import from_pretrained
from lalm_lens.results import COLUMNS, CausalTrace
from lalm_lens.trace_page import write_trace_page

pytestmark = pytest.mark.numbers

N_CLIPS = 4


@pytest.fixture(scope="module")
def hf() -> Qwen2AudioForConditionalGeneration:
    return Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM, dtype=torch.float32).eval()


PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n{user}<|im_end|>\n<|im_start|>assistant\n{prefix}"
)


def hf_inputs(attribute: Attribute, waveform: torch.Tensor) -> dict[str, torch.Tensor]:
    user = f"{attribute.question} Possible options: {', '.join(attribute.labels)}."
    text = PROMPT.format(user=user, prefix=attribute.prefix)
    processor = AutoProcessor.from_pretrained(TINY_LALM)
    return dict(processor(text=text, audio=waveform.numpy(), sampling_rate=16_000, return_tensors="pt"))


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_curves_match_a_trace_with_plain_hf_hooks(name, hf, folders, traces):
    """Everything again from the wav file on, with transformers alone: prompt, features, runs, patches, exclusions."""
    attribute, n_layers = ATTRIBUTES[name], hf.config.text_config.num_hidden_layers
    tokenizer = AutoProcessor.from_pretrained(TINY_LALM).tokenizer
    options = [tokenizer.encode(f" {label}", add_special_tokens=False)[0] for label in attribute.labels]
    curves = {"layer": [], "audio_layer": []}
    frame = traces[name].to_frame()
    for sample in read_folder(folders[name]):
        clean, silent = (hf_inputs(attribute, w) for w in (sample.waveform, torch.zeros_like(sample.waveform)))
        is_audio = clean["input_ids"] == hf.config.audio_token_index
        clean_logits, states = hf_states(hf, clean)
        silent_logits, _ = hf_states(hf, silent)
        true = attribute.labels.index(sample.label)

        def p(logits: torch.Tensor, true: int = true) -> float:
            return float(logits.double().softmax(-1)[..., options[true]])

        p_clean, p_silent = p(clean_logits[0, -1]), p(silent_logits[0, -1])
        kept = (
            int(clean_logits[0, -1, options].argmax()) == true
            and int(silent_logits[0, -1, options].argmax()) != true
            and p_clean > p_silent
        )
        rows = frame[frame["sample"] == sample.name]
        assert (rows.status == "kept").all() == kept
        assert abs(rows.p_clean.iloc[0] - p_clean) < 1e-5
        assert abs(rows.p_corrupted.iloc[0] - p_silent) < 1e-5
        for kind, where in (("layer", ~is_audio), ("audio_layer", is_audio)):
            recovery = [
                (p(hf_patched(hf, silent, layer, where, state)) - p_silent) / (p_clean - p_silent)
                for layer, state in [
                    (-1, hf_embeds(hf, clean)),
                    *((n, states[f"decoder.{n}"]) for n in range(n_layers)),
                ]
            ]
            ours = rows[rows.kind == kind].sort_values("layer").recovery
            expected = torch.tensor(recovery, dtype=torch.float64)
            assert_close(torch.tensor(ours.to_numpy()), expected, rtol=0, atol=1e-4)
            if kept:
                curves[kind].append(recovery)
    assert curves["layer"], "no clip was kept: nothing was compared"
    kept_rows = traces[name].kept
    for kind, recoveries in curves.items():
        mean = kept_rows[kept_rows.kind == kind].groupby("layer").recovery.mean()
        expected = torch.tensor(recoveries, dtype=torch.float64).mean(0)
        assert_close(torch.tensor(mean.to_numpy()), expected, rtol=0, atol=1e-4)


def test_token_rows_match_plain_hf_hooks(hf, folders, traces):
    sample = read_folder(folders["animal"])[0]
    rows = traces["animal"].to_frame().query("kind == 'token'")
    rows = rows[rows["sample"] == sample.name].sample(25, random_state=0)
    attribute = ATTRIBUTES["animal"]
    clean, silent = (hf_inputs(attribute, w) for w in (sample.waveform, torch.zeros_like(sample.waveform)))
    _, states = hf_states(hf, clean)
    tokenizer = AutoProcessor.from_pretrained(TINY_LALM).tokenizer
    target = tokenizer.encode(f" {sample.label}", add_special_tokens=False)[0]
    for row in rows.itertuples():
        where = torch.zeros_like(clean["input_ids"], dtype=torch.bool)
        where[0, row.position] = True
        state = hf_embeds(hf, clean) if row.site == "embed" else states[f"decoder.{row.layer}"]
        logits = hf_patched(hf, silent, row.layer, where, state)[0]
        assert abs(float(logits.double().softmax(-1)[target]) - row.p_patched) < 1e-5
        assert tokenizer.decode(clean["input_ids"][0, row.position]) == row.token


# --- the table ------------------------------------------------------------------------------------------------


def test_the_table_has_one_row_per_patch(traces, tiny_lalm):
    frame = traces["gender"].to_frame()
    assert list(frame.columns) == list(COLUMNS)
    assert frame["sample"].nunique() == N_CLIPS
    n_layers = tiny_lalm.cfg.n_layers + 1
    for _, rows in frame.groupby("sample"):
        n_text = rows.text_index.nunique()
        assert len(rows) == n_layers * (2 + n_text)
        tokens = rows[rows.kind == "token"]
        assert sorted(tokens.text_index.unique()) == list(range(-n_text, 0))
        assert tokens[tokens.text_index == -1].token.unique().tolist() == [" is"]
        assert tokens[tokens.text_index == -1].region.unique().tolist() == ["last"]
        assert tokens[tokens.text_index == -n_text].token.unique().tolist() == ["<|audio_eos|>"]
        assert (tokens.position - tokens.text_index).nunique() == 1
        assert rows[rows.kind != "token"].position.isna().all()
    assert set(frame[frame.layer == -1].site) == {"embed"}
    assert set(frame[frame.layer >= 0].site) == {"resid_post"}
    gap = frame.p_clean - frame.p_corrupted
    assert (((frame.p_patched - frame.p_corrupted) / gap - frame.recovery).abs() <= frame.noise + 1e-12).all()
    assert (frame.m_patched == frame.p_patched).all()  # the metric is the probability
    objects = frame[frame.region == "object"]
    assert (objects.option == objects.token.str.strip()).all()
    assert (objects.is_correct == (objects.option == objects.label)).all()
    assert frame[frame.region != "object"].option.isna().all()
    assert not frame[frame.region != "object"].is_correct.any()
    constant = ["form", "corruption", "metric", "predict", "direction"]
    assert frame[constant].drop_duplicates().to_numpy().tolist() == [
        ["P3", "silence", "probability", "labels", "denoise"]
    ]


def test_excluded_samples_keep_their_rows(traces):
    frame = traces["gender"].to_frame()
    assert set(frame.status) == {"kept", "corrupted_right"}  # silence always gives the same of two answers
    assert frame[frame.status != "kept"].recovery.notna().all()


@pytest.mark.parametrize(
    ("clean_right", "corrupted_right", "m", "status"),
    [
        (False, True, (0.1, 0.2), "clean_wrong"),
        (False, False, (0.2, 0.1), "clean_wrong"),
        (True, True, (0.1, 0.2), "corrupted_right"),
        (True, False, (0.1, 0.2), "no_gap"),
        (True, False, (0.2, 0.2), "no_gap"),
        (True, False, (0.2, 0.1), "kept"),
    ],
)
def test_the_first_exclusion_that_applies_is_told(clean_right, corrupted_right, m, status):
    nothing = torch.empty(0, dtype=torch.float64)
    recovery = Recovery(0.5, 0.5, *m, 0.0, [], nothing, nothing, nothing, {}, "sweep", Cost(0, 0, 0.0, 0))
    told = exclusions(recovery, clean_right, corrupted_right)
    assert told["status"] == status
    assert (told["clean_right"], told["corrupted_right"]) == (clean_right, corrupted_right)
    assert told["has_gap"] == (m[0] > m[1])


def test_a_trace_is_saved_whole_and_loaded_again(traces, tmp_path):
    trace = traces["emotion"]
    path = trace.save(tmp_path / "deep" / "trace.parquet")
    pd.testing.assert_frame_equal(CausalTrace.load(path).to_frame(), trace.to_frame())
    assert [p.name for p in path.parent.iterdir()] == ["trace.parquet"]
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match="not a causal trace"):
        CausalTrace.load(tmp_path / "other.parquet")
    assert "patched runs; tiny_lalm emotion:" in repr(trace)


def test_the_summary_averages_what_is_kept(traces):
    trace = traces["gender"]
    row = trace.summary().iloc[0]
    kept = trace.kept.drop_duplicates("sample")
    assert (row.clips, row.kept, row.corrupted_right) == (N_CLIPS, len(kept), N_CLIPS - len(kept))
    assert 0 < row.kept < N_CLIPS
    assert row.p_clean == pytest.approx(kept.p_clean.mean())
    curve = trace.kept[trace.kept.kind == "layer"].groupby("layer").recovery.mean()
    assert curve[row.fusion_layer] >= 0.5
    assert (curve[curve.index < row.fusion_layer] < 0.5).all()


def test_the_report_shows_the_summary_and_the_pictures(traces, tmp_path):
    trace = traces["emotion"]
    data = trace.save(tmp_path / "trace.parquet")
    page = write_trace_page(trace, data, [tmp_path / "layers.png"]).read_text(encoding="utf-8")
    assert f"<td>{trace.summary().p_clean.iloc[0]:.3f}</td>" in page
    assert '<img src="layers.png"' in page
    assert "&lt;table" not in page


def test_a_hook_left_on_the_model_is_refused(tiny_lalm):
    tiny_lalm.add_perma_hook("blocks.0.hook_resid_post", lambda state, hook: state * 0)
    try:
        with pytest.raises(HookError, match=r"blocks\.0\.hook_resid_post would be part of every run"):
            causal_trace(tiny_lalm, [Sample("a.wav", "male", chirps([1.0])[0])], attribute="gender")
    finally:
        tiny_lalm.reset_hooks(including_permanent=True)


def test_runs_that_are_not_finite_are_refused():
    broken = from_pretrained(TINY_LALM)
    broken.unembed.linear.weight.data[3] = torch.inf
    with pytest.raises(InputError, match="logits are not finite"):
        causal_trace(broken, [Sample("a.wav", "male", chirps([1.0])[0])], attribute="gender", progress=False)


def test_what_cannot_be_traced_is_refused(tiny_lalm, pair):
    sample = Sample("a.wav", "purple", chirps([1.0])[0])
    with pytest.raises(PromptError, match="not an option of gender: male, female"):
        causal_trace(tiny_lalm, [sample], attribute="gender")
    with pytest.raises(PromptError, match="no attribute 'colour'"):
        causal_trace(tiny_lalm, [sample], attribute="colour")
    with pytest.raises(DataError, match="nothing to trace"):
        causal_trace(tiny_lalm, [], attribute="gender")
    male = Sample("a.wav", "male", sample.waveform)
    with pytest.raises(DataError, match="listed 2 times"):
        causal_trace(tiny_lalm, [male, male], attribute="gender")
    with pytest.raises(InputError, match="n_together"):
        causal_trace(tiny_lalm, [male], attribute="gender", n_together=0)
    with pytest.raises(InputError, match="token budget"):
        causal_trace(tiny_lalm, [male], attribute="gender", token_budget=0)
    with pytest.raises(AudioError, match=r"a\.wav of 3\.00 s"):
        causal_trace(tiny_lalm, [Sample("a.wav", "male", chirps([3.0])[0])], attribute="gender")
    with pytest.raises(AudioError, match=r"a\.wav is digital silence"):
        causal_trace(tiny_lalm, [Sample("a.wav", "male", torch.zeros(16_000))], attribute="gender")
    with pytest.raises(InputError, match="without tokenizer"):
        causal_trace(pair()[1], [sample], attribute="gender")
