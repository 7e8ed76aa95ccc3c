"""Bigger than the GPU: what brings weights that lie elsewhere to the modules that compute with them.

Such a weight is on the meta device, and comes in for its module's forward alone. Nothing hangs on the model itself: its
`forward` is one way in among several (`run_with_hooks`, `generate`, `bind`).
"""

import shutil
import tempfile
import weakref
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader, send_to_device
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lalm_lens.errors import InputError, reason
from lalm_lens.nn.block import Block
from lalm_lens.placement import DISK, Placement, parts
from lalm_lens.shapes import widened

ELSEWHERE = "Give an offload_folder with room on a local disk."


class Store(OffloadedWeightsLoader):
    """The weights that are not where they are computed with, by name: in memory, or in files that go when it goes.

    Every store has a folder of its own: two models that were loaded into one folder never read each other's weights.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        dtype: torch.dtype,
        folder: str | Path | None,
        wide: Container[str] = (),
    ):
        self.kept: dict[str, Tensor] = {}
        self.files: dict[str, dict[str, str]] = {}
        super().__init__(state_dict=self.kept, index=self.files)
        self.placement, self.dtype, self.wide = placement, dtype, wide
        self.buffer = torch.empty(0, dtype=dtype)
        on_disk = {name: p for name, p in model.named_parameters() if placement.lies[name] == DISK}
        if on_disk:
            self.folder = new_folder(folder, sum(p.nbytes for p in on_disk.values()))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def put(self, name: str, tensor: Tensor) -> Tensor:
        """What the parameter of that name becomes: `tensor`, or where its numbers are kept elsewhere, its shape."""
        lies, dtype = self.placement.lies[name], widened(self.dtype) if name in self.wide else self.dtype
        if lies == DISK:
            self.write(name, self.cast(tensor) if dtype == self.dtype else tensor.to(dtype))
        else:
            tensor = tensor.to(device=lies, dtype=dtype)
            if self.placement.is_here(name):
                return tensor
            self.kept[name] = tensor
        return torch.empty(tensor.shape, dtype=dtype, device="meta")

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


def new_folder(folder: str | Path | None, n_bytes: int) -> Path:
    """A new folder in `folder`, by default in the system's temporary one, on a disk that has room for so many bytes."""
    parent = Path(tempfile.gettempdir() if folder is None else folder).expanduser().resolve()
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
        if not self.n_users:
            # All of them before the first is put in: where memory runs out on the way, nothing has come.
            weights = {leaf: self.store[name].to(self.device) for leaf, name in self.names.items()}
            for leaf, weight in weights.items():
                module.register_parameter(leaf, nn.Parameter(weight, self.shapes[leaf].requires_grad))
        self.n_users += 1

    def go(self, module: nn.Module, *_: Any) -> None:
        self.n_users = max(0, self.n_users - 1)
        for leaf, shape in self.shapes.items() if not self.n_users else ():
            module.register_parameter(leaf, shape)


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of one module itself, without those of its parts, read where they lie."""
    found: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    for hook in module._forward_pre_hooks.values():
        visitors = getattr(hook, "__self__", None)
        if isinstance(visitors, Visitors):
            found |= {leaf: visitors.store[name] for leaf, name in visitors.names.items()}
    return found


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


def is_ours(hook: Any) -> bool:
    """Whether a torch hook on a module is one of those that bring weights and states."""
    return isinstance(getattr(hook, "__self__", None), Visitors) or getattr(hook, "func", None) in (sent, returned)


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
