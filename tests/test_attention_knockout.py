"""Attention knockout: against plain HF under a mask made by hand, and on models whose ways of hearing are known."""

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omni import AUDIO, IMAGE, VIDEO, Batch, Clip, Image, Video, Words, tiny_omni
from reference import hf_cut
from torch.testing import assert_close

from lalm_lens.assets import TINY_LALM_PLANTED, TINY_LALM_RELAY
from lalm_lens.assets.clips import write_clips
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.datasets import read_folder
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.attention_knockout import AttentionKnockout, attention_knockout, audio_knockout
from lalm_lens.experiments.cuts import cuts, layer_sets, positions, spelled
from lalm_lens.experiments.knockout_generation import (
    KnockoutGeneration,
    first_named,
    forced,
    knockout_generation,
    write,
)
from lalm_lens.inputs import Inputs
from lalm_lens.loading import from_hf, from_pretrained
from lalm_lens.prompts import Position, Prompt
from lalm_lens.runs import Run

N_LAYERS, N_HEADS = 8, 4
PLANTED_BLOCK = 4
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    return cache(lambda name, n: read_folder(write_clips(root / f"{name}{n}", name, n, seed=11)))


@pytest.fixture(scope="module")
def hen(random_pair, clips):
    """One clip: the sample, what HF takes, and where the parts of the prompt are."""
    model = random_pair[1]
    sample = clips("animal", 9)[5]
    run = Question.about(model, [sample], "animal", "P3", True).run(sample)
    region = np.array([position.region for position in run.prompt.positions])
    n_pos = len(region)
    where = {name: np.flatnonzero(region == name).tolist() for name in ("audio", "object", "early", "late")}
    where |= {"text": np.flatnonzero(region != "audio").tolist(), "last": [n_pos - 1], "penultimate": [n_pos - 2]}
    where |= {"early+object": where["early"] + where["object"], "3-4": [3, 4], "generated": [n_pos - 1]}
    return sample, run, where


def closed(n_pos: int, edges: list[tuple[list[int], list[int]]], heads: tuple[int, ...] | None = None) -> torch.Tensor:
    """[head, query_pos, key_pos] that are shut, from (keys, queries)."""
    shut = torch.zeros(N_HEADS, n_pos, n_pos, dtype=torch.bool)
    for keys, queries in edges:
        for head in range(N_HEADS) if heads is None else heads:
            for query in queries:
                shut[head, query, keys] = True
    return shut


def numbers(logits: torch.Tensor, base: torch.Tensor, options: list[int], true: int) -> dict[str, float]:
    """The columns of a row, from logits at the last position, with numpy."""
    wide, of_base = logits.double().numpy(), base.double().numpy()
    p = np.exp(wide - wide.max()) / np.exp(wide - wide.max()).sum()
    others = [token for n, token in enumerate(options) if n != true]
    rival = max(others, key=lambda token: of_base[token])
    return {
        "p": p[options[true]],
        "logit_difference": wide[options[true]] - wide[rival],
        "label_p": p[options[true]] / p[options].sum(),
        "right": int(np.argmax(wide[options])) == true,
        "answer": ATTRIBUTES["animal"].labels[int(np.argmax(wide[options]))],
    }


CHAINS = [
    ("audio", "object", "last"),
    ("audio", "text"),
    (("early", "object"), "penultimate"),
    ("late", "generated"),
    ((3, 4), "audio"),
]
LAYERS = (3, "up_to", "from", "all", (6, 1, 2))


def by_hand(kind: str, layer: int | None) -> list[int]:
    if kind.startswith("window"):
        return [n for n in range(N_LAYERS) if abs(n - layer) <= (int(kind.split()[1]) - 1) / 2]
    every = {"all": lambda n: True, "chosen": lambda n: n in (6, 1, 2)}
    every |= {"up_to": lambda n: n <= layer, "from": lambda n: n >= layer}
    return [n for n in range(N_LAYERS) if every[kind](n)]


