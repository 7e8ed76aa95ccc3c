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
from lalm_lens.transformer import At, HookedTransformer


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

        Raises `HookError` if a hook on the encoder or adapter could not fire, because no audio is heard in this run;
        `InputError` if placeholders and audio do not match, or the mask of `Inputs` is given a second time.
        """
        return self.decode(inputs, attention_mask, start_at_layer, stop_at_layer, logits_at)

    def enter(
        self, inputs: Inputs | Embedded | Tensor, attention_mask: Bool[Tensor, "batch pos"] | None
    ) -> tuple[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"] | None]:
        if attention_mask is not None and not isinstance(inputs, Tensor):
            raise InputError("The attention mask is part of `Inputs` and `Embedded`: do not give another one.")
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
        n_audio = inputs.tokens.new_zeros(0) if inputs.n_frames is None else self.audio_encoder.n_audio(inputs.n_frames)
        check_placeholders(is_audio, n_audio)
        if inputs.mel is None or inputs.n_frames is None:
            if silent := self.hooked() & self.front_end():
                raise self.silent(min(silent))
            return Embedded(text, inputs.attention_mask)
        audio = self.adapter(self.audio_encoder(inputs.mel, inputs.n_frames))
        is_sound = torch.arange(audio.shape[1], device=audio.device) < n_audio[:, None]
        return Embedded(splice(text, self.hook_audio_embed(audio[is_sound]), is_audio), inputs.attention_mask)

    def live(self, inputs: Any = None, *, start_at_layer: int | None = None, **rest: Any) -> set[str]:
        live = super().live(inputs, start_at_layer=start_at_layer, **rest)
        if isinstance(inputs, Inputs) and inputs.mel is not None and start_at_layer is None:
            return live
        return live - self.front_end()

    def front_end(self) -> set[str]:
        """The hook points that fire only where audio is heard."""
        return {name for name in self.hook_dict if name.startswith(("audio_encoder.", "adapter.", "hook_audio_embed"))}

    def silent(self, name: str) -> HookError:
        if name not in self.front_end():
            return super().silent(name)
        return HookError(
            f"A hook on {name} would not fire: this run holds no audio, or audio that was embedded before. Give the "
            "model `Inputs` to hear it again."
        )

    def __repr__(self) -> str:
        encoder, decoder = self.lalm_cfg.encoder, self.lalm_cfg.decoder
        return (
            f"HookedLALM({self.cfg.model_name!r}, {self.lalm_cfg.model_type}: audio encoder {encoder.n_layers} x "
            f"{encoder.d_model}, decoder {decoder.n_layers} x {decoder.d_model}, {decoder.n_heads} heads on "
            f"{decoder.n_kv_heads} key-value heads, vocabulary {decoder.d_vocab}, "
            f"{sum(p.numel() for p in self.parameters()) / 1e6:.1f} M parameters, {self.cfg.dtype}, {self.cfg.device})"
        )


def check_placeholders(is_audio: Bool[Tensor, "batch pos"], n_audio: Int[Tensor, " clip"]) -> None:
    """Clips fill the placeholders in order; none may reach over into the next prompt."""
    wanted = is_audio.sum(-1)
    ends = torch.cat([n_audio.new_zeros(1), n_audio.cumsum(0)])
    if wanted.sum() != n_audio.sum() or not torch.isin(wanted.cumsum(0), ends).all():
        raise InputError(
            f"The prompts have {wanted.tolist()} audio placeholders and the clips make {n_audio.tolist()} audio "
            "embeddings. Give `Inputs` with the clips that the prompts were made for, in their order."
        )


def splice(
    text: Float[Tensor, "batch pos d_model"],
    audio: Float[Tensor, "audio_pos d_model"],
    is_audio: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_model"]:
    """Put audio embeddings where the prompt has audio placeholders."""
    return text.masked_scatter(is_audio[..., None], audio.to(text.dtype))
