"""Ways to compute the same causal map, each with the same signature.

    rival(clean, corrupt, patches, token) -> log-probability of the token at the last position, for each patch

Every rival also does the two base runs, which give the clean states and the corrupted answer; with no patches it does
those alone. The peers are used as their own manuals say, in the versions that are pinned in constraints.txt.
"""

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

from benchmarks.forward import bridge
from benchmarks.task import Embed, Patches
from lalm_lens.loading import from_hf

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


class Bridge(OneByOne):
    """TransformerLens' wrapper of the transformers model."""

    def __init__(self, hf: HF):
        self.model = bridge(twin(hf))
        self.names = [f"blocks.{layer}.hook_resid_post" for layer in range(len(hf.model.language_model.layers))]

    def states(self, embed: Embed) -> list[Resid]:
        _, kept = self.model.run_with_cache(embed, names_filter=self.names)
        return [kept[name] for name in self.names]

    def last_logits(self, embed: Embed, change: Change | None = None) -> Float[Tensor, " d_vocab"]:
        hooks: list[tuple[Any, Callable]] = []
        if change:
            hooks.append((self.names[change.layer], lambda resid, hook: change.put(resid)))
        return self.model.run_with_hooks(embed, fwd_hooks=hooks)[0, -1]


class NNsight(OneByOne):
    def __init__(self, hf: HF):
        import nnsight  # pyright: ignore[reportMissingImports]  in the extra `bench`

        self.model, self.save = nnsight.NNsight(twin(hf)), nnsight.save

    def states(self, embed: Embed) -> list[Resid]:
        layers = self.model.model.language_model.layers
        with self.model.trace(inputs_embeds=embed, use_cache=False):
            kept = self.save([layer.output for layer in layers])
        return kept

    def last_logits(self, embed: Embed, change: Change | None = None) -> Float[Tensor, " d_vocab"]:
        layers = self.model.model.language_model.layers
        with self.model.trace(inputs_embeds=embed, use_cache=False):
            if change:
                layers[change.layer].output[:, change.position] = change.value
            last = self.model.output.logits[0, -1].save()
        return last


class Pyvene(LastLogits):
    """pyvene knows Qwen2 and not Qwen2-Audio, so it gets the language model; its hooks, and all logits."""

    def __init__(self, hf: HF):
        super().__init__(twin(hf))
        self.at_layer = cache(self.intervenable)  # made once for each layer, as for a loop over positions

    def intervenable(self, layer: int) -> Any:
        import pyvene  # pyright: ignore[reportMissingImports]  in the extra `bench`

        swap = {"layer": layer, "component": "block_output", "intervention_type": pyvene.VanillaIntervention}
        return pyvene.IntervenableModel([swap], model=self.lm)

    def forward(self, embed: Embed) -> Float[Tensor, " d_vocab"]:
        return self.lm(inputs_embeds=embed, use_cache=False).logits[0, -1]

    def last_logits(self, embed: Embed, change: Change | None = None) -> Float[Tensor, " d_vocab"]:
        if change is None:
            return self.forward(embed)
        _, changed = self.at_layer(change.layer)(
            {"inputs_embeds": embed},
            unit_locations={"base": change.position},
            source_representations=change.value[:, None],
            use_cache=False,
        )
        return changed.logits[0, -1]


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


def ours_plain(hf: HF) -> Rival:
    """Hooks on our model, from the block that is patched on, with the last position alone unembedded."""
    model = from_hf(hf)
    names = [f"blocks.{layer}.hook_resid_{at}" for layer in range(model.cfg.n_layers) for at in ("pre", "post")]

    def run(clean: Embed, corrupt: Embed, patches: Patches, token: int) -> Float[Tensor, " patch"]:
        cleans, corrupts = (
            model.run_with_cache(embed, names_filter=names, logits_at=-1)[1] for embed in (clean, corrupt)
        )

        def last_logits(layer: int, at: int) -> Float[Tensor, " d_vocab"]:
            name = f"blocks.{layer}.hook_resid_post"
            change = Change(layer, at, cleans[name][:, at])
            return model.run_with_hooks(
                corrupts["resid_pre", layer],
                start_at_layer=layer,
                logits_at=-1,
                fwd_hooks=[(name, lambda resid, hook: change.put(resid))],
            )[0, -1]

        return log_probabilities(token, (last_logits(*patch) for patch in patches))

    return run


def ours_hooks(hf: HF) -> Rival:
    """FILL IN: the map by `lalm_lens.engine`'s hooks executor, on `from_hf(hf)`."""
    raise NotImplementedError("the hooks executor is not wired in yet")


def ours_sweep(hf: HF) -> Rival:
    """FILL IN: the map by `lalm_lens.engine`'s sweep, on `from_hf(hf)`."""
    raise NotImplementedError("the sweep is not wired in yet")


class Entry(NamedTuple):
    title: str
    build: Callable[[HF], Rival]
    whole: bool = False  # fast enough to be timed on the whole map


RIVALS = {
    "bridge": Entry("TransformerLens bridge", Bridge),
    "nnsight": Entry("nnsight", NNsight),
    "pyvene": Entry("pyvene", Pyvene),
    "hooks": Entry("plain hooks on HF", PlainHooks),
    "hooks-again": Entry("plain hooks on HF, again", PlainHooks),
    "last-logits": Entry("plain hooks on HF, last logits only", LastLogits),
    "clever": Entry("HF with cached prefix, batched, last logits only", Clever, whole=True),
    "ours-plain": Entry("lalm_lens, run_with_hooks from the patched block on", ours_plain),
    "ours-hooks": Entry("lalm_lens, hooks executor", ours_hooks),
    "ours-sweep": Entry("lalm_lens, sweep", ours_sweep, whole=True),
}


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


def twin(hf: HF) -> HF:
    """A model of its own on the same weights, for a rival that changes the modules it is given."""
    return copy.deepcopy(hf, {id(weight): weight for weight in hf.parameters()})


def causal_lm(hf: HF) -> Qwen2ForCausalLM:
    """The language model inside, as the class that it would be without ears."""
    with torch.device("meta"):
        lm = Qwen2ForCausalLM(hf.model.language_model.config)
    lm.model, lm.lm_head = hf.model.language_model, hf.lm_head
    return lm.eval()
