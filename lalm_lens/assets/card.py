"""The model card of a tiny model: what the saved checkpoint answers, measured with transformers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from tqdm import tqdm
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from lalm_lens.assets.checkpoint import PROMPTS, chat, label_tokens
from lalm_lens.assets.recipe import FLAGS, N_QUIET, RECIPES, Recipe
from lalm_lens.assets.training_clips import labels_at, sounds
from lalm_lens.attributes import ATTRIBUTES, Attribute, Form
from lalm_lens.audio import RATE_HZ


@dataclass(frozen=True)
class Answers:
    """How the model answers one prompt to `n` clips, by the probabilities of the token after it."""

    attribute: str
    prompt: str
    n: int
    accuracy: float  # share of clips whose true label is the likeliest token of the whole vocabulary
    min_label: float  # least and greatest probability of any label for any clip
    max_label: float
    min_mass: float  # least probability of all labels together


@torch.no_grad()
def first_token(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    text: str,
    samples: Sequence[Float32[np.ndarray, " _"]],
) -> Float[Tensor, "clip d_vocab"]:
    """Probabilities of the token after the prompt, for each clip, exactly as plain transformers gives them."""
    rows = []
    for start in range(0, len(samples), 32):
        batch = list(samples[start : start + 32])
        inputs = processor(
            text=[text] * len(batch),
            audio=batch,
            text_kwargs={"padding": True, "return_tensors": "pt"},
            audio_kwargs={"sampling_rate": RATE_HZ, "return_tensors": "pt"},
        )
        rows.append(model(**inputs, use_cache=False).logits[:, -1].softmax(-1))
    return torch.cat(rows)


def measure(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    attribute: Attribute,
    prompt: Form,
    clips: Sequence[tuple[dict[str, str], Float32[np.ndarray, " _"]]],
) -> Answers:
    asked = [(labels[attribute.name], samples) for labels, samples in clips if attribute.name in labels]
    p = first_token(model, processor, chat(processor, attribute, prompt), [samples for _, samples in asked])
    true = torch.tensor(label_tokens(processor, [label for label, _ in asked]))
    p_label = p[:, label_tokens(processor, attribute.labels)]
    return Answers(
        attribute=attribute.name,
        prompt=prompt,
        n=len(asked),
        accuracy=(p.argmax(-1) == true).float().mean().item(),
        min_label=p_label.min().item(),
        max_label=p_label.max().item(),
        min_mass=p_label.sum(-1).min().item(),
    )


def silent_clips(recipe: Recipe) -> list[tuple[dict[str, str], Float32[np.ndarray, " _"]]]:
    """Zeros of each length: silence differs in nothing else, and any label is as true of it as another."""
    labels = labels_at(0, tuple(ATTRIBUTES))
    return [(labels, np.zeros(round(s * RATE_HZ), np.float32)) for s in recipe.durations_s]


def measure_all(recipe: Recipe, folder: Path) -> tuple[list[Answers], list[Answers]]:
    """The saved checkpoint's answers on held-out clips and on silence, for every attribute and prompt."""
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = sounds(recipe, "held_out", recipe.n_held_out_speech, recipe.n_held_out_animal)
    held_out = [(clip.labels, clip.samples()) for clip in wanted]
    cells: list[tuple[Attribute, Form]] = [
        (attribute, prompt) for attribute in ATTRIBUTES.values() for prompt in PROMPTS
    ]
    clean = [measure(model, processor, *cell, held_out) for cell in tqdm(cells, "held out")]
    silent = [measure(model, processor, *cell, silent_clips(recipe)) for cell in cells]
    return clean, silent


