"""A conversion is a table: one row per tensor, in HF's own layout, strict and reversible.

Every tensor of a checkpoint and every parameter of ours must be accounted for, by name and shape, before the first
number is read. Then tensors stream from disk one by one into the model.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ProcessorMixin

from lalm_lens.config import LALMConfig
from lalm_lens.encoders.base import AudioEncoder
from lalm_lens.encoders.vision import VisionEncoder
from lalm_lens.errors import ConversionError
from lalm_lens.prompts import Hearing, Template, seeing_processor
from lalm_lens.shapes import widened

Shapes = dict[str, tuple[int, ...]]
Place = Callable[[str, Tensor], Tensor]  # our name and HF's tensor -> what the parameter becomes
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Rule:
    """`hf` becomes `ours`. `{i}` stands for the index of a block."""

    hf: str
    ours: str

    def under(self, hf: str = "", ours: str = "") -> "Rule":
        return replace(self, hf=hf + self.hf, ours=ours + self.ours)

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.ours,)

    def split(self, theirs: Tensor) -> Iterable[Tensor]:
        """HF's tensor as ours."""
        return (theirs,)

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """`split` undone."""
        return ours[0]


@dataclass(frozen=True)
class Fused:
    """`hf` is several tensors of ours in one: they have the same shape, and lie one after the other."""

    hf: str
    targets: tuple[str, ...]

    def split(self, theirs: Tensor) -> Iterable[Tensor]:
        """HF's tensor as ours: views of it, so nothing is copied."""
        return rearrange(theirs, "(part rows) ... -> part rows ...", part=len(self.targets))

    def join(self, ours: Sequence[Tensor]) -> Tensor:
        """`split` undone."""
        return rearrange([*ours], "part rows ... -> (part rows) ...")


@dataclass(frozen=True)
class Tied:
    """`hf` is the same tensor as `to`: it may be left out of a checkpoint, and if it is there it must be equal."""

    hf: str
    to: str

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.to,)


@dataclass(frozen=True)
class Drop:
    """`hf` is not needed, for this reason."""

    hf: str
    why: str
    targets: tuple[str, ...] = ()


Row = Rule | Fused | Tied | Drop


@dataclass(frozen=True)
class Layout:
    """How one generation of checkpoints names the tensors of the table: (prefix on disk, prefix in the table)."""

    prefixes: tuple[tuple[str, str], ...] = ()

    def to_table(self, name: str) -> str:
        return self._swap(name, self.prefixes)

    def to_disk(self, name: str) -> str:
        return self._swap(name, [(table, disk) for disk, table in self.prefixes])

    def _swap(self, name: str, prefixes: Iterable[tuple[str, str]]) -> str:
        for old, new in sorted(prefixes, key=lambda pair: -len(pair[0])):
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


@dataclass(frozen=True)
class Sight:
    """How the vision tower of a model is built, what comes between it and the decoder, and what makes the patches."""

    encoder: Callable[[LALMConfig], VisionEncoder]
    adapter: Callable[[LALMConfig], nn.Module]
    processor: Callable[[Path], ProcessorMixin] = seeing_processor  # of the files in a folder


@dataclass(frozen=True)
class Part:
    """A checkpoint of its own, which another one needs. In the table its tensors are named `part/tensor`."""

    name: str  # what the user calls it, and the table
    id_key: str  # config.json's name for its id on the Hub
    published: str  # that id, where config.json names none


@dataclass(frozen=True)
class Under:
    """The parameters below some of our modules."""

    modules: tuple[str, ...]

    def __contains__(self, name: object) -> bool:
        return str(name).startswith(tuple(f"{module}." for module in self.modules))


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """All that lalm_lens knows about one HF model type."""

    model_type: str
    config: Callable[[Mapping[str, Any]], LALMConfig]  # config.json -> ours; raises on a key it does not know
    encoder: Callable[[LALMConfig], AudioEncoder]
    adapter: Callable[[LALMConfig], nn.Module]
    rows: Callable[[LALMConfig], tuple[Row, ...]]
    layouts: tuple[Layout, ...]  # every naming that is out in the world
    template: Template  # how a question about a clip is written
    hearing: Hearing  # how clips become what the encoder takes
    hf_class: str | None  # transformers' own class, that ours is verified against; None where it has none
    frame_mask: str | None  # its name for the mask of mel frames; None where it takes none
    wide: Container[str] = frozenset()  # our names of what it keeps in float32 where the rest of the model is narrower
    sight: Sight | None = None  # of a model that also sees
    parts: tuple[Part, ...] = ()  # what a checkpoint leaves to others; `config` finds their configs under "parts"
    pickle: str | None = None  # the file of its own tensors, where that is not safetensors
    processor: Callable[[Path], ProcessorMixin | None] | None = None  # of a folder that transformers itself cannot read
    stop_tokens: tuple[int, ...] = ()  # what ends an answer beside what the checkpoint's own files say


