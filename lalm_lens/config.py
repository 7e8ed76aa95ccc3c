"""Shapes of the stages as plain frozen data, and the reader that turns an HF config.json into them.

The truth about a model is its `LALMConfig`; TransformerLens' `model.cfg` is derived from it and never read back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lalm_lens.errors import ConversionError

Value = TypeVar("Value", bool, int, float, str)


@dataclass(frozen=True)
class Rope:
    """Plain rotary embedding: angle of pair i at position p = p * theta ** (-2i / d_head)."""

    theta: float


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's rotary embedding (arXiv 2407.21783): pairs that turn slowly turn `factor` times more slowly still.

    A pair that comes round fewer than `low` times in the `n_ctx` positions of the first training is one of those; one
    that comes round more than `high` times stays as it is; between them, it is something between.
    """

    theta: float
    factor: float
    low: float
    high: float
    n_ctx: int

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ConversionError(f"llama3 rope: {self.low} and {self.high} turns should be above 0 and in this order.")


@dataclass(frozen=True)
class MRope:
    """Rotary embedding by time, height and width (arXiv 2409.12191): the first `sections[0]` pairs of a head turn by
    the position in time, the next `sections[1]` by that in height, and so on in turn."""

    theta: float
    sections: tuple[int, ...]


@dataclass(frozen=True)
class DynamicNTK:
    """Rotary embedding, in float32, whose base grows with the length n of a prompt beyond `n_trained` tokens (Qwen):
    theta * alpha ** (d_head / (d_head - 2)), alpha = 2 ** ceil(log2(n / n_trained) + 1) - 1."""

    theta: float
    n_trained: int


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    eps: float
    # Another rotary scheme is another config class, with its own module in nn/rope.py.
    rope: Rope | Llama3Rope | MRope | DynamicNTK
    qkv_bias: bool
    windows: tuple[int | None, ...]  # per block: positions a query looks back on, itself included; None = all
    tied: bool = False  # the unembedding is the embedding
    log_n: int | None = None  # queries grow with the logarithm of their position beyond so many; None = none does

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ConversionError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key-value heads evenly.")
        if self.d_head % 2:
            raise ConversionError(f"Rotary embedding turns pairs, and heads are {self.d_head} wide: an odd number.")
        if isinstance(self.rope, MRope) and 2 * sum(self.rope.sections) != self.d_head:
            raise ConversionError(
                f"Heads of width {self.d_head} have {self.d_head // 2} pairs to turn, and the sections "
                f"{self.rope.sections} are {sum(self.rope.sections)}."
            )
        if isinstance(self.rope, DynamicNTK) and self.d_head < 4:
            raise ConversionError(f"Heads are {self.d_head} wide: too narrow for a base that grows with the prompt.")
        if len(self.windows) != self.n_layers:
            raise ConversionError(f"{len(self.windows)} layer types for {self.n_layers} layers.")
        if any(window is not None and window < 1 for window in self.windows):
            raise ConversionError(f"A sliding window must be at least 1 position wide, got {self.windows}.")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A Whisper-type encoder."""

    n_layers: int
    d_model: int
    n_heads: int
    d_mlp: int
    n_mels: int
    n_ctx: int  # positions after the second convolution, 20 ms each
    window: int | None = None  # positions that are heard apart from all others; None = the whole clip is one

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise ConversionError(f"The audio encoder's {self.n_heads} heads cannot share {self.d_model} evenly.")

    @property
    def n_frames(self) -> int:
        """Mel frames (10 ms) of the padded clip that the encoder takes."""
        return 2 * self.n_ctx


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """DeSTA's connector: learned queries that look at several states of the audio encoder in turn."""

    n_layers: int
    n_heads: int
    d_mlp: int
    n_queries: int  # audio tokens, however long the clip
    taps: tuple[int, ...]  # how many blocks of the encoder each of these states has passed, in ascending order
    n_unheard: int  # blocks of the published encoder behind the last of them: nothing of theirs is heard

    def __post_init__(self) -> None:
        if not self.taps or list(self.taps) != sorted(set(self.taps)):
            raise ConversionError(f"The states of the encoder that are looked at should be different: {self.taps}.")
        if self.n_unheard < 0:
            raise ConversionError(
                f"The states after {self.taps} blocks are looked at, and this Whisper has "
                f"{self.taps[-1] + self.n_unheard} blocks: it belongs to another model."
            )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Qwen2.5-VL's tower (arXiv 2502.13923): a frame is cut into patches, most blocks look at windows of it only."""

    n_layers: int
    d_model: int
    n_heads: int
    d_mlp: int
    n_channels: int
    patch: int  # pixels along a side
    n_frames: int  # of a video that are one patch in time; an image is repeated
    merge: int  # patches along the side of a square that becomes one token
    window: int  # tokens along the side of a window
    whole: tuple[int, ...]  # blocks in which a patch sees its whole frame
    theta: float
    image_token: int  # ids of the placeholders that embeddings of images, and of videos, replace
    video_token: int
    start_token: int  # ids of what stands before a picture, and before a clip: before a video that is heard, both
    audio_start_token: int
    positions_per_s: int  # how far a second of video moves the position in time

    def __post_init__(self) -> None:
        if self.d_model % (4 * self.n_heads):
            raise ConversionError(
                f"{self.n_heads} heads of {self.d_model} in all: rows turn one half of the pairs of each head, columns "
                "the other, so a head must be a multiple of 4 wide."
            )
        if self.window < 1:
            raise ConversionError("A window of the vision tower must hold at least one token.")
        if self.whole and max(self.whole) >= self.n_layers:
            raise ConversionError(f"Blocks {self.whole} see whole frames, and there are {self.n_layers} blocks.")

    @property
    def n_pixels(self) -> int:
        """Numbers of a patch."""
        return self.n_channels * self.n_frames * self.patch**2


