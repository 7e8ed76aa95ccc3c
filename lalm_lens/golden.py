"""`verify_golden`: a checkpoint run by us, beside arrays that the original implementation computed and somebody stored.
`verify_original`: beside the original itself, where it is installed.

For models that transformers has no class for. A golden set is a folder: inputs.safetensors with `input_ids`,
`attention_mask` and, for the runs `clean` and `corrupted`, `{run}.input_features`; expected.safetensors with
`{run}.projector_output`, `embeds`, `resid_post` [layer, batch, pos, d_model] and `logits`, all of them float32.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lalm_lens.errors import DataError, reason
from lalm_lens.inputs import Inputs
from lalm_lens.loading import from_pretrained
from lalm_lens.model import HookedLALM
from lalm_lens.placement import usable_device
from lalm_lens.shapes import typed
from lalm_lens.verify import Verification, our_states, real_positions, states_of
from lalm_lens.weights import Conversion

RUNS = ("clean", "corrupted")
MASKS = ("attention_mask", "feature_attention_mask", "input_features_mask")
STORED = ("projector_output", "embeds", "resid_post", "logits")
LOGITS, STATES = 1e-4, 2e-5  # absolute: a few times the noise of the originals


@typed
def verify_golden(
    path_or_hub_id: str | Path,
    golden: str | Path,
    *,
    device: str | torch.device = "cpu",
    conversion: Conversion | None = None,
    parts: Mapping[str, str | Path] | None = None,
) -> Verification:
    """Run a checkpoint on the inputs of a golden set, in float32, and compare adapter, embeddings, blocks and logits.

    Two places agree if no number differs by more than 1e-4 (logits) or 2e-5. Padding is not compared. Raises
    `DataError` for a folder that is no golden set, or one of another model.
    """
    files, stored = (read_arrays(Path(golden) / f"{name}.safetensors") for name in ("inputs", "expected"))
    theirs = {run: {key: wanted(stored, f"{run}.{key}") for key in STORED} for run in RUNS}
    model = from_pretrained(path_or_hub_id, device=usable_device(device), conversion=conversion, parts=parts)
    rows = []
    for run in RUNS:
        inputs = inputs_of(files, run, model.lalm_cfg.audio_token)
        rows += compared(run, model, inputs.to(model.device), theirs[run])
    return Verification(model.cfg.model_name, torch.float32, pd.DataFrame(rows), f"the golden set {golden}")


@typed
def verify_original(
    model: HookedLALM, inputs: Inputs, blocks: Iterable[nn.Module], run: Callable[[], Any]
) -> Verification:
    """Compare with the authors' own code, which you have installed and run: embeddings, decoder blocks and logits.

    `blocks` are the original's decoder blocks in their order. `run` runs it once on the prompts of `inputs`, and
    returns its logits or something that has them:

        verify_original(model, inputs, original.llm_model.model.layers, lambda: original(**theirs))

    Two places agree as in `verify_golden`, which is of float32: bring both models to it. Raises `DataError` where the
    original has other blocks, does not run them, or sees prompts of another length.
    """
    n_layers, blocks = model.decoder_cfg.n_layers, list(blocks)
    if len(blocks) != n_layers:
        raise DataError(f"This model has {n_layers} decoder blocks, and the original {len(blocks)}: give them all.")

    def logits() -> Tensor:
        said = run()
        return said if isinstance(said, Tensor) else said.logits

    theirs = states_of({f"blocks.{n}": block for n, block in enumerate(blocks)}, logits)
    mine, is_token = our_states(model, inputs.to(model.device)), inputs.attention_mask.cpu()
    rows = []
    for what in (its for its in mine if its in ("hook_embed", "logits") or its.startswith("blocks.")):
        if what not in theirs:
            raise DataError("The original did not run all of these blocks: give those that `run` goes through.")
        if mine[what].shape != theirs[what].shape:
            raise DataError(
                f"{what} is {tuple(theirs[what].shape)} in the original, and {tuple(mine[what].shape)} here: give both "
                "the same prompts."
            )
        rows.append(row(what, mine[what][is_token].float(), theirs[what][is_token].float()))
    return Verification(model.cfg.model_name, torch.float32, pd.DataFrame(rows), "the original in memory")


def read_arrays(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path.parent} is no golden set: {path.name} cannot be read ({reason(error)}).") from None


def wanted(arrays: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in arrays:
        raise DataError(f"A golden set has {name}, and this one does not.")
    return arrays[name]


def inputs_of(files: Mapping[str, Tensor], run: str, audio_token: int) -> Inputs:
    masks = {name: files[name] for name in MASKS if name in files}
    features = wanted(files, f"{run}.input_features")
    inputs = Inputs.from_hf({**masks, "input_ids": tokens_of(files, audio_token), "input_features": features})
    if "input_audio_lengths" not in files:
        return inputs
    return replace(inputs, n_frames=2 * files["input_audio_lengths"][:, 0])  # Qwen-Audio counts states


def tokens_of(files: Mapping[str, Tensor], audio_token: int) -> Tensor:
    """Our prompts: placeholders where audio is heard, and the words of a transcript where one is read."""
    tokens = files.get("merged_input_ids", wanted(files, "input_ids")).clone()
    if "merged_input_ids" in files:  # -1 where DeSTA2 puts audio in
        tokens[tokens == -1] = audio_token
    elif "transcript_mask" in files:  # DeSTA2.5 has placeholders for both
        words = [wanted(files, f"transcript_ids.{row}") for row in range(len(tokens))]
        tokens[files["transcript_mask"]] = torch.cat(words)
    return tokens


def compared(run: str, model: HookedLALM, inputs: Inputs, theirs: Mapping[str, Tensor]) -> list[dict]:
    """One row a place, in the order of the computation."""
    mine = our_states(model, inputs)
    is_real, is_token = real_positions(model, inputs, mine), inputs.attention_mask.cpu()
    audio, their_audio = mine["adapter"], theirs["projector_output"]
    if audio.numel() != their_audio.numel():  # stored of the sound alone
        audio = audio[is_real["adapter"]]
    if audio.numel() != their_audio.numel():
        raise DataError(
            f"The adapter's {tuple(their_audio.shape)} in the golden set are not {tuple(audio.shape)} here."
        )
    resid_post = torch.stack([mine[f"blocks.{n}"] for n in range(model.decoder_cfg.n_layers)])
    for key, its in (("embeds", mine["hook_embed"]), ("resid_post", resid_post), ("logits", mine["logits"])):
        if its.shape != theirs[key].shape:
            raise DataError(f"{key} is {tuple(theirs[key].shape)} in the golden set, and {tuple(its.shape)} here.")
    return [
        row(f"{run} adapter", audio.flatten(), their_audio.flatten()),
        row(f"{run} hook_embed", mine["hook_embed"][is_token], theirs["embeds"][is_token]),
        *(
            row(f"{run} blocks.{n}", *(states[n, is_token] for states in (resid_post, theirs["resid_post"])))
            for n in range(len(resid_post))
        ),
        row(f"{run} logits", mine["logits"][is_token], theirs["logits"][is_token]),
    ]


def row(what: str, ours: Tensor, theirs: Tensor) -> dict:
    difference, allowed = float((ours - theirs).abs().max()), LOGITS if what.endswith("logits") else STATES
    return {
        "what": what,
        "largest": float(theirs.abs().max()),
        "difference": difference,
        "allowed": allowed,
        "agrees": difference <= allowed,
    }
