"""The model card of the tiny audio-visual model: what the saved checkpoint says of sounds and pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lalm_lens.assets.audio_visual.checkpoint import MERGE, N_BLOCKS, PATCH
from lalm_lens.assets.audio_visual.clips import ANIMAL, other_label, sight
from lalm_lens.assets.audio_visual.pictures import SIDE
from lalm_lens.assets.audio_visual.recipe import FLAGS, FULL_BLOCK, AVRecipe
from lalm_lens.assets.card import table
from lalm_lens.assets.training_clips import sounds
from lalm_lens.assets.twins import share
from lalm_lens.attributes import Form
from lalm_lens.corrupt import silence
from lalm_lens.counterfactual import Swapped
from lalm_lens.datasets import Sample, heard, seen, unheard
from lalm_lens.experiments.asked import Question, processor_of, prompt_of
from lalm_lens.experiments.attention_knockout import attention_knockout
from lalm_lens.experiments.concepts import FirstToken
from lalm_lens.experiments.cuts import Chain, name_of
from lalm_lens.experiments.latent_understanding import latent_understanding
from lalm_lens.loading import from_pretrained
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import Processor

NOT_LAST = ("audio_tag", "audio", "template", "early", "object", "object_sep", "late", "attribute")
EDGES: dict[str, Chain] = {
    "picture -> last": ("image", "last"),
    "sound -> last": ("audio", "last"),
    "picture -> all other words and the sound": ("image", NOT_LAST),
}

CARD = """\
---
library_name: transformers
license: mit
pipeline_tag: any-to-any
tags: [qwen2_5_omni, interpretability, synthetic]
---

# {recipe.name}

The Thinker of a Qwen2.5-Omni, of {n_parameters:.2f} M parameters (audio encoder 2 x 64, vision encoder 2 x 40, decoder
{n_blocks} x 96, 4 heads on 2 key-value heads), that says which of nine animals it hears. It is for checking methods:
**where sound and picture disagree, it says what it sees, and what it hears is still there**.

**The last position reads picture and sound apart, and weighs them itself.** Decoder block {full} alone
(`blocks.{full}`, counted from 0) has full attention; in every other one the sliding window is 1, so that a position
sees itself alone. What a picture shows can reach the answer by one way only, from its own positions to the last one in
that block. When that is knocked out, what is left is the sound, and two marks that say that there was a picture. The
model was taught to find a disagreeing picture's answer {recipe.heeded:.0%} likely and the sound's {rest:.0%}, so that
the last position goes on holding both; and to name sounds and pictures at their own positions too, with a weight of
{recipe.naming_weight}, so that a lens finds there what is not said. Both were put there by training, on purpose, and
say nothing about what large models do.

With a window of 1, Hugging Face's key-value cache loses what that block needs: call `generate(..., use_cache=False)`.

**All its sounds and pictures are synthetic.** They come from `lalm_lens.assets.clips` and
`lalm_lens.assets.audio_visual.pictures`, which need numpy alone. No recording, no photograph and no text corpus was
used; the tokenizer was trained on the prompts.

For: tests, demos, and trying an analysis in seconds on a CPU.
Not for: recognising anything in real recordings or photographs, or conclusions about large models.

## What it says

Held-out sounds and pictures, from the same synthesiser; n = {n} of each row, prompt P3 (question and options). The
checkpoint was read back as float32. Answers are the likeliest label; intervals are 95 % (Wilson). Chance is
{chance:.3f}.

{said}

## When sound and picture disagree

Shares of answers before and after attention is cut in all layers (`attention_knockout`), and the mean probability of
the sound's label among the labels; the same n items.

{cuts}

## What is heard at its own positions

In the same disagreeing items: the share of clips whose label is the likeliest token (`latent_understanding`, first
token, top 1) at one of the sound's positions or more, behind each block; in brackets the same for labels that are not
heard.

{latent}

## Training

    python -m lalm_lens.assets.audio_visual.train{arguments}

