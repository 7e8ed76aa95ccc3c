"""The encoder that Qwen2-Audio, Voxtral and Audio Flamingo 3 share, and its blocks, under HF's names."""

from lalm_lens.config import ConfigReader, EncoderConfig
from lalm_lens.weights import Rule

BLOCKS = (
    Rule("conv1.weight", "conv1.weight"),
    Rule("conv1.bias", "conv1.bias"),
    Rule("conv2.weight", "conv2.weight"),
    Rule("conv2.bias", "conv2.bias"),
    Rule("layers.{i}.self_attn_layer_norm.weight", "blocks.{i}.ln1.w"),
    Rule("layers.{i}.self_attn_layer_norm.bias", "blocks.{i}.ln1.b"),
    Rule("layers.{i}.self_attn.q_proj.weight", "blocks.{i}.attn.q_proj.weight"),
    Rule("layers.{i}.self_attn.q_proj.bias", "blocks.{i}.attn.q_proj.bias"),
    Rule("layers.{i}.self_attn.k_proj.weight", "blocks.{i}.attn.k_proj.weight"),  # Whisper's keys have no bias
    Rule("layers.{i}.self_attn.v_proj.weight", "blocks.{i}.attn.v_proj.weight"),
    Rule("layers.{i}.self_attn.v_proj.bias", "blocks.{i}.attn.v_proj.bias"),
    Rule("layers.{i}.self_attn.out_proj.weight", "blocks.{i}.attn.o_proj.weight"),
    Rule("layers.{i}.self_attn.out_proj.bias", "blocks.{i}.attn.o_proj.bias"),
    Rule("layers.{i}.final_layer_norm.weight", "blocks.{i}.ln2.w"),
    Rule("layers.{i}.final_layer_norm.bias", "blocks.{i}.ln2.b"),
    Rule("layers.{i}.fc1.weight", "blocks.{i}.mlp.in_proj.weight"),
    Rule("layers.{i}.fc1.bias", "blocks.{i}.mlp.in_proj.bias"),
    Rule("layers.{i}.fc2.weight", "blocks.{i}.mlp.out_proj.weight"),
    Rule("layers.{i}.fc2.bias", "blocks.{i}.mlp.out_proj.bias"),
)

ENCODER = (
    *BLOCKS,
    Rule("embed_positions.weight", "W_pos"),
    Rule("layer_norm.weight", "ln_post.w"),
    Rule("layer_norm.bias", "ln_post.b"),
)


def whisper_config(read: ConfigReader, model_type: str) -> EncoderConfig:
    """An `audio_config`. Absent keys have the size of whisper-large-v3; transformers has two names for each."""
    read.expect("model_type", model_type)
    read.expect("activation_function", "gelu")
    read.expect("scale_embedding", False)
    read.ignore("encoder_layerdrop", "layerdrop", "activation_dropout", "vocab_size", "tie_word_embeddings")
    cfg = EncoderConfig(
        n_layers=read.one_of(("encoder_layers", "num_hidden_layers"), 32),
        d_model=read.one_of(("d_model", "hidden_size"), 1280),
        n_heads=read.one_of(("encoder_attention_heads", "num_attention_heads"), 20),
        d_mlp=read.one_of(("encoder_ffn_dim", "intermediate_size"), 5120),
        n_mels=read.size("num_mel_bins", 128),
        n_ctx=read.size("max_source_positions", 1500),
    )
    read.expect("num_key_value_heads", cfg.n_heads)
    read.expect("head_dim", cfg.d_model // cfg.n_heads)
    read.finish()
    return cfg
