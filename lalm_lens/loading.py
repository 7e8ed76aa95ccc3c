"""`from_pretrained`, `from_hf`: files, or a model in memory, become a `HookedLALM`.

Nothing that was downloaded is executed.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

from lalm_lens.config import LALMConfig
from lalm_lens.errors import ConversionError, InputError, reason
from lalm_lens.marked import MarkedLALM
from lalm_lens.model import HookedLALM
from lalm_lens.offload import Store, attach
from lalm_lens.placement import DeviceMap, MaxMemory, Placement, usable_device
from lalm_lens.prompts import Processor, processor_of_parts
from lalm_lens.seeing import SeeingLALM
from lalm_lens.shapes import typed, widened
from lalm_lens.transcribe import Transcriber
from lalm_lens.weights import (
    FLOATS,
    Checkpoint,
    Conversion,
    Drop,
    Part,
    Parts,
    Place,
    StateDict,
    Table,
    Tensors,
    assign,
    choose_layout,
    load,
    onto,
    plain_pickle,
    read_json,
)

# What transformers raises for a tokenizer, feature extractor, config or weight file that it cannot use.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, StrictDataclassError)
# No code, and no pickle but this one, whose tensors exist nowhere else.
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "qformer_connector.pth")
UNWANTED = ("consolidated*", "original/*", "*.fp32*")  # the same weights again
ABOUT = (
    ("config.json",),
    ("config.json", "tokenizer_config.json", "tokenizer.json"),
)  # what says how a model, and a part, is made
SPEAKER, LISTENER = "llm", "whisper"  # the parts that answer, and that write down what is said


class Readable(AbstractContextManager):
    """Turns what transformers raises for files that it cannot use into a `ConversionError` that says `what`."""

    def __init__(self, what: str, advice: str):
        self.what, self.advice = what, advice

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # The Rust code of `tokenizers` raises plain `Exception`s, of no subclass.
        if kind is Exception or isinstance(error, UNREADABLE):
            raise ConversionError(f"{self.what} ({type(error).__name__}: {reason(error)}). {self.advice}") from error


@typed
def from_pretrained(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    conversion: Conversion | None = None,
    device_map: DeviceMap | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | Path | None = None,
    parts: Mapping[str, str | Path] | None = None,
) -> HookedLALM:
    """Load a published checkpoint as a hooked model in eval mode, with its processor beside it.

    `path_or_hub_id` is a folder with config.json and safetensors files, or a repository on the Hub. The conversion
    follows from the config's `model_type`, unless one is given. float32 is the default because the numbers that a
    trace compares are small; bfloat16 halves the memory. Raises `ConversionError` if a tensor or a config key is
    unknown, missing or misshapen.

    `device_map`, in place of `device`, spreads a model over GPUs, CPU and disk: accelerate's "auto" ("balanced",
    "balanced_low_0", "sequential") within `max_memory` per device, as {0: "20GB", "cpu": "60GB"}; or your own map from
    modules to places, as {"blocks.2": "disk", "": "cpu"}. Such a model runs on the first GPU of the map, or on the CPU:
    inputs may be given on any device, logits come back on that one. What goes to disk lies in a new folder inside
    `offload_folder`, by default the system's temporary one, as long as the model lives. Raises `InputError` for a map
    or folder that cannot be used.

    `parts` says where the parts of a model are that its checkpoint leaves to others, by name, as folders or Hub ids:
    {"whisper": ..., "llm": ...} of a DeSTA. By default they are those that config.json names.
    """
    device = usable_device(device)
    if device_map is None and (max_memory, offload_folder) != (None, None):
        raise InputError("max_memory and offload_folder belong to a device_map: give device_map='auto' with them.")
    if device_map is not None and device.type != "cpu":
        raise InputError(f"device = {str(device)!r} and a device_map contradict each other: give one of them.")
    files = Files.find(path_or_hub_id, conversion, parts)
    folder, config, conversion = files.folder, files.config, files.conversion
    model = skeleton(config, conversion, model_name(path_or_hub_id))
    with ExitStack() as stack:
        checkpoint = files.open(stack)
        if device_map is None:
            fill(model, checkpoint, conversion, onto(device, dtype, conversion.wide))
        else:
            model.placement = Placement.of(in_dtype(model, dtype, conversion), device_map, max_memory)
            store = Store(model, model.placement, dtype, offload_folder, conversion.wide)
            fill(model, checkpoint, conversion, store.put)
            attach(model, model.placement, store)
    speaker = files.parts.get(SPEAKER, folder)
    ends = stop_tokens(read_optional(speaker / "generation_config.json"), read_config(speaker))
    model.stop_tokens = tuple(dict.fromkeys((*ends, *conversion.stop_tokens)))
    return with_processor(model, read_processor(files), conversion, files.transcriber(device))


@typed
def without_weights(
    path_or_hub_id: str | Path,
    *,
    conversion: Conversion | None = None,
    parts: Mapping[str, str | Path] | None = None,
) -> HookedLALM:
    """A checkpoint's shapes on the meta device, and its processor: enough to ask what it hears and how it is asked.
    Raises as `from_pretrained`."""
    files = Files.find(path_or_hub_id, conversion, parts)
    model = skeleton(files.config, files.conversion, model_name(path_or_hub_id))
    return with_processor(model, read_processor(files), files.conversion)


@typed
def from_hf(
    model: nn.Module, processor: ProcessorMixin | None = None, *, conversion: Conversion | None = None
) -> HookedLALM:
    """A transformers model that is in memory already, as a hooked model in eval mode on the same weights.

    Nothing is copied: our parameters are HF's own tensors, in their dtype and on their device, so an edit in place of
    one is an edit of the other, until `.to` moves one of them away. `processor` is HF's as well; without it,
    `.processor` is None. Raises `ConversionError` as `from_pretrained` does, and for a model that is quantised,
    wrapped by PEFT, offloaded, split over devices or of more than one dtype.
    """
    state = plain_state(model)
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(f"{state.name} is no transformers model: it has no config to convert it by.")
    config = json.loads(model.config.to_json_string())  # what config.json would say, had it been saved
    conversion = conversion or conversion_for(config)
    if conversion.parts:
        raise ConversionError(f"A {conversion.model_type} is made of several checkpoints: open it by from_pretrained.")
    ours = skeleton(config, conversion, model_name(model.name_or_path or state.name))
    one = one_dtype(state, conversion, ours.lalm_cfg)
    fill(ours, state, conversion, onto(one.device, one.dtype, conversion.wide))
    generation = getattr(model, "generation_config", None)  # a class that cannot generate has none
    ends = stop_tokens({} if generation is None else generation.to_dict(), config)
    ours.stop_tokens = tuple(dict.fromkeys((*ends, *conversion.stop_tokens)))
    return with_processor(ours, processor, conversion)


@dataclass(frozen=True)
class Files:
    """Where the files of a checkpoint are, those of its parts too, and what they say of the model."""

    folder: Path
    parts: dict[str, Path]
    config: Mapping[str, Any]  # with what the parts' files say under "parts"
    conversion: Conversion

    @classmethod
    def find(
        cls,
        path_or_hub_id: str | Path,
        conversion: Conversion | None,
        parts: Mapping[str, str | Path] | None,
        wanted: Sequence[str] = WANTED,
        wanted_of_parts: Sequence[str] = WANTED,
    ) -> "Files":
        folder, given = local_folder(path_or_hub_id, wanted), dict(parts or {})
        config = read_config(folder)
        conversion = conversion or conversion_for(config)
        names = [part.name for part in conversion.parts]
        if unknown := sorted(set(given) - set(names)):
            its = f"its parts are {' and '.join(names)}" if names else "it has none"
            raise ConversionError(f"A {conversion.model_type} has no part {unknown[0]!r}: {its}.")
        folders = {
            part.name: part_folder(part, config, given.get(part.name), wanted_of_parts) for part in conversion.parts
        }
        if not folders:
            return cls(folder, {}, config, conversion)
        about = {name: {"config": read_config(its), **tokenizer_files(its)} for name, its in folders.items()}
        return cls(folder, folders, {**config, "parts": about}, conversion)

    def open(self, stack: ExitStack) -> Tensors:
        """All tensors, read when they are asked for."""
        pickle = self.conversion.pickle
        own = Checkpoint.open(self.folder, stack) if pickle is None else plain_pickle(self.folder / pickle)
        if not self.parts:
            return own
        parts: dict[str, Tensors] = {name: Checkpoint.open(its, stack) for name, its in self.parts.items()}
        return Parts(str(self.folder), own, parts)

    def transcriber(self, device: torch.device) -> Transcriber | None:
        """What writes down what a clip says, of a model that reads it."""
        return Transcriber(self.parts[LISTENER], device) if LISTENER in self.parts else None


def part_folder(part: Part, config: Mapping[str, Any], given: str | Path | None, wanted: Sequence[str]) -> Path:
    """Where a part's files are: where the user says, else on the Hub under the id that config.json names."""
    where = config.get(part.id_key) or part.published if given is None else given
    try:
        return local_folder(where, wanted)
    except ConversionError as error:
        raise ConversionError(
            f"The part {part.name!r} is missing: {error} Say where it is: parts={{{part.name!r}: FOLDER}}, or --part "
            f"{part.name}=FOLDER."
        ) from None


