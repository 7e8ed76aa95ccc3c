"""What DeSTA2 and DeSTA2.5-Audio share: Whisper and Llama from their own repositories, and the connector between."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from lalm_lens.adapters.qformer import QFormerAdapter
from lalm_lens.config import ConfigReader, DecoderConfig, EncoderConfig, LALMConfig, QFormerConfig
from lalm_lens.encoders.whisper import TappedWhisperEncoder
from lalm_lens.errors import ConversionError
from lalm_lens.weights import Drop, Row, Rule

from ._llama import DECODER
from ._whisper import BLOCKS, whisper_config

CONNECTOR = (
    Rule("layer_prompts.{i}", "queries_{i}"),
    Rule("layer_weights", "mixture"),
    *(
        rule.under(hf="qformer.layer.{i}.", ours="blocks.{i}.")
        for theirs, attn, ln in (("attention", "attn", "ln1"), ("crossattention", "cross_attn", "ln_cross"))
        for part in ("weight", "bias")
        for rule in (
            Rule(f"{theirs}.self.query.{part}", f"{attn}.q_proj.{part}"),
            Rule(f"{theirs}.self.key.{part}", f"{attn}.k_proj.{part}"),
            Rule(f"{theirs}.self.value.{part}", f"{attn}.v_proj.{part}"),
            Rule(f"{theirs}.output.dense.{part}", f"{attn}.o_proj.{part}"),
            Rule(f"{theirs}.output.LayerNorm.{part}", f"{ln}.{part[0]}"),
        )
    ),
    Rule("qformer.layer.{i}.intermediate.dense.weight", "blocks.{i}.mlp.in_proj.weight"),
    Rule("qformer.layer.{i}.intermediate.dense.bias", "blocks.{i}.mlp.in_proj.bias"),
    Rule("qformer.layer.{i}.output.dense.weight", "blocks.{i}.mlp.out_proj.weight"),
    Rule("qformer.layer.{i}.output.dense.bias", "blocks.{i}.mlp.out_proj.bias"),
    Rule("qformer.layer.{i}.output.LayerNorm.weight", "blocks.{i}.ln2.w"),
    Rule("qformer.layer.{i}.output.LayerNorm.bias", "blocks.{i}.ln2.b"),
    Rule("proj.0.weight", "ln.w"),
    Rule("proj.0.bias", "ln.b"),
    Rule("proj.1.weight", "linear.weight"),
    Rule("proj.1.bias", "linear.bias"),
)
PARTS = (
    Rule("whisper/model.encoder.embed_positions.weight", "audio_encoder.W_pos"),
    Drop("whisper/model.encoder.layer_norm.*", why="the last state is tapped before it"),
    Drop("whisper/model.decoder.*", why="it writes the transcript, which is part of the prompt"),
    Drop("whisper/proj_out.weight", why="it writes the transcript"),
    *(rule.under(hf="llm/model.") for rule in DECODER),
    Rule("llm/lm_head.weight", "unembed.linear.weight"),
)
D_MLP = 3072  # of the Q-Former: BertConfig's default, which neither model changes
WHISPER = {  # transformers' WhisperConfig where a config.json says nothing
    "num_mel_bins": 80,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "d_model": 384,
}
OF_DECODER = (
    "decoder_attention_heads decoder_ffn_dim decoder_layerdrop decoder_layers forced_decoder_ids max_target_positions "
    "median_filter_width use_weighted_layer_sum classifier_proj_size apply_spec_augment mask_time_prob "
    "mask_time_length mask_time_min_masks mask_feature_prob mask_feature_length mask_feature_min_masks"
).split()
Config = TypeVar("Config", EncoderConfig, DecoderConfig)
Taps = tuple[int, tuple[int, ...]]  # mel bins of a Whisper, and which of its states are looked at


def rows(cfg: LALMConfig, connector: str) -> tuple[Row, ...]:
    """`connector` comes before the names of the checkpoint's own tensors."""
    qformer, n_heard = qformer_of(cfg), cfg.encoder.n_layers
    return (
        *(rule.under(hf=connector, ours="adapter.") for rule in CONNECTOR),
        *(rule.under(hf="whisper/model.encoder.", ours="audio_encoder.") for rule in of_blocks(BLOCKS, n_heard)),
        *(
            Drop(f"whisper/model.encoder.layers.{n}.*", why="it is behind the last tap")
            for n in range(n_heard, n_heard + qformer.n_unheard)
        ),
        *PARTS,
    )


