"""Bigger than the GPU: weights on several GPUs, the CPU and the disk, arithmetic on the GPUs.

accelerate decides what lies where. A weight that does not lie where its module runs is on the meta device, and comes in
for that module's forward alone. Nothing hangs on the model itself: its `forward` is one way in among several
(`run_with_hooks`, `generate`, `bind`).
"""

import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import OffloadedWeightsLoader, get_balanced_memory, get_max_memory, send_to_device
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lalm_lens.errors import InputError, reason
from lalm_lens.nn.block import Block, DecoderBlock, EncoderBlock

CPU, DISK = "cpu", "disk"
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's
UNSPLIT = [DecoderBlock.__name__, EncoderBlock.__name__]

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


class Store(OffloadedWeightsLoader):
    """The weights that are not where they are computed with, by name: in memory, or in files that go when it goes.

    Every store has a folder of its own: two models that were loaded into one folder never read each other's weights.
    """

    def __init__(self, model: nn.Module, placement: Placement, dtype: torch.dtype, folder: str | Path | None):
        self.kept: dict[str, Tensor] = {}
        self.files: dict[str, dict[str, str]] = {}
        super().__init__(state_dict=self.kept, index=self.files)
        self.placement, self.dtype = placement, dtype
        self.buffer = torch.empty(0, dtype=dtype)
        on_disk = {name: p for name, p in model.named_parameters() if placement.lies[name] == DISK}
        if on_disk:
            self.folder = new_folder(folder, sum(p.numel() for p in on_disk.values()) * dtype.itemsize)
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def put(self, name: str, tensor: Tensor) -> Tensor:
        """What the parameter of that name becomes: `tensor`, or where its numbers are kept elsewhere, its shape."""
        lies = self.placement.lies[name]
        if lies == DISK:
            self.write(name, self.cast(tensor))
        else:
            tensor = tensor.to(device=lies, dtype=self.dtype)
            if self.placement.is_here(name):
                return tensor
            self.kept[name] = tensor
        return torch.empty(tensor.shape, dtype=self.dtype, device="meta")

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor in the model's dtype, until the next one comes."""
        if tensor.dtype == self.dtype:
            return tensor
        # One buffer for all: freed one by one, a quarter of a checkpoint stayed in the holes of glibc's heap.
        if self.buffer.numel() < tensor.numel():
            self.buffer = torch.empty(tensor.numel(), dtype=self.dtype)
        return self.buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)

    def write(self, name: str, tensor: Tensor) -> None:
        # accelerate's own writer maps the file into memory: on a full disk that ends the process.
        path = self.folder / f"{name}.safetensors"
        try:
            save_file({name: tensor.contiguous()}, path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{name} cannot be written to {path.parent}: {reason(error)}. {ELSEWHERE}") from None
        self.files[name] = {"safetensors_file": str(path), "weight_name": name}

    def __deepcopy__(self, _: Any) -> "Store":
        return self  # a copy of the model reads the same files


ELSEWHERE = "Give an offload_folder with room on a local disk."


def new_folder(folder: str | Path | None, n_bytes: int) -> Path:
    """A new folder in `folder`, by default in the system's temporary one, on a disk that has room for so many bytes."""
    parent = Path(tempfile.gettempdir() if folder is None else folder).expanduser()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < n_bytes:
            raise InputError(f"{n_bytes / 1e9:.1f} GB go to disk, and {parent} has {free / 1e9:.1f}. {ELSEWHERE}")
        return Path(tempfile.mkdtemp(prefix="lalm_lens_", dir=parent))
    except OSError as error:
        raise InputError(f"Nothing can be written to {parent}: {reason(error)}. {ELSEWHERE}") from None


class Visitors:
    """The weights of one module that lie elsewhere: here while somebody uses them, then their shapes alone.

    They are put in as `Parameter`s, so gradients reach the states; a gradient of the weights themselves goes with them.
    """

    def __init__(self, module: nn.Module, names: dict[str, str], store: Store, device: str):
        self.names, self.store, self.device = names, store, device
        self.shapes = {leaf: getattr(module, leaf) for leaf in names}
        self.n_users = 0  # more than one: a hook that runs the model itself, or `held`
        module.register_forward_pre_hook(self.come)
        module.register_forward_hook(self.go, always_call=True)

    def come(self, module: nn.Module, *_: Any) -> None:
        self.n_users += 1
        for leaf, name in self.names.items() if self.n_users == 1 else ():
            weight = self.store[name].to(self.device)
            module.register_parameter(leaf, nn.Parameter(weight, self.shapes[leaf].requires_grad))

    def go(self, module: nn.Module, *_: Any) -> None:
        self.n_users = max(0, self.n_users - 1)
        for leaf, shape in self.shapes.items() if not self.n_users else ():
            module.register_parameter(leaf, shape)


def attach(model: nn.Module, placement: Placement, store: Store) -> None:
    """Let weights come to their modules, and states to the parts that run elsewhere and back from there."""
    store.buffer = store.buffer.new_empty(0)  # all is written
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    for part, names in list(parts(model)):
        device = placement.runs[names[0]]
        for module in part.modules() if isinstance(part, Block) else [part]:
            own = {leaf: name_of[id(parameter)] for leaf, parameter in module.named_parameters(recurse=False)}
            away = {leaf: name for leaf, name in own.items() if not placement.is_here(name)}
            if away:
                Visitors(module, away, store, device)
        if device != placement.device:
            part.register_forward_pre_hook(partial(sent, device), with_kwargs=True)
            part.register_forward_hook(partial(returned, placement.device))


def sent(device: str, part: nn.Module, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    return send_to_device(args, device), send_to_device(kwargs, device)


def returned(device: str, part: nn.Module, args: tuple, out: Any) -> Any:
    return send_to_device(out, device)


@contextmanager
def held(part: nn.Module) -> Iterator[None]:
    """Keep the weights of a part of the model here, read once for any number of uses. To be read: an edit is lost."""
    with ExitStack() as stack:
        for module in part.modules():
            for hook in module._forward_pre_hooks.values():
                visitors = getattr(hook, "__self__", None)
                if isinstance(visitors, Visitors):
                    visitors.come(module)
                    stack.callback(visitors.go, module)
        yield
