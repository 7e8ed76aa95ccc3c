"""Seconds, memory and this machine's own rate of matrix products."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from benchmarks.hf import Rival
from benchmarks.loading import Peak
from benchmarks.rivals import RIVALS
from benchmarks.task import Patches, Shape, Task, build


@dataclass(frozen=True)
class Setting:
    """What is the same for every rival of a run."""

    shape: Shape
    n_sample: int = 8
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def sample(self) -> list[tuple[int, int]]:
        return self.shape.sample(self.n_sample)

    def build(self) -> Task:
        return build(self.shape, self.device, getattr(torch, self.dtype))


def seconds(call: Callable[[], object], device: str) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def matmul_rate(setting: Setting) -> float:
    """Floating-point operations per second of square matrix products, in the type of the run."""
    n, times = (8_192, 10) if setting.device.startswith("cuda") else (2_048, 4)
    a, b = (torch.randn(n, n, device=setting.device, dtype=getattr(torch, setting.dtype)) for _ in range(2))
    return times * 2 * n**3 / seconds(lambda: [a @ b for _ in range(times)], setting.device)


def map_seconds(rival: Rival, task: Task, setting: Setting, whole: bool) -> float:
    """Seconds of the whole map; of the base runs and the sample, scaled up, where the whole would take too long."""

    def taken(patches: Patches) -> float:
        return seconds(lambda: rival(task.clean, task.corrupt, patches, task.token), setting.device)

    if whole:
        return taken(setting.shape.patches)
    base = taken([])
    return base + (taken(setting.sample) - base) * len(setting.shape.patches) / len(setting.sample)


def peak_bytes(name: str, setting: Setting) -> int:
    """The most memory a rival takes above the model, in a process of its own: the system keeps freed memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_here, name, setting).result()


@torch.no_grad()
def peak_here(name: str, setting: Setting) -> int:
    torch.set_num_threads(1)
    task, entry = setting.build(), RIVALS[name]
    patches = setting.shape.patches if entry.whole else setting.sample[:2]  # one forward after the other
    if setting.device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        entry.build(task.hf)(task.clean, task.corrupt, patches, task.token)
        return torch.cuda.max_memory_allocated() - before
    with Peak() as peak:
        entry.build(task.hf)(task.clean, task.corrupt, patches, task.token)
    return peak.above["anonymous"]
