"""`HookedLALM`: a hooked decoder that also hears."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lalm_lens.config import LALMConfig
from lalm_lens.encoders.base import AudioEncoder
from lalm_lens.encoders.whisper import n_states
from lalm_lens.errors import HookError, InputError
from lalm_lens.inputs import Embedded, Inputs
from lalm_lens.nn.kv_cache import KeyValueCache
from lalm_lens.prompts import Processor
from lalm_lens.shapes import typed
from lalm_lens.transformer import At, HookedTransformer, Positions, axis_sizes
from lalm_lens.words import Text


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
        inputs: Inputs | Embedded | Text | Int[Tensor, "batch pos"] | Float[Tensor, "batch pos d_model"],
        *,
        attention_mask: Bool[Tensor, "batch pos"] | None = None,
        positions: Int[Tensor, "batch pos"] | Int[Tensor, "3 batch pos"] | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        logits_at: At = None,
        kv_cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch at width"]:
        """Logits, or the residual stream: `HookedTransformer.forward`, which here also takes `Inputs` and `Embedded`.

        Raises `HookError` if a hook on the encoder or adapter could not fire, because no audio is heard in this run;
        `InputError` if placeholders and audio do not match, or mask or positions of `Inputs` are given a second time.
        """
        return self.decode(inputs, attention_mask, positions, start_at_layer, stop_at_layer, logits_at, kv_cache)

    def enter(
        self, inputs: Any, attention_mask: Bool[Tensor, "batch pos"] | None, positions: Positions | None
    ) -> tuple[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"] | None, Positions | None]:
        if not (attention_mask is None and positions is None) and not isinstance(inputs, Tensor):
            raise InputError(
                "Attention mask and positions are part of `Inputs` and `Embedded`, and texts need none: do not give "
                "them."
            )
        if isinstance(inputs, str | Sequence):
            inputs = Inputs(*self.read(inputs))
        if isinstance(inputs, Tensor) and not inputs.is_floating_point():
            everything = torch.ones_like(inputs, dtype=torch.bool)
            inputs = Inputs(inputs, everything if attention_mask is None else attention_mask)
        if isinstance(inputs, Inputs):
            inputs = self.embed_inputs(inputs)
        if isinstance(inputs, Embedded):
            positions = inputs.positions if positions is None else positions
            inputs, attention_mask = inputs.embed, inputs.attention_mask
        return super().enter(inputs, attention_mask, positions)

    @typed
    def embed_inputs(self, inputs: Inputs) -> Embedded:
        """Run encoders and adapters once and merge, for any number of decoder runs.

        Raises `InputError` if placeholders and what is heard and seen do not match one to one.
        """
        inputs = self.here(inputs)
        merged = self.see(inputs, self.hear(inputs, self.embed(inputs.tokens)))
        return Embedded(merged, inputs.attention_mask, self.positions_of(inputs))

    def hear(self, inputs: Inputs, embed: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """With the audio where its placeholders are."""
        is_audio = self.is_audio(inputs.tokens)
        n_audio = inputs.tokens.new_zeros(0) if inputs.n_frames is None else self.audio_encoder.n_audio(inputs.n_frames)
        check_placeholders(is_audio, n_audio, "audio", "clips")
        if inputs.mel is None or inputs.n_frames is None:
            self.refuse_hooks(self.ears())
            return embed
        audio = self.adapter(self.audio_encoder(inputs.mel, inputs.n_frames))
        is_sound = torch.arange(audio.shape[1], device=audio.device) < n_audio[:, None]
        return splice(embed, self.hook_audio_embed(audio[is_sound]), is_audio)

    def see(self, inputs: Inputs, embed: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """With pictures where their placeholders are: none here."""
        if inputs.images is not None or inputs.videos is not None:
            raise InputError(
                f"This {self.lalm_cfg.model_type} model hears and does not see: leave out images and videos."
            )
        return embed

    def is_audio(self, tokens: Int[Tensor, "*batch pos"]) -> Bool[Tensor, "*batch pos"]:
        """Where audio is heard."""
        return tokens == self.lalm_cfg.audio_token

    def is_placeholder(self, tokens: Int[Tensor, "*batch pos"]) -> Bool[Tensor, "*batch pos"]:
        """Where something is heard or seen, and no word of the vocabulary stands."""
        return self.is_audio(tokens)

    def positions_of(self, inputs: Any) -> Int[Tensor, "3 batch pos"] | None:
        return inputs.positions if isinstance(inputs, Inputs | Embedded) else None

    def perceived(self, inputs: Inputs, stack: str) -> list[tuple[int, int, int]]:
        """Of each row of an encoder's states, a window of a clip: how many belong to it in the blocks, how many of them
        enter the adapter, and how many tokens come out."""
        if stack == "vision_encoder" or inputs.n_frames is None:
            return []
        ears = self.audio_encoder
        return [(n_states(n), ears.n_entering(n), ears.n_audio(n)) for n in inputs.n_frames.tolist()]

    def fed(self, tokens: Int[Tensor, "*batch pos"], stack: str) -> Bool[Tensor, "*batch pos"]:
        """Where these tokens stand for what an encoder makes."""
        return self.is_audio(tokens)

    def refuse_hooks(self, names: set[str]) -> None:
        """Raise `HookError` for a hook on one of these points, which this run does not pass."""
        if silent := self.hooked() & names:
            raise self.silent(min(silent))

    def bind(self, *inputs: Inputs) -> "BoundLALM":
        """The same model for helpers that pass tokens alone: their tokens stand for these inputs, audio included.

        The encoder runs here, once: bind again after an edit of its weights. `bound.tokens` holds, for each of the
        inputs, the tokens to give to such a helper; they may be sliced and stacked. Where only one of the inputs has
        them, its plain `inputs.tokens` do as well.

            bound = model.bind(clean, corrupted)
            patching.get_act_patch_resid_pre(bound, bound.tokens[1], clean_cache, metric)
        """
        return BoundLALM(self, inputs)

    @property
    def tokenizer(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]  it comes with the processor
        """The processor's."""
        return None if self.processor is None else self.processor.tokenizer

    def live(self, inputs: Any = None, *, start_at_layer: int | None = None, **rest: Any) -> set[str]:
        live = super().live(inputs, start_at_layer=start_at_layer, **rest)
        if isinstance(inputs, Inputs) and inputs.mel is not None and start_at_layer is None:
            return live
        return live - self.ears()

    def sizes(self, inputs: Any = None, *_: Any) -> dict[str, dict[str, int]]:
        if not isinstance(inputs, Inputs) or inputs.mel is None:
            return super().sizes(inputs)
        cfg = self.lalm_cfg.encoder
        heard = axis_sizes(cfg, len(inputs.mel), -(-inputs.mel.shape[-1] // 2)) | {
            "kv_head": cfg.n_heads,
            "d_head": cfg.d_model // cfg.n_heads,
        }
        adapter, qformer = heard, self.lalm_cfg.qformer
        if qformer is not None:
            n_clips, n_taps = len(inputs.mel), len(qformer.taps)
            adapter = axis_sizes(cfg, n_clips, qformer.n_queries) | {
                "tap": n_taps,
                "clip_tap": n_clips * n_taps,
                "state_pos": cfg.n_ctx,
                "kv_head": cfg.n_heads,
                "d_head": cfg.d_model // cfg.n_heads,
                "d_mlp": qformer.d_mlp,
            }
            heard = heard | {"tap": n_taps}
        return super().sizes(inputs) | {"audio_encoder.": heard, "adapter.": adapter}

    def shape_of(self, inputs: Any) -> tuple[int, int]:
        if isinstance(inputs, Inputs | Embedded):
            n_batch, n_pos = inputs.attention_mask.shape
            return n_batch, n_pos
        return super().shape_of(inputs)

    def front_end(self) -> set[str]:
        """The hook points that fire only where something is heard or seen."""
        return self.ears()

    def ears(self) -> set[str]:
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
            f"{sum(p.numel() for p in self.parameters()) / 1e6:.1f} M parameters, {self.cfg.dtype}, {self.cfg.device}"
            f"{'' if self.placement is None else f'; {self.placement}'})"
        )