@dataclass(frozen=True, kw_only=True)
class LALMConfig:
    model_type: str
    decoder: DecoderConfig
    encoder: EncoderConfig
    audio_token: int  # id of the placeholder that audio embeddings replace
    audio_marks: tuple[int, int] | None = None  # ids of the tokens around a clip, where they are vectors of their own
    vision: VisionConfig | None = None  # of a model that also sees
    qformer: QFormerConfig | None = None  # of a model whose adapter is one


# What a config.json may say that does not change a forward pass at inference: training, bookkeeping, generation.
_IRRELEVANT = frozenset(
    "add_cross_attention cross_attention_hidden_size pruned_heads tie_encoder_decoder "
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id length_penalty "
    "max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix "
    "remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens "
    "task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torchscript typical_p use_bfloat16 "
    "_attn_implementation_autoset _name_or_path architectures attention_dropout attn_implementation auto_map "
    "bos_token_id chunk_size_feed_forward decoder_start_token_id dropout dtype eos_token_id id2label ignore_index "
    "init_std initializer_range is_decoder is_encoder_decoder label2id output_attentions output_hidden_states "
    "pad_token_id problem_type return_dict torch_dtype transformers_version use_cache".split()
)


class ConfigReader:
    """Reads one HF config section and remembers what was read, so that an unknown key is refused by name.

    A config may say something we do not compute; silence about it would be a wrong number at layer 20.
    """

    def __init__(self, section: Mapping[str, Any], where: str):
        self.section = section
        self.where = where
        self.known: set[str] = set(_IRRELEVANT)

    def __call__(self, key: str, default: Value) -> Value:
        """The value of `key`, of the same type as its default."""
        self.known.add(key)
        value: Any = self.section.get(key, default)
        as_float = isinstance(default, float) and type(value) is int
        if type(value) is not type(default) and not as_float:
            raise ConversionError(f"{self.where}: {key} = {value!r} should be of type {type(default).__name__}.")
        return type(default)(value)

    def size(self, key: str, default: int) -> int:
        """A number of things: at least one."""
        value = self(key, default)
        if value < 1:
            raise ConversionError(f"{self.where}: {key} = {value} should be 1 or more.")
        return value

    def required(self, key: str) -> int:
        """A whole number that has no default."""
        self.known.add(key)
        value = self.section.get(key)
        if type(value) is not int:
            raise ConversionError(f"{self.where}: {key} = {value!r} should be a whole number, and has no default.")
        return value

    def number(self, key: str) -> float:
        """A number above 0 that has no default."""
        if key not in self.section:
            raise ConversionError(f"{self.where} says no {key}, which has no default.")
        value = self(key, 0.0)
        if not value > 0:
            raise ConversionError(f"{self.where}: {key} = {value} should be above 0.")
        return value

    def one_of(self, keys: tuple[str, ...], default: int) -> int:
        """A number of things that has several names, all of which say the same."""
        said = {key: self.size(key, default) for key in keys if key in self.section}
        self.known.update(keys)
        if len(set(said.values())) > 1:
            raise ConversionError(f"{self.where}: {said} contradict each other.")
        return next(iter(said.values()), default)

    def sizes(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of numbers, each 0 or more."""
        values = self.optional(key, default)
        if not isinstance(values, list | tuple) or not all(type(value) is int and value >= 0 for value in values):
            raise ConversionError(f"{self.where}: {key} = {values!r} should be a list of whole numbers.")
        return tuple(values)

    def optional_size(self, key: str, default: int) -> int | None:
        """A number of things, or null."""
        return None if self.optional(key, default) is None else self.size(key, default)

    def optional(self, key: str, default: Any = None) -> Any:
        """The value of `key`, which may be null."""
        self.known.add(key)
        return self.section.get(key, default)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse a value that would ask for arithmetic we do not do. An absent key means the first of `allowed`."""
        self.known.add(key)
        value = self.section.get(key, allowed[0])
        if value not in allowed:
            raise ConversionError(f"{self.where}: {key} = {value!r} is not supported (only {allowed}).")

    def ignore(self, *keys: str) -> None:
        """Keys that this family has and that do not change its forward pass."""
        self.known.update(keys)

    def inner(self, key: str, defaults: Mapping[str, Any] = {}) -> "ConfigReader":
        """A nested section, whose absent keys are those of `defaults`."""
        self.known.add(key)
        section = self.section.get(key)
        section = {} if section is None else section
        if not isinstance(section, Mapping):
            raise ConversionError(f"{self.where}: {key} must be a JSON object, got {section!r}.")
        return ConfigReader({**defaults, **section}, f"{self.where}: {key}")

    def finish(self) -> None:
        """Raise for each key that nobody asked about."""
        unknown = sorted(set(self.section) - self.known)
        if unknown:
            raise ConversionError(
                f"{self.where} has keys that this conversion does not know: {', '.join(unknown)}. "
                "It may ask for arithmetic that would be left out; teach the conversion what they mean."
            )
