"""All weights of a decoder under TransformerLens' names, and what its tools compute from them."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig

from lalm_lens.errors import InputError
from lalm_lens.nn.block import DecoderBlock
from lalm_lens.nn.embed import Embed, Unembed
from lalm_lens.nn.norm import RMSNorm
from lalm_lens.words import Words

ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
MLP = ("W_in", "W_gate", "W_out", "b_in", "b_out")


def _stacked(part: str, name: str) -> property:
    """A weight of all blocks, [layer, ...]: a copy, unlike the views of one block."""
    return property(lambda self: torch.stack([getattr(getattr(block, part), name) for block in self.blocks]))


class NamedWeights(Words):
    """What a decoder knows of its own weights."""

    cfg: TransformerBridgeConfig
    embed: Embed
    blocks: nn.ModuleList
    ln_final: RMSNorm
    unembed: Unembed

    W_E = property(lambda self: self.embed.W_E)  # [d_vocab, d_model], a view
    W_U = property(lambda self: self.unembed.W_U)  # [d_model, d_vocab], a view
    b_U = property(lambda self: self.unembed.b_U)  # [d_vocab]
    W_Q, W_K, W_V, W_O, b_Q, b_K, b_V, b_O = (_stacked("attn", name) for name in ATTENTION)
    W_in, W_gate, W_out, b_in, b_out = (_stacked("mlp", name) for name in MLP)

    @property
    def each_block(self) -> list[DecoderBlock]:
        return [block for block in self.blocks if isinstance(block, DecoderBlock)]

    def tokens_to_residual_directions(self, tokens: str | int | Int[Tensor, "*at"]) -> Float[Tensor, "*at d_model"]:
        """The direction of the residual stream whose dot product with its normalised state is the token's logit.

        It holds the final norm's weight, `ln_final.w * W_U[:, token]`, because that norm is not folded away: so
        `ActivationCache.logit_attrs` adds up to the logit.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        if isinstance(tokens, Tensor) and tokens.numel() == 1:  # TransformerLens counts on no axis then
            tokens = int(tokens)
        directions = self.W_U[:, tokens]
        return self.ln_final.w * (rearrange(directions, "d_model ... -> ... d_model"))

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """What the output biases of the blocks before `layer` have added to the residual stream; with `mlp_input`, that
        block's attention too."""
        if not 0 <= layer + mlp_input <= len(self.blocks):
            raise InputError(f"layer = {layer}, but this model has {len(self.blocks)} blocks.")
        biases = [block.attn.b_O for block in self.each_block[: layer + mlp_input]]
        if include_mlp_biases:
            biases += [block.mlp.b_out for block in self.each_block[:layer]]
        return torch.stack(biases).sum(0) if biases else self.ln_final.w.new_zeros(self.cfg.d_model)

    def blocks_with(self, part: str) -> list[tuple[int, nn.Module]]:
        """The blocks that have a part of that name, such as `attn`, with their indices."""
        return [(layer, block) for layer, block in enumerate(self.blocks) if part in dict(block.named_children())]

    def tl_parameters(self) -> dict[str, Tensor]:
        """Every weight of the decoder under TransformerLens' names, in its shapes.

        Views, but for `W_K W_V b_K b_V` where query heads share keys and values: those are repeated for each query
        head, so that the index of a head means the same in all of them.
        """
        parameters: dict[str, Tensor] = {"embed.W_E": self.W_E, "unembed.W_U": self.W_U, "unembed.b_U": self.b_U}
        for layer, block in enumerate(self.each_block):
            parameters |= {f"blocks.{layer}.ln1.w": block.ln1.w, f"blocks.{layer}.ln2.w": block.ln2.w}
            for name in ATTENTION:
                weight = getattr(block.attn, name)
                shared = name in ("W_K", "W_V", "b_K", "b_V") and len(weight) < self.cfg.n_heads
                parameters[f"blocks.{layer}.attn.{name}"] = (
                    weight.repeat_interleave(self.cfg.n_heads // len(weight), dim=0) if shared else weight
                )
            parameters |= {f"blocks.{layer}.mlp.{name}": getattr(block.mlp, name) for name in MLP}
        return parameters | {"ln_final.w": self.ln_final.w}
