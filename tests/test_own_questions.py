"""Stimuli that each have a question and texts of their own: what is read of each, beside one forward for each."""

import json

import numpy as np
import pytest
import torch

from lalm_lens.alme import read_alme
from lalm_lens.conflict import ConflictItem, make_conflict
from lalm_lens.datasets import Sample, read_folder
from lalm_lens.errors import DataError, InputError
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.back_patch import back_patch
from lalm_lens.experiments.convergence import compared, convergence
from lalm_lens.experiments.pathways import pathways
from lalm_lens.experiments.probe import probe
from lalm_lens.experiments.suppression import suppression

QUIET = {"progress": False}
LAST = 7  # layer
STIMULI = [  # the question, its choices, and of these the answer and what the text says in its place
    ("What animal is heard?", ["cat", "dog"], "cat", "dog"),
    ("Which animal is it?", ["cow", "dog", "pig"], "dog", "pig"),
    ("What animal makes the sound?", ["frog", "cow"], "cow", "frog"),
    ("What animal is there?", ["hen", "pig", "frog", "cat"], "pig", "cat"),
]


@pytest.fixture(scope="module")
def clips(folders) -> list[Sample]:
    return read_folder(folders["animal"])


@pytest.fixture(scope="module")
def items(clips, folders, tmp_path_factory) -> list[ConflictItem]:
    rows = [
        {
            "stimulus_id": f"{n}",
            "audio_path": clip.name,
            "ref_text": f"It is a {answer}.",
            "conflict_text": f"It is a {stated}.",
            "question": {
                "question_text": question,
                "choices": choices,
                "correct_answer": answer,
                "conflict_answer": stated,
                "flip_type": "noun",
            },
        }
        for n, (clip, (question, choices, answer, stated)) in enumerate(zip(clips, STIMULI, strict=False))
    ]
    path = tmp_path_factory.mktemp("alme") / "stimuli.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return read_alme(path, folders["animal"], framing="statement")


def of(items: list[ConflictItem], condition: str) -> list[ConflictItem]:
    found = [item for item in items if item.condition == condition]
    assert len(found) == len(STIMULI)
    return found


def said(model, item: ConflictItem) -> tuple[Question, torch.Tensor]:
    """The labels' log-probabilities among the labels, of one forward."""
    question = Question.about(model, [item], item.attribute, "P3", True)
    with torch.no_grad():
        logits = model(question.run(item).inputs, logits_at=-1)[0, -1]
    return question, logits[question.tokens].double().log_softmax(-1)


def test_suppression_is_read_with_each_question(tiny_lalm, items):
    found = suppression(tiny_lalm, items, **QUIET)
    assert len(found.frame) == 4 * 4 * 2 * 8
    ends = found.frame[(found.frame.place == "last") & (found.frame.layer == LAST)].set_index(["clip", "run"])
    for condition in ("conflict", "audio_only"):
        for item, conflict in zip(of(items, condition), of(items, "conflict"), strict=True):
            question, log_p = said(tiny_lalm, item)
            row = ends.loc[(item.source.name, condition)]
            assert row.predicted == question.labels[int(log_p.argmax())]
            for side in ("audio", "text"):
                label = getattr(conflict, f"{side}_label")
                assert row[f"log_p_{side}"] == pytest.approx(float(log_p[question.labels.index(label)]), abs=2e-4)
            assert row.n_labels == len(question.labels)
    its = found.verdict(n_resamples=50)
    assert its["chance"] == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 2, 1 / 4]))
    with pytest.raises(DataError, match="No item is in conflict"):
        suppression(tiny_lalm, of(items, "aligned"), **QUIET)


def test_back_patching_asks_each_question(tiny_lalm, items):
    how = {"sources": (LAST,), "targets": (2,), "windows": (1,), "n_choosing": 2}
    table = back_patch(tiny_lalm, of(items, "conflict"), **how, **QUIET)
    assert len(table.frame) == 4 * 2
    for item in of(items, "conflict"):
        question, log_p = said(tiny_lalm, item)
        rows = table.frame[table.frame["sample"] == item.name]
        assert set(rows.place) == {"audio", "control"}
        p = float(log_p.exp()[question.labels.index(item.label)])
        assert rows.label_p_before.tolist() == pytest.approx([p] * 2, rel=1e-3)
        assert set(rows.answer_before) == {question.labels[int(log_p.argmax())]}
    assert table.chosen().n_clips == 2
    assert table.summary(n_resamples=20).n.tolist() == [2] * 4


def test_twins_of_stimuli_are_compared(tiny_lalm, items):
    found = convergence(tiny_lalm, items, n_permutations=9, **QUIET)
    states: dict[str, list[np.ndarray]] = {"audio_only": [], "text_only": []}
    for condition, its in states.items():
        for item in of(items, condition):
            run = Question.about(tiny_lalm, [item], item.attribute, "P3", True).run(item)
            _, cache = tiny_lalm.run_with_cache(run.inputs, names_filter=f"blocks.{LAST}.hook_resid_post")
            its.append(cache["resid_post", LAST][0, -1].detach().numpy())
    labels = [item.label for item in of(items, "audio_only")]
    expected = compared(*map(np.stack, states.values()), labels, n_permutations=9)
    rows = found.frame[found.frame.layer == LAST]
    assert rows["sample"].tolist() == [item.source.name for item in of(items, "audio_only")]
    for name in ("cosine", "mismatched", "cka"):
        assert rows[name].tolist() == pytest.approx(expected[name].tolist(), rel=1e-3, abs=1e-4)
    assert (rows.attribute.unique().tolist(), rows.text_only.unique().tolist()) == (["noun"], ["no_audio"])
    with pytest.raises(DataError, match="Twins are one item audio_only and one text_only"):
        convergence(tiny_lalm, items[1:], **QUIET)


def test_probes_read_prompts_with_each_question(tiny_lalm, items):
    both = of(items, "conflict") + of(items, "audio_only")
    targets = [item.condition for item in both]
    how = {"targets": targets, "stacks": ["decoder"], "n_folds": 2, "n_controls": 0}
    found = probe(tiny_lalm, both, **how, **QUIET)
    assert found.layers().n.tolist() == [8] * 9
    assert found.frame.attribute.unique().tolist() == ["noun"]
    assert set(found.frame.target) == {"conflict", "audio_only"}


def test_what_has_no_question_or_no_pathway_is_refused_in_a_line(tiny_lalm, clips, items):
    for experiment in (suppression, back_patch, convergence, probe):
        with pytest.raises(InputError, match="Name an attribute, or give items of make_conflict"):
            experiment(tiny_lalm, clips, **QUIET)
    for its in (of(items, "conflict"), make_conflict(clips, "animal", conditions=["conflict"])):
        with pytest.raises(DataError, match="has a text of its own, and pathways need texts that state each label"):
            pathways(tiny_lalm, its, attribute="animal", **QUIET)