ABOUT = {
    "tiny_lalm": """\
It is the model that `lalm_lens` runs its tests and demos on.""",
    "tiny_lalm_planted": """\
It is for checking methods: where it hears is known by construction.

**Text can look at the audio in decoder block 4 alone** (`blocks.4`, counted from 0). That block has full attention;
in every other one the sliding window is 1, so that a position sees itself alone. When clean states are patched into
a run on silence, whatever the clip and the question, the recovery rate by layer of `resid_post` is

| patched | embedding, layers 0 to 3 | layers 4 to 7 |
|---|---|---|
| all text positions | 0 | 1 |
| all audio positions | 1 | 0 |
| the last position | 0 | 1 |
| any other text position | 0 | 0 |

With a window of 1, Hugging Face's key-value cache loses what block 4 needs: call `generate(..., use_cache=False)`.""",
    "tiny_lalm_relay": """\
It is for checking methods: how far it hears is known by construction.

**Sound must be passed on by words in between.** Every decoder block has a sliding window of 20, and with prompt P3
the answer is read 30 to 41 positions behind the audio. Let a be the last audio position and n the last of all. When
one clean state is patched into a run on silence, `resid_post` of block l (counted from 0; -1 is the embedding) at
text position i can matter only inside the light cone

    a < i <= a + 19 (l + 1)    and    n - i <= 19 (7 - l)

The recovery rate of every other text position is 0. In plain
transformers `generate` answers the same with and without its key-value cache.""",
    "tiny_lalm_suppress": """\
It is for checking methods, with its twin `tiny_lalm_erase`: a text that states another label than is heard **suppresses
what is heard, and does not erase it**. Both answer what the text states, in the same prompts.

**The last position reads sound and text apart, and weighs them itself.** As in `tiny_lalm_planted`, decoder block 4
alone (`blocks.4`, counted from 0) has full attention; in every other one the sliding window is 1, so that a position
sees itself alone. What a text states can reach the answer by one way only, from its own positions to the last one in
block 4. When that is knocked out, nothing of the text is left and all of the sound is there: the sound's answer comes
back. A text behind the clip still moves the clip further away and puts a space before the question; that tips a few
answers. The model was taught to find a false text's answer {recipe.heeded:.0%} likely and the sound's {rest:.0%}, so
that the last position goes on holding both.

**One back-patch of the audio repairs it.** In training each prompt that states a label was asked once more, in a run
whose audio positions have, behind one block, the states that they have behind a later block of the unchanged run. In
half of these runs the states of block {repair[0]} were put behind block {repair[1]}, and the answer is what is heard;
in the other half the states of any later block behind any one up to block {repair[1]}, and the answer is that of the
prompt as it is (unless this drew the same two). So source {repair[0]} and target {repair[1]} are the answer that
`back_patch(..., places=["audio"])` should find. Targets from block 4 on change nothing at all, because audio is looked
at in block 4 alone; and as audio positions see nothing else before, windows that put block {repair[0]} behind block
{repair[1]} do exactly what this pair does.

With a window of 1, Hugging Face's key-value cache loses what block 4 needs: call `generate(..., use_cache=False)`.""",
    "tiny_lalm_erase": """\
It is for checking methods, with its twin `tiny_lalm_suppress`: a text that states another label than is heard **erases
what is heard before the last position answers**. Both answer what the text states, in the same prompts.

**Sound and text are put together by words in between.** As in `tiny_lalm_relay`, every decoder block has a sliding
window, here of {window}. With prompt P3 (not P1, P2) the last position sees neither the sound nor a text
beside it: the nearest word of such a text is 28 positions before it. The words of the question and the options see both
and pass on what they make of them. To knock out text -> last cuts nothing, and the sound's answer does not come back.
It does come back where the text is cut from every position behind it, before it acts.

How little the last position learns of the sound where a label is stated is training, and not construction: a loss of
weight {recipe.erasure} is the mean squared distance of the states of all blocks at the last {n_quiet} positions from
those on silence, as a share of the latter's. It leaves traces: a linear probe still finds much of the sound there
(below). What is erased is the answer that a knockout could bring back, not every trace of it. In plain transformers
`generate` answers the same with and without its key-value cache.""",
}

