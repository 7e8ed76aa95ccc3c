"""`info`: what a checkpoint is and what it costs, from its config.json alone."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.axes import axes_of
from lalm_lens.config import DecoderConfig, EncoderConfig, LALMConfig, QFormerConfig, VisionConfig
from lalm_lens.loading import ABOUT, Files, in_dtype, model_name, skeleton
from lalm_lens.model import HookedLALM
from lalm_lens.placement import Placement
from lalm_lens.seeing import SeeingLALM
from lalm_lens.shapes import typed
from lalm_lens.weights import Conversion

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHED: dict[str, Callable[[str], bool]] = {
    "every resid_post": lambda name: name.endswith("hook_resid_post"),
    "everything": lambda name: True,
}


@dataclass(frozen=True)
class ModelInfo:
    """Sizes, parameters by stage, what is heard, bytes of caches, hook points."""

    model_name: str
    cfg: LALMConfig
    n_parameters: dict[str, int]  # by stage
    weight_bytes: dict[str, int]  # by dtype
    heard_s: float  # a window of the encoder
    n_audio: int  # audio tokens of a clip of that length
    longer: str  # what becomes of a longer clip
    n_text: int  # tokens of the prompt beside it, for which the caches are counted
    cache_bytes: dict[str, dict[str, int]]  # by what is cached, then by dtype
    spread: dict[str, Placement]  # what device_map="auto" does on this machine, by dtype
    hooks: dict[str, str]  # axes by name, blocks taken together

    def __repr__(self) -> str:
        n_parameters = sum(self.n_parameters.values())
        of_stages = ", ".join(f"{stage} {n / 1e6:.1f} M" for stage, n in self.n_parameters.items())
        memory = {"weights": self.weight_bytes, **self.cache_bytes}
        width = max(map(len, self.hooks))
        lines = [
            f"{self.model_name}: {self.cfg.model_type}",
            f"parameters     {n_parameters / 1e6:.1f} M: {of_stages}",
            f"audio encoder  {sizes(self.cfg.encoder)}",
            *([] if self.cfg.vision is None else [f"vision encoder {sizes(self.cfg.vision)}"]),
            *(
                []
                if self.cfg.qformer is None
                else [f"adapter        {sizes(self.cfg.qformer)}, taps {self.cfg.qformer.taps}"]
            ),
            f"decoder        {sizes(self.cfg.decoder)}{windows(self.cfg.decoder)}",
            f"hears          {self.heard_s:g} s: {self.n_audio} audio tokens, {self.n_audio / self.heard_s:g} a second",
            f"               {self.longer}",
            "",
            f"{'memory':18} {'float32':>12} {'bfloat16':>12}",
            *(f"{what:18} {megabytes(of['float32'])} {megabytes(of['bfloat16'])}" for what, of in memory.items()),
            f"(cached by run_with_cache: of one clip of {self.heard_s:g} s and {self.n_text} tokens of text)",
            f'device_map="auto" here: {", ".join(f"{dtype} {where}" for dtype, where in self.spread.items())}',
            "",
            *(f"{name:{width}}  [{axes}]" for name, axes in self.hooks.items()),
        ]
        return "\n".join(lines)


@typed
def info(
    path_or_hub_id: str | Path,
    *,
    n_text: int = 60,
    conversion: Conversion | None = None,
    parts: Mapping[str, str | Path] | None = None,
) -> ModelInfo:
    """Describe a checkpoint whose config.json is there, and those of its `parts`; its weights are neither read nor
    needed.

    Bytes of a cache are those of its tensors' memory; where two hook points see the same tensor, it counts once.
    Raises `ConversionError` for a config that cannot be converted.
    """
    files = Files.find(path_or_hub_id, conversion, parts, *ABOUT)
    model = skeleton(files.config, files.conversion, model_name(path_or_hub_id))
    n_frames = model.lalm_cfg.encoder.n_frames
    passed, weights, spread = {}, {}, {}
    for name, dtype in DTYPES.items():
        in_dtype(model, dtype, files.conversion)
        passed[name], spread[name] = states_passed(model, n_text), Placement.of(model, "auto")
        weights[name] = sum(parameter.nbytes for parameter in model.parameters())
    return ModelInfo(
        model_name=model.cfg.model_name,
        cfg=model.lalm_cfg,
        n_parameters=n_parameters(model),
        weight_bytes=weights,
        heard_s=n_frames / 100,
        n_audio=model.audio_encoder.n_audio(n_frames),
        longer=files.conversion.hearing.longer,
        n_text=n_text,
        cache_bytes={
            what: {dtype: n_bytes(states, chosen) for dtype, states in passed.items()}
            for what, chosen in CACHED.items()
        },
        spread=spread,
        hooks=collapsed(model.hook_dict, model.lalm_cfg.qformer is not None),
    )


def n_parameters(model: HookedLALM) -> dict[str, int]:
    stages: dict[str, nn.Module] = {"audio encoder": model.audio_encoder, "adapter": model.adapter}
    if isinstance(model, SeeingLALM):
        stages |= {"vision encoder": model.vision_encoder, "vision adapter": model.vision_adapter}
    counted = {stage: sum(p.numel() for p in module.parameters()) for stage, module in stages.items()}
    return {**counted, "decoder": sum(p.numel() for p in model.parameters()) - sum(counted.values())}


@torch.no_grad()
def states_passed(model: HookedLALM, n_text: int) -> dict[str, Tensor]:
    """What an unfiltered `run_with_cache` keeps of one clip of full length: on the meta device, so shapes alone.

    Front-end and decoder run one after the other, because the merge between them reads numbers.
    """
    states: dict[str, Tensor] = {}

    def keep(state: Tensor, hook: HookPoint) -> None:
        states[str(hook.name)] = state

    cfg = model.lalm_cfg
    mel = torch.empty(1, cfg.encoder.n_mels, cfg.encoder.n_frames, device="meta")
    n_frames = torch.empty(1, dtype=torch.long, device="meta")
    with model.hooks(fwd_hooks=[(model.front_end().__contains__, keep)]):
        audio = model.hook_audio_embed(model.adapter(model.audio_encoder(mel, n_frames))[0].clone())
    embed = audio.new_empty(1, len(audio) + n_text, cfg.decoder.d_model)
    model.run_with_hooks(embed, fwd_hooks=[(lambda name: name not in model.front_end(), keep)])
    return states


def n_bytes(states: Mapping[str, Tensor], chosen: Callable[[str], bool]) -> int:
    storages = [state.untyped_storage() for name, state in states.items() if chosen(name)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def collapsed(names: Iterable[str], has_taps: bool = False) -> dict[str, str]:
    """Axes by hook name, with the numbers of blocks as a range: `blocks.{0..7}.hook_resid_post`."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(re.sub(r"\.\d+\.", ".{}.", name), []).extend(re.findall(r"\.(\d+)\.", name))
    return {
        pattern.replace("{}", f"{{{numbers[0]}..{numbers[-1]}}}" if numbers else ""): axes_of(pattern, has_taps)
        for pattern, numbers in layers.items()
    }


def sizes(cfg: EncoderConfig | QFormerConfig | DecoderConfig | VisionConfig) -> str:
    return ", ".join(f"{name} {value}" for name, value in vars(cfg).items() if type(value) in (int, float))


def windows(cfg: DecoderConfig) -> str:
    widths = Counter(width for width in cfg.windows if width is not None)
    return "".join(f", window {width} in {n} blocks" for width, n in widths.items())


def megabytes(n: int) -> str:
    return f"{n / 1e6:9,.1f} MB"
