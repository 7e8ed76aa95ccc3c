"""`from_pretrained`: a folder or a Hub id becomes a `HookedLALM`. Nothing that was downloaded is executed."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from transformers import AutoProcessor

from lalm_lens.errors import ConversionError, InputError
from lalm_lens.model import HookedLALM
from lalm_lens.prompts import Processor
from lalm_lens.shapes import typed
from lalm_lens.weights import Checkpoint, Conversion, load, read_json

if TYPE_CHECKING:
    from transformers import ProcessorMixin


# What transformers raises for a tokenizer, feature extractor or config file that it cannot use.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, StrictDataclassError)


@typed
def from_pretrained(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    conversion: Conversion | None = None,
) -> HookedLALM:
    """Load a published checkpoint as a hooked model in eval mode, with its processor beside it.

    `path_or_hub_id` is a folder with config.json and safetensors files, or a repository on the Hub. The conversion
    follows from the config's `model_type`, unless one is given. float32 is the default because the numbers that a
    trace compares are small; bfloat16 halves the memory. Raises `ConversionError` if a tensor or a config key is
    unknown, missing or misshapen.
    """
    device = usable_device(device)
    folder = local_folder(path_or_hub_id)
    config = read_config(folder)
    conversion = conversion or conversion_for(config)
    cfg = conversion.config(config)
    with torch.device("meta"):
        model = HookedLALM(cfg, conversion.encoder(cfg), conversion.adapter(cfg), model_name(path_or_hub_id))
    with ExitStack() as stack:
        checkpoint = Checkpoint.open(folder, stack)
        load(model, checkpoint, conversion.rows(cfg), conversion.layouts, dtype, device)
    model.tie()
    model.follow_weights()
    hf_processor = read_processor(folder)
    if hf_processor is not None:
        model.processor = Processor(hf_processor, conversion.marks, cfg, model.audio_encoder.n_audio)
    return model.eval()


def model_name(path_or_hub_id: str | Path) -> str:
    """The Hub id, or the name of the folder: a downloaded snapshot's folder is named by a hash."""
    path = Path(path_or_hub_id).expanduser()
    return path.resolve().name if path.is_dir() else str(path_or_hub_id)


def usable_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"The device {str(device)!r} cannot be used here: {reason}") from None


def local_folder(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists() or len(path.parts) != 2 or path.is_absolute():
        raise ConversionError(
            f"There is no model at {path_or_hub_id}: give a folder with config.json and .safetensors files, or a Hub "
            "id such as Qwen/Qwen2-Audio-7B-Instruct."
        )
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # no code, no pickles
    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=wanted, ignore_patterns=["consolidated*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(
            f"{path_or_hub_id} is no local folder, and it cannot be had from the Hub: {reason}"
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


def read_processor(folder: Path) -> "ProcessorMixin | None":
    """The model's own tokenizer and feature extractor; None for a checkpoint that ships without them."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0]
        raise ConversionError(
            f"The tokenizer or feature extractor in {folder} cannot be read ({type(error).__name__}: {reason}). Put "
            "the model's own processor files beside its weights."
        ) from error
