"""What every layer would answer if it were the last: its states through the final norm and the unembedding.

Eq. 1 of arXiv 2506.05140, with the final norm, which its released code applies too. Layer l is the residual stream
after block l, from 0 on; -1 is the merged embedding. One forward gives all layers: each is read out where it arises, so
neither states nor the logits of more than a few positions are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from lalm_lens.attributes import Attribute, Form
from lalm_lens.datasets import Sample, heard, seen
from lalm_lens.engine.branches import indexed
from lalm_lens.engine.plan import ran_out, usual_budget
from lalm_lens.errors import InputError
from lalm_lens.experiments.asked import prompt_of
from lalm_lens.inputs import Embedded, Inputs
from lalm_lens.interventions import Knockout, NamedHook
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import Processor, Prompt
from lalm_lens.runs import Positions, Run
from lalm_lens.shapes import at_least_float32, typed
from lalm_lens.transformer import HookedTransformer

AT_ONCE = 2**25  # logits: 128 MiB in float32


class Words(NamedTuple):
    """What some states say of some tokens: first those that were asked for, then the largest of the vocabulary."""

    token: Int[Tensor, "*layer at word"]
    logit: Float[Tensor, "*layer at word"]
    log_prob: Float[Tensor, "*layer at word"]  # over the whole vocabulary
    rank: Int[Tensor, "*layer at word"]  # in the vocabulary: 0 for the largest logit


@dataclass(frozen=True)
class Reading:
    """How states are read: `norm` is the final one; `embed` puts the merged embedding before the first layer."""

    tokens: tuple[int, ...] = ()
    top_k: int = 0
    norm: bool = True
    embed: bool = False

    def check(self, model: HookedTransformer) -> None:
        """Raise `InputError` for tokens that there are not, and for nothing to read."""
        d_vocab = model.decoder_cfg.d_vocab
        if wrong := [token for token in self.tokens if not 0 <= token < d_vocab]:
            raise InputError(f"There are {d_vocab} tokens, counted from 0; got {wrong}.")
        if not 0 <= self.top_k <= d_vocab or not (self.tokens or self.top_k):
            raise InputError(f"Read some tokens, or the top_k of {d_vocab}, 1 or more; got top_k={self.top_k}.")

    def scores(self, model: HookedTransformer, states: Float[Tensor, "at d_model"]) -> Float[Tensor, "at d_vocab"]:
        return unembedded(model, states, self.norm)

    def names(self, n_layers: int) -> list[str]:
        return ["hook_embed"] * self.embed + [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]


@typed
def lens(
    model: HookedTransformer,
    inputs: Inputs | Embedded,
    where: Bool[Tensor, "batch pos"],
    reading: Reading,
    *,
    fwd_hooks: Sequence[NamedHook] = (),
) -> Words:
    """What every layer says at the positions `where`, row by row of the batch: [layer, at, word]. One forward.

    `fwd_hooks` change the run that is read. Raises `InputError` for logits that are not finite.
    """
    reading.check(model)
    found: list[Words] = []

    def look(state: Float[Tensor, "batch pos d_model"], hook: HookPoint) -> None:
        found.append(said(model, state[where.to(state.device)], reading))

    n_layers = model.decoder_cfg.n_layers
    hooks = [*fwd_hooks, *((name, look) for name in reading.names(n_layers))]
    with torch.no_grad():
        model.run_with_hooks(inputs.to(model.device), fwd_hooks=hooks, stop_at_layer=n_layers)
    return Words(*(torch.stack(its).cpu() for its in zip(*found, strict=True)))


def said(model: HookedTransformer, states: Float[Tensor, "at d_model"], reading: Reading) -> Words:
    """A part of the states at a time: a large vocabulary at many positions is more than there is room for."""
    size = max(1, AT_ONCE // model.decoder_cfg.d_vocab)
    parts = [words(reading.scores(model, part), reading) for part in states.to(model.device).split(size)]
    return Words(*map(torch.cat, zip(*parts, strict=True)))


def unembedded(
    model: HookedTransformer, states: Float[Tensor, "at d_model"], norm: bool
) -> Float[Tensor, "at d_vocab"]:
    logits = model.unembed(model.ln_final(states[None]) if norm else states[None])[0]
    if not logits.isfinite().all():
        raise InputError(f"A layer's logits are not finite in {logits.dtype}. Load the model as bfloat16 or float32.")
    return at_least_float32(logits)


def words(logits: Float[Tensor, "at d_vocab"], reading: Reading) -> Words:
    asked = torch.tensor(reading.tokens, dtype=torch.long, device=logits.device).expand(len(logits), -1)
    token = torch.cat([asked, logits.topk(reading.top_k).indices], dim=-1)
    logit = logits.gather(-1, token)
    rank = torch.stack([(logits > each[:, None]).sum(-1) for each in logit.unbind(-1)], dim=-1)
    return Words(token, logit, logit - logits.logsumexp(-1, keepdim=True), rank)


# --- many clips ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A clip, what is asked about it, and the positions of the prompt, from 0 on, that are read."""

    sample: Sample
    prompt: Prompt
    at: tuple[int, ...]

    @classmethod
    def of(
        cls, processor: Processor, sample: Sample, attribute: Attribute, form: Form, *positions: Positions
    ) -> "Asked":
        if sample.is_heard:
            processor.check_audible(sample.waveform, sample.name)
        prompt = prompt_of(processor, sample, attribute, form)
        run = run_of(prompt)
        if not positions:
            raise InputError('Nothing is read: name one place or more, as ("audio",).')
        return cls(sample, prompt, tuple(sorted({index for its in positions for index in run.indices(its)})))


