"""What the runs of a clip read, and traces of models that read it."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from desta_golden import NAMES, golden, model_of, said
from reference import chirps
from torch import Tensor
from torch.testing import assert_close

from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.corrupt import Corrupted, OtherClip
from lalm_lens.datasets import Sample, cut_to
from lalm_lens.engine.plan import Engine
from lalm_lens.errors import ConversionError, InputError, PromptError
from lalm_lens.experiments.attention_knockout import attention_knockout
from lalm_lens.experiments.causal_trace import causal_trace
from lalm_lens.experiments.cells import Grid, cells
from lalm_lens.experiments.logit_lens import logit_lens
from lalm_lens.experiments.object_effect import object_effect
from lalm_lens.experiments.recovery import Case, recover
from lalm_lens.metrics import Answer
from lalm_lens.prompts import Processor, Prompt
from lalm_lens.results import EMBED_LAYER, CausalTrace
from lalm_lens.runs import Run
from lalm_lens.transcribe import Transcriber
from lalm_lens.transcripts import Clean, Filler, Fixed, Listener, Own, Reading, reading, transcribed

GENDER = ATTRIBUTES["gender"]
SAYS = " they say so"
CLIP, OTHER = (
    Sample(f"{label}.wav", label, clip, SAYS)
    for label, clip in zip(("male", "female"), chirps([1.6, 1.1]), strict=True)
)
SHORTER = Own(corrupted=" oh")


def processor_of(name: str) -> Processor:
    processor = model_of(name).processor
    assert processor is not None
    return processor


def n_tokens(name: str, text: str) -> int:
    return len(processor_of(name).transcript_tokens(text))


def trace(name: str, transcript: Reading | str | None = None, engine: Engine = "auto", **settings) -> CausalTrace:
    how = {"attribute": "gender", "transcript": transcript, "engine": engine, "progress": False}
    return causal_trace(model_of(name), [CLIP], **how, **settings)


# --- the choices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_both_runs_read(name):
    listener, silence = Listener(processor_of(name)), Corrupted("silence", torch.zeros_like(CLIP.waveform))
    words = processor_of(name).transcript_tokens(SAYS)
    (dot,) = processor_of(name).transcript_tokens(".")
    assert len(words) > 3
    assert Filler().of(listener, CLIP, silence) == ((dot,) * len(words),) * 2
    assert Clean().of(listener, CLIP, silence) == (words, words)
    assert Fixed().of(listener, CLIP, silence) == (" ", " ")
    assert Fixed("mine").of(listener, CLIP, silence) == ("mine", "mine")
    assert SHORTER.of(listener, CLIP, silence) == (words, " oh")
    with pytest.raises(PromptError, match="A filler is one token, and 'speaking' is"):
        Filler("speaking").of(listener, CLIP, silence)


def test_a_choice_has_a_name_or_is_itself_the_text():
    assert [reading(name) for name in ("filler", "clean", "placeholder", "own")] == [Filler(), Clean(), Fixed(), Own()]
    assert reading(" Hello there.") == Fixed(" Hello there.")
    assert reading(SHORTER) is SHORTER
    names = [Filler().name, Filler("x").name, Clean().name, Fixed().name, Fixed("mine").name, SHORTER.name, Own().name]
    assert names == ["filler", "filler 'x'", "clean", "placeholder", "text 'mine'", "own, corrupted ' oh'", "own"]
    with pytest.raises(PromptError, match="no transcript 'cleen'; did you mean clean"):
        reading("cleen")


@pytest.mark.parametrize("name", NAMES)
def test_each_run_hears_its_own_sound(name, tmp_path, monkeypatch):
    transcriber = Transcriber(tmp_path)
    monkeypatch.setattr(transcriber, "write", lambda clip: " something" if clip.any() else " Thank you.")
    processor = replace(processor_of(name), transcriber=transcriber)
    clip, silence = replace(CLIP, transcript=None), Corrupted("silence", torch.zeros_like(CLIP.waveform))
    something, thanks = (text if name == "desta2" else text.strip() for text in (" something", " Thank you."))
    assert Own().of(Listener(processor), clip, silence) == (
        processor.transcript_tokens(something),
        thanks,
    )
    assert Own().of(Listener(processor), CLIP, silence) == (
        processor.transcript_tokens(SAYS),
        thanks,
    )
    other = Sample("other.wav", "female", CLIP.waveform[:-9], " and so on")
    for heard, its in ((other, " and so on"), (replace(other, waveform=torch.cat([CLIP.waveform] * 2)), something)):
        corrupted = OtherClip().of(CLIP, [CLIP, heard])
        assert Own().of(Listener(processor), CLIP, corrupted)[1] == its, "of a clip that is cut, nobody knows it"
    monkeypatch.setattr("lalm_lens.transcripts.has_speech", lambda clip: bool(clip.any()))
    assert Own().of(Listener(processor, True), clip, silence) == (processor.transcript_tokens(something), " ")
    monkeypatch.setattr("lalm_lens.transcripts.has_speech", lambda clip: False)
    assert Clean().of(Listener(processor, True), CLIP, silence) == (processor.transcript_tokens(" "),) * 2


def test_a_clip_that_is_cut_loses_its_transcript():
    cut, whole = cut_to([CLIP, OTHER], len(OTHER.waveform))
    assert (cut.transcript, whole.transcript) == (None, SAYS)


# --- traces ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_from_clip_and_words_is_the_original_ones(name):
    """Its prompt, features and cells are ours; what the authors' own code made of theirs is stored."""
    model, processor = model_of(name), processor_of(name)
    _, files, stored = golden(name)
    clip = files["waveform"]
    prompt = processor.prompt(GENDER, processor.n_frames(clip), transcript=said(name))
    clean, silent = (Run(processor.inputs([prompt], [its]), prompt) for its in (clip, torch.zeros_like(clip)))
    after = tuple(stored["text_after_positions"].tolist())
    chosen = [  # theirs leaves out the token between DeSTA2's clip and transcript
        replace(cell, positions=after) if cell.kind == "layer" else cell for cell in cells(model, Grid(), clean)
    ]
    (found,) = recover(model, [Case(clean, silent, Answer((int(stored["target_ids"][0]),)), chosen)], engine="sweep")
    p = {
        (kind, embed): torch.tensor(
            [
                float(each)
                for cell, each in zip(chosen, found.p_patched, strict=True)
                if cell.kind == kind and (cell.layer == EMBED_LAYER) == embed
            ]
        ).double()
        for kind in ("layer", "audio_layer", "token")
        for embed in (True, False)
    }
    expected = {
        ("layer", False): stored["p_layer"][0],
        ("layer", True): stored["p_embed_text"],
        ("audio_layer", False): stored["p_audio_layer"][0],
        ("audio_layer", True): stored["p_embed_audio"],
        ("token", False): stored["p_token"][0].flatten(),
    }
    for key, each in expected.items():
        assert_close(p[key].log(), each.log(), rtol=0, atol=2e-4)
    assert_close(
        torch.tensor([found.p_clean, found.p_corrupted]).double().log(),
        torch.cat([stored["p_clean"], stored["p_corrupted"]]).log(),
        rtol=0,
        atol=2e-4,
    )