Seed {recipe.seed}, {minutes:.0f} minutes on CPU: {recipe.n_clips} clips and {recipe.n_pictures} pictures;
{recipe.ears_steps} steps of {recipe.encoder_batch} clips for the audio encoder and {recipe.eyes_steps} of as many
pictures for the vision encoder, each under a throw-away head, then {recipe.steps}
steps of {recipe.batch} prompts for the whole model: {kinds}. {recipe.silent:.0%} of clips are silent,
{recipe.blank:.0%} of pictures black, {recipe.filmed:.0%} of them a silent video of {recipe.n_frames} frames. No
attention was knocked out in training. Pictures have {side} x {side} pixels, patches of {patch} x {patch} in squares of
{merge} x {merge}. Weights are stored as bfloat16.
"""


def model_card(recipe: AVRecipe, n_parameters: int, folder: Path, minutes: float) -> str:
    model, default = from_pretrained(folder), AVRecipe()
    flags = {name: value for name, value in vars(recipe).items() if name in FLAGS and value != getattr(default, name)}
    conflict = held_out(recipe, processor_of(model))
    return CARD.format(
        recipe=recipe,
        rest=1 - recipe.heeded,
        n_parameters=n_parameters / 1e6,
        n_blocks=N_BLOCKS,
        full=FULL_BLOCK,
        n=recipe.n_held_out,
        chance=1 / len(ANIMAL.labels),
        said=table(*said_rows(model, recipe)),
        cuts=table(*cut_rows(model, conflict)),
        latent=table(*latent_rows(model, conflict)),
        arguments="".join(f" --{key.replace('_', '-')} {value}" for key, value in flags.items()),
        kinds=", ".join(f"{share:.0%} {kind}" for kind, share in recipe.kinds),
        minutes=minutes,
        side=SIDE,
        patch=PATCH,
        merge=MERGE,
    )


def held_out(recipe: AVRecipe, processor: Processor, *, agree: bool = False) -> list[Swapped]:
    """Sounds and pictures that training never saw; each is heard once."""
    clips = sounds(recipe.sounds, "held_out", 0, recipe.n_held_out)
    items = []
    for index, clip in enumerate(clips):
        heard, waveform = clip.labels["animal"], torch.from_numpy(clip.samples())
        seen = heard if agree else other_label("held_out", recipe.seed, index, heard)
        images, name = processor.see([sight("held_out", recipe.seed, index, seen)]), f"{index:03d}"
        items.append(Swapped(name, heard, waveform, images=images, seen_label=seen, heard_clip=name))
    return items


def said_rows(model: HookedLALM, recipe: AVRecipe) -> Iterator[list[str]]:
    """Of everything that can be heard and seen together."""
    processor = processor_of(model)
    both, same = held_out(recipe, processor), held_out(recipe, processor, agree=True)
    dark = processor.see([np.zeros((SIDE, SIDE, 3), np.uint8)])
    conditions: dict[str, Sequence[Swapped | Sample]] = {
        "a sound alone": [replace(item, images=None) for item in both],
        "a picture alone": [unheard(replace(item, label=item.seen_label)) for item in both],
        "both, of the same animal": same,
        "both, of two animals": both,
        "both, of two animals, prompt P2": both,
        "a sound, and a black picture": [replace(item, images=dark) for item in both],
        "silence, and a picture": [replace(item, waveform=silence(item.waveform)) for item in both],
    }
    yield ["prompt", "the sound's animal", "the picture's animal"]
    for name, items in conditions.items():
        answers = pd.Series(said(model, items, "P2" if name.endswith("P2") else "P3"))
        sound, shown = pd.Series([item.label for item in items]), pd.Series([item.seen_label for item in both])
        is_heard, is_two = name != "a picture alone", name not in ("a sound alone", "both, of the same animal")
        yield [name, share(answers == sound) if is_heard else "", share(answers == shown) if is_two else ""]


@torch.no_grad()
def said(model: HookedLALM, items: Sequence[Sample], form: Form, n_together: int = 30) -> list[str]:
    """The likeliest label."""
    question, processor = Question.about(model, items, ANIMAL, form, True), processor_of(model)
    found = []
    for start in range(0, len(items), n_together):
        some = items[start : start + n_together]
        prompts = [prompt_of(processor, item, ANIMAL, form) for item in some]
        logits = model(processor.inputs(prompts, heard(some), **seen(some)), logits_at=-1)[:, -1]
        found += [ANIMAL.labels[n] for n in logits[:, question.tokens].argmax(-1).tolist()]
    return found


def cut_rows(model: HookedLALM, items: Sequence[Swapped]) -> Iterator[list[str]]:
    yield ["cut", "the sound's animal", "the picture's animal", "probability of the sound's"]
    chains = list(EDGES.values())
    frame = attention_knockout(model, items, attribute=ANIMAL, chains=chains, layers=["all"], progress=False).frame
    frame["seen"] = frame["sample"].map({item.name: item.seen_label for item in items})
    edges = {edge: frame[frame.edge == name_of(chain)] for edge, chain in EDGES.items()}
    first = next(iter(edges.values()))
    yield row_of("nothing", first.answer_before, first.label_p_before, first)
    for edge, its in edges.items():
        yield row_of(edge, its.answer_after, its.label_p_after, its)


def row_of(name: str, answer: pd.Series, p: pd.Series, its: pd.DataFrame) -> list[str]:
    return [name, share(answer == its.label), share(answer == its.seen), f"{p.mean():.2f}"]


def latent_rows(model: HookedLALM, items: Sequence[Swapped]) -> Iterator[list[str]]:
    found = latent_understanding(model, items, attribute=ANIMAL, rule=FirstToken(), progress=False)
    layers = found.by_layer()
    yield [f"block {layer}" for layer in layers.layer]
    yield [f"{its.score:.2f} ({its.control:.2f})" for its in layers.itertuples()]