def run_of(prompt: Prompt) -> Run:
    """The prompt alone, which knows its positions, and hears nothing."""
    tokens = torch.tensor([prompt.tokens])
    return Run(Inputs(tokens, torch.ones_like(tokens, dtype=torch.bool)), prompt)


def read_all(
    model: HookedLALM,
    processor: Processor,
    asked: Sequence[Asked],
    reading: Reading,
    knockouts: Sequence[Knockout],
    token_budget: int | None,
    bar: tqdm,
) -> list[Words]:
    """What is said of each clip, in their order: [layer, at, word]. Clips go through the model together as far as
    `token_budget` lets them, those of like length first; where memory runs out, it is halved."""
    budget = usual_budget(model) if token_budget is None else token_budget
    if budget < 1:
        raise InputError(f"A token budget is a whole number from 1 on; got {token_budget}.")
    found: dict[int, Words] = {}
    waiting = sorted(range(len(asked)), key=lambda n: len(asked[n].prompt))
    while waiting:
        together = [asked[n] for n in waiting[: n_together(asked, waiting, budget)]]
        try:
            its = read_together(model, processor, together, reading, knockouts)
        except RuntimeError as error:
            if not ran_out(error) or len(together) == 1:
                raise
            budget = max(1, len(together) * len(together[-1].prompt) // 2)
            continue
        found |= dict(zip(waiting, its, strict=False))
        waiting = waiting[len(together) :]
        bar.update(len(together))
    return [found[n] for n in range(len(asked))]


def n_together(asked: Sequence[Asked], waiting: Sequence[int], budget: int) -> int:
    """How many of the next have room, padded to the longest of them; at least one."""
    fitting = (n for n, which in enumerate(waiting) if (n + 1) * len(asked[which].prompt) > budget)
    return max(1, next(fitting, len(waiting)))


def read_together(
    model: HookedLALM,
    processor: Processor,
    asked: Sequence[Asked],
    reading: Reading,
    knockouts: Sequence[Knockout],
) -> Iterator[Words]:
    prompts = [each.prompt for each in asked]
    samples = [each.sample for each in asked]
    inputs = processor.inputs(prompts, heard(samples), **seen(samples))
    where = torch.zeros_like(inputs.attention_mask)
    for row, each in enumerate(asked):
        where[row, torch.tensor(each.at) + where.shape[1] - len(each.prompt)] = True
    hooks = [hook for knockout in knockouts for hook in hooks_of(model, knockout, prompts)]
    said_together = lens(model, inputs, where, reading, fwd_hooks=hooks)
    parts = [its.split([len(each.at) for each in asked], dim=1) for its in said_together]
    return (Words(*its) for its in zip(*parts, strict=True))


def hooks_of(model: HookedLALM, knockout: Knockout, prompts: Sequence[Prompt]) -> list[NamedHook]:
    """A knockout in a left-padded batch, in each row at that prompt's own positions. A transcript may be empty: then
    there is nothing to cut."""
    n_pos = max(map(len, prompts))
    rows = {
        row: placed(model, knockout, prompt, n_pos - len(prompt))
        for row, prompt in enumerate(prompts)
        if knockout.keys != "transcript" or run_of(prompt).has("transcript")
    }

    def close(scores: Float[Tensor, "batch head query_pos key_pos"], hook: HookPoint) -> Tensor:
        its = (rows[row].apply(scores[[row]], hook) if row in rows else scores[[row]] for row in range(len(prompts)))
        return torch.cat(list(its))

    return [(f"blocks.{layer}.attn.hook_attn_scores", close) for layer in knockout.layers]


def placed(model: HookedLALM, knockout: Knockout, prompt: Prompt, n_pad: int) -> Knockout:
    its = indexed(knockout, run_of(prompt), model)
    assert isinstance(its, Knockout)
    queries, keys = (tuple(n + n_pad for n in where) for where in (its.queries_at, its.keys_at))
    return replace(its, queries=queries, keys=keys)


def told(knockouts: Sequence[Knockout]) -> str:
    """In words, for a table: what cannot look at what."""
    return "; ".join(map(told_one, knockouts)) or "none"


def told_one(knockout: Knockout) -> str:
    heads = "" if knockout.heads is None else f", heads {of_numbers(knockout.heads)}"
    queries, keys = (its if isinstance(its, str) else of_numbers(its) for its in (knockout.queries, knockout.keys))
    return f"{queries} without {keys}, layers {of_numbers(knockout.layers)}{heads}"


def of_numbers(numbers: Sequence[int]) -> str:
    whole = list(numbers)
    is_run = len(whole) > 2 and whole == list(range(whole[0], whole[-1] + 1))
    return f"{whole[0]} to {whole[-1]}" if is_run else ", ".join(map(str, whole))
