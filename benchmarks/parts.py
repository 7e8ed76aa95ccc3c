"""Where a rival's time goes, by part."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Setting
from benchmarks.rivals import RIVALS

PARTS = {  # operations by the part they belong to; products are told apart by their operands
    "softmax": "_softmax _safe_softmax _log_softmax exp exp_ amax max maximum logsumexp logaddexp sub_ masked_fill_",
    "norms": "mean pow square rsqrt sqrt rms_norm _fused_rms_norm",
    "elementwise": "add add_ sub mul mul_ div div_ neg silu silu_ cat copy_ clone where index index_put_ gather sum",
}
PRODUCTS = "mm addmm bmm baddbmm".split()
FUSED = "_scaled_dot_product_flash_attention_for_cpu _flash_attention_forward _efficient_attention_forward".split()
PART = {op: part for part, ops in PARTS.items() for op in ops.split()} | dict.fromkeys(FUSED, "attention products")


@torch.no_grad()
def by_part(name: str, setting: Setting) -> dict[str, float]:
    """Seconds of each part of the whole map, the largest first; profiling itself slows the small ones down."""
    task, entry = setting.build(), RIVALS[name]
    rival = entry.build(task.hf)
    on_cuda = setting.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    rival(task.clean, task.corrupt, setting.sample, task.token)
    with profile(activities=activities, record_shapes=True) as profiled:
        rival(task.clean, task.corrupt, setting.shape.patches, task.token)
    linears = [
        module.weight.shape for module in task.hf.model.language_model.modules() if isinstance(module, nn.Linear)
    ]
    taken: Counter[str] = Counter()
    for event in profiled.key_averages(group_by_input_shape=True):
        time_us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        taken[part_of(event.key, event.input_shapes, set(linears), task.hf.lm_head.weight.shape)] += time_us / 1e6
    return dict(taken.most_common())


def part_of(op: str, shapes: Sequence[Sequence[int]], linears: set[torch.Size], unembed: torch.Size) -> str:
    """`linears` and `unembed` are shapes of weights, which may come in transposed."""
    op = op.removeprefix("aten::")
    if op not in PRODUCTS:
        return PART.get(op, "other")
    operands = {tuple(sorted(shape[-2:])) for shape in shapes if len(shape) > 1}
    if tuple(sorted(unembed)) in operands:
        return "unembed"
    return "projections and MLP" if operands & {tuple(sorted(each)) for each in linears} else "attention products"
