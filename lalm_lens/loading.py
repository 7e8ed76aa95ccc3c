"""`from_pretrained`, `from_hf`: files, or a model in memory, become a `HookedLALM`.

Nothing that was downloaded is executed.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
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
from lalm_lens.prompts import Processor
from lalm_lens.seeing import SeeingLALM
from lalm_lens.shapes import typed
from lalm_lens.weights import (
    FLOATS,
    Checkpoint,
    Conversion,
    Place,
    StateDict,
    Table,
    Tensors,
    choose_layout,
    load,
    onto,
    read_json,
)

# What transformers raises for a tokenizer, feature extractor, config or weight file that it cannot use.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, StrictDataclassError)
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")  # no code, no pickles


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
    """
    device = usable_device(device)
    if device_map is None and (max_memory, offload_folder) != (None, None):
        raise InputError("max_memory and offload_folder belong to a device_map: give device_map='auto' with them.")
    if device_map is not None and device.type != "cpu":
        raise InputError(f"device = {str(device)!r} and a device_map contradict each other: give one of them.")
    folder = local_folder(path_or_hub_id)
    config = read_config(folder)
    conversion = conversion or conversion_for(config)
    model = skeleton(config, conversion, model_name(path_or_hub_id))
    with ExitStack() as stack:
        checkpoint = Checkpoint.open(folder, stack)
        if device_map is None:
            fill(model, checkpoint, conversion, onto(device, dtype, conversion.wide))
        else:
            model.placement = Placement.of(model.to(dtype), device_map, max_memory)
            store = Store(model, model.placement, dtype, offload_folder, conversion.wide)
            fill(model, checkpoint, conversion, store.put)
            attach(model, model.placement, store)
    generation = folder / "generation_config.json"
    ends = stop_tokens(read_json(generation) if generation.is_file() else {}, config)
    model.stop_tokens = tuple(dict.fromkeys((*ends, *conversion.stop_tokens)))
    return with_processor(model, read_processor(folder, conversion), conversion)


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
    ours = skeleton(config, conversion, model_name(model.name_or_path or state.name))
    one = one_dtype(state, conversion, ours.lalm_cfg)
    fill(ours, state, conversion, onto(one.device, one.dtype, conversion.wide))
    generation = getattr(model, "generation_config", None)  # a class that cannot generate has none
    ends = stop_tokens({} if generation is None else generation.to_dict(), config)
    ours.stop_tokens = tuple(dict.fromkeys((*ends, *conversion.stop_tokens)))
    return with_processor(ours, processor, conversion)


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


def fill(model: HookedLALM, tensors: Tensors, conversion: Conversion, place: Place) -> None:
    load(model, tensors, conversion.rows(model.lalm_cfg), conversion.layouts, place)
    model.tie()
    model.follow_weights()
    model.eval()


def with_processor(model: HookedLALM, hf: ProcessorMixin | None, conversion: Conversion) -> HookedLALM:
    if hf is not None:
        ways = conversion.template, conversion.hearing
        model.processor = Processor(hf, *ways, model.lalm_cfg, model.audio_encoder.n_audio)
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
    """A tensor that is as all are, but for those that HF keeps in float32."""
    table = Table(conversion.rows(cfg))
    layout = choose_layout(state.shapes, table, conversion.layouts)
    hits = {name: table.find(layout.to_table(name)) for name in state.tensors}
    wide = {name for name, hit in hits.items() if hit is not None and not conversion.wide.isdisjoint(hit[1])}
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
        return Path(
            snapshot_download(str(path_or_hub_id), allow_patterns=list(wanted), ignore_patterns=["consolidated*"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"{path_or_hub_id} is no local folder, and it cannot be had from the Hub: {reason(error)}"
        ) from error


def read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ConversionError(f"{folder} has no config.json, so it is not a model. Give the folder of a checkpoint.")
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ConversionError(f"{path} names no model_type, so nobody knows how to convert it.")
    return config


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


def read_processor(folder: Path, conversion: Conversion) -> ProcessorMixin | None:
    """The model's own tokenizer and feature extractor; None for a checkpoint that ships without them."""
    readable = Readable(
        f"The tokenizer or feature extractor in {folder} cannot be read",
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
        if conversion.sight is not None:
            return conversion.sight.processor(folder)
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