def stop_tokens(*configs: Mapping[str, Any]) -> tuple[int, ...]:
    """What ends an answer, from the first config that says it: in generation_config.json, or in config.json."""
    for config in configs:
        thinker = config.get("thinker_config") or {}
        for section in (config, thinker, config.get("text_config") or {}, thinker.get("text_config") or {}):
            stops = section.get("eos_token_id")
            if stops is not None:
                return tuple(stops) if isinstance(stops, list) else (stops,)
    return ()


def skeleton(config: Mapping[str, Any], conversion: Conversion, name: str) -> HookedLALM:
    """The model of a config on the meta device: every shape and no number."""
    cfg = conversion.config(config)
    with torch.device("meta"):
        hears = conversion.encoder(cfg), conversion.adapter(cfg)
        if cfg.audio_marks is not None:
            return MarkedLALM(cfg, *hears, name)
        if conversion.sight is None:
            return HookedLALM(cfg, *hears, name)
        return SeeingLALM(cfg, *hears, conversion.sight.encoder(cfg), conversion.sight.adapter(cfg), name)


def in_dtype(model: HookedLALM, dtype: torch.dtype, conversion: Conversion) -> HookedLALM:
    """A skeleton whose parameters are as wide as they will be."""
    model.to(dtype)
    for name, parameter in list(model.named_parameters()):
        if name in conversion.wide:
            assign(model, name, parameter.data.to(widened(dtype)))
    return model


