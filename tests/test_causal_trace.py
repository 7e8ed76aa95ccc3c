"""Causal tracing: against plain HF hooks, and by the identities that hold for any weights."""

import zlib
from itertools import combinations

import pandas as pd
import pytest
import torch
from reference import chirps, hf_batch, hf_embeds, hf_patched, hf_states
from torch.testing import assert_close
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from lalm_lens.assets import TINY_LALM
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES, Attribute
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.errors import AudioError, DataError, HookError, InputError, PromptError
from lalm_lens.experiments.causal_trace import Recovery, causal_trace, patched_logits, recover, run, status_of
from lalm_lens.inputs import Inputs
from lalm_lens.loading import from_pretrained
from lalm_lens.report import write_report
from lalm_lens.results import COLUMNS, CausalTrace

N_CLIPS = 4
SLIDING = {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.fixture(scope="module")
def hf() -> Qwen2AudioForConditionalGeneration:
    return Qwen2AudioForConditionalGeneration.from_pretrained(TINY_LALM, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("clips")
    return {name: write_clips(root / name, name, N_CLIPS, seed=11) for name in ATTRIBUTES}


@pytest.fixture(scope="module")
def traces(tiny_lalm, folders) -> dict[str, CausalTrace]:
    return {
        name: causal_trace(tiny_lalm, read_folder(folder), attribute=name, progress=False)
        for name, folder in folders.items()
    }


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


# --- identities, on random models ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[{"seed": 1}, {"seed": 2, "n_kv_heads": 1}, {"seed": 3, **SLIDING}], ids=str)
def example(request, pair):
    """A random model with one clean and one silent run of it."""
    ours = pair(**request.param)[1]
    clip = chirps([1.3])[0]
    clean, silent = (Inputs.from_hf(hf_batch([waveform])) for waveform in (clip, torch.zeros_like(clip)))
    is_audio = (clean.tokens == ours.lalm_cfg.audio_token)[0]
    return ours, run(ours, clean, "resid_post"), run(ours, silent, "resid_post"), is_audio


def relative(recovery: Recovery) -> pd.DataFrame:
    """One row per patch: kind, layer, first and last patched position, recovery rate."""
    gap = recovery.p_clean - recovery.p_corrupted
    return pd.DataFrame(
        [
            (p.kind, p.layer, int(p.where.nonzero().max()), (float(q) - recovery.p_corrupted) / gap)
            for p, q in zip(recovery.patches, recovery.p_patched, strict=True)
        ],
        columns=["kind", "layer", "last", "recovery"],
    )


def most_changed(clean, corrupted) -> int:
    """The token whose probability differs most, so that recovery rates are well defined."""
    return int((clean.logits.softmax(-1) - corrupted.logits.softmax(-1)).abs().argmax())


def test_all_positions_patched_at_any_layer_give_the_clean_run(example):
    ours, clean, corrupted, is_audio = example
    everywhere = torch.ones(1, len(is_audio), dtype=torch.bool)
    for layer in range(-1, ours.cfg.n_layers):
        logits = patched_logits(ours, clean, corrupted, layer, everywhere, "resid_post")[0]
        assert_close(logits, clean.logits)


def test_text_before_the_audio_brings_nothing_back(example):
    ours, clean, corrupted, is_audio = example
    before = torch.zeros(1, len(is_audio), dtype=torch.bool)
    before[0, : int(is_audio.nonzero().min())] = True
    for layer in range(ours.cfg.n_layers):
        state = clean.cache["resid_post", layer][before]
        assert torch.equal(state, corrupted.cache["resid_post", layer][before])
        both = torch.cat([before, torch.zeros_like(before)])
        patched, unpatched = patched_logits(ours, clean, corrupted, layer, both, "resid_post")
        assert torch.equal(patched, unpatched)


def test_clean_into_clean_changes_nothing(example):
    ours, clean, _, is_audio = example
    for layer in range(-1, ours.cfg.n_layers):
        where = torch.stack([is_audio, ~is_audio, torch.zeros_like(is_audio)])
        audio, text, nothing = patched_logits(ours, clean, clean, layer, where, "resid_post")
        assert torch.equal(audio, nothing)
        assert torch.equal(text, nothing)
        assert_close(nothing, clean.logits)


def test_the_last_block_counts_at_the_last_position_only(example):
    ours, clean, corrupted, is_audio = example
    target = most_changed(clean, corrupted)
    rows = relative(recover(ours, clean, corrupted, is_audio, target))
    final = rows[rows.layer == ours.cfg.n_layers - 1]
    with_last = final[final["last"] == len(is_audio) - 1].recovery
    without = final[final["last"] < len(is_audio) - 1].recovery
    assert len(with_last) == 2  # all text, and the last token alone
    assert len(without) > 5
    assert (with_last - 1).abs().max() < 1e-4
    assert without.abs().max() < 1e-4


def test_embeddings_of_text_bring_back_nothing_and_of_audio_everything(example):
    ours, clean, corrupted, is_audio = example
    rows = relative(recover(ours, clean, corrupted, is_audio, most_changed(clean, corrupted)))
    embed = rows[rows.layer == -1]
    assert (embed[embed.kind == "audio_layer"].recovery - 1).abs().max() < 1e-4
    assert embed[embed.kind != "audio_layer"].recovery.abs().max() < 1e-4


def test_recovery_is_not_clipped(example):
    """Random weights know no [0, 1]."""
    ours, clean, corrupted, is_audio = example
    rates = torch.cat(
        [
            torch.tensor(relative(recover(ours, clean, corrupted, is_audio, target)).recovery.to_numpy())
            for target in range(20, 24)
        ]
    )
    assert rates.min() < -0.05 or rates.max() > 1.05


def test_the_batch_size_does_not_change_the_numbers(example):
    ours, clean, corrupted, is_audio = example
    few, many = (recover(ours, clean, corrupted, is_audio, 17, batch_size=size).p_patched for size in (1, 50))
    assert_close(few.log(), many.log(), rtol=0, atol=1e-5)


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
    assert ((frame.p_patched - frame.p_corrupted) / gap - frame.recovery).abs().max() < 1e-12


def test_excluded_samples_keep_their_rows(traces):
    frame = traces["gender"].to_frame()
    assert set(frame.status) == {"kept", "corrupted_right"}  # silence always gives the same of two answers
    assert frame[frame.status != "kept"].recovery.notna().all()


@pytest.mark.parametrize(
    ("clean", "corrupted", "p", "status"),
    [
        ([1.0, 2.0], [2.0, 1.0], (0.1, 0.2), "clean_wrong"),
        ([2.0, 1.0], [2.0, 1.0], (0.1, 0.2), "corrupted_right"),
        ([2.0, 1.0], [1.0, 2.0], (0.1, 0.2), "no_gap"),
        ([2.0, 1.0], [1.0, 2.0], (0.2, 0.2), "no_gap"),
        ([2.0, 1.0], [1.0, 2.0], (0.2, 0.1), "kept"),
    ],
)
def test_the_first_exclusion_that_applies_is_told(clean, corrupted, p, status):
    recovery = Recovery(*p, [], torch.empty(0, dtype=torch.float64))
    assert status_of(recovery, torch.tensor(clean), torch.tensor(corrupted), true=0) == status


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


@pytest.mark.parametrize("view", ["layers", "tokens"])
def test_plots_show_every_attribute_with_its_n(traces, view):
    both = CausalTrace.concat([traces["gender"].frame, traces["animal"].frame])
    figure = both.plot(view)
    titles = " ".join(ax.get_title() for ax in figure.axes)
    for name in ("gender", "animal"):
        n = traces[name].kept["sample"].nunique()
        assert f"{name} (n = {n} kept of {N_CLIPS})" in titles
    labels = {ax.get_xlabel() for ax in figure.axes} | {ax.get_ylabel() for ax in figure.axes}
    assert "patched layer" in labels
    assert any(label.startswith("recovery rate") for label in labels)


def test_the_curves_are_the_means_of_what_is_kept(traces):
    trace = traces["gender"]
    assert len(trace.kept) < len(trace.frame)
    (ax,) = trace.plot("layers").axes
    lines = {line.get_label(): line for line in ax.lines}
    for kind, label in (("layer", "text positions"), ("audio_layer", "audio positions")):
        mean = trace.kept[trace.kept.kind == kind].groupby("layer").recovery.mean()
        assert lines[label].get_xdata().tolist() == mean.index.tolist()
        assert lines[label].get_ydata().tolist() == pytest.approx(mean.tolist())


def test_the_map_is_the_mean_of_what_is_kept(traces):
    trace = traces["gender"]
    ax = trace.plot("tokens").axes[0]
    (image,) = ax.images
    assert image.origin == "lower"  # the embedding at the bottom
    tokens = trace.kept[trace.kept.kind == "token"]
    mean = tokens.pivot_table(index="layer", columns="text_index", values="recovery").to_numpy()
    assert image.get_array().ravel().tolist() == pytest.approx(mean.ravel().tolist())
    assert [label.get_text() for label in ax.get_xticklabels()][-2:] == ["\N{OPEN BOX}gender", "\N{OPEN BOX}is"]
    assert [text.get_text() for text in ax.texts] == ["early", "object", "late", "last"]
    assert len(ax.patches) == 4


def test_plots_of_a_trace_without_kept_samples_say_so(traces):
    frame = traces["gender"].to_frame().assign(status="clean_wrong")
    for view in ("layers", "tokens"):
        title = CausalTrace(frame).plot(view).axes[0].get_title()
        assert title == "gender (n = 0 kept)\ndrawn though excluded:\n4 clean_wrong"


@pytest.mark.parametrize("view", ["layers", "tokens"])
@pytest.mark.parametrize("names", [["gender"], ["gender", "emotion", "animal"]])
def test_no_title_is_cut_off_or_overlaps(traces, view, names):
    frame = pd.concat([traces[name].frame for name in names], ignore_index=True)
    statuses = ["clean_wrong", "corrupted_right", "no_gap"]
    excluded = frame.assign(
        model="Somebody/Some-Audio-Model-7B-Instruct",
        status=[statuses[zlib.crc32(name.encode()) % 3] for name in frame["sample"]],
    )
    figure = CausalTrace(excluded).plot(view)
    figure.draw_without_rendering()
    boxes = [figure.get_suptitle() and figure._suptitle.get_window_extent()]
    boxes += [ax.title.get_window_extent() for ax in figure.axes if ax.get_title()]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
    assert all(not a.overlaps(b) for a, b in combinations(boxes, 2))


def test_a_trace_without_a_gap_is_drawn_empty(traces):
    frame = traces["gender"].to_frame().assign(recovery=float("nan"), status="no_gap")
    for view in ("layers", "tokens"):
        assert "no_gap" in CausalTrace(frame).plot(view).axes[0].get_title()


def test_several_models_are_counted_apart_and_not_drawn_together(traces):
    frame = traces["gender"].to_frame()
    both = CausalTrace(pd.concat([frame, frame.assign(model="another")], ignore_index=True))
    assert both.summary().clips.tolist() == [N_CLIPS, N_CLIPS]
    with pytest.raises(DataError, match="one model"):
        both.plot()


def test_the_report_shows_the_summary_and_the_pictures(traces, tmp_path):
    trace = traces["emotion"]
    data = trace.save(tmp_path / "trace.parquet")
    page = write_report(trace, data, [tmp_path / "layers.png"]).read_text(encoding="utf-8")
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
    with pytest.raises(InputError, match="batch_size"):
        causal_trace(tiny_lalm, [male], attribute="gender", batch_size=0)
    with pytest.raises(AudioError, match=r"a\.wav of 3\.00 s"):
        causal_trace(tiny_lalm, [Sample("a.wav", "male", chirps([3.0])[0])], attribute="gender")
    with pytest.raises(AudioError, match=r"a\.wav is digital silence"):
        causal_trace(tiny_lalm, [Sample("a.wav", "male", torch.zeros(16_000))], attribute="gender")
    with pytest.raises(InputError, match="without tokenizer"):
        causal_trace(pair()[1], [sample], attribute="gender")