@pytest.mark.parametrize("engine", ["sweep", "hooks"])
@pytest.mark.parametrize("heads", ["all", (1, 2)])
def test_every_row_is_plain_hf_under_a_mask(random_pair, hen, engine, heads):
    hf, model = random_pair
    sample, run, where = hen
    layers = LAYERS if engine == "sweep" and heads == "all" else ("all", (6, 1, 2))
    how = {"attribute": "animal", "chains": CHAINS, "layers": layers, "heads": heads, "engine": engine, **QUIET}
    table = attention_knockout(model, [sample], **how)
    assert (table.frame.engine == engine).all()
    batch = run.inputs.to_hf("feature_attention_mask")
    options = list(model.processor.label_tokens(ATTRIBUTES["animal"].labels).values())
    true = ATTRIBUTES["animal"].labels.index(sample.label)
    base = hf_cut(hf, batch, {})[0][-1]
    cut = None if heads == "all" else heads
    bites = []
    for row in table.frame.sample(min(30, len(table.frame)), random_state=0).itertuples():
        places = row.edge.split(" -> ")
        edges = [(where[a], where[b]) for a, b in pairwise(places)]
        shut = closed(run.n_pos, edges, cut)
        at = by_hand(row.kind, None if pd.isna(row.layer) else row.layer)
        assert row.layers == spelled(at)
        logits = hf_cut(hf, batch, dict.fromkeys(at, shut))[0][-1]
        for when, of_run in (("before", base), ("after", logits)):
            expected = numbers(of_run, base, options, true)
            for name in ("p", "logit_difference", "label_p"):
                assert_close(getattr(row, f"{name}_{when}"), expected[name], rtol=2e-4, atol=2e-5)
            assert getattr(row, f"right_{when}") == expected["right"]
            assert getattr(row, f"answer_{when}") == expected["answer"]
        bites.append((base - logits).abs().max() > 1e-2)
    assert np.mean(bites) > 0.8, "most of these knockouts should change something"
    assert len(table.frame) == 7 * (3 * N_LAYERS + 2 if layers == LAYERS else 2)


def test_the_engines_agree(random_pair, clips):
    how = {"attribute": "animal", "chains": CHAINS[:1], "layers": ["all"], "heads": "each", **QUIET}
    swept, hooked = (
        attention_knockout(random_pair[1], clips("animal", 9)[2:3], engine=engine, **how).to_frame()
        for engine in ("sweep", "hooks")
    )
    assert set(swept["heads"]) == {"0", "1", "2", "3"}
    same = [name for name in swept if name not in ("engine", "noise")]
    pd.testing.assert_frame_equal(swept[same], hooked[same], rtol=1e-4, atol=1e-6)
    assert (hooked.noise == 0).all()
    assert swept.noise.max() < 1e-6


def test_a_prediction_may_be_one_of_the_whole_vocabulary(tiny_lalm, clips):
    """The model says " male" and not "male": without the space, no label has the largest logit of all tokens."""
    samples, how = clips("gender", 4), {"attribute": "gender", "layers": ["all"], **QUIET}
    spaced = attention_knockout(tiny_lalm, samples, predict="vocab", **how).frame
    bare = attention_knockout(tiny_lalm, samples, predict="vocab", label_space=False, **how).frame
    among = attention_knockout(tiny_lalm, samples, label_space=False, **how).frame
    assert spaced.right_before.all()
    assert not bare.right_before.any()
    assert (among.right_before == (among.answer_before == among.label)).all()
    assert among.right_before.any()
    assert spaced.n_pairs.tolist() == [40] * 4


def test_a_knockout_of_nothing_changes_no_bit(random_pair, hen):
    """What is behind a query, it cannot see anyway."""
    sample = hen[0]
    how = {"attribute": "animal", "chains": [("last", "audio"), ("object", "early")], "layers": (1, "all"), **QUIET}
    swept = attention_knockout(random_pair[1], [sample], engine="sweep", **how).frame
    assert len(swept) == 2 * (N_LAYERS + 1)
    for name in ("p", "logit_difference", "label_p", "right", "answer"):
        assert (swept[f"{name}_before"] == swept[f"{name}_after"]).all()
    hooked = attention_knockout(random_pair[1], [sample], engine="hooks", **how).frame
    assert_close(torch.tensor(hooked.p_after.to_numpy()), torch.tensor(hooked.p_before.to_numpy()))


# --- in generation ----------------------------------------------------------------------------------------------

N_NEW = 5
EDGES = [
    ("audio", "generated"),
    ("generated", "generated"),
    ("audio", "object", "generated"),
    ("audio", "last"),
    ("text", "audio"),
]