def fill(model: HookedLALM, tensors: Tensors, conversion: Conversion, place: Place) -> None:
    load(model, tensors, conversion.rows(model.lalm_cfg), conversion.layouts, place)
    model.tie()
    model.follow_weights()
    model.eval()


def with_processor(
    model: HookedLALM, hf: ProcessorMixin | None, conversion: Conversion, transcriber: Transcriber | None = None
) -> HookedLALM:
    if hf is not None:
        ways = conversion.template, conversion.hearing
        model.processor = Processor(hf, *ways, model.lalm_cfg, model.audio_encoder.n_audio, transcriber)
        model.processor.check()
    return model


def plain_state(hf: nn.Module) -> StateDict:
    """The tensors of a model whose weights are all here, as they are. Raises `ConversionError` with advice."""
    tensors: dict[str, Tensor] = hf.state_dict()
    first = next(iter(tensors.values()), torch.empty(0))
    faults = {
        "is wrapped by PEFT: give what its `merge_and_unload()` returns": [
            name for name in tensors if name.startswith("base_model.") or ".base_layer." in name
        ],
        "is offloaded or was never loaded: load it whole, on one device": [
            name for name, tensor in tensors.items() if tensor.is_meta
        ],
        "is split over devices: load it on one": [
            name for name, tensor in tensors.items() if tensor.device != first.device
        ],
        "is quantised or sharded: load it without a quantization_config": [
            name
            for name, tensor in tensors.items()
            if type(tensor) is not Tensor or tensor.dtype not in FLOATS.values()
        ],
    }
    state = StateDict(type(hf).__name__, tensors)
    for fault, names in faults.items():
        refuse(state, fault, names)
    return state


