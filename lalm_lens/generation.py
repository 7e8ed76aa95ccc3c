"""Generation with hooks active: greedy or sampled, with keys and values remembered."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lalm_lens.errors import InputError
from lalm_lens.hooks import NamedHook, StrictHooks
from lalm_lens.nn.kv_cache import KeyValueCache
from lalm_lens.words import Words


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token; the same seed draws the same. `top_k` and `top_p` cut off the unlikely ones."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def warpers(self) -> LogitsProcessorList:
        try:
            warpers = [TemperatureLogitsWarper(float(self.temperature))]
            warpers += [TopKLogitsWarper(self.top_k)] if self.top_k is not None else []
            warpers += [TopPLogitsWarper(self.top_p)] if self.top_p is not None else []
        except ValueError as error:
            raise InputError(f"{self} cannot be drawn from: {error}.") from None
        return LogitsProcessorList(warpers)


class Greedy:
    """The likeliest token."""

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
        return logits.argmax(-1)


class Drawn:
    """A token drawn from the distribution, as transformers draws it."""

    def __init__(self, sampling: Sampling, device: torch.device):
        self.warpers = sampling.warpers()
        self.generator = torch.Generator(device).manual_seed(sampling.seed)

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
        wide: Any = logits.float()
        nothing: Any = torch.empty(len(logits), 0, dtype=torch.long)  # the warpers ignore the tokens before
        p = self.warpers(nothing, wide).softmax(-1)
        return torch.multinomial(p, 1, generator=self.generator)[:, 0]


@dataclass(frozen=True, repr=False)
class Generated:
    """What a model wrote after its prompts, one row for each; what comes after a stop token is padding."""

    tokens: Int[Tensor, "batch new_pos"]
    log_probs: Float[Tensor, "batch new_pos"] = field(repr=False)  # of each token, given all before it
    is_token: Bool[Tensor, "batch new_pos"] = field(repr=False)  # False on padding; True on the stop token itself
    texts: tuple[str, ...] | None = None  # without special tokens; None without a tokenizer

    def __repr__(self) -> str:
        return f"Generated({list(self.texts) if self.texts else self.tokens.tolist()})"


class Generates(StrictHooks, Words):
    """A decoder that can go on from where it stopped."""

    stop_tokens: tuple[int, ...] = ()  # what ends an answer, from the checkpoint's generation_config.json

    def advance(self, inputs: Any, kv_cache: KeyValueCache) -> Float[Tensor, "batch d_vocab"]:
        """Logits at the last position, after the cache has taken in the inputs; does not look at hooks."""
        raise NotImplementedError

    def advance_by(self, tokens: Int[Tensor, " batch"], kv_cache: KeyValueCache) -> Float[Tensor, "batch d_vocab"]:
        """The same for one token of text on each row."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        inputs: Any,
        max_new_tokens: int = 50,
        *,
        sampling: Sampling | None = None,
        stop_tokens: Iterable[int] | None = None,
        fwd_hooks: Iterable[NamedHook] = (),
        progress: bool = False,
    ) -> Generated:
        """Let the model write after its prompts, greedily unless `sampling` says how to draw.

        `inputs` is what the model itself takes: `Inputs`, text, tokens. A row ends at one of `stop_tokens`, which are
        by default the checkpoint's own. Hooks, those in `fwd_hooks` and those already attached, fire in every step on
        the positions which that step computes: all of the prompt first, then one at a time. `hook.ctx["offset"]` is the
        position, counted with padding, of the first of them, so `Patch(...).hook()` acts in the one step that computes
        its positions. The encoder runs in the first step alone. Final norm and logits are computed at the last
        position only. Raises `HookError` for a hook that the first step would not pass, `InputError` for a prompt that
        leaves no room.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is 1 or more; got {max_new_tokens}.")
        stops = torch.tensor([*(self.stop_tokens if stop_tokens is None else stop_tokens)], dtype=torch.long)
        pick = Greedy() if sampling is None else Drawn(sampling, torch.device(self.cfg.device or "cpu"))
        kv_cache, steps = KeyValueCache(n_more=max_new_tokens - 1), []
        with self.hooks(fwd_hooks=self.by_name(fwd_hooks, self.live(inputs) if fwd_hooks else set())):
            self.refuse_silent_hooks(inputs)
            logits = self.advance(inputs, kv_cache)
            if kv_cache.n_pos + max_new_tokens > self.cfg.n_ctx:
                raise InputError(
                    f"The prompt has {kv_cache.n_pos} positions and this model {self.cfg.n_ctx}, so there is no room "
                    f"for {max_new_tokens} new tokens."
                )
            going = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
            for step in tqdm(range(max_new_tokens), "generating", unit="token", disable=not progress):
                if step:
                    logits = self.advance_by(steps[-1][0], kv_cache)
                tokens = pick(logits).where(going, torch.tensor(self.pad_token))
                log_p = logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
                steps.append((tokens, log_p.where(going, 0.0), going))
                going = going & ~torch.isin(tokens, stops.to(tokens.device))
                if not going.any():
                    break
        tokens, log_probs, is_token = (torch.stack(column, dim=1) for column in zip(*steps, strict=True))
        texts = self.tokenizer and tuple(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))
        return Generated(tokens, log_probs, is_token, texts or None)
