"""TransformerLens' bridge, nnsight and pyvene, each used as its own manual says, in the versions that are pinned."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

from jaxtyping import Float
from torch import Tensor

from benchmarks.forward import bridge
from benchmarks.hf import HF, Change, LastLogits, OneByOne, Resid
from benchmarks.task import Embed


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

        self.model: Any = nnsight.NNsight(twin(hf))
        self.save = nnsight.save

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


def twin(hf: HF) -> HF:
    """A model of its own on the same weights, for a rival that changes the modules it is given."""
    return copy.deepcopy(hf, {id(weight): weight for weight in hf.parameters()})