def hf_written(hf, run, edges: list[tuple[list[int], list[int]]], layers, heads) -> tuple[list[int], list[float]]:
    """Greedy, with the whole sequence run again for every token, under a mask made by hand."""
    batch, tokens, log_p = dict(run.inputs.to_hf("feature_attention_mask")), [], []
    for _ in range(N_NEW):
        n_pos = batch["input_ids"].shape[1]
        its = [([n for n in keys if n < n_pos], [n for n in queries if n < n_pos]) for keys, queries in edges]
        logits, _ = hf_cut(hf, batch, dict.fromkeys(layers, closed(n_pos, its, heads)))
        tokens.append(int(logits[-1].argmax()))
        log_p.append(float(logits[-1].log_softmax(-1).max()))
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([tokens[-1:]])], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return tokens, log_p


@pytest.mark.parametrize("edge", EDGES, ids=" -> ".join)
@pytest.mark.parametrize(("layers", "heads"), [("all", "all"), ((2, 5), (0, 3))], ids=["all", "some"])
def test_each_generated_token_is_plain_hf_under_a_mask(random_pair, hen, edge, layers, heads):
    hf, model = random_pair
    _, run, where = hen
    last = run.n_pos - 1
    where = {**where, "generated": list(range(last, last + N_NEW))}
    chosen, some = (range(N_LAYERS), None) if layers == "all" else (layers, heads)
    whole = cuts(model, run, [edge], [layers], heads, n_new=N_NEW - 1)[-1]
    assert whole.edge == " -> ".join(edge)
    pairs = [(where[a], where[b]) for a, b in pairwise(edge)]
    tokens, log_p = hf_written(hf, run, pairs, chosen, some)
    ours = write(model, run, whole, N_NEW)
    assert ours.tokens[0].tolist() == tokens
    assert_close(ours.log_probs[0], torch.tensor(log_p), rtol=1e-4, atol=1e-5)
    for engine in ("sweep", "hooks"):
        log_p_forced = forced(model, run, torch.tensor(tokens), [whole], engine)[0]
        assert_close(log_p_forced, torch.tensor(log_p), rtol=1e-4, atol=1e-5)
    free = forced(model, run, torch.tensor(tokens), cuts(model, run, [("last", "audio")], ["all"], "all"))[0]
    moved = (free - log_p_forced).abs()
    if edge == ("audio", "last") and layers == "all":
        assert moved[0] > 1e-3
    else:
        assert (moved > 1e-4).sum() >= N_NEW - 2, "nearly every token feels it"


