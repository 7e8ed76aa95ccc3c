"""`HookedLALM`: a hooked decoder that also hears."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.config import LALMConfig
from lalm_lens.encoders.base import AudioEncoder
from lalm_lens.errors import HookError, InputError
from lalm_lens.inputs import Embedded, Inputs
from lalm_lens.prompts import Processor
from lalm_lens.shapes import typed
from lalm_lens.transformer import At, HookedTransformer, NamesFilter


class HookedLALM(HookedTransformer):
    """A `HookedTransformer` whose embeddings also come from audio.

    Beside the decoder's hook points: `audio_encoder.blocks.{l}.*` under the same names, `audio_encoder.hook_embed`
    and `hook_out`, `adapter.hook_in/hook_out`, `hook_audio_embed` (the rows spliced into the prompt), and `hook_embed`
    after the merge: it is the whole input of block 0, audio included.
    """

    def __init__(self, cfg: LALMConfig, audio_encoder: AudioEncoder, adapter: nn.Module, name: str = "custom"):
        super().__init__(cfg.decoder, name)
        self.lalm_cfg = cfg
        self.audio_encoder = audio_encoder
        self.adapter = adapter
        self.hook_audio_embed = HookPoint()  # [audio_pos, d_model], all clips of the batch one after the other
        self.processor: Processor | None = None
        self.setup()

    @typed
    def forward(
        self,
        inputs: Inputs | Embedded | Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
        *,
        attention_mask: Bool[Tensor, "batch pos"] | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        logits_at: At = None,
    ) -> Float[Tensor, "batch at width"]:
        """Logits, or the residual stream: `HookedTransformer.forward`, which here also takes `Inputs` and `Embedded`.

        Raises `HookError` if a hook on the encoder or adapter could not fire, because no audio is heard in this run.
        """
        if not hears(inputs):
            self.refuse_front_end_hooks()
        return self.decode(inputs, attention_mask, start_at_layer, stop_at_layer, logits_at)

    def enter(
        self, inputs: Inputs | Embedded | Tensor, attention_mask: Bool[Tensor, "batch pos"] | None
    ) -> tuple[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"] | None]:
        if isinstance(inputs, Tensor) and not inputs.is_floating_point():
            everything = torch.ones_like(inputs, dtype=torch.bool)
            inputs = Inputs(inputs, everything if attention_mask is None else attention_mask)
        if isinstance(inputs, Inputs):
            inputs = self.embed_inputs(inputs)
        if isinstance(inputs, Embedded):
            inputs, attention_mask = inputs.embed, inputs.attention_mask
        return super().enter(inputs, attention_mask)

    @typed
    def embed_inputs(self, inputs: Inputs) -> Embedded:
        """Run the audio encoder and the adapter once and merge, for any number of decoder runs.

        Raises `InputError` if placeholders and audio do not match one to one.
        """
        text = self.embed(inputs.tokens)
        is_audio = inputs.tokens == self.lalm_cfg.audio_token
        audio = self.hear(inputs)
        if is_audio.sum() != len(audio):
            raise InputError(
                f"The prompts have {int(is_audio.sum())} audio placeholders and the clips make {len(audio)} audio "
                "embeddings. Give `Inputs` with the clips that the prompts were made for."
            )
        return Embedded(splice(text, audio.to(text.dtype), is_audio), inputs.attention_mask)

    def hear(self, inputs: Inputs) -> Float[Tensor, "audio_pos d_model"]:
        if inputs.mel is None or inputs.n_frames is None:
            return self.embed.table.weight[:0]
        audio = self.adapter(self.audio_encoder(inputs.mel, inputs.n_frames))
        n_audio = self.audio_encoder.n_audio(inputs.n_frames)
        is_sound = torch.arange(audio.shape[1], device=audio.device) < n_audio[:, None]
        return self.hook_audio_embed(audio[is_sound])

    def run_with_cache(self, *args: Any, names_filter: NamesFilter = None, **kwargs: Any) -> tuple:
        if names_filter is None and args and not hears(args[0]):
            front_end = self.front_end()
            return super().run_with_cache(*args, names_filter=lambda name: name not in front_end, **kwargs)
        return super().run_with_cache(*args, names_filter=names_filter, **kwargs)

    def front_end(self) -> set[str]:
        """Hook points that fire only where audio is heard."""
        return {name for name in self.hook_dict if name.startswith(("audio_encoder.", "adapter.", "hook_audio_embed"))}

    def refuse_front_end_hooks(self) -> None:
        silent = [name for name in self.front_end() if self.hook_dict[name].has_hooks()]
        if silent:
            raise HookError(
                f"A hook on {min(silent)} would not fire: these inputs hold no audio, or audio that was embedded "
                "before. Give the model `Inputs` with audio."
            )

    def __repr__(self) -> str:
        encoder, decoder = self.lalm_cfg.encoder, self.lalm_cfg.decoder
        return (
            f"HookedLALM({self.cfg.model_name!r}, {self.lalm_cfg.model_type}: audio encoder {encoder.n_layers} x "
            f"{encoder.d_model}, decoder {decoder.n_layers} x {decoder.d_model}, {decoder.n_heads} heads on "
            f"{decoder.n_kv_heads} key-value heads, vocabulary {decoder.d_vocab}, "
            f"{sum(p.numel() for p in self.parameters()) / 1e6:.1f} M parameters, {self.cfg.dtype}, {self.cfg.device})"
        )


def hears(inputs: Any) -> bool:
    return isinstance(inputs, Inputs) and inputs.mel is not None


def splice(
    text: Float[Tensor, "batch pos d_model"],
    audio: Float[Tensor, "audio_pos d_model"],
    is_audio: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_model"]:
    """Put audio embeddings where the prompt has audio placeholders."""
    return text.masked_scatter(is_audio[..., None], audio)