def _shared(name: str) -> tuple[Callable, Callable]:
    """Getter and setter of an attribute of the model that was bound."""
    return lambda self: getattr(self.model[0], name), lambda self, value: setattr(self.model[0], name, value)


class BoundLALM(HookedLALM):
    """A `HookedLALM` whose tokens also name the audio of the inputs that were bound to it.

    Each audio position of each of them has a token of its own, behind the vocabulary, and one more token is padding:
    so tokens alone say what is heard, however they are sliced and stacked. Everything else is the model's own.
    """

    def __init__(self, model: HookedLALM, inputs: Sequence[Inputs]):
        if not inputs:
            raise InputError("Nothing to bind: give one or more `Inputs`.")
        vars(self).update(vars(model))  # the same modules and hook points: no copy, and no second model to keep in step
        self.model = [model]  # in a list, so that it does not count as a part of itself
        self.padding = self.decoder_cfg.d_vocab  # behind it, one token for each audio position
        inputs = [self.here(each) for each in inputs]
        self.plain = [each.tokens for each in inputs]
        self.is_token = [each.attention_mask for each in inputs]
        self.positions: list[Int[Tensor, "3 batch pos"] | None] = []
        self.tokens: tuple[Int[Tensor, "batch pos"], ...] = ()
        with torch.no_grad():
            self.audio = torch.cat([self.take_in(each) for each in inputs])

    def take_in(self, inputs: Inputs) -> Float[Tensor, "audio_pos d_model"]:
        """Give what is heard and seen in these inputs its tokens."""
        is_audio = self.is_placeholder(inputs.tokens)
        first = self.padding + 1 + sum(int((tokens > self.padding).sum()) for tokens in self.tokens)
        tokens = inputs.tokens.masked_fill(~inputs.attention_mask, self.padding)
        tokens[is_audio] = torch.arange(first, first + int(is_audio.sum()), device=tokens.device)
        self.tokens += (tokens,)
        embedded = self.model[0].embed_inputs(inputs)
        self.positions.append(embedded.positions)
        return embedded.embed[is_audio]

    def enter(
        self, inputs: Any, attention_mask: Bool[Tensor, "batch pos"] | None, positions: Positions | None
    ) -> tuple[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"] | None, Positions | None]:
        if isinstance(inputs, Tensor) and not inputs.is_floating_point():
            inputs = self.resolve(inputs, attention_mask, positions)
            attention_mask = positions = None
        return super().enter(inputs, attention_mask, positions)

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        chosen = {name} if isinstance(name, str) else self.matched(name)
        if silent := chosen & self.front_end():
            raise self.silent(min(silent))
        super().add_hook(name, *args, **kwargs)

    def resolve(
        self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"] | None, positions: Positions | None
    ) -> Embedded:
        """What tokens stand for. Raises `InputError` for plain ones with audio that none or several inputs have."""
        tokens = torch.cat([self.named(row[None]) for row in tokens])
        is_audio, is_token = tokens > self.padding, tokens != self.padding
        text = self.embed(tokens.masked_fill(is_audio | ~is_token, 0))
        audio = self.audio.to(text)[tokens[is_audio] - self.padding - 1]
        embed, is_token = splice(text, audio, is_audio), is_token if mask is None else is_token & mask
        if positions is not None:
            return Embedded(embed, is_token, positions.expand(3, *positions.shape[-2:]))
        return Embedded(embed, is_token, self.placed(tokens, is_token))

    def placed(
        self, tokens: Int[Tensor, "batch pos"], is_token: Bool[Tensor, "batch pos"]
    ) -> Int[Tensor, "3 batch pos"] | None:
        """Positions of rows in which something may be seen."""
        if all(positions is None for positions in self.positions):
            return None
        counted = (is_token.cumsum(-1) - 1).clamp(min=0)
        rows = [self.placed_row(row) for row in tokens]
        return torch.stack(
            [plain.expand(3, -1) if its is None else its for its, plain in zip(rows, counted, strict=True)], dim=1
        )

    def placed_row(self, row: Int[Tensor, " pos"]) -> Int[Tensor, "3 pos"] | None:
        """None for words of its own, and where nothing was seen."""
        for tokens, positions in zip(self.tokens, self.positions, strict=True):
            for n in range(len(tokens)):
                if torch.equal(tokens[n, : len(row)], row):
                    return None if positions is None else positions[:, n, : len(row)]
        if (row > self.padding).any():
            raise InputError(
                "Where pictures are seen, tokens are those of `bound.tokens` from the first on: positions hang on all "
                "that comes before. Give `positions` for others."
            )
        return None

    def named(self, row: Int[Tensor, "1 pos"]) -> Int[Tensor, "1 pos"]:
        """A row of tokens in which every audio position has its own token."""
        hits = [
            tokens[n : n + 1]
            for tokens, plain in zip(self.tokens, self.plain, strict=True)
            for n in range(len(plain))
            if torch.equal(plain[n], row[0])
        ]
        if not hits and not self.is_placeholder(row).any():
            return row  # words of its own, or a row that is named already
        if len(hits) != 1:
            raise InputError(
                f"{len(hits)} of the prompts that were bound have these tokens, so it is open which audio they stand "
                "for: give `bound.tokens`, which say it."
            )
        return hits[0]

    def __repr__(self) -> str:
        return f"{super().__repr__()} bound to {len(self.audio)} audio positions of {len(self.tokens)} inputs"

    def is_placeholder(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        return self.model[0].is_placeholder(tokens)

    def front_end(self) -> set[str]:
        return self.model[0].front_end()

    # What changes while a model runs is the model's own, so that hooks on either know of each other.
    context_level = property(*_shared("context_level"))
    is_caching = property(*_shared("is_caching"))
    training = property(*_shared("training"))  # pyright: ignore[reportAssignmentType]


def check_placeholders(is_placeholder: Bool[Tensor, "batch pos"], n_made: Int[Tensor, " item"], kind: str, its: str):
    """Clips, or pictures, fill their placeholders in order; none may reach over into the next prompt."""
    wanted = is_placeholder.sum(-1)
    ends = torch.cat([n_made.new_zeros(1), n_made.cumsum(0)])
    if wanted.sum() != n_made.sum() or not torch.isin(wanted.cumsum(0), ends).all():
        raise InputError(
            f"The prompts have {wanted.tolist()} {kind} placeholders and the {its} make {n_made.tolist()} {kind} "
            f"embeddings. Give `Inputs` with the {its} that the prompts were made for, in their order."
        )


def splice(
    text: Float[Tensor, "batch pos d_model"],
    audio: Float[Tensor, "audio_pos d_model"],
    is_audio: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_model"]:
    """Put audio embeddings where the prompt has audio placeholders."""
    return text.masked_scatter(is_audio[..., None], audio.to(text.dtype))
