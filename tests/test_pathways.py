"""Pathways: TransformerLens' attribution, plain hooks, identities of circuits, and a model with a known layer."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch.testing import assert_close
from transformer_lens.tools.analysis import attribution_patching

from lalm_lens.assets import TINY_LALM_PLANTED
from lalm_lens.assets.clips import write_clips
from lalm_lens.attribution import EVERYWHERE, Contrast, Node, attribution, node_scores, nodes_of, only
from lalm_lens.corrupt import Silence
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.engine.plan import run_branches
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.circuits import Circuits, circuits
from lalm_lens.experiments.contrasts import Contrasts, task_of
from lalm_lens.experiments.pathways import Pathways, overlap, pathways
from lalm_lens.loading import from_pretrained
from lalm_lens.readouts import Logits

pytestmark = pytest.mark.numbers

PLANTED = 4
HOW = {"attribute": "gender", "progress": False}


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    return read_folder(write_clips(tmp_path_factory.mktemp("clips"), "gender", 2, seed=3))


@pytest.fixture(scope="module")
def contrast(tiny_lalm, samples) -> Contrast:
    """One clip against another."""
    question = Question.about(tiny_lalm, samples, "gender", "P3", True)
    male, female = (question.run(its) for its in samples[:2])
    return Contrast(male, female, *question.tokens)


@pytest.fixture(scope="module")
def ends(tiny_lalm, contrast) -> tuple[float, float]:
    with torch.no_grad():
        return tuple(
            float(contrast.metric(tiny_lalm(run.inputs)[0, -1])) for run in (contrast.clean, contrast.corrupted)
        )


def measured(model, contrast: Contrast, branches) -> torch.Tensor:
    values = run_branches(model, branches, Logits(tokens=(contrast.answer, contrast.rival))).values[:, 0]
    return values[:, 0] - values[:, 1]


# --- attribution ------------------------------------------------------------------------------------------------


def test_one_gradient_is_transformer_lens_attribution(tiny_lalm, contrast):
    bound = tiny_lalm.bind(contrast.clean.inputs, contrast.corrupted.inputs)
    theirs = attribution_patching.attribution_patch(bound, *bound.tokens, lambda its: contrast.metric(its[0, -1]))
    ours = attribution(tiny_lalm, contrast, ig_steps=1)
    for node, score in theirs.node_scores.items():
        at = ours[node.hook_name][node.position]
        assert float(at if node.head is None else at[node.head]) == pytest.approx(score, rel=1e-3, abs=1e-5)
    whole = Counter()
    for node, score in theirs.node_scores.items():
        whole[node.kind, node.layer, node.head] += score
    nodes = [Node("head", 2, 3), Node("mlp", 5), Node("mlp", 0, None, "audio"), Node("resid", 7, None, "last")]
    scores = node_scores(ours, contrast.clean, nodes)
    assert float(scores[0]) == pytest.approx(whole["attn_head_out", 2, 3], rel=1e-3, abs=1e-5)
    assert float(scores[1]) == pytest.approx(whole["mlp_out", 5, None], rel=1e-3, abs=1e-5)
    audio = contrast.clean.region("audio")
    some = [s for n, s in theirs.node_scores.items() if (n.kind, n.layer) == ("mlp_out", 0) and n.position in audio]
    assert float(scores[2]) == pytest.approx(sum(some), rel=1e-3, abs=1e-5)
    assert all(parameter.grad is None for parameter in tiny_lalm.parameters())


def test_steps_through_the_embeddings_add_up_to_the_difference(tiny_lalm, contrast, ends):
    """What integrated gradients promise; and what they are: means over runs in between, by torch alone."""
    gap = ends[0] - ends[1]
    by_steps = {n: attribution(tiny_lalm, contrast, ig_steps=n, resid=False) for n in (1, 3, 8)}
    errors = {n: abs(float(its["hook_embed"].sum()) - gap) for n, its in by_steps.items()}
    assert errors[8] < 0.1 * gap
    assert errors[8] < errors[1]
    clean, corrupted = (tiny_lalm.embed_inputs(run.inputs) for run in (contrast.clean, contrast.corrupted))
    delta, gradient = (clean.embed - corrupted.embed).detach(), torch.zeros_like(clean.embed)
    for n in range(3):
        embed = (corrupted.embed.detach() + n / 3 * delta).requires_grad_()
        contrast.metric(tiny_lalm(replace(clean, embed=embed))[0, -1]).backward()
        gradient += embed.grad / 3
    tiny_lalm.zero_grad(set_to_none=True)
    assert_close(by_steps[3]["hook_embed"], (delta * gradient).sum(-1)[0], rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="ig_steps is 1 or more"):
        attribution(tiny_lalm, contrast, ig_steps=0)


def test_a_small_change_does_what_is_attributed_to_it(tiny_lalm, contrast):
    """With states a thousandth of the way to the clean ones, by plain hooks."""
    scores = attribution(tiny_lalm, contrast, ig_steps=1)
    with torch.no_grad():
        _, clean = tiny_lalm.run_with_cache(contrast.clean.inputs)
        base = contrast.metric(tiny_lalm(contrast.corrupted.inputs).double()[0, -1])
        for node in (Node("head", 0, 2), Node("mlp", 3), Node("resid", 2, None, "last")):
            at = list(contrast.clean.indices(node.positions(contrast.clean)))
            patch = node.patch(contrast.corrupted, contrast.clean)

            def nudge(state, hook, at=at, head=node.head):
                moved = torch.zeros_like(state)
                where = (0, at) if head is None else (0, at, head)
                moved[where] = (clean[hook.name] - state)[where]
                return state + 1e-2 * moved

            logits = tiny_lalm.run_with_hooks(contrast.corrupted.inputs, fwd_hooks=[(patch.name, nudge)])
            change = 100 * (contrast.metric(logits.double()[0, -1]) - base)
            assert float(change) == pytest.approx(
                float(node_scores(scores, contrast.clean, [node])), rel=0.15, abs=0.02
            )


def test_runs_of_other_regions_are_no_contrast(tiny_lalm, samples, contrast):
    short = replace(samples[0], waveform=samples[0].waveform[:16_000])
    run = Question.about(tiny_lalm, samples, "gender", "P3", True).run(short)
    with pytest.raises(InputError, match="Give clips of one length"):
        Contrast(contrast.clean, run, 1, 2)


# --- circuits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regions", ["all", "each"])
def test_no_node_is_the_corrupted_run_and_every_node_the_clean_one(tiny_lalm, contrast, ends, regions):
    names = list(dict.fromkeys(position.region for position in contrast.clean.prompt.positions))
    every = nodes_of(tiny_lalm, ("head", "mlp"), [EVERYWHERE] if regions == "all" else names)
    assert len(every) == 8 * 5 * (1 if regions == "all" else len(names))
    nothing, everything = measured(tiny_lalm, contrast, [only(contrast, its, every) for its in ([], every)])
    assert float(everything) == pytest.approx(ends[0], abs=1e-4)
    assert float(nothing) == pytest.approx(ends[1], abs=1e-3)


def test_a_circuit_is_what_plain_hooks_leave_of_the_clean_run(tiny_lalm, contrast):
    every = nodes_of(tiny_lalm, ("head", "mlp"), [EVERYWHERE])
    circuit = {Node("head", 0, 1), Node("head", 0, 3), Node("mlp", 0), Node("mlp", 1), Node("head", 1, 2)}
    with torch.no_grad():
        _, corrupted = tiny_lalm.run_with_cache(contrast.corrupted.inputs)

        def replaced(state, hook):
            layer, changed = int(hook.name.split(".")[1]), state.clone()
            if hook.name.endswith("hook_z"):
                heads = [head for head in range(4) if Node("head", layer, head) not in circuit]
                changed[:, :, heads] = corrupted[hook.name][:, :, heads]
            elif Node("mlp", layer) not in circuit:
                changed = corrupted[hook.name]
            return changed

        names = [f"blocks.{n}.{its}" for n in range(8) for its in ("attn.hook_z", "hook_mlp_out")]
        expected = tiny_lalm.run_with_hooks(contrast.clean.inputs, fwd_hooks=[(name, replaced) for name in names])
    found = measured(tiny_lalm, contrast, [only(contrast, circuit, every)])
    assert_close(found[0], contrast.metric(expected[0, -1]), rtol=1e-4, atol=1e-4)


def test_overlaps_are_counted_and_chance_is_that_of_draws():
    nodes = [Node("mlp", n) for n in range(12)]
    rng = np.random.default_rng(0)
    assert overlap(nodes, nodes, 4)["jaccard"] == 1
    assert overlap(nodes, nodes[::-1], 6)["jaccard"] == 0
    half = overlap(nodes, [*nodes[2:], *nodes[:2]], 4)  # 0 1 2 3 and 2 3 4 5
    assert half["n_shared"] == 2
    assert half["jaccard"] == pytest.approx(2 / 6)
    drawn = np.array([len({*rng.permutation(12)[:4]} & {*range(4)}) for _ in range(20_000)])
    assert half["expected"] == pytest.approx((drawn / (8 - drawn)).mean(), abs=0.005)
    assert half["p"] == pytest.approx((drawn >= 2).mean(), abs=0.01)


# --- the experiment ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    return from_pretrained(TINY_LALM_PLANTED)


@pytest.fixture(scope="module")
def paths(planted, samples) -> Pathways:
    """Text and clip in one prompt."""
    return pathways(planted, samples, within="conflict", ig_steps=2, n_exact=None, **HOW)


def test_each_modality_goes_over_its_own_region_to_the_layer_that_looks(paths):
    """In the planted model the last position looks back in block 4 alone."""
    maps = paths.map(n_resamples=50).set_index(["modality", "region", "layer"]).recovery.sort_index()
    drawn = paths.lines().set_index(["line", "layer"]).recovery
    assert drawn["audio: audio"].tolist() == maps["audio", "audio"].tolist()
    for modality, region in (("text", "statement"), ("audio", "audio")):
        assert maps[modality, region].loc[: PLANTED - 1].tolist() == pytest.approx([1] * PLANTED, abs=0.02)
        assert maps[modality, "last"].loc[PLANTED:].tolist() == pytest.approx([1] * 4, abs=0.02)
    for modality, region in (("text", "audio"), ("audio", "statement"), ("audio", "early")):
        assert maps[modality, region].tolist() == pytest.approx([0] * 8, abs=1e-3)
    rows = paths.frame[(paths.frame.component == "head") & (paths.frame.modality == "audio")]
    by_layer = rows.groupby("layer").exact.apply(lambda its: its.abs().max())
    assert (by_layer[PLANTED] > 10 * by_layer.drop(PLANTED)).loc[PLANTED + 1 :].all()


def test_rows_are_what_the_tasks_say(planted, samples, paths):
    contrasts = Contrasts.of(
        "gender",
        "statement",
        form="P3",
        within="conflict",
        order="audio_first",
        corruption=Silence(),
        label_space=True,
        states=None,
        seed=0,
    )
    heard = {(task.sample.name, task.modality): task for task in contrasts.tasks(planted, samples[:1])}
    assert {its for _, its in heard} == {"text", "audio"}
    text = heard[samples[0].name, "text"]
    assert (text.answer, text.rival, text.corrupted_by) == ("female", "male", "stated male")
    statement = [p.token for p in text.contrast.clean.prompt.positions if p.region == "statement"]
    assert "".join(statement) == "The speaker's gender is female."
    audio = heard[samples[0].name, "audio"]
    assert (audio.answer, audio.corrupted_by) == ("male", "silence")
    assert audio.contrast.clean.inputs.tokens.tolist() == text.contrast.clean.inputs.tokens.tolist()
    rows = paths.frame[(paths.frame["sample"] == samples[0].name) & (paths.frame.modality == "text")]
    assert rows.m_clean.unique().tolist() == pytest.approx([text.m_clean])
    scores = attribution(planted, text.contrast, ig_steps=2)
    for row in rows.iloc[[0, 17, 35, 60]].to_dict("records"):
        node = Node(row["component"], row["layer"], None if pd.isna(row["head"]) else row["head"], row["region"])
        assert float(node_scores(scores, text.contrast.clean, [node])) == pytest.approx(row["attribution"], rel=1e-3)
        branch = [replace(only(text.contrast, [], []), run=text.contrast.corrupted)]
        branch = [replace(its, changes=(node.patch(its.run, text.contrast.clean),)) for its in branch]
        change = float(measured(planted, text.contrast, branch)) - text.m_corrupted
        assert row["exact"] == pytest.approx(change, abs=1e-3)


def test_the_rival_is_another_label_even_where_nothing_is_corrupted(tiny_lalm, samples, contrast):
    question = Question.about(tiny_lalm, samples, "gender", "P3", True)
    for label, status in (("male", "corrupted_right"), ("female", "clean_wrong")):
        task = task_of(question, samples[0], "audio", label, "itself", contrast.clean, contrast.clean)
        assert {task.answer, task.rival} == {"male", "female"}
        assert task.m_clean == task.m_corrupted != 0
        assert task.status == status
    kept = task_of(question, samples[0], "audio", "male", "the other", contrast.clean, contrast.corrupted)
    assert (kept.status, kept.rival) == ("kept", "female")


def test_circuits_are_the_largest_and_agreement_is_a_correlation(paths):
    rows = paths.frame[(paths.frame.component != "resid") & (paths.frame.modality == "audio")]
    means = rows.groupby(["component", "layer", "head"], dropna=False).attribution.mean()
    largest = means.abs().sort_values(ascending=False).index[:3]
    circuit = paths.circuit("audio", 3)
    assert [(its.component, its.layer) for its in circuit] == [(component, layer) for component, layer, _ in largest]
    assert len(set(paths.circuit("audio", 40))) == 40
    assert paths.overlap([1, 40, 41]).k.tolist() == [1, 40]
    assert paths.overlap([40]).jaccard.tolist() == paths.overlap([40]).expected.tolist() == [1.0]
    with pytest.raises(InputError, match="has 40 heads and MLPs"):
        paths.circuit("text", 41)
    heads = rows[rows.component == "head"]
    found = paths.agreement(n_resamples=50).set_index(["modality", "component"]).loc[("audio", "head")]
    for name, test in (("pearson", pearsonr), ("spearman", spearmanr)):
        each = [test(its.attribution, its.exact).statistic for _, its in heads.groupby("sample")]
        assert found[name] == pytest.approx(np.mean(each))
    assert found.pearson > 0.7


def test_a_modality_keeps_its_answer_with_its_own_circuit(planted, samples, paths, tmp_path):
    found = circuits(
        planted, samples[:1], paths, ks=(0, 10, 40), n_random=1, within="conflict", corruption=Silence(), **HOW
    )
    rows = found.faithfulness("choosing", n_resamples=50).set_index(["task", "circuit", "k"]).faithfulness
    for task in ("text", "audio"):
        for circuit in ("text", "audio", "random"):
            assert rows[task, circuit, 0] == pytest.approx(0, abs=0.02)
            assert rows[task, circuit, 40] == pytest.approx(1, abs=0.02)
    assert rows["audio", "audio", 10] > rows["audio", "random", 10]
    frame = found.frame
    assert len(frame) == 1 * 2 * (2 + 1) * 3
    one = frame[(frame.modality == "audio") & (frame.circuit == "audio") & (frame.k == 10)]
    ratio = (one.m_circuit - one.m_corrupted).mean() / (one.m_clean - one.m_corrupted).mean()
    assert rows["audio", "audio", 10] == pytest.approx(ratio)
    assert frame.is_chosen_by.all()
    path = found.save(tmp_path / "circuits.parquet")
    pd.testing.assert_frame_equal(Circuits.load(path).to_frame(), found.to_frame())
    left, right = found.plot("choosing").axes
    assert left.get_title().startswith("the answer is read (n = 1)")
    assert len(right.lines) == 3 + 2
    with pytest.raises(DataError, match="of the within 'conflict', and circuits are asked for of 'alone'"):
        circuits(planted, samples, paths, **HOW)


def test_clips_that_chose_the_circuits_do_not_tell_how_good_they_are():
    rows = [
        {"sample": sample, "modality": task, "circuit": "text", "k": k, "m_circuit": k * good, "is_chosen_by": chosen}
        for task in ("text", "audio")
        for sample, chosen, good in (("a", True, 1.0), ("b", True, 0.9), ("c", False, 0.2), ("d", False, 0.4))
        for k in (0, 1)
    ]
    about = dict.fromkeys(["model", "attribute", "form", "within", "framing", "answer", "rival", "corrupted_by"], "m")
    frame = pd.DataFrame(rows).assign(**about, label_space=True, status="kept", n_nodes=1, m_clean=1.0, m_corrupted=0.0)
    found = Circuits.concat([frame])
    for on, share in (("held_out", 0.3), ("choosing", 0.95)):
        its = found.faithfulness(on, n_resamples=50)
        assert its[its.k == 1].faithfulness.tolist() == pytest.approx([share] * 2)
        assert set(its.clips) == {on}
        assert set(its.n) == {2}
    pd.testing.assert_frame_equal(found.faithfulness(), found.faithfulness("held_out"))
    each = found.faithfulness("each", n_resamples=50).set_index(["clips", "task", "k"]).faithfulness
    assert each["held_out", "text", 1] == pytest.approx(0.3)
    assert each["choosing", "audio", 1] == pytest.approx(0.95)
    assert "2 clips that did not choose the circuits" in repr(found)
    with pytest.raises(DataError, match="No clip of the table did not choose the circuits"):
        Circuits(found.frame[found.frame.is_chosen_by]).faithfulness()
    assert "2 clips that chose the circuits" in repr(Circuits(found.frame[found.frame.is_chosen_by]))


def test_the_table_and_its_pictures(paths, tmp_path):
    path = paths.save(tmp_path / "paths.parquet")
    pd.testing.assert_frame_equal(Pathways.load(path).to_frame(), paths.to_frame())
    assert repr(paths).startswith("Pathways(tiny_lalm_planted, gender; audio: ")
    maps = paths.plot("map").axes[:2]
    recovered = paths.map(n_resamples=2)
    for ax, modality in zip(maps, ("text", "audio"), strict=True):
        grid = recovered[recovered.modality == modality].pivot(index="layer", columns="region", values="recovery")
        names = [label.get_text().replace(" ", "_") for label in ax.get_xticklabels()]
        np.testing.assert_allclose(ax.images[0].get_array(), grid[names])
    nodes = paths.plot("nodes").axes[0].images[0].get_array()
    means = paths.nodes().set_index(["modality", "component", "layer"]).attribution
    assert nodes[3, 4] == pytest.approx(means["text", "mlp", 3])
    (ax,) = paths.plot("overlap").axes
    assert list(ax.lines[0].get_ydata()) == paths.overlap(range(1, 41)).jaccard.tolist()


def test_tasks_that_fail_are_told_and_left_out_on_request(paths):
    one = paths.frame.assign(status=np.where(paths.frame.modality == "audio", "kept", "clean_wrong"))
    with pytest.raises(DataError, match="No answer is kept that comes from the text"):
        _ = Pathways(one).kept
    assert Pathways(one).counts().to_dict("list") == {"kept": [2, 0], "clean_wrong": [0, 2], "corrupted_right": [0, 0]}
    some = paths.frame.assign(status=np.where(paths.frame["sample"] == paths.frame["sample"][0], "kept", "clean_wrong"))
    assert Pathways(some).kept.frame["sample"].nunique() == 1
    assert Pathways(some).counts().kept.tolist() == [1, 1]
    mixed = Pathways(pd.concat([paths.frame, paths.frame.assign(ig_steps=1)]))
    with pytest.raises(DataError, match="more than one ig_steps"):
        mixed.map()