@pytest.mark.parametrize("transcript", ["filler", "clean", "placeholder", "mine", SHORTER], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_both_engines_trace_every_choice(name, transcript):
    kinds = ["layer"] if transcript == SHORTER else ["layer", "audio_layer"]
    first, second = (trace(name, transcript, engine, kinds=kinds).to_frame() for engine in ("sweep", "hooks"))
    assert set(first.kind) == set(kinds)
    assert set(first.transcript) == {reading(transcript).name}
    assert set(first.transcript_is) == {"audio"}
    for column in ("p_clean", "p_corrupted", "p_patched", "m_patched"):
        assert_close(*(torch.tensor(frame[column].to_numpy()) for frame in (first, second)), rtol=1e-4, atol=1e-7)
    last = first[(first.layer == first.layer.max()) & (first.kind == "layer")]
    assert abs(last.recovery.item() - 1) < 1e-4


def test_filler_is_what_is_read_where_nothing_is_said():
    default, filler = (trace("desta25", which, kinds=["layer"]).to_frame() for which in (None, "filler"))
    assert default.equals(filler)
    assert trace("desta25", "clean", kinds=["layer"]).to_frame().p_clean.iloc[0] != default.p_clean.iloc[0]


@cache
def logits_and_states(name: str, transcript: str, silent: bool) -> tuple[Prompt, Tensor, dict[str, Tensor]]:
    model, processor = model_of(name), processor_of(name)
    clip = torch.zeros_like(CLIP.waveform) if silent else CLIP.waveform
    prompt = processor.prompt(GENDER, processor.n_frames(clip), transcript=transcript)
    with torch.no_grad():
        logits, states = model.run_with_cache(processor.inputs([prompt], [clip]), return_cache_object=False)
    return prompt, logits[0, -1], states


@pytest.mark.parametrize(("name", "direction"), [("desta2", "denoise"), ("desta2", "noise"), ("desta25", "denoise")])
def test_words_are_patched_into_a_run_of_another_length(name, direction):
    """By plain hooks: words counted from the right end behind the transcript, from the left before the clip."""
    model, processor = model_of(name), processor_of(name)
    texts = {False: SAYS, True: " oh"}
    rows = trace(name, SHORTER, "sweep", direction=direction).to_frame()
    assert set(rows.kind) == {"layer", "token"}
    assert "transcript" not in set(rows.region.dropna())
    of_base = direction == "denoise"
    base, _, _ = logits_and_states(name, texts[of_base], of_base)
    source, _, states = logits_and_states(name, texts[not of_base], not of_base)
    clean, _, _ = logits_and_states(name, SAYS, False)
    shift = len(source) - len(base)
    assert abs(shift) > 1
    label = processor.label_tokens(GENDER.labels)[CLIP.label]
    clip = torch.zeros_like(CLIP.waveform) if of_base else CLIP.waveform
    inputs = processor.inputs([base], [clip])

    def p_patched(layer: int, at: list[int], taken: list[int]) -> float:
        name_ = f"blocks.{layer}.hook_resid_post"

        def put(state: Tensor, hook: object) -> Tensor:
            state[:, at] = states[name_][:, taken]
            return state

        with torch.no_grad():
            logits = model.run_with_hooks(inputs, fwd_hooks=[(name_, put)])
        return float(logits[0, -1].double().softmax(-1)[label])

    end = max(base.is_region("transcript").nonzero())[0].item() + 1
    before = [pos for pos in range(end) if base.positions[pos].region not in ("audio", "transcript")]
    behind = list(range(end, len(base)))
    for layer in range(2):
        (row,) = rows[(rows.kind == "layer") & (rows.layer == layer)].p_patched
        expected = p_patched(layer, before + behind, before + [pos + shift for pos in behind])
        assert abs(row - expected) < 1e-6 + 1e-4 * expected
    for text_index in (-1, end - len(base)):
        token = rows[(rows.kind == "token") & (rows.layer == 1) & (rows.text_index == text_index)]
        assert token.token.item() == clean.positions[text_index].token
        pos = len(base) + text_index
        expected = p_patched(1, [pos], [pos + shift])
        assert abs(token.p_patched.item() - expected) < 1e-6 + 1e-4 * expected
    assert set(rows[rows.kind == "token"].text_index) == set(range(end - len(base), 0))


def test_a_transcript_that_counts_as_text_is_patched_as_text():
    model, processor = model_of("desta2"), processor_of("desta2")
    prompt = processor.prompt(GENDER, 100, transcript=SAYS)
    run = Run(processor.inputs([prompt], [CLIP.waveform]), prompt)
    audio, transcript = (set(run.indices(region)) for region in ("audio", "transcript"))
    rest = set(range(len(prompt))) - audio - transcript
    for side, text in (("audio", rest), ("text", rest | transcript)):
        its = {cell.kind: set(cell.positions) for cell in cells(model, Grid(transcript_is=side), run)}
        assert its["layer"] == text
        assert its["audio_layer"] == set(range(len(prompt))) - text
        places = [cell.positions[0] for cell in cells(model, Grid(kinds=("token",), transcript_is=side), run)]
        first = max(audio | transcript if side == "audio" else audio) + 1
        assert sorted(set(places)) == list(range(first, len(prompt)))
    rows = trace("desta25", "clean", transcript_is="text").to_frame()
    said_rows = rows[rows.region == "transcript"]
    assert "".join(said_rows[said_rows.layer == 0].token) == SAYS
    assert set(said_rows.segment) == {"none"}


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kinds": ["layer", "audio_layer"]}, "audio_layer at resid_post cannot"),
        ({"transcript_is": "text"}, "layer, token at resid_post cannot"),
        ({"kinds": ["layer"], "site": "pattern"}, "layer at pattern cannot"),
    ],
)
def test_states_of_transcripts_of_two_lengths_are_refused(settings, named):
    lengths = [n_tokens("desta2", text) for text in (SAYS, " oh")]
    message = f"male.wav has {lengths[0]} tokens in the clean run and {lengths[1]} in the corrupted one.* {named}"
    with pytest.raises(InputError, match=message):
        trace("desta2", SHORTER, **settings)