class Table:
    """Rows as a lookup, both ways."""

    def __init__(self, rows: tuple[Row, ...]):
        self.rows = [(_pattern(row.hf), row) for row in rows]

    def find(self, hf_name: str) -> tuple[Row, tuple[str, ...]] | None:
        """The row of an HF tensor, and its targets with the block index filled in; None if there is none."""
        hits = [(row, match) for pattern, row in self.rows if (match := pattern.fullmatch(hf_name))]
        assert len(hits) < 2, f"{hf_name} matches two rows: {hits}"
        if not hits:
            return None
        row, match = hits[0]
        return row, tuple(target.format(**match.groupdict()) for target in row.targets)

    def hf_name(self, our_name: str) -> str | None:
        """The HF name of what holds one of our parameters."""
        for _, row in self.rows:
            for target in row.targets if isinstance(row, Rule | Fused) else ():
                if match := _pattern(target).fullmatch(our_name):
                    return row.hf.format(**match.groupdict())
        return None


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\*", r".*"))


class Tensors(ABC):
    """HF's tensors, wherever they are: their shapes are known, a tensor is fetched when it is asked for."""

    name: str  # for messages
    shapes: Shapes

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor: ...


@dataclass
class StateDict(Tensors):
    """The tensors of a model that is in memory."""

    name: str
    tensors: dict[str, Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass
class Checkpoint(Tensors):
    """The safetensors files of a folder, opened without reading their numbers."""

    name: str
    shapes: Shapes
    files: dict[str, Any] = field(repr=False)  # tensor name -> the open shard that holds it

    @classmethod
    def open(cls, folder: Path, stack: ExitStack) -> "Checkpoint":
        files, shapes = {}, {}
        if adapters := sorted(folder.glob("adapter_*.*")):
            raise ConversionError(
                f"{folder} holds {adapters[0].name}, of LoRA: merge it into the weights, or take it away."
            )
        for path in shards_of(folder):
            try:
                shard = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ConversionError(f"{path} is not a whole safetensors file ({error}). Download it again.") from None
            for name in shard.keys():  # noqa: SIM118  safe_open is not a dict
                header = shard.get_slice(name)
                if name in files:
                    raise ConversionError(f"{name} is in two files of {folder}, {path.name} the second. Remove one.")
                if header.get_dtype() not in FLOATS:
                    raise ConversionError(
                        f"{name} in {path.name} is {header.get_dtype()}: quantised checkpoints are not supported. "
                        f"Use one in {', '.join(FLOATS)}."
                    )
                files[name] = shard
                shapes[name] = tuple(header.get_shape())
        return cls(str(folder), shapes, files)

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)


@dataclass
class Parts(Tensors):
    """Tensors of several checkpoints, those of a part as `part/tensor`."""

    name: str
    own: Tensors
    parts: dict[str, Tensors]

    def __post_init__(self) -> None:
        self.shapes = dict(self.own.shapes)
        for part, tensors in self.parts.items():
            named = {f"{part}/{name}": shape for name, shape in tensors.shapes.items()}
            if twice := self.shapes.keys() & named.keys():
                raise ConversionError(f"{min(twice)} is in {self.own.name}, and in {tensors.name} too. Remove one.")
            self.shapes |= named

    def __getitem__(self, name: str) -> Tensor:
        if name in self.own.shapes:
            return self.own[name]
        part, _, tensor = name.partition("/")
        return self.parts[part][tensor]