def one_dtype(state: StateDict, conversion: Conversion, cfg: LALMConfig) -> Tensor:
    """A tensor that is as all are that we take."""
    table = Table(conversion.rows(cfg))
    layout = choose_layout(state.shapes, table, conversion.layouts)
    hits = {name: table.find(layout.to_table(name)) for name in state.tensors}
    # HF keeps some in float32, and what is dropped may be as it likes.
    wide = {
        name
        for name, hit in hits.items()
        if hit and (isinstance(hit[0], Drop) or any(ours in conversion.wide for ours in hit[1]))
    }
    one = next(tensor for name, tensor in state.tensors.items() if name not in wide)
    other = [name for name, tensor in state.tensors.items() if tensor.dtype != one.dtype and name not in wide]
    refuse(state, "mixes dtypes: bring it to one, as `model.float()` does", other)
    return one


def refuse(state: StateDict, fault: str, names: Sequence[str]) -> None:
    if names:
        n_all = len(state.tensors)
        raise ConversionError(f"This {state.name} {fault} ({len(names)} of {n_all} tensors, e.g. {names[0]}).")


def model_name(path_or_hub_id: str | Path) -> str:
    """The Hub id, or the name of the folder: a downloaded snapshot's folder is named by a hash."""
    path = Path(path_or_hub_id).expanduser()
    return path.resolve().name if path.is_dir() else str(path_or_hub_id)


def local_folder(path_or_hub_id: str | Path, wanted: Sequence[str] = WANTED) -> Path:
    """The folder itself, or where the `wanted` files of a repository on the Hub have been put."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists() or len(path.parts) != 2 or path.is_absolute():
        raise ConversionError(
            f"There is no model at {path_or_hub_id}: give a folder with config.json and .safetensors files, or a Hub "
            "id such as Qwen/Qwen2-Audio-7B-Instruct."
        )
    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=list(wanted), ignore_patterns=list(UNWANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"{path_or_hub_id} is no local folder, and it cannot be had from the Hub: {reason(error)}"
        ) from error


def tokenizer_files(folder: Path) -> dict[str, Mapping[str, Any]]:
    """tokenizer_config.json and, only where that does not name the added tokens, tokenizer.json: 17 MB of Llama's."""
    says = read_optional(folder / "tokenizer_config.json")
    files = {"tokenizer_config": says}
    return files if "added_tokens_decoder" in says else {**files, "tokenizer": read_optional(folder / "tokenizer.json")}


def read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"{folder} has no config.json, so it is not a model. Give the folder of a checkpoint.")
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ConversionError(f"{path} names no model_type, so nobody knows how to convert it.")
    return config


def read_optional(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}


def conversion_for(config: Mapping[str, Any]) -> Conversion:
    known = our_conversions()
    if config["model_type"] not in known:
        raise ConversionError(
            f"There is no conversion for model type {config['model_type']!r}; there is one for {', '.join(known)}."
        )
    return known[config["model_type"]]


def our_conversions() -> dict[str, Conversion]:
    """The built-in conversions. Imported here, because they import the packages beneath this one."""
    try:
        import conversions
    except ImportError as error:
        raise ConversionError(
            "The package `conversions` that belongs to lalm_lens is missing: reinstall it."
        ) from error
    if getattr(conversions, "OWNER", None) != "lalm_lens":
        raise ConversionError(
            f"Another package called `conversions` is installed ({conversions.__file__}). Uninstall it and reinstall "
            "lalm_lens, or start Python elsewhere if a folder of that name lies in the way."
        )
    return conversions.available()


def read_processor(files: Files) -> ProcessorMixin | None:
    """The model's own tokenizer and feature extractor; None for a checkpoint that ships without them."""
    folder, conversion = files.parts.get(SPEAKER, files.folder), files.conversion
    where = " or ".join(map(str, files.parts.values())) or folder
    readable = Readable(
        f"The tokenizer or feature extractor in {where} cannot be read",
        "Put the model's own processor files beside its weights.",
    )
    if conversion.processor is not None:
        with readable:
            return conversion.processor(folder)
    has_tekken = (folder / "tekken.json").is_file()  # Mistral's own repositories have nothing else
    if not has_tekken and not (folder / "tokenizer_config.json").is_file():
        return None
    if has_tekken and find_spec("mistral_common") is None:
        raise ConversionError(
            f"{folder} has a tekken.json, which mistral-common reads, and that is not installed. Install it: pip "
            "install 'lalm_lens[voxtral]'."
        )
    with readable:
        if files.parts:
            return processor_of_parts(**files.parts)
        if conversion.sight is not None:
            return conversion.sight.processor(folder)
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
