"""Multi-head attention, with or without rotation, under TransformerLens' names.

`attend` picks its strategy by who listens: the fused kernel by default, explicit scores and patterns where a hook
sits on one of them. Both give the same numbers to float32 rounding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.nn.kv_cache import Memory
from lalm_lens.nn.rope import Rotation
from lalm_lens.nn.views import BiasView, Viewed, WeightView
from lalm_lens.shapes import at_least_float32

Mask = Bool[Tensor, "#batch 1 #query_pos key_pos"]
ByHead = Float[Tensor, "batch pos _head d_model"]


@dataclass(frozen=True)
class Projections:
    """Which of the four projections have a bias."""

    q: bool
    k: bool
    v: bool
    o: bool


def causal_mask(
    is_token: Bool[Tensor, "batch key_pos"] | None,
    n_query: int,
    n_key: int,
    window: int | None,
    device: torch.device,
) -> Mask | None:
    """True where one of the last `n_query` of `n_key` positions may look: back on tokens, at most `window` positions,
    itself included.

    None for plain causality, which the fused kernel knows. A padding row looks at itself alone: a row that may look
    at nothing would be NaN, and its NaN would reach real rows.
    """
    if is_token is None and window is None and n_query in (1, n_key):
        return None
    back = torch.arange(n_key - n_query, n_key, device=device)[:, None] - torch.arange(n_key, device=device)
    allowed = (back >= 0) if window is None else (back >= 0) & (back < window)
    if is_token is None:
        return allowed[None, None]
    return (allowed & is_token[:, None, None, :]) | (back == 0)


class Attention(Viewed):
    """What every self-attention has in common: projections, heads, the weighted sum."""

    is_causal: bool
    W_Q = WeightView("q_proj", "(head d_head) d_model -> head d_model d_head", "head", "n_heads")
    W_K = WeightView("k_proj", "(head d_head) d_model -> head d_model d_head", "head", "n_kv_heads")
    W_V = WeightView("v_proj", "(head d_head) d_model -> head d_model d_head", "head", "n_kv_heads")
    W_O = WeightView("o_proj", "d_model (head d_head) -> head d_head d_model", "head", "n_heads")
    b_Q = BiasView("q_proj", "(head d_head) -> head d_head", "head", "n_heads")
    b_K = BiasView("k_proj", "(head d_head) -> head d_head", "head", "n_kv_heads")
    b_V = BiasView("v_proj", "(head d_head) -> head d_head", "head", "n_kv_heads")
    b_O = BiasView("o_proj", "d_model -> d_model")

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, bias: Projections):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_head
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias=bias.q)
        self.k_proj = nn.Linear(d_model, n_kv_heads * d_head, bias=bias.k)
        self.v_proj = nn.Linear(d_model, n_kv_heads * d_head, bias=bias.v)
        self.o_proj = nn.Linear(n_heads * d_head, d_model, bias=bias.o)
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_v = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_attn_scores = HookPoint()  # [batch, head, query_pos, key_pos], after the mask
        self.hook_pattern = HookPoint()  # [batch, head, query_pos, key_pos]
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]

    def project(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> tuple[
        Float[Tensor, "batch pos head d_head"],
        Float[Tensor, "batch pos kv_head d_head"],
        Float[Tensor, "batch pos kv_head d_head"],
    ]:
        q = rearrange(self.q_proj(x), "batch pos (head d_head) -> batch pos head d_head", d_head=self.d_head)
        k = rearrange(self.k_proj(x), "batch pos (head d_head) -> batch pos head d_head", d_head=self.d_head)
        v = rearrange(self.v_proj(x), "batch pos (head d_head) -> batch pos head d_head", d_head=self.d_head)
        return self.hook_q(q), self.hook_k(k), self.hook_v(v)

    def output(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos d_model"]:
        return self.o_proj(rearrange(self.hook_z(z), "batch pos head d_head -> batch pos (head d_head)"))

    def attend(
        self,
        q: Float[Tensor, "batch query_pos head d_head"],
        k: Float[Tensor, "batch key_pos kv_head d_head"],
        v: Float[Tensor, "batch key_pos kv_head d_head"],
        mask: Mask | None,
    ) -> Float[Tensor, "batch query_pos head d_head"]:
        if self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks():
            return self.attend_explicitly(q, k, v, mask)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        z = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=self.is_causal and mask is None and q.shape[2] > 1,  # a single query may see all keys
            enable_gqa=self.n_heads != self.n_kv_heads,
        )
        return z.transpose(1, 2)

    def attend_explicitly(
        self,
        q: Float[Tensor, "batch query_pos head d_head"],
        k: Float[Tensor, "batch key_pos kv_head d_head"],
        v: Float[Tensor, "batch key_pos kv_head d_head"],
        mask: Mask | None,
    ) -> Float[Tensor, "batch query_pos head d_head"]:
        k, v = (
            repeat(
                x,
                "batch pos kv_head d_head -> batch pos (kv_head group) d_head",
                group=self.n_heads // self.n_kv_heads,
            )
            for x in (k, v)
        )
        scores = einsum(q, k, "batch query_pos head d_head, batch key_pos head d_head -> batch head query_pos key_pos")
        if mask is None and self.is_causal:
            n_query, n_key = scores.shape[-2:]
            mask = torch.ones(n_query, n_key, dtype=torch.bool, device=q.device).tril(n_key - n_query)[None, None]
        scores = scores * self.d_head**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        pattern = at_least_float32(self.hook_attn_scores(scores)).softmax(-1).to(q.dtype)
        return einsum(
            self.hook_pattern(pattern),
            v,
            "batch head query_pos key_pos, batch key_pos head d_head -> batch query_pos head d_head",
        )


class BidirectionalAttention(Attention):
    """Self-attention of an encoder: no rotation, every allowed key is seen."""

    is_causal = False

    def forward(self, x: Float[Tensor, "batch pos d_model"], mask: Mask | None) -> Float[Tensor, "batch pos d_model"]:
        q, k, v = self.project(x)
        return self.output(self.attend(q, k, v, mask))


class CrossAttention(Attention):
    """Attention of a Q-Former to states from elsewhere: no rotation, all of them are seen."""

    is_causal = False

    def forward(
        self, x: Float[Tensor, "batch query_pos d_model"], states: Float[Tensor, "batch state_pos d_model"]
    ) -> Float[Tensor, "batch query_pos d_model"]:
        q, k, v = (
            rearrange(its, "batch pos (head d_head) -> batch pos head d_head", d_head=self.d_head)
            for its in (self.q_proj(x), self.k_proj(states), self.v_proj(states))
        )
        return self.output(self.attend(self.hook_q(q), self.hook_k(k), self.hook_v(v), None))


class WindowedAttention(BidirectionalAttention):
    """The same within windows of so many positions (Qwen2.5-Omni). The fused kernel takes each window by itself, so its
    time grows with the length of a clip and not with its square; a pattern that is looked at is of the whole clip."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, bias: Projections, window: int):
        super().__init__(d_model, n_heads, n_kv_heads, d_head, bias)
        self.window = window

    def attend(
        self,
        q: Float[Tensor, "clip pos head d_head"],
        k: Float[Tensor, "clip pos kv_head d_head"],
        v: Float[Tensor, "clip pos kv_head d_head"],
        mask: Mask | None,
    ) -> Float[Tensor, "clip pos head d_head"]:
        """`mask` is True on the sound, for every query; what lies behind the sound looks at itself."""
        assert mask is not None
        if self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks():
            return self.attend_explicitly(q, k, v, window_mask(mask, self.window))
        n_windows, by_window = q.shape[1] // self.window, {"pos": self.window}
        q, k, v = (rearrange(x, "clip (n pos) head d_head -> (clip n) pos head d_head", **by_window) for x in (q, k, v))
        mask = window_mask(rearrange(mask, "clip a b (n pos) -> (clip n) a b pos", **by_window), self.window)
        z = super().attend(q, k, v, mask)
        return rearrange(z, "(clip n) pos head d_head -> clip (n pos) head d_head", n=n_windows)