def test_every_pair_of_what_is_heard_seen_asked_and_written():
    """An audio-visual model, whose positions are in time, height and width."""
    hf = tiny_omni(seed=4)
    hf.set_attn_implementation("eager")
    model = from_hf(hf)
    batch = Batch([[Words(4), Image(4, 6), Words(2), Video(2, 4, 4), Words(2), Clip(0.5), Words(6)]]).hf()
    tokens = batch["input_ids"][0].tolist()
    kinds = {AUDIO: "audio", IMAGE: "image", VIDEO: "video"}
    last_heard = max(n for n, token in enumerate(tokens) if token == AUDIO)
    regions = [kinds.get(token, "late" if n > last_heard else "text_before") for n, token in enumerate(tokens)]
    run = Run(Inputs.from_hf(batch), Prompt(tuple(tokens), tuple(Position("", region) for region in regions)))
    places = ("audio", "image", "video", "late", "generated")
    pairs = [(a, b) for a in places for b in places]
    written = model.generate(run.inputs, N_NEW, stop_tokens=()).tokens
    n_pos = len(tokens) + N_NEW - 1
    its_cuts = cuts(model, run, pairs, ["all"], "all", n_new=N_NEW - 1)
    found = {engine: forced(model, run, written[0], its_cuts, engine) for engine in ("sweep", "hooks")}
    begun = torch.cat([batch["input_ids"], written[:, :-1]], 1)
    longer = batch | {"input_ids": begun, "attention_mask": torch.ones_like(begun)}
    where = {name: [n for n, region in enumerate(regions) if region == name] for name in places}
    where["generated"] = list(range(len(tokens) - 1, n_pos))

    def log_p(shut: dict[int, torch.Tensor]) -> torch.Tensor:
        return hf_cut(hf, longer, shut)[0][-N_NEW:].log_softmax(-1).gather(-1, written.T)[:, 0]

    base, layers = log_p({}), range(len(hf.model.language_model.layers))
    for n, (keys, queries) in enumerate(pairs):
        expected = log_p(dict.fromkeys(layers, closed(n_pos, [(where[keys], where[queries])])))
        for values in found.values():
            assert_close(values[n], expected, rtol=1e-4, atol=1e-5)
        sees = where[queries][-1] >= where[keys][0]  # its own key is cut as well
        assert ((expected - base).abs().max() > 1e-3) == sees, f"{keys} -> {queries} should bite"
    (cut,) = cuts(model, run, [("image", "generated")], ["all"], "all", n_new=N_NEW - 1)
    n_read, tokens = 0, batch["input_ids"]
    model.stop_tokens = ()
    for token in write(model, run, cut, N_NEW).tokens[0]:
        shut = closed(tokens.shape[1], [(where["image"], list(range(run.n_pos - 1, tokens.shape[1])))])
        step = batch | {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        assert hf_cut(hf, step, dict.fromkeys(layers, shut))[0][-1].argmax() == token
        tokens, n_read = torch.cat([tokens, token[None, None]], 1), n_read + 1
    assert n_read == N_NEW


def test_what_is_written_stands_in_the_table(tiny_lalm, clips):
    samples = clips("animal", 9)[:5]
    chains = [("audio", "generated"), ("last", "audio")]
    how = {"attribute": "animal", "chains": chains, "max_new_tokens": 4, **QUIET}
    table = knockout_generation(tiny_lalm, samples, **how)
    cut, uncut = (table.frame[table.frame.edge == " -> ".join(chain)] for chain in chains)
    assert (uncut.text_before == [f" {sample.label}." for sample in samples]).sum() >= 4
    assert (uncut.text_after == uncut.text_before).all()
    assert_close(torch.tensor(uncut.log_p_after.to_numpy()), torch.tensor(uncut.log_p_before.to_numpy()))
    assert (cut.text_after != cut.text_before).sum() >= 3
    still = [f" {sample.label}." == text for sample, text in zip(samples, cut.text_after, strict=True)]
    effects = table.effects("accuracy").set_index("edge")
    assert effects.before.min() >= 4 / 5
    assert effects.after["audio -> generated"] == pytest.approx(np.mean(still))
    assert effects.change["last -> audio"] == 0
    assert table.effects("log_probability").change.iloc[0] == pytest.approx((cut.log_p_after - cut.log_p_before).mean())
    assert "10 texts" in repr(table)
    with pytest.raises(InputError, match="effect is one of log_probability, accuracy"):
        table.effects(effect="probability")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" dog.", "dog"),
        ("It is a Hot-Dog, no cat", "dog"),
        ("a rooster, not a hen", "rooster"),
        ("dogs", None),
        ("", None),
    ],
)
def test_the_label_that_a_text_names_first(text, label):
    assert first_named(text, ATTRIBUTES["animal"].labels) == label


# --- models of which is known who may look where ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n"), [("animal", 9), ("gender", 4)])
def test_the_planted_layer_alone_is_where_the_last_position_hears(clips, name, n):
    """Clips are of one length and the labels balanced: a model that cannot hear gives one answer to all."""
    table = attention_knockout(from_pretrained(TINY_LALM_PLANTED), clips(name, n), attribute=name, **QUIET)
    effects = table.effects("accuracy")
    single = effects[effects.kind == "window 1"].set_index("layer")
    assert (effects.before == 1).all()
    assert single.after[PLANTED_BLOCK] == pytest.approx(1 / len(ATTRIBUTES[name].labels))
    assert (single.after.drop(PLANTED_BLOCK) == 1).all()
    elsewhere = table.frame[(table.frame.kind == "window 1") & (table.frame.layer != PLANTED_BLOCK)]
    assert len(elsewhere) == n * (N_LAYERS - 1)
    assert (elsewhere.p_after == elsewhere.p_before).all(), "to the bit"
    assert table.frame[table.frame.layer == PLANTED_BLOCK].answer_after.nunique() == 1


