"""The axes of every hook point, by the last part of its name, and the memory that its states take."""

import math
from collections.abc import Iterable, Mapping

AXES = {
    "batch, pos, d_model": "embed resid_pre resid_mid resid_post attn_out mlp_out normalized in out mlp_in "
    "cross_attn_out resid_cross normalized_resid_post queries mixed",
    "batch, pos, 1": "scale",
    "batch, pos, head, d_head": "q rot_q z",
    "batch, pos, kv_head, d_head": "k v rot_k",
    "batch, head, query_pos, key_pos": "attn_scores pattern",
    "batch, pos, head, d_model": "result attn_in q_input",
    "batch, pos, kv_head, d_model": "k_input v_input",
    "batch, pos, tap": "mixture",
    "batch, pos, d_mlp": "pre pre_linear post",
    "audio_pos, d_model": "audio_embed",
    "vision_pos, d_model": "vision_embed",
}
AXES_OF = {f"hook_{name}": axes for axes, names in AXES.items() for name in names.split()}


TAPPED = {"audio_encoder.hook_out": "clip, pos, tap, d_model", "adapter.hook_in": "clip, state_pos, tap, d_model"}


def axes_of(name: str, has_taps: bool = False) -> str:
    """The axes of a hook point, such as "batch, pos, d_model"; where audio is heard, `batch` is `clip`, and where
    pictures are seen, `frame`. `has_taps` says that the adapter is a Q-Former: its blocks have the taps of each
    clip one after the other, and look at `state_pos` of the encoder."""
    if has_taps and name in TAPPED:
        return TAPPED[name]
    batch = {"audio_encoder": "clip", "adapter": "clip", "vision_encoder": "frame", "vision_adapter": "frame"}
    is_tap = name.startswith(("adapter.blocks", "adapter.hook_queries"))
    axes = AXES_OF[name.split(".")[-1]].replace(
        "batch", "clip_tap" if is_tap else batch.get(name.split(".")[0], "batch")
    )
    if ".cross_attn." not in name:
        return axes
    return axes.replace("key_pos", "state_pos").replace("pos, kv_head", "state_pos, kv_head")


def n_bytes(names: Iterable[str], sizes: Mapping[str, int], itemsize: int) -> int:
    """Memory of the states of these hook points, each taken once; `sizes` are those of the axes.

    A block's `resid_pre` is the tensor that came out before it, so it does not count.
    """
    counted = (axes_of(name, "tap" in sizes).split(", ") for name in names if not name.endswith("hook_resid_pre"))
    return itemsize * sum(math.prod(sizes.get(axis, 1) for axis in axes) for axes in counted)