def test_audio_is_patched_where_both_transcripts_are_as_long():
    kinds = ["audio_layer"]
    frame = trace("desta2", Own(corrupted=SAYS), kinds=kinds).to_frame()
    assert frame.p_patched.tolist() == trace("desta2", "clean", kinds=kinds).to_frame().p_patched.tolist()


def test_a_transcript_for_a_model_that_reads_none_is_refused(tiny_lalm):
    for settings in ({"transcript": "clean"}, {"transcript_is": "audio"}, {"voice_activity": True}):
        with pytest.raises(PromptError, match=r"prompts of a qwen2_audio model hold no transcript: leave out"):
            causal_trace(tiny_lalm, [CLIP], attribute="gender", **settings)


def test_without_a_whisper_that_writes_the_user_is_told_what_to_give():
    clip = replace(CLIP, transcript=None)
    for transcript in ("filler", "clean", "own"):
        with pytest.raises(ConversionError, match="Give the transcripts yourself"):
            causal_trace(model_of("desta2"), [clip], attribute="gender", transcript=transcript, progress=False)
    kinds = ["layer"]
    placed = causal_trace(
        model_of("desta2"), [clip], attribute="gender", transcript="placeholder", kinds=kinds, progress=False
    )
    assert set(placed.frame.transcript) == {"placeholder"}


