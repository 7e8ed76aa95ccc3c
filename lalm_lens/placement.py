"""Where the weights of a model lie that is spread over GPUs, CPU and disk, and where they are computed with.

accelerate decides, or a map of the user's own.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory
from torch import nn

from lalm_lens.errors import InputError, reason
from lalm_lens.nn.block import Block, DecoderBlock, EncoderBlock, VisionBlock
from lalm_lens.nn.qformer import QFormerBlock

CPU, DISK = "cpu", "disk"
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's
UNSPLIT = [block.__name__ for block in (DecoderBlock, EncoderBlock, VisionBlock, QFormerBlock)]

Modules = dict[str, int | str | torch.device]  # places by the names of modules or parameters
DeviceMap = str | Modules
MaxMemory = dict[int | str, int | str]


@dataclass(frozen=True)
class Placement:
    """Where each parameter lies, and where it is computed with: a device, or for the first also "disk"."""

    lies: dict[str, str] = field(repr=False)
    runs: dict[str, str] = field(repr=False)
    device: str  # where runs begin and end: the first accelerator, else the CPU
    blocks: Counter[str]  # how many lie where

    @classmethod
    def of(cls, model: nn.Module, device_map: DeviceMap, max_memory: MaxMemory | None = None) -> "Placement":
        """Raises `InputError` for a map that leaves something out, names what is not there, or splits a block."""
        if isinstance(device_map, str):
            return cls.from_lies(model, spelled_out(model, automatic(model, device_map, max_memory)))
        if max_memory is not None:
            raise InputError("max_memory is for device_map='auto': a map of your own says itself what lies where.")
        return cls.from_lies(model, spelled_out(model, device_map))

    @classmethod
    def from_lies(cls, model: nn.Module, lies: dict[str, str]) -> "Placement":
        device = next((place for place in lies.values() if place not in (CPU, DISK)), CPU)
        runs, blocks = {}, Counter()
        for part, names in parts(model):
            places = {lies[name] for name in names}
            runs |= dict.fromkeys(names, runs_on(part, places - {CPU, DISK}, device, names))
            blocks[" and ".join(sorted(places))] += isinstance(part, Block)
        return cls(lies, runs, device, +blocks)

    def is_here(self, name: str) -> bool:
        """Whether a parameter lies where it is computed with."""
        return self.lies[name] == self.runs[name]

    def __str__(self) -> str:
        return f"blocks: {', '.join(f'{n} on {place}' for place, n in self.blocks.items())}"


def parts(model: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    """What runs in one place, with the names of its parameters: blocks, and outside of them each module with weights of
    its own. A tied weight has one name, wherever it is met."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def walk(module: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
        is_block = isinstance(module, Block)
        if own := [names[id(parameter)] for parameter in module.parameters(recurse=is_block)]:
            yield module, own
        for child in () if is_block else module.children():
            yield from walk(child)

    return walk(model)


def runs_on(part: nn.Module, accelerators: set[str], device: str, names: list[str]) -> str:
    """Where its weights lie, if that is an accelerator, else where runs begin."""
    if len(accelerators) > 1:
        raise InputError(
            f"device_map splits {names[0].rpartition('.')[0]} over {' and '.join(sorted(accelerators))}: what computes "
            "together, a block above all, lies on one GPU; only the CPU and the disk may hold the rest of it."
        )
    has_parts = not isinstance(part, Block) and any(True for child in part.children() for _ in child.parameters())
    # Between its parts everything is where runs begin: W_pos is added there, wherever it lies.
    return accelerators.pop() if accelerators and not has_parts else device


def automatic(model: nn.Module, strategy: str, max_memory: MaxMemory | None) -> Modules:
    """accelerate's own map. `model` has its final dtype; its blocks stay whole."""
    if strategy not in STRATEGIES:
        raise InputError(f"device_map is {strategy!r}. Give {', '.join(STRATEGIES)}, or a dict from modules to places.")
    try:
        memory: Any = None if max_memory is None else dict(max_memory)  # a copy: accelerate writes into it
        if strategy == "sequential":
            memory = get_max_memory(memory)
        else:
            low_zero = strategy == "balanced_low_0"
            memory = get_balanced_memory(model, memory, no_split_module_classes=UNSPLIT, low_zero=low_zero)
        return dict(infer_auto_device_map(model, memory, no_split_module_classes=UNSPLIT))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"max_memory = {max_memory} cannot be used: {reason(error)} "
            "Give sizes by device, as in {0: '20GB', 'cpu': '60GB'}."
        ) from None


def spelled_out(model: nn.Module, device_map: Modules) -> dict[str, str]:
    """The place of each parameter: what the map says of the longest name above it."""
    known = {"", *dict(model.named_modules()), *dict(model.named_parameters())}
    if unknown := [name for name in device_map if name not in known]:
        stages = ", ".join(name for name, child in model.named_children() if list(child.parameters()))
        raise InputError(
            f"device_map names {unknown[0]!r}, which is no part of this model. Name its stages ({stages}), what is in "
            "them, as blocks.0, or '' for all the rest."
        )
    places = {name: DISK if place == DISK else str(usable_device(place)) for name, place in device_map.items()}
    lies = {name: said_of(name, places) for name, _ in model.named_parameters()}
    if forgotten := [name for name, place in lies.items() if place is None]:
        raise InputError(
            f"device_map says nothing of {len(forgotten)} of {len(lies)} parameters, e.g. {forgotten[0]}. Add them, or "
            "'' for all the rest."
        )
    return {name: place for name, place in lies.items() if place is not None}


def said_of(name: str, places: dict[str, str]) -> str | None:
    while name and name not in places:
        name = name.rpartition(".")[0]
    return places.get(name)


def usable_device(device: int | str | torch.device) -> torch.device:
    try:
        there = torch.empty(0, device=device).device
        if there.type == "meta":
            raise RuntimeError("it holds shapes and no numbers")
        return there
    except (RuntimeError, AssertionError, ImportError) as error:  # torch asserts that it was built with CUDA
        raise InputError(f"The device {str(device)!r} cannot be used here: {reason(error)}") from None
