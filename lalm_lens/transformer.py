"""`HookedTransformer`: a decoder on TransformerLens' hook points, under TransformerLens' names."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import send_to_device
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.config.transformer_lens_config import TransformerLensConfig
from transformer_lens.hook_points import HookPoint

from lalm_lens.bridge_config import bridge_config, decoder_config
from lalm_lens.config import DecoderConfig, EncoderConfig, MRope, VisionConfig
from lalm_lens.errors import InputError, LensError
from lalm_lens.generation import Generates
from lalm_lens.named_weights import NamedWeights
from lalm_lens.nn.attention import causal_mask
from lalm_lens.nn.block import DecoderBlock
from lalm_lens.nn.embed import Embed, Unembed
from lalm_lens.nn.kv_cache import KeyValueCache, Memory
from lalm_lens.nn.norm import RMSNorm
from lalm_lens.nn.rope import rotary_of
from lalm_lens.offload import held
from lalm_lens.placement import Placement
from lalm_lens.shapes import typed

At = int | slice | Int[Tensor, " at"] | None  # positions; None is all
Positions = Int[Tensor, "batch pos"] | Int[Tensor, "3 batch pos"]  # what is rotated by: one axis, or three


SWITCHES = {  # hook points that are off at first, and what switches them on
    "attn.hook_result": "use_attn_result",
    "attn.hook_attn_in": "use_attn_in",
    "attn.hook_q_input": "use_split_qkv_input",
    "attn.hook_k_input": "use_split_qkv_input",
    "attn.hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
}


class HookedTransformer(Generates, NamedWeights):
    """A decoder whose every activation can be cached and replaced.

    Hook points: `hook_embed`, `blocks.{l}.hook_resid_pre/mid/post`, `blocks.{l}.hook_attn_out/mlp_out`,
    `blocks.{l}.attn.hook_q/k/v/rot_q/rot_k/attn_scores/pattern/z`,
    `blocks.{l}.mlp.hook_pre/pre_linear/post`, `blocks.{l}.ln1/ln2.hook_scale/hook_normalized`, `ln_final.hook_*`;
    once switched on, `blocks.{l}.attn.hook_result/attn_in/q_input/k_input/v_input` and `blocks.{l}.hook_mlp_in`.
    """

    placement: Placement | None = None  # where the weights of a model lie that was loaded with a device_map

    def __init__(self, cfg: DecoderConfig | TransformerLensConfig, name: str | None = None):
        """From our own config, or from one of TransformerLens'; then the weights are random, as it says."""
        super().__init__()
        theirs = cfg if isinstance(cfg, TransformerLensConfig) else None
        self.switched: frozenset[str] = frozenset()
        self.decoder_cfg = decoder_config(cfg) if isinstance(cfg, TransformerLensConfig) else cfg
        self.cfg = bridge_config(self.decoder_cfg, name or getattr(theirs, "model_name", "custom"))
        self.embed = Embed(self.decoder_cfg.d_vocab, self.decoder_cfg.d_model)
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        self.rotary = rotary_of(self.decoder_cfg)
        self.blocks = nn.ModuleList(DecoderBlock(self.decoder_cfg) for _ in range(self.decoder_cfg.n_layers))
        self.ln_final = RMSNorm(self.decoder_cfg.d_model, self.decoder_cfg.eps)
        self.unembed = Unembed(self.decoder_cfg.d_model, self.decoder_cfg.d_vocab)
        self.tie()
        self.setup()
        if theirs:
            self.follow(theirs)

    def follow(self, theirs: TransformerLensConfig) -> None:
        """Random weights, switches, device and type as a TransformerLens config asks for them."""
        draw_weights(self, getattr(theirs, "initializer_range", -1.0), getattr(theirs, "seed", None))
        self.cfg.default_prepend_bos = theirs.default_prepend_bos
        for switch in sorted(set(SWITCHES.values())):
            if getattr(theirs, switch, False):
                getattr(self, f"set_{switch}")(True)
        self.to(device=theirs.device, dtype=theirs.dtype)

    def tie(self) -> None:
        """Let the unembedding be the embedding, where the config says so."""
        if self.decoder_cfg.tied:
            self.unembed.linear.weight = self.embed.table.weight

    @typed
    def forward(
        self,
        inputs: str | Sequence[str] | Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
        *,
        attention_mask: Bool[Tensor, "batch pos"] | None = None,
        positions: Int[Tensor, "batch pos"] | Int[Tensor, "3 batch pos"] | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        logits_at: At = None,
        kv_cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch at width"]:
        """Logits [batch, at, d_vocab]; with `stop_at_layer`, the residual stream [batch, pos, d_model] before it.

        `inputs` are tokens, text, embeddings, or, with `start_at_layer`, the residual stream before that block.
        `attention_mask` is False on padding, which is on the left. `positions` are those that queries and keys are
        rotated by: by default, tokens are counted; three axes are time, height and width. `logits_at` names the
        positions to unembed (-1: the last one alone); the axis of positions stays. `kv_cache` holds the positions
        before the inputs, and takes them in; tokens are counted on from the largest of them. `hook.ctx["offset"]` tells
        hooks how many those are.
        """
        return self.decode(inputs, attention_mask, positions, start_at_layer, stop_at_layer, logits_at, kv_cache)

    def decode(
        self,
        inputs: Any,
        attention_mask: Bool[Tensor, "batch pos"] | None,
        positions: Positions | None,
        start_at_layer: int | None,
        stop_at_layer: int | None,
        logits_at: At,
        kv_cache: KeyValueCache | None,
    ) -> Float[Tensor, "batch at width"]:
        layers = self.layers(start_at_layer, stop_at_layer)
        if kv_cache is not None and len(layers) < self.decoder_cfg.n_layers:
            raise InputError("A key-value cache needs every block: leave out start_at_layer and stop_at_layer.")
        self.refuse_silent_hooks(inputs, start_at_layer=start_at_layer, stop_at_layer=stop_at_layer)
        inputs, attention_mask, positions = self.here(inputs), self.here(attention_mask), self.here(positions)
        with self.told(offset=kv_cache.n_pos if kv_cache else 0, n_more=kv_cache.n_more if kv_cache else 0):
            if start_at_layer is None:
                resid, attention_mask, positions = self.enter(inputs, attention_mask, positions)
            else:
                resid = resumed(inputs)
            resid = self.run_blocks(resid, attention_mask, positions, layers, kv_cache)
            if stop_at_layer is not None:
                return resid
            logits = self.unembed(self.ln_final(at_positions(resid, logits_at)))
        if kv_cache is not None:
            kv_cache.commit()
        return logits

    def advance(self, inputs: Any, kv_cache: KeyValueCache) -> Float[Tensor, "batch d_vocab"]:
        with self.told(offset=kv_cache.n_pos, n_more=kv_cache.n_more):
            resid = self.run_blocks(
                *self.enter(self.here(inputs), None, None), range(self.decoder_cfg.n_layers), kv_cache
            )
            logits = self.unembed(self.ln_final(resid[:, -1:]))[:, -1]
        kv_cache.commit()
        return logits

    def advance_by(self, tokens: Int[Tensor, " batch"], kv_cache: KeyValueCache) -> Float[Tensor, "batch d_vocab"]:
        return self.advance(self.embed(tokens[:, None]), kv_cache)

    def enter(
        self, inputs: Any, attention_mask: Bool[Tensor, "batch pos"] | None, positions: Positions | None
    ) -> tuple[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"] | None, Positions | None]:
        """The residual stream before block 0, which of its positions are no padding, and what they rotate by."""
        if not isinstance(inputs, Tensor):
            if attention_mask is not None:
                raise InputError("Texts are padded by the model itself: do not give an attention mask.")
            inputs, attention_mask = self.read(inputs)
        # A copy: hooks may edit in place (TransformerLens' own setters do), and the caller runs these again.
        resid = self.hook_embed(inputs.clone() if inputs.is_floating_point() else self.embed(inputs))
        return resid, attention_mask, positions

    def run_blocks(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        is_token: Bool[Tensor, "batch pos"] | None,
        positions: Positions | None,
        layers: range,
        kv_cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        n_pos, device = resid.shape[1], resid.device
        if kv_cache is not None:
            new = torch.ones(resid.shape[:2], dtype=torch.bool, device=device) if is_token is None else is_token
            is_token = kv_cache.with_tokens(new)
            if positions is not None:
                kv_cache.with_positions(positions if positions.ndim == 3 else positions[None], is_token)
        n_key = n_pos if is_token is None else is_token.shape[1]
        if is_token is not None and is_token.all():
            is_token = None
        if positions is None:
            positions = counted(is_token, n_pos, n_key, device) + (0 if kv_cache is None else kv_cache.shift)
        elif positions.ndim == 3 and not isinstance(self.decoder_cfg.rope, MRope):
            raise InputError("This model has one position for each token, not three: give positions [batch, pos].")
        n_tokens = [n_key] if is_token is None else is_token.sum(-1).tolist()
        rotation = self.rotary(positions, resid.dtype, n_tokens if kv_cache is None else kv_cache.of_prompts(n_tokens))
        windows, blocks = self.decoder_cfg.windows, self.each_block
        masks = {window: causal_mask(is_token, n_pos, n_key, window, device) for window in set(windows)}
        for layer in layers:
            memory = None if kv_cache is None else Memory(kv_cache, layer)
            # Switched on, a block reads its own W_*, and not through the modules to which offloaded weights come.
            with held(blocks[layer]) if self.switched else nullcontext():
                resid = blocks[layer](resid, masks[windows[layer]], rotation, memory)
        return resid

    def live(
        self, inputs: Any = None, *, start_at_layer: int | None = None, stop_at_layer: int | None = None, **_: Any
    ) -> set[str]:
        layers = self.layers(start_at_layer, stop_at_layer)
        skipped = [f"blocks.{layer}." for layer in range(self.decoder_cfg.n_layers) if layer not in layers]
        skipped += [] if start_at_layer is None else ["hook_embed"]
        skipped += [] if stop_at_layer is None else ["ln_final."]
        return {name for name in self.switched_on() if not name.startswith(tuple(skipped))}

    def sizes(self, inputs: Any = None, *_: Any) -> dict[str, dict[str, int]]:
        cfg, shape = self.decoder_cfg, self.shape_of(inputs)
        decoder = axis_sizes(cfg, *shape) | {"head": cfg.n_heads, "kv_head": cfg.n_kv_heads, "d_head": cfg.d_head}
        return dict.fromkeys(("blocks.", "hook_", "ln_final."), decoder)

    def shape_of(self, inputs: Any) -> tuple[int, int]:
        """Prompts and positions."""
        n_batch, n_pos = (inputs if isinstance(inputs, Tensor) else self.read(inputs)[0]).shape[:2]
        return n_batch, n_pos

    def positions_of(self, inputs: Any) -> Int[Tensor, "3 batch pos"] | None:
        """What the positions of some inputs are rotated by, where that is more than their number."""
        return None

    def layers(self, start: int | None, stop: int | None) -> range:
        """The blocks from `start` to before `stop`."""
        n_layers = self.decoder_cfg.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n_layers <= layer <= n_layers:
                raise InputError(f"{name} = {layer}, but this model has {n_layers} blocks.")
        first, last, _ = slice(start, stop).indices(n_layers)
        if first > last:
            raise InputError(f"start_at_layer = {start} is behind stop_at_layer = {stop}.")
        return range(first, last)

    def switch_of(self, name: str) -> str | None:
        if not name.startswith("blocks."):
            return None
        switch = SWITCHES.get(name.split(".", 2)[2])
        return None if switch is None or switch in self.switched else f"set_{switch}(True)"

    def switched_on(self) -> set[str]:
        layers = range(self.decoder_cfg.n_layers)
        off = [point for point, switch in SWITCHES.items() if switch not in self.switched]
        return self.hook_dict.keys() - {f"blocks.{layer}.{point}" for layer in layers for point in off}

    def switch(self, name: str, on: bool) -> None:
        """Let the blocks do what the switches say. `cfg` is told, and never asked: setting it switches nothing."""
        self.switched = self.switched | {name} if on else self.switched - {name}
        setattr(self.cfg, name, on)
        for block in self.each_block:
            block.attn.use_result = "use_attn_result" in self.switched
            block.use_mlp_in = "use_hook_mlp_in" in self.switched
            block.fork = None
            if "use_split_qkv_input" in self.switched:
                block.fork = block.attn.fork
            elif "use_attn_in" in self.switched:
                block.fork = block.attn.fork_once

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether every head's own contribution is computed: `attn.hook_result` [batch, pos, head, d_model]."""
        self.switch("use_attn_result", use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether each head's query, key and value read their own copy of the residual stream before the norm:
        `attn.hook_q_input` [batch, pos, head, d_model], `hook_k_input`, `hook_v_input` [batch, pos, kv_head, d_model].
        `ln1` then runs, and its hooks fire, once on each of the three."""
        if use_split_qkv_input and "use_attn_in" in self.switched:
            raise InputError("One of the two at a time: call `model.set_use_attn_in(False)` first.")
        self.switch("use_split_qkv_input", use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether each head reads its own copy of the residual stream before the norm: `attn.hook_attn_in`
        [batch, pos, head, d_model]. Refused where heads share keys and values."""
        if use_attn_in and "use_split_qkv_input" in self.switched:
            raise InputError("One of the two at a time: call `model.set_use_split_qkv_input(False)` first.")
        if use_attn_in and self.decoder_cfg.n_heads != self.decoder_cfg.n_kv_heads:
            raise InputError(
                f"{self.decoder_cfg.n_heads} heads share {self.decoder_cfg.n_kv_heads} keys and values, so no head has "
                "an input of its own: use set_use_split_qkv_input."
            )
        self.switch("use_attn_in", use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether the MLP reads its own copy of the residual stream: `hook_mlp_in` [batch, pos, d_model]."""
        self.switch("use_hook_mlp_in", use_hook_mlp_in)

    @property
    def device(self) -> torch.device:
        """Where runs begin and end."""
        return super().device if self.placement is None else torch.device(self.placement.device)

    def here(self, inputs: Any) -> Any:
        """Inputs on that device, if the model was loaded with a device_map; else as they are."""
        return inputs if self.placement is None else send_to_device(inputs, self.device)

    def _apply(self, fn: Callable, recurse: bool = True) -> "HookedTransformer":
        if self.placement is not None:
            raise LensError(
                f"This model was loaded with a device_map ({self.placement}), so it can be neither moved nor cast. "
                "Load it again with another device_map, device or dtype."
            )
        super()._apply(fn, recurse)
        self.follow_weights()
        return self

    def follow_weights(self) -> None:
        """`cfg` says where the model runs and of what type its weights are."""
        self.cfg.device, self.cfg.dtype = str(self.device), self.embed.table.weight.dtype


def axis_sizes(cfg: DecoderConfig | EncoderConfig | VisionConfig, n_batch: int, n_pos: int) -> dict[str, int]:
    """The axes that decoder and encoder share, by their names."""
    positions = dict.fromkeys(("pos", "query_pos", "key_pos", "audio_pos"), n_pos)
    rows = dict.fromkeys(("batch", "clip", "frame"), n_batch)
    return positions | rows | {"head": cfg.n_heads, "d_model": cfg.d_model, "d_mlp": cfg.d_mlp}


@torch.no_grad()
def draw_weights(model: HookedTransformer, std: float, seed: int | None) -> None:
    """Normal weights, norms left at one; a negative `std` means 0.8 / sqrt(d_model), as in TransformerLens."""
    std = std if std > 0 else 0.8 / model.decoder_cfg.d_model**0.5
    generator = torch.Generator() if seed is None else torch.Generator().manual_seed(seed)
    if seed is None:
        generator.seed()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, std, generator=generator)


def counted(
    is_token: Bool[Tensor, "batch key_pos"] | None, n_pos: int, n_key: int, device: torch.device
) -> Int[Tensor, "batch pos"]:
    """The positions of the last `n_pos` of `n_key` tokens: the first word of a padded prompt is at position 0."""
    if is_token is None:
        return torch.arange(n_key - n_pos, n_key, device=device)[None]
    return (is_token.cumsum(-1) - 1).clamp(min=0)[:, n_key - n_pos :]


def resumed(inputs: Any) -> Float[Tensor, "batch pos d_model"]:
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point()):
        raise InputError("With start_at_layer, give the residual stream before that block: [batch, pos, d_model].")
    return inputs.clone()  # as in `enter`


def at_positions(resid: Float[Tensor, "batch pos d_model"], at: At) -> Float[Tensor, "batch at d_model"]:
    if at is None:
        return resid
    return resid[:, [at]] if isinstance(at, int) else resid[:, at]
