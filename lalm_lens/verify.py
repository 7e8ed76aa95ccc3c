"""`verify`: a checkpoint run by us and by transformers' own class, compared block by block."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from lalm_lens.attributes import ATTRIBUTES
from lalm_lens.audio import RATE_HZ, Waveform, Waveforms
from lalm_lens.config import LALMConfig, VisionConfig
from lalm_lens.errors import ConversionError
from lalm_lens.inputs import Inputs
from lalm_lens.loading import Readable, conversion_for, from_pretrained, local_folder, read_config
from lalm_lens.model import HookedLALM
from lalm_lens.placement import usable_device
from lalm_lens.prompts import Processor
from lalm_lens.seeing import SeeingLALM
from lalm_lens.shapes import typed
from lalm_lens.weights import Conversion, Rule, Table, choose_layout

States = dict[str, Tensor]  # by place, on the CPU
RTOL, ATOL = 1.3e-6, 1e-5  # what torch.testing.assert_close allows in float32
# Times HF's difference with itself. Right models came to 2.9 and 4.4: a channel of 900 makes a matter of luck of it.
ALLOWED_RMS, ALLOWED_LARGEST = 4.0, 6.0


@dataclass(frozen=True)
class Verification:
    """Ours beside HF's, one row a place, in the order of the computation.

    Columns: `what`; `largest`, HF's largest absolute value; `difference`, the largest absolute one, and `rms`, its root
    mean square; `hf_difference` and `hf_rms`, HF's own with itself (eager attention against sdpa); `agrees`.
    """

    model_name: str
    dtype: torch.dtype
    frame: pd.DataFrame = field(repr=False)
    against: str = "transformers"

    @property
    def passed(self) -> bool:
        return bool(self.frame.agrees.all())

    @property
    def verdict(self) -> str:
        worst = self.frame.iloc[int(self.frame.difference.to_numpy().argmax())]  # a NaN is the largest
        largest = f"largest difference {worst.difference:.2g}, in {worst.what}"
        if self.passed:
            return f"{self.model_name} agrees with {self.against} in {self.dtype} ({largest})."
        wrong = self.frame.what[~self.frame.agrees]
        return (
            f"{self.model_name} DIFFERS from {self.against} in {self.dtype}: first in {wrong.iloc[0]}, in {len(wrong)} "
            f"of {len(self.frame)} places in all ({largest})."
        )

    def __repr__(self) -> str:
        shown = self.frame.assign(agrees=self.frame.agrees.map({True: "yes", False: "NO"}))
        return f"{shown.to_string(index=False, float_format='{:.2e}'.format)}\n{self.verdict}"


@typed
def verify(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    waveforms: Waveforms | None = None,
    conversion: Conversion | None = None,
) -> Verification:
    """Run a checkpoint as ours and as transformers' own class, and compare logits and the output of every block.

    Both hear `waveforms` (16 kHz; by default three sounds made here) with the attributes' prompts, in one left-padded
    batch, and a model that sees has an image before each; padding is not compared. Two places agree if the root mean
    square of their difference is at most four times that of HF with itself (eager attention against sdpa) and the
    largest difference at most six; in float32 also if `torch.testing.assert_close` says so, which is too strict where a
    residual stream has a few huge channels, as those of trained models do. One model at a time is in memory. The
    conversion is the built-in one, unless one is given.
    Raises `ConversionError` for a checkpoint that cannot be opened or has no processor.
    """
    device = usable_device(device)
    conversion = conversion or conversion_for(read_config(local_folder(path_or_hub_id, ["config.json"])))
    if conversion.hf_class is None:
        raise ConversionError(
            f"transformers has no class for a {conversion.model_type} model to compare with. Compare with what its "
            "authors' own code computed, stored as a golden set: lalm-lens verify MODEL --golden FOLDER."
        )
    ours = from_pretrained(path_or_hub_id, dtype=dtype, device=device, conversion=conversion)
    if ours.processor is None:
        raise ConversionError(
            f"{path_or_hub_id} has no tokenizer and feature extractor, so it has nothing to hear. Put the model's own "
            "processor files beside its weights."
        )
    inputs = questions(ours.processor, waveforms or sounds(ours.processor)).to(device)
    mine = our_states(ours, inputs)
    is_real = real_positions(ours, inputs, mine)
    cfg, name = ours.lalm_cfg, ours.cfg.model_name
    del ours  # before HF comes
    hf = load_hf(local_folder(path_or_hub_id), conversion.hf_class, dtype, device)
    modules = counterparts(hf, mine, conversion, cfg)
    batch = {  # HF's Audio Flamingo 3 leaves the cast of features to the caller
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.to_hf(conversion.frame_mask).items()
    }
    theirs = hf_states(hf, modules, batch)
    hf.set_attn_implementation("eager")
    eager = hf_states(hf, modules, batch)

    def real(run: States, what: str) -> Tensor:
        """Voxtral's adapter returns its clips one after the other, Omni's towers and adapters what is heard and seen
        alone."""
        is_flat = what.startswith("vision_") or run[what].numel() != mine[what].numel()
        if is_flat and run is not mine:
            return run[what]
        return run[what].reshape(mine[what].shape)[is_real[what.split(".")[0]]]

    rows = [compare(what, *(real(run, what) for run in (mine, theirs, eager))) for what in mine]
    return Verification(name, dtype, pd.DataFrame(rows))


def sounds(processor: Processor) -> list[Waveform]:
    """Three rising tones in noise, of 4 s (or what the model hears) and shorter: a batch that needs padding."""
    generator = torch.Generator().manual_seed(0)
    longest = min(4 * RATE_HZ, processor.n_samples)
    times = [torch.arange(int(share * longest)) / RATE_HZ for share in (1.0, 0.37, 0.71)]
    return [
        0.3 * torch.sin(2 * torch.pi * (300 + 200 * t) * t) + 0.03 * torch.randn(len(t), generator=generator)
        for t in times
    ]


def questions(processor: Processor, waveforms: Waveforms) -> Inputs:
    """The attributes' prompts in turn, each about the next clip."""
    asked = list(zip(cycle(ATTRIBUTES.values()), waveforms, strict=False))
    if processor.cfg.vision is None:
        prompts = [processor.prompt(which, processor.n_frames(clip)) for which, clip in asked]
        return processor.inputs(prompts, waveforms)
    seen = photos(processor.cfg.vision, len(asked))
    prompts = [
        processor.prompt(which, processor.n_frames(clip), images=processor.see([photo]))
        for (which, clip), photo in zip(asked, seen, strict=True)
    ]
    return processor.inputs(prompts, waveforms, processor.see(seen))


