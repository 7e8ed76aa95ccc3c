"""transformers' own model, driven in three ways, and what every way of computing the map has in common."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2AudioForConditionalGeneration, Qwen2ForCausalLM

from benchmarks.task import Embed, Patches

HF = Qwen2AudioForConditionalGeneration
Rival = Callable[[Embed, Embed, Patches, int], Float[Tensor, " patch"]]
Resid = Float[Tensor, "1 pos d_model"]
Logits = Float[Tensor, "*row d_vocab"]


class Change(NamedTuple):
    layer: int
    position: int
    value: Float[Tensor, "1 d_model"]

    def put(self, resid: Resid) -> Resid:
        resid[:, self.position] = self.value
        return resid


class OneByOne(ABC):
    """A forward for each patch."""

    def __call__(self, clean: Embed, corrupt: Embed, patches: Patches, token: int) -> Float[Tensor, " patch"]:
        states = self.states(clean)
        self.last_logits(corrupt)  # the answer that recovery is measured from
        return log_probabilities(
            token,
            (self.last_logits(corrupt, Change(layer, at, states[layer][:, at])) for layer, at in patches),
        )

    @abstractmethod
    def states(self, embed: Embed) -> list[Resid]:
        """resid_post of every block."""

    @abstractmethod
    def last_logits(self, embed: Embed, change: Change | None = None) -> Float[Tensor, " d_vocab"]:
        """What the model answers, changed or as it is."""


class PlainHooks(OneByOne):
    """torch's own hooks on the transformers model."""

    def __init__(self, hf: HF):
        self.hf, self.layers = hf, hf.model.language_model.layers

    def states(self, embed: Embed) -> list[Resid]:
        kept: list[Resid] = []
        with hooked((layer, lambda module, inputs, output: kept.append(output)) for layer in self.layers):
            self.last_logits(embed)
        return kept

    def last_logits(self, embed: Embed, change: Change | None = None) -> Float[Tensor, " d_vocab"]:
        with hooked([(self.layers[change.layer], lambda module, inputs, output: change.put(output))] if change else []):
            return self.forward(embed)

    def forward(self, embed: Embed) -> Float[Tensor, " d_vocab"]:
        return self.hf(inputs_embeds=embed, use_cache=False).logits[0, -1]


class LastLogits(PlainHooks):
    """The same, with the last position alone unembedded.

    Qwen2-Audio's own class ignores `logits_to_keep` (transformers 5.23), so this calls the language model inside it.
    """

    def __init__(self, hf: HF):
        super().__init__(hf)
        self.lm = causal_lm(hf)

    def forward(self, embed: Embed) -> Float[Tensor, " d_vocab"]:
        return self.lm(inputs_embeds=embed, use_cache=False, logits_to_keep=1).logits[0, -1]


class Clever:
    """transformers as a careful user drives it: the keys and values before the first patch are computed once, the
    positions of one layer are the rows of a batch, and the last position alone is unembedded."""

    def __init__(self, hf: HF):
        self.plain, self.lm, self.layers = LastLogits(hf), causal_lm(hf), hf.model.language_model.layers

    def __call__(self, clean: Embed, corrupt: Embed, patches: Patches, token: int) -> Float[Tensor, " patch"]:
        states, prefix = self.plain.states(clean), DynamicCache()
        self.lm(inputs_embeds=corrupt, past_key_values=prefix, use_cache=True, logits_to_keep=1)
        first = min((at for _, at in patches), default=corrupt.shape[1])
        prefix.crop(first - corrupt.shape[1])
        repeated = cache(lambda n: repeat(prefix, n))
        rows = []
        for layer, group in groupby(patches, key=lambda patch: patch[0]):
            at = torch.tensor([position for _, position in group], device=corrupt.device)
            with hooked([(self.layers[layer], put_rows(at - first, states[layer][0, at]))]):
                rows.append(self.suffix(corrupt[:, first:].expand(len(at), -1, -1), repeated(len(at))))
        return log_probabilities(token, rows)

    def suffix(self, embeds: Float[Tensor, "row pos d_model"], prefix: DynamicCache) -> Float[Tensor, "row d_vocab"]:
        """Last logits. The prefix comes back as it was."""
        logits = self.lm(inputs_embeds=embeds, past_key_values=prefix, use_cache=True, logits_to_keep=1).logits
        prefix.crop(-embeds.shape[1])
        return logits[:, -1]


def log_probabilities(token: int, logits: Iterable[Logits]) -> Float[Tensor, " patch"]:
    """Of the token, in float32. Each row of logits is let go before the next is computed."""
    found = [row.float().log_softmax(-1)[..., token].reshape(-1) for row in logits]
    return torch.cat(found) if found else torch.empty(0)


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def put_rows(at: Tensor, values: Float[Tensor, "row d_model"]) -> Callable[..., None]:
    """A hook that changes one position in each row of a batch, another in each."""

    def hook(module: nn.Module, inputs: Any, output: Float[Tensor, "row pos d_model"]) -> None:
        output[torch.arange(len(at), device=at.device), at] = values

    return hook


def repeat(prefix: DynamicCache, n: int) -> DynamicCache:
    repeated = copy.deepcopy(prefix)
    repeated.batch_repeat_interleave(n)
    return repeated


def causal_lm(hf: HF) -> Qwen2ForCausalLM:
    """The language model inside, as the class that it would be without ears."""
    with torch.device("meta"):
        lm = Qwen2ForCausalLM(hf.model.language_model.config)
    lm.model, lm.lm_head = hf.model.language_model, hf.lm_head
    return lm.eval()