def plain_pickle(path: Path) -> StateDict:
    """A pickle of nothing but tensors by name. Nothing in it is executed: anything else raises `ConversionError`."""
    if not path.is_file():
        raise ConversionError(f"{path.parent} has no {path.name}, which holds the weights of the model. Download it.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError) as error:
        raise ConversionError(
            f"{path} is no pickle of plain tensors, and what else is in one could run code, so it is not read "
            f"({type(error).__name__}). Take the published file."
        ) from None
    if not isinstance(state, dict) or not state or not all(map(is_plain, state, state.values())):
        raise ConversionError(f"{path} holds something else than float tensors by name. Take the published file.")
    return StateDict(str(path), {name: tensor.detach() for name, tensor in state.items()})


def is_plain(name: object, tensor: object) -> bool:
    if not isinstance(name, str) or type(tensor) not in (Tensor, nn.Parameter):
        return False
    assert isinstance(tensor, Tensor)
    return tensor.dtype in FLOATS.values() and tensor.layout == torch.strided and not tensor.is_meta


def shards_of(folder: Path) -> list[Path]:
    """The weight files: those that the index names, else model.safetensors, else every safetensors file.

    Some repositories hold the same weights a second time in another format, which the index leaves out.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ConversionError(f"{index} has no weight_map from tensors to files. Download it again.")
        shards = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        shards = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    gone = [path.name for path in shards if not path.is_file()]
    if gone:
        raise ConversionError(f"{index} names {gone[0]}, which is not in the folder. Download it again.")
    if not shards:
        pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pth", ".pt")]
        hint = f" It has {pickles[0]}, but a pickle can run code: convert it to safetensors." if pickles else ""
        raise ConversionError(f"{folder} holds no .safetensors file.{hint}")
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `ConversionError` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON ({error}). Download it again.") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds no JSON object. Download it again.")
    return content


def load(
    model: nn.Module,
    checkpoint: Tensors,
    rows: tuple[Row, ...],
    layouts: tuple[Layout, ...],
    place: Place,
) -> None:
    """Fill `model`, whose parameters may be on the meta device, from a checkpoint. Never holds two copies.

    Each tensor goes straight to where `place` puts it.

    Raises `ConversionError` that names what is missing, extra or misshapen, before anything is read.
    """
    table = Table(rows)
    layout = choose_layout(checkpoint.shapes, table, layouts)
    check(model, checkpoint, table, layout)
    # A bar after two seconds: a large checkpoint takes minutes.
    for name in tqdm(checkpoint.shapes, "loading", unit="tensor", delay=2, leave=False, disable=None):
        row, targets = table.find(layout.to_table(name)) or (None, ())
        if isinstance(row, Rule | Fused):
            for target, tensor in zip(targets, row.split(checkpoint[name]), strict=True):
                assign(model, target, place(target, tensor))
        elif isinstance(row, Tied):
            twin = layout.to_disk(*targets)
            if not torch.equal(checkpoint[name], checkpoint[twin]):
                raise ConversionError(f"{name} is said to be tied to {twin}, but they differ.")


def onto(device: torch.device, dtype: torch.dtype, wide: Container[str] = ()) -> Place:
    """Everything on one device, in one dtype but for what stays `wide`."""
    return lambda name, tensor: tensor.to(device=device, dtype=widened(dtype) if name in wide else dtype)


def choose_layout(names: Iterable[str], table: Table, layouts: tuple[Layout, ...]) -> Layout:
    """The naming under which the most tensors are known; what is still unknown is an error later, by name."""
    names = list(names)

    def n_known(layout: Layout) -> int:
        in_table = {name: layout.to_table(name) for name in names}
        return sum(table.find(ours) is not None and layout.to_disk(ours) == name for name, ours in in_table.items())

    return max(layouts, key=n_known)


def check(model: nn.Module, checkpoint: Tensors, table: Table, layout: Layout) -> None:
    """Every tensor has a row, every parameter has a tensor, and their shapes agree."""
    ours = dict(model.named_parameters())
    found = {name: table.find(layout.to_table(name)) for name in checkpoint.shapes}
    extra = [name for name, hit in found.items() if hit is None]
    targets = {name: hit[1] for name, hit in found.items() if hit is not None and isinstance(hit[0], Rule | Fused)}
    extra += [name for name, its in targets.items() if not set(its) <= set(ours)]
    filled = {target for its in targets.values() for target in its}
    lacking = [layout.to_disk(table.hf_name(name) or f"(no row makes {name})") for name in ours if name not in filled]
    missing = list(dict.fromkeys(lacking))
    expected = {
        name: joined_shape([ours[target].shape for target in its]) for name, its in targets.items() if name not in extra
    }
    wrong = [
        f"{name} is {checkpoint.shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if checkpoint.shapes[name] != shape
    ]
    lora = [name for name in extra if ".lora_" in name]
    kinds = {
        "of LoRA, to be merged into what they change": lora,
        "unknown": [name for name in extra if name not in lora],
        "missing": missing,
        "of another shape": wrong,
    }
    problems = [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"
        for kind, names in kinds.items()
        if names
    ]
    if problems:
        raise ConversionError(
            f"The {len(checkpoint.shapes)} tensors in {checkpoint.name} do not fit the model: {'; '.join(problems)}. "
            "Check that the checkpoint is whole and that its config.json belongs to it."
        )


def joined_shape(shapes: Sequence[torch.Size]) -> tuple[int, ...]:
    """Of tensors that lie one after the other."""
    return tuple(shapes[0]) if len(shapes) == 1 else (sum(shape[0] for shape in shapes), *shapes[0][1:])


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a parameter be `tensor`, without a copy."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=old.requires_grad))


def export(model: nn.Module, rows: tuple[Row, ...], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under their HF names: the table run backwards."""
    table, ours = Table(rows), dict(model.named_parameters())
    names = {name: table.hf_name(name) for name in ours}
    assert None not in names.values(), f"no row makes {[name for name, hf_name in names.items() if hf_name is None]}"
    for hf_name in dict.fromkeys(filter(None, names.values())):
        row, targets = table.find(hf_name) or (None, ())
        assert isinstance(row, Rule | Fused)
        yield layout.to_disk(hf_name), row.join([ours[target].detach() for target in targets])