def test_the_relay_hears_by_way_of_the_words(clips):
    """Its last position cannot see the audio, so it is the words that must: those of the question and the options, each
    of which stands in for the other. From the options it goes to the last."""
    words = ("early", "object")
    chains = [("audio", "last"), ("audio", "object"), ("audio", words), ("object", "last")]
    how = {"attribute": "animal", "chains": chains, "layers": ["all"], **QUIET}
    table = attention_knockout(from_pretrained(TINY_LALM_RELAY), clips("animal", 9), **how)
    accuracy = table.effects("accuracy").set_index("edge")
    assert (accuracy.before == 1).all()
    direct = table.frame[table.frame.edge == "audio -> last"]
    assert (direct.p_after == direct.p_before).all(), "to the bit"
    for edge in ("audio -> early+object", "object -> last"):
        assert accuracy.after[edge] <= 2 / 9
    to_options = table.frame[table.frame.edge == "audio -> object"]
    assert ((to_options.p_after - to_options.p_before).abs() > 10 * to_options.noise).all()


def test_audio_knockout_is_the_papers(tiny_lalm, clips):
    """In all layers and heads; here the prompts have no transcript."""
    samples = clips("gender", 4)
    table = audio_knockout(tiny_lalm, samples, attribute="gender", **QUIET)
    assert list(table.frame.edge.unique()) == ["audio_side -> last", "audio_side -> penultimate"]
    assert set(table.frame.layers) == {"0-7"}
    again = attention_knockout(
        tiny_lalm,
        samples,
        attribute="gender",
        chains=[("audio", "last"), ("audio", (-2,))],
        layers=[(range(8))],
        **QUIET,
    )
    assert table.frame.p_after.tolist() == again.frame.p_after.tolist()
    accuracy = table.effects("accuracy").set_index("edge").after
    assert accuracy["audio_side -> last"] == 0.5
    assert accuracy["audio_side -> penultimate"] == 1
    run = Question.about(tiny_lalm, samples, "gender", "P3", True).run(samples[0])
    spoken = [
        replace(position, region="transcript") if n == 30 else position
        for n, position in enumerate(run.prompt.positions)
    ]
    heard = replace(run, prompt=replace(run.prompt, positions=tuple(spoken)))
    assert positions(heard, "audio_side") == positions(run, "audio")
    assert set(positions(run, "audio")) - set(positions(heard, "audio")) == {30}


# --- which layers, which places -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layers", [1, 2, 8, 32])
def test_windows_and_cumulative_sets_by_count(n_layers):
    for size in (1, 3, 5, 9, 13):
        sets = layer_sets(size, n_layers)
        assert [(kind, layer) for kind, layer, _ in sets] == [(f"window {size}", n) for n in range(n_layers)]
        for _, layer, layers in sets:
            n_below, n_above = min(layer, size // 2), min(n_layers - 1 - layer, size // 2)
            assert len(layers) == n_below + 1 + n_above
            assert layers == tuple(range(layers[0], layers[-1] + 1))
            assert layer - layers[0] == n_below
    up_to, on = layer_sets("up_to", n_layers), layer_sets("from", n_layers)
    assert [len(layers) for *_, layers in up_to] == list(range(1, n_layers + 1))
    assert [len(layers) for *_, layers in on] == list(range(n_layers, 0, -1))
    for (_, layer, below), (_, _, above) in zip(up_to, on[1:], strict=False):
        assert sorted(below + above) == list(range(n_layers))
        assert max(below) == layer
    assert layer_sets("all", n_layers) == [("all", None, tuple(range(n_layers)))]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"layers": (2,)}, "by the odd size of a window"),
        ({"layers": ((),)}, "by the odd size of a window"),
        ({"layers": ((8,),)}, "There are 8 layers"),
        ({"heads": (4,)}, "There are 4 heads"),
        ({"chains": (("audio",),)}, "A chain names two places"),
        ({"chains": ()}, "No edge is cut"),
        ({"chains": (("sound", "last"),)}, "There is no place 'sound'"),
        ({"chains": (("image", "last"),)}, "No position of this prompt is 'image'"),
        ({"chains": (((200,), "last"),)}, "Positions are from 0"),
        ({"chains": (("text", "text"),)}, "no key to look at"),
        ({"n_together": 0}, "n_together"),
    ],
)
def test_what_cannot_be_cut_is_refused(tiny_lalm, clips, what, says):
    with pytest.raises(InputError, match=says):
        attention_knockout(
            tiny_lalm, clips("gender", 4)[:1], attribute="gender", **{"layers": ["all"], **what}, **QUIET
        )