# --- analyses of a single run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_single_run_reads_what_is_said_in_its_clip(name):
    model, processor = model_of(name), processor_of(name)

    def logits(words: str) -> Tensor:
        prompt = processor.prompt(GENDER, processor.n_frames(CLIP.waveform), answer="male", transcript=words)
        tokens = list(processor.label_tokens(GENDER.labels).values())
        return model(processor.inputs([prompt], [CLIP.waveform]))[0, -1, tokens].double()

    def read(sample: Sample) -> tuple[Tensor, float]:
        how: dict = {"attribute": "gender", "progress": False}
        lens = logit_lens(model, [sample], top_k=0, **how).frame
        cut = attention_knockout(model, [sample], layers=["all"], **how).frame
        last = lens[lens.layer == lens.layer.max()].sort_values("option", key=lambda at: at.map(GENDER.labels.index))
        return torch.tensor(last.logit.to_numpy()), float(cut.logit_difference_before.iloc[0])

    (mine,) = transcribed(processor, [CLIP], text=" never mind")
    for sample, words in ((CLIP, SAYS), (mine, " never mind")):
        expected = logits(words)
        lens, difference = read(sample)
        assert_close(lens, expected, atol=2e-5, rtol=0)
        assert_close(difference, float(expected[0] - expected[1]), atol=2e-5, rtol=0)
    assert (logits(SAYS) - logits(" never mind")).abs().max() > 1e-3


def test_what_looks_at_the_whole_clip_has_no_place_in_time():
    lens = logit_lens(model_of("desta2"), [CLIP], attribute="gender", positions="audio", top_k=1, progress=False)
    assert (lens.frame.region == "audio").all()
    assert lens.frame.start_s.isna().all()
    assert lens.frame.end_s.isna().all()


def test_clips_are_transcribed_beforehand(monkeypatch, tiny_lalm):
    monkeypatch.setattr("lalm_lens.transcripts.has_speech", lambda waveform: waveform.equal(CLIP.waveform))
    said = transcribed(processor_of("desta25"), [CLIP, OTHER], voice_activity=True)
    assert [sample.transcript for sample in said] == [SAYS, " "]
    with pytest.raises(PromptError, match="prompts of a qwen2_audio model hold no transcript"):
        transcribed(tiny_lalm.processor, [CLIP])


@pytest.mark.parametrize(("transcript", "words"), [(None, "."), ("clean", SAYS)])
def test_the_effect_of_options_is_measured_with_one_transcript_in_both_runs(transcript, words):
    model, processor = model_of("desta2"), processor_of("desta2")
    reads = processor.transcript_tokens(words) * (n_tokens("desta2", SAYS) if words == "." else 1)
    prompt = processor.prompt(GENDER, processor.n_frames(CLIP.waveform), transcript=reads)
    tokens = list(processor.label_tokens(GENDER.labels).values())
    clean, silent = (
        model(processor.inputs([prompt], [waveform]))[0, -1].log_softmax(-1)[tokens]
        for waveform in (CLIP.waveform, torch.zeros_like(CLIP.waveform))
    )
    how: dict = {"metric": "log_probability", "transcript": transcript, "progress": False}
    found = object_effect(model, [CLIP], attribute="gender", **how).frame
    chosen = int(clean.argmax())
    assert_close(float(found.m_clean.iloc[0]), float(clean[chosen]), atol=2e-5, rtol=0)
    assert_close(float(found.m_corrupted.iloc[0]), float(silent[chosen]), atol=2e-5, rtol=0)