def of_blocks(rules: tuple[Rule, ...], n: int) -> tuple[Rule, ...]:
    """With a row for each of the first `n` blocks, so that there may be others for the blocks behind them."""
    return tuple(
        Rule(rule.hf.replace("{i}", str(i)), rule.ours.replace("{i}", str(i)))
        for rule in rules
        for i in range(n if "{i}" in rule.hf else 1)
    )


def whisper_part(read: ConfigReader) -> EncoderConfig:
    read = ConfigReader({**WHISPER, **read.section}, read.where)
    read.ignore(*OF_DECODER)
    return whisper_config(read, "whisper")


def own_config(read: ConfigReader, part: str, repeated: str, of: Callable[[ConfigReader], Config]) -> Config:
    """What the part's own config.json says. `repeated` is config.json's copy of it, which may say less, but not
    something else."""
    own = read.inner("parts").inner(part).inner("config").section
    if not own:
        raise ConversionError(f"The config of the part {part!r} is missing: open this model by from_pretrained.")
    cfg, copy = of(ConfigReader(own, f"{part}: config.json")), read.inner(repeated)
    said = of(ConfigReader({**own, **copy.section}, copy.where))
    if said != cfg:
        other = [name for name in vars(cfg) if vars(cfg)[name] != vars(said)[name]]
        raise ConversionError(
            f"{copy.where} and the config.json of the part {part!r} contradict each other in {', '.join(other)}: "
            f"{[vars(said)[name] for name in other]} and {[vars(cfg)[name] for name in other]}. Give the part that "
            "belongs to the model."
        )
    return cfg


def looked_at(whisper: str, taps: Mapping[str, Taps]) -> Taps:
    """What a connector that was trained with this Whisper takes."""
    if whisper not in taps:
        raise ConversionError(f"config.json: nobody knows what is looked at in {whisper!r}, only in {', '.join(taps)}.")
    return taps[whisper]


def lalm_config(
    model_type: str,
    whisper: EncoderConfig,
    decoder: DecoderConfig,
    *,
    taps: tuple[int, ...],
    n_mels: int,
    n_layers: int,
    n_queries: int,
    audio_token: int,
) -> LALMConfig:
    """`n_layers` of the Q-Former; `n_mels` are those that the connector was trained with."""
    if whisper.n_mels != n_mels:
        raise ConversionError(
            f"The part 'whisper' hears {whisper.n_mels} mel bins, and the connector was trained on one that hears "
            f"{n_mels}: give the Whisper that belongs to the model."
        )
    if audio_token >= decoder.d_vocab:
        raise ConversionError(
            f"The clip's token {audio_token} is not among {decoder.d_vocab}: give the right tokenizer."
        )
    qformer = QFormerConfig(
        n_layers=n_layers,
        n_heads=whisper.n_heads,
        d_mlp=D_MLP,
        n_queries=n_queries,
        taps=taps,
        n_unheard=whisper.n_layers - max(taps),
    )
    return LALMConfig(
        model_type=model_type,
        decoder=decoder,
        encoder=replace(whisper, n_layers=max(taps)),
        audio_token=audio_token,
        qformer=qformer,
    )


def qformer_of(cfg: LALMConfig) -> QFormerConfig:
    assert cfg.qformer is not None
    return cfg.qformer


def encoder(cfg: LALMConfig) -> TappedWhisperEncoder:
    return TappedWhisperEncoder(cfg.encoder, qformer_of(cfg).taps, qformer_of(cfg).n_queries)


def adapter(cfg: LALMConfig) -> QFormerAdapter:
    return QFormerAdapter(qformer_of(cfg), cfg.encoder.d_model, cfg.decoder.d_model)