# --- the table ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knocked(tiny_lalm, clips):
    how = {"attribute": "animal", "chains": [("audio", "last"), ("object", "last")], "layers": (1, 5, "all")}
    return attention_knockout(tiny_lalm, clips("animal", 9)[:3], **how, **QUIET)


def test_effects_are_means_over_clips(knocked):
    frame = knocked.to_frame()
    rows = frame[(frame.edge == "audio -> last") & (frame.kind == "window 5") & (frame.layer == 1)]
    assert len(rows) == 3
    changes = {
        "probability": rows.p_after - rows.p_before,
        "relative_probability": rows.p_after / rows.p_before - 1,
        "logit_difference": rows.logit_difference_after - rows.logit_difference_before,
        "label_probability": rows.label_p_after - rows.label_p_before,
        "accuracy": rows.right_after.astype(int) - rows.right_before.astype(int),
    }
    for effect, expected in changes.items():
        found = knocked.effects(effect)
        (row,) = found[(found.edge == "audio -> last") & (found.kind == "window 5") & (found.layer == 1)].itertuples()
        assert row.change == pytest.approx(expected.mean())
        assert row.n == 3
        rng = np.random.default_rng(1)
        means = rng.choice(expected.to_numpy(), (4000, 3)).mean(1)
        assert (row.low, row.high) == pytest.approx(
            tuple(np.quantile(means, [0.025, 0.975])), abs=0.15 * means.std() * 4
        )
        assert row.low <= row.change <= row.high
    wrong = knocked.frame.assign(right_before=knocked.frame["sample"] != "dog_000.wav")
    assert set(AttentionKnockout(wrong).right.frame["sample"]) == set(frame["sample"]) - {"dog_000.wav"}


def test_a_table_is_saved_and_says_what_it_holds(knocked, tmp_path):
    path = knocked.save(tmp_path / "deep" / "knocked.parquet")
    pd.testing.assert_frame_equal(AttentionKnockout.load(path).to_frame(), knocked.to_frame())
    assert repr(knocked) == (
        f"AttentionKnockout({3 * 2 * (2 * N_LAYERS + 1)} runs, clips: 3 of animal; audio -> last, object -> last)"
    )
    with pytest.raises(
        DataError, match="not a table of knockout in generation: it has no column seen_label, text_before"
    ):
        KnockoutGeneration.load(path)
    with pytest.raises(DataError, match="in the table twice"):
        AttentionKnockout(pd.concat([knocked.frame, knocked.frame])).effects()
    with pytest.raises(DataError, match="more than one kind: window 1; window 5"):
        knocked.effects(by=("edge",))
    with pytest.raises(InputError, match="effect is one of probability"):
        knocked.effects(effect="size")
    with pytest.raises(DataError, match="nothing to trace"):
        AttentionKnockout.concat([])


def test_the_picture_shows_every_way_to_choose_layers(knocked):
    figure = knocked.plot("label_probability")
    found = knocked.effects("label_probability")
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["animal (n = 3)\naudio -> last", "animal (n = 3)\nobject -> last"]
    for ax, edge in zip(figure.axes, ("audio -> last", "object -> last"), strict=True):
        lines = {line.get_label(): line for line in ax.lines}
        for kind in ("window 1", "window 5"):
            rows = found[(found.edge == edge) & (found.kind == kind)]
            assert lines[kind].get_xdata().tolist() == rows.layer.tolist() == list(range(N_LAYERS))
            assert lines[kind].get_ydata().tolist() == rows.change.tolist()
        (everywhere,) = found[(found.edge == edge) & (found.kind == "all")].change
        assert set(lines["all"].get_ydata()) == {everywhere}
    assert "probability among the labels" in figure.axes[0].get_ylabel()
    assert f"noise floor of probability {knocked.frame.noise.max():.0e}" in figure.get_suptitle()


def test_the_examples_in_the_docs_run(tiny_lalm, clips):
    text = (Path(__file__).parent.parent / "docs" / "attention.md").read_text(encoding="utf-8")
    names = {"model": tiny_lalm, "samples": clips("animal", 9)[:2]}
    for block in text.split("```python")[1:]:
        exec(block.split("```")[0], names)
    assert len(names["by_layer"]) == 4 * (4 * N_LAYERS + 1)
    assert set(names["accuracy"].edge) == {"audio -> generated"}
    assert "generated" in set(names["while_writing"].frame.region)
    assert repr(names["effects"]).startswith("ObjectEffect(2 clips")