def photos(cfg: VisionConfig, n: int) -> list[np.ndarray]:
    """Noise in colour, each of several windows of the vision tower, and of a size of its own."""
    random, side = np.random.default_rng(0), cfg.patch * cfg.merge
    sizes = [(side * (cfg.window + 3 + which % 3), side * (2 * cfg.window + 1 + which)) for which in range(n)]
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def real_positions(model: HookedLALM, inputs: Inputs, states: States) -> dict[str, Any]:
    """Which positions of each stage are compared. All of an encoder's are real to it, the silence behind the clip too,
    unless it hears in windows."""
    assert inputs.n_frames is not None
    n_frames, is_token = inputs.n_frames.cpu(), inputs.attention_mask.cpu()
    is_sound = first(states["audio_encoder.blocks.0"], (n_frames + 1) // 2)
    seen = {}
    if isinstance(model, SeeingLALM) and inputs.images is not None:
        frames = model.vision_encoder.frames(inputs.images.grid.cpu())
        seen = {"vision_encoder": frames.by_window, "vision_adapter": frames.tokens_by_window}
    return seen | {
        "audio_encoder": slice(None) if model.lalm_cfg.encoder.window is None else is_sound,
        "adapter": first(states["adapter"], model.audio_encoder.n_audio(n_frames)),
        **dict.fromkeys(("hook_embed", "blocks", "logits"), is_token),
    }


def first(states: Tensor, n: Tensor) -> Tensor:
    """True for the first so many positions of each clip."""
    return torch.arange(states.shape[1]) < n[:, None]


@torch.no_grad()
def our_states(model: HookedLALM, inputs: Inputs) -> States:
    """In the order of the computation: blocks of encoders, adapters, merged embeddings, decoder blocks, logits."""
    encoder, decoder = model.lalm_cfg.encoder, model.lalm_cfg.decoder
    blocks = [f"audio_encoder.blocks.{n}" for n in range(encoder.n_layers)]
    hooks = {what: f"{what}.hook_resid_post" for what in blocks}
    hooks |= {"adapter": "adapter.hook_out"}
    if inputs.images is not None and model.lalm_cfg.vision is not None:
        seen = [f"vision_encoder.blocks.{n}" for n in range(model.lalm_cfg.vision.n_layers)]
        hooks |= {what: f"{what}.hook_resid_post" for what in seen} | {"vision_adapter": "vision_adapter.hook_out"}
    hooks |= {"hook_embed": "hook_embed"}
    hooks |= {f"blocks.{n}": f"blocks.{n}.hook_resid_post" for n in range(decoder.n_layers)}
    logits, cache = model.run_with_cache(inputs, names_filter=list(hooks.values()), device="cpu")
    return {**{what: cache[hook] for what, hook in hooks.items()}, "logits": logits.cpu()}


def load_hf(folder: Path, hf_class: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    if not hasattr(transformers, hf_class):
        raise ConversionError(f"transformers {transformers.__version__} has no {hf_class} to compare with. Update it.")
    with Readable(f"transformers cannot open {folder}", "Check that it is whole."):
        hf = getattr(transformers, hf_class).from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, trust_remote_code=False
        )
    return hf.to(device).eval()


def counterparts(hf: nn.Module, places: Iterable[str], conversion: Conversion, cfg: LALMConfig) -> dict[str, nn.Module]:
    """HF's module for each of our places: the innermost one that holds all the weights that ours holds there."""
    table, names = Table(conversion.rows(cfg)), list(hf.state_dict())
    layout = choose_layout(names, table, conversion.layouts)
    hits = {name: table.find(layout.to_table(name)) for name in names}
    ours = {name: hit[1][0] for name, hit in hits.items() if hit is not None and isinstance(hit[0], Rule)}
    owners = {what: [name.split(".")[:-1] for name in ours if ours[name].startswith(f"{what}.")] for what in places}
    common = {what: commonprefix(paths) for what, paths in owners.items() if paths}  # noqa: RUF071  of names
    return {what: hf.get_submodule(".".join(path)) for what, path in common.items()}


def hf_states(hf: nn.Module, modules: Mapping[str, nn.Module], batch: dict[str, Tensor]) -> States:
    return states_of(modules, lambda: hf(**batch, use_cache=False).logits)


@torch.no_grad()
def states_of(modules: Mapping[str, nn.Module], run: Callable[[], Tensor]) -> States:
    """What modules put out while something runs, what enters the first decoder block, and the logits that come back."""
    states: States = {}

    def keep(what: str, state: Tensor | tuple) -> None:  # before transformers 5, a decoder block returned a tuple
        states[what] = (state if isinstance(state, Tensor) else state[0]).cpu()

    def left(what: str, module: nn.Module, args: tuple, out: Tensor | tuple) -> None:
        keep(what, out)

    def entered(module: nn.Module, args: tuple, kwargs: dict) -> None:
        keep("hook_embed", args[0] if args else kwargs["hidden_states"])

    handles = [module.register_forward_hook(partial(left, what)) for what, module in modules.items()]
    handles.append(modules["blocks.0"].register_forward_pre_hook(entered, with_kwargs=True))
    try:
        keep("logits", run())
    finally:
        for handle in handles:
            handle.remove()
    return states


def compare(what: str, ours: Tensor, theirs: Tensor, eager: Tensor) -> dict[str, Any]:
    between, within_hf = ours.float() - theirs.float(), eager.float() - theirs.float()
    difference, hf_difference = (float(each.abs().max()) for each in (between, within_hf))
    rms, hf_rms = (float(each.square().mean().sqrt()) for each in (between, within_hf))
    close = ours.dtype == torch.float32 and torch.allclose(ours, theirs, rtol=RTOL, atol=ATOL)
    return {
        "what": what,
        "largest": float(theirs.abs().max()),
        "difference": difference,
        "hf_difference": hf_difference,
        "rms": rms,
        "hf_rms": hf_rms,
        "agrees": close or (rms <= ALLOWED_RMS * hf_rms and difference <= ALLOWED_LARGEST * hf_difference),
    }