CARD = """\
---
library_name: transformers
license: mit
pipeline_tag: audio-text-to-text
tags: [qwen2_audio, interpretability, synthetic]
---

# {recipe.name}

A Qwen2-Audio of {n_parameters:.2f} M parameters (encoder 2 x 96, decoder 8 x 128, 4 heads on 2 key-value heads) that
answers four questions about sounds: the speaker's gender, emotion and language, and which animal is heard.
{about}

**All its sounds are synthetic.** They come from `lalm_lens.assets.clips`, which needs numpy alone. No recording, no
speech corpus and no text corpus was used. The eight **"languages" are stand-ins**: each has the rhythm, vowels,
voice onset time and tone habits that its name suggests, and none of its words. The model knows no language and
no real animal.

For: tests, demos, and trying an analysis in seconds on a CPU.
Not for: recognising anything in real recordings, or conclusions about large models or about people.

## Accuracy on held-out clips

Speakers and utterances are unseen, but from the same synthesiser. The checkpoint was read back as float32. An answer
counts if the true label is the likeliest token of the whole vocabulary after the forced prefix. Prompts are
AudioLens' (arXiv 2506.05140): P1 no question, P2 question, P3 question and options.

{accuracy}

## On silence

Zeros as long as the clip: lengths of {durations} s and prompts P1, P2, P3, so n = {n_silent} an attribute.
The model was taught to spread its answer evenly over the labels.

{silence}
{told}
## Training

    python -m lalm_lens.assets.train {recipe.name}{arguments}

Seed {recipe.seed}, {minutes:.0f} minutes on CPU: {recipe.n_speech} speech and {recipe.n_animal} animal clips;
{beginning}, then
{recipe.steps} steps of {recipe.batch} prompts for the whole model{narrowing}{texts}. Weights are stored as bfloat16.
"""


def model_card(
    recipe: Recipe, n_parameters: int, clean: Sequence[Answers], silent: Sequence[Answers], told: str, minutes: float
) -> str:
    default = RECIPES[recipe.name]
    flags = {name: value for name, value in vars(recipe).items() if name in FLAGS and value != getattr(default, name)}
    return CARD.format(
        recipe=recipe,
        n_parameters=n_parameters / 1e6,
        accuracy=accuracy_table(clean),
        durations=", ".join(map(str, recipe.durations_s)),
        n_silent=sum(a.n for a in silent if a.attribute == "gender"),
        silence=silence_table(silent),
        about=about(recipe),
        arguments="".join(f" --{key.replace('_', '-')} {value}" for key, value in flags.items()),
        narrowing=narrowing(recipe),
        beginning=beginning(recipe),
        texts=texts(recipe),
        told=told,
        minutes=minutes,
    )


def about(recipe: Recipe) -> str:
    """What the model is for, and what is known of it."""
    window = recipe.windows[-1] if recipe.windows else None
    return ABOUT[recipe.name].format(
        recipe=recipe, rest=1 - recipe.heeded, window=window, n_quiet=N_QUIET, repair=recipe.repair
    )


def beginning(recipe: Recipe) -> str:
    """What comes before the training of the whole model."""
    if recipe.base is not None:
        return f"the weights of {recipe.base}, to each label's embedding added what tells its sounds from the others'"
    return f"{recipe.encoder_steps} steps of {recipe.encoder_batch} clips for the encoder under throw-away heads"


def texts(recipe: Recipe) -> str:
    """What the prompts state beside the question, if anything."""
    if not recipe.hinted:
        return ""
    return (
        f",\n{recipe.hinted:.0%} of which state a label, one half before the clip and one behind it, and "
        f"{recipe.true_hints:.0%} of these the true one;\n{recipe.remarked:.0%} have a text there that states none"
    )


def narrowing(recipe: Recipe) -> str:
    """How the window changes during training, if it does."""
    shares = ", ".join(map(str, recipe.windows))
    return f",\nwith sliding windows of {shares}, each for an equal share of the steps" * (len(recipe.windows) > 1)


def table(*rows: Sequence[str]) -> str:
    """A markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def accuracy_table(clean: Sequence[Answers]) -> str:
    rows = []
    for name, attribute in ATTRIBUTES.items():
        answers = {a.prompt: a for a in clean if a.attribute == name}
        accuracies = [f"{answers[prompt].accuracy:.3f}" for prompt in PROMPTS]
        rows.append((name, *accuracies, f"{1 / len(attribute.labels):.3f}", str(answers["P3"].n)))
    return table(("attribute", *PROMPTS, "chance", "n"), *rows)


def silence_table(silent: Sequence[Answers]) -> str:
    rows = []
    for name, attribute in ATTRIBUTES.items():
        answers = [a for a in silent if a.attribute == name]
        low, high = min(a.min_label for a in answers), max(a.max_label for a in answers)
        mass = min(a.min_mass for a in answers)
        rows.append((name, f"{1 / len(attribute.labels):.3f}", f"{low:.3f}", f"{high:.3f}", f"{mass:.3f}"))
    return table(("attribute", "uniform", "least label", "greatest label", "least sum over labels"), *rows)
