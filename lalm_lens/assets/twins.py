"""What models that were told answers say where text and sound disagree, for their model cards."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from lalm_lens.assets.card import table
from lalm_lens.assets.checkpoint import N_BLOCKS
from lalm_lens.assets.recipe import Recipe
from lalm_lens.assets.training_clips import sounds
from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.conflict import FRAMINGS, make_conflict
from lalm_lens.datasets import Sample
from lalm_lens.experiments.asked import Question
from lalm_lens.experiments.attention_knockout import attention_knockout
from lalm_lens.experiments.back_patch import back_patch
from lalm_lens.loading import from_pretrained
from lalm_lens.model import HookedLALM
from lalm_lens.pieces import Order

ORDERS: tuple[Order, ...] = get_args(Order)
BEHIND = ("text_before", "audio_tag", "audio", "template", "early", "object", "object_sep", "late", "attribute", "last")
EDGES = {
    "statement -> last": ("statement", "last"),
    "statement -> all": ("statement", BEHIND),
    "audio -> last": ("audio", "last"),
}
PLACES = {"last": "last", "object": "options"}

TOLD = """
## When text and sound disagree

A text before the clip or behind it states a false label, as `make_conflict` words it ("The speaker's emotion is
happy."); prompt P3, n held-out clips. **Text dominance** is the share of answers that are the text's, among those that
are the text's or the sound's. The other columns are the share of answers that are the sound's: without a text, and with
it once attention is cut in all layers (`attention_knockout`) from the statement to the last position, from the
statement to every position behind it, and from the audio to the last position. Answers are the likeliest label;
intervals are 95 % (Wilson).

{conflict}

How well a linear probe (logistic regression, 5-fold cross-validation, {n} clips) reads which **animal is heard** from
the output of each block (P3), at the last position and from the mean over the options. The stated animal is independent
of the heard one, so chance is {chance:.3f}.

{probes}

**Back-patching** (`back_patch`, one block at a time): the audio's states behind a block are put behind an earlier one.
Of all {n_pairs} pairs, the one under which the text dominates least was chosen on half of the clips and judged on the
other half, of n (`held_out`), and, as published, chosen on the half that it is judged on (`same`). p is that of
McNemar's exact test of text or sound, before and after.

{repairs}
"""


def told(recipe: Recipe, folder: Path) -> str:
    """The part of a model card on texts that state a label; nothing for a model that was never told one."""
    if not recipe.hinted:
        return ""
    model = from_pretrained(folder)
    return TOLD.format(
        conflict=table(*conflict_rows(model, recipe)),
        probes=table(*probe_rows(model, recipe)),
        repairs=table(*repair_rows(model, recipe)),
        n_pairs=N_BLOCKS * (N_BLOCKS - 1) // 2,
        n=recipe.n_held_out_animal,
        chance=1 / len(ATTRIBUTES["animal"].labels),
    )


def held_out(recipe: Recipe, attribute: str, n_speech: int, n_animal: int) -> list[Sample]:
    return [
        Sample(f"{number:03d}", clip.labels[attribute], torch.from_numpy(clip.samples()))
        for number, clip in enumerate(sounds(recipe, "held_out", n_speech, n_animal))
        if attribute in clip.labels
    ]


def conflict_rows(model: HookedLALM, recipe: Recipe) -> Iterator[list[str]]:
    yield ["attribute", "text", "n", "no text", "text dominance", *(f"{name} cut" for name in EDGES)]
    chains = list(EDGES.values())
    for name in tqdm(ATTRIBUTES, "told"):
        samples = held_out(recipe, name, recipe.n_held_out_speech // 6, recipe.n_held_out_animal // 3)
        alone = attention_knockout(model, samples, attribute=name, layers=["all"], progress=False).frame
        for order in ORDERS:
            items = make_conflict(samples, name, conditions=["conflict"], order=order)
            found = attention_knockout(model, items, attribute=name, chains=chains, layers=["all"], progress=False)
            stated = found.frame["sample"].map({item.name: item.text_label for item in items})
            cells = found.frame.assign(stated=stated)
            cuts = [share(its.answer_after == its.label) for _, its in cells.groupby("edge", sort=False)]
            yield [name, order, str(len(samples)), share(alone.right_before), dominance(cells), *cuts]


def dominance(cells: pd.DataFrame) -> str:
    one = cells[cells.edge == cells.edge.iloc[0]]
    decided = one[(one.answer_before == one.label) | (one.answer_before == one.stated)]
    return share(decided.answer_before == decided.stated)


def share(hits: pd.Series) -> str:
    low, high = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return f"{hits.mean():.2f} ({low:.2f} to {high:.2f})"


def probe_rows(model: HookedLALM, recipe: Recipe) -> Iterator[list[str]]:
    yield ["states", "text", *(f"block {block}" for block in range(N_BLOCKS))]
    samples = held_out(recipe, "animal", 0, recipe.n_held_out_animal)
    labels = np.array([sample.label for sample in samples])
    for order in tqdm((None, *ORDERS), "probes"):
        said = samples if order is None else [told_any(sample, n, order) for n, sample in enumerate(samples)]
        for place, its in states_of(model, said).items():
            yield [PLACES[place], order or "none", *(f"{readable(block, labels, recipe.seed):.2f}" for block in its)]


def repair_rows(model: HookedLALM, recipe: Recipe) -> Iterator[list[str]]:
    sides = [f"{what}, {when}" for what in ("text dominance", "the sound's") for when in ("before", "after")]
    yield ["attribute", "text", "chosen on", "source -> target", "n", *sides, "p"]
    for name in tqdm(ATTRIBUTES, "back-patched"):
        samples = held_out(recipe, name, recipe.n_held_out_speech // 6, recipe.n_held_out_animal // 3)
        for order in ORDERS:
            items = make_conflict(samples, name, conditions=["conflict"], order=order)
            found = back_patch(model, items, attribute=name, windows=(1,), places=["audio"], progress=False)
            for _, row in found.summary("tdr").iterrows():
                shares = [row.tdr_before, row.tdr_after, row.accuracy_before, row.accuracy_after]
                pair = f"{row.source} -> {row.target}"
                yield [name, order, row.picked_on, pair, str(row.n), *(f"{x:.2f}" for x in shares), f"{row.tdr_p:.2g}"]


def told_any(sample: Sample, number: int, order: Order) -> Sample:
    """The clip, and a text that states each label equally often of clips of each label."""
    attribute = ATTRIBUTES["animal"]
    n_labels = len(attribute.labels)
    stated = attribute.labels[(number // n_labels) % n_labels]  # held-out clips count through the labels
    return replace(sample, statement=FRAMINGS["statement"].statement(attribute, stated, order))


@torch.no_grad()
def states_of(model: HookedLALM, samples: Sequence[Sample]) -> dict[str, Float[np.ndarray, "layer clip d_model"]]:
    """What blocks put out, at each of `PLACES`."""
    question = Question.about(model, samples, "animal", "P3", True)
    names = [f"blocks.{block}.hook_resid_post" for block in range(N_BLOCKS)]
    found: dict[str, list[Float[np.ndarray, "layer d_model"]]] = {place: [] for place in PLACES}
    for sample in samples:
        run = question.run(sample)
        _, cache = model.run_with_cache(run.inputs, names_filter=names, logits_at=-1)
        states = torch.cat([cache[name] for name in names])
        for place, its in found.items():
            its.append(states[:, run.indices(place)].mean(1).numpy())
    return {place: np.stack(its, axis=1) for place, its in found.items()}


def readable(states: Float[np.ndarray, "clip d_model"], labels: np.ndarray, seed: int) -> float:
    """Accuracy of a linear probe on clips that it was not fitted to."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    return float(cross_val_score(probe, states, labels, cv=KFold(5, shuffle=True, random_state=seed)).mean())