def window_mask(is_sound: Mask, window: int) -> Mask:
    """True where a state may look: at the sound in its own window. States behind the sound look at themselves."""
    positions = torch.arange(is_sound.shape[-1], device=is_sound.device)
    which = positions // window
    return ((which[:, None] == which) & is_sound) | (positions[:, None] == positions)


class AxialAttention(Attention):
    """Self-attention of a vision tower: queries and keys are rotated by row and column, every allowed key is seen."""

    is_causal = False

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, bias: Projections):
        super().__init__(d_model, n_heads, n_kv_heads, d_head, bias)
        self.hook_rot_q = HookPoint()  # [frame, pos, head, d_head]
        self.hook_rot_k = HookPoint()  # [frame, pos, head, d_head]

    def forward(
        self, x: Float[Tensor, "frame pos d_model"], mask: Mask | None, rotation: Rotation
    ) -> Float[Tensor, "frame pos d_model"]:
        q, k, v = self.project(x)
        q, k = self.hook_rot_q(rotation(q)), self.hook_rot_k(rotation(k))
        return self.output(self.attend(q, k, v, mask))


class RotaryAttention(Attention):
    """Causal self-attention of a decoder: queries and keys are rotated by their positions.

    Four of its hook points are off until the model switches them on, because they cost a copy of the residual stream
    for each head: `hook_result`, and `hook_attn_in` or `hook_q_input`, `hook_k_input`, `hook_v_input`.
    """

    is_causal = True

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, bias: Projections):
        super().__init__(d_model, n_heads, n_kv_heads, d_head, bias)
        self.use_result = False
        self.hook_rot_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_rot_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_result = HookPoint()  # [batch, pos, head, d_model]
        self.hook_attn_in = HookPoint()  # [batch, pos, head, d_model]
        self.hook_q_input = HookPoint()  # [batch, pos, head, d_model]
        self.hook_k_input = HookPoint()  # [batch, pos, kv_head, d_model]
        self.hook_v_input = HookPoint()  # [batch, pos, kv_head, d_model]

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        mask: Mask | None,
        rotation: Rotation,
        memory: Memory | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        return self.mix(*self.project(x), mask, rotation, memory)

    def mix(
        self,
        q: Float[Tensor, "batch pos head d_head"],
        k: Float[Tensor, "batch pos kv_head d_head"],
        v: Float[Tensor, "batch pos kv_head d_head"],
        mask: Mask | None,
        rotation: Rotation,
        memory: Memory | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """From projected queries, keys and values on; those in `memory` come before them."""
        q, k = self.hook_rot_q(rotation.of_queries(q)), self.hook_rot_k(rotation(k))
        if memory is not None:
            k, v = memory.extend(k, v)
        return self.output(self.attend(q, k, v, mask))

    def fork(self, resid: Float[Tensor, "batch pos d_model"]) -> tuple[ByHead, ByHead, ByHead]:
        """A copy of the residual stream for each head's query, key and value."""
        return (
            self.hook_q_input(by_head(resid, self.n_heads)),
            self.hook_k_input(by_head(resid, self.n_kv_heads)),
            self.hook_v_input(by_head(resid, self.n_kv_heads)),
        )

    def fork_once(self, resid: Float[Tensor, "batch pos d_model"]) -> tuple[ByHead, ByHead, ByHead]:
        """A copy of the residual stream for each head, from which it makes query, key and value."""
        assert self.n_heads == self.n_kv_heads, "the model refuses hook_attn_in where heads share keys"
        attn_in = self.hook_attn_in(by_head(resid, self.n_heads))
        return attn_in, attn_in, attn_in

    def project_by_head(
        self, q_input: ByHead, k_input: ByHead, v_input: ByHead
    ) -> tuple[
        Float[Tensor, "batch pos head d_head"],
        Float[Tensor, "batch pos kv_head d_head"],
        Float[Tensor, "batch pos kv_head d_head"],
    ]:
        axes = "batch pos head d_model, head d_model d_head -> batch pos head d_head"
        q = self.hook_q(einsum(q_input, self.W_Q, axes) + self.b_Q)
        k = self.hook_k(einsum(k_input, self.W_K, axes) + self.b_K)
        v = self.hook_v(einsum(v_input, self.W_V, axes) + self.b_V)
        return q, k, v

    def output(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos d_model"]:
        if not self.use_result:
            return super().output(z)
        result = einsum(
            self.hook_z(z),
            self.W_O,
            "batch pos head d_head, head d_head d_model -> batch pos head d_model",
        )
        return self.hook_result(result).sum(2) + self.b_O


def by_head(resid: Float[Tensor, "batch pos d_model"], n_heads: int) -> ByHead:
    """Copies, so that a hook may edit one head's in place."""
    return repeat(resid, "batch pos d_model -> batch pos head d_model", head=n_heads).contiguous()
