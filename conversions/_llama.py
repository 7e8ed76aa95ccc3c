"""The decoder that Llama, Mistral and Qwen2 share: its tensors, and the Qwen2 and Llama parts of a config.json."""

from lalm_lens.config import ConfigReader, DecoderConfig, Llama3Rope, Rope
from lalm_lens.errors import ConversionError
from lalm_lens.weights import Rule

DECODER = (
    Rule("embed_tokens.weight", "embed.table.weight"),
    Rule("layers.{i}.input_layernorm.weight", "blocks.{i}.ln1.w"),
    Rule("layers.{i}.self_attn.q_proj.weight", "blocks.{i}.attn.q_proj.weight"),
    Rule("layers.{i}.self_attn.k_proj.weight", "blocks.{i}.attn.k_proj.weight"),
    Rule("layers.{i}.self_attn.v_proj.weight", "blocks.{i}.attn.v_proj.weight"),
    Rule("layers.{i}.self_attn.o_proj.weight", "blocks.{i}.attn.o_proj.weight"),
    Rule("layers.{i}.post_attention_layernorm.weight", "blocks.{i}.ln2.w"),
    Rule("layers.{i}.mlp.gate_proj.weight", "blocks.{i}.mlp.gate_proj.weight"),
    Rule("layers.{i}.mlp.up_proj.weight", "blocks.{i}.mlp.in_proj.weight"),
    Rule("layers.{i}.mlp.down_proj.weight", "blocks.{i}.mlp.out_proj.weight"),
    Rule("norm.weight", "ln_final.w"),
)

QKV_BIAS = (  # Qwen2 has them; Llama and Mistral do not
    Rule("layers.{i}.self_attn.q_proj.bias", "blocks.{i}.attn.q_proj.bias"),
    Rule("layers.{i}.self_attn.k_proj.bias", "blocks.{i}.attn.k_proj.bias"),
    Rule("layers.{i}.self_attn.v_proj.bias", "blocks.{i}.attn.v_proj.bias"),
)


def qwen2_config(read: ConfigReader) -> DecoderConfig:
    """A `text_config` of type qwen2. Absent keys have the defaults of transformers' Qwen2Config."""
    read.expect("model_type", "qwen2")
    read.expect("hidden_act", "silu")
    read.expect("use_mrope", False)
    read.expect("tie_word_embeddings", False)
    n_heads = read.size("num_attention_heads", 32)
    d_model = read.size("hidden_size", 4096)
    n_layers = read.size("num_hidden_layers", 32)
    cfg = DecoderConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=read.optional_size("num_key_value_heads", 32) or n_heads,
        d_head=read.size("head_dim", d_model // n_heads),
        d_mlp=read.size("intermediate_size", 22016),
        d_vocab=read.size("vocab_size", 151936),
        n_ctx=read.size("max_position_embeddings", 32768),
        eps=read("rms_norm_eps", 1e-6),
        rope=rope(read),
        qkv_bias=True,
        windows=windows(read, n_layers),
    )
    read.finish()
    return cfg


def llama_config(read: ConfigReader) -> DecoderConfig:
    """A `text_config` of type llama. Absent keys have the defaults of transformers' LlamaConfig."""
    read.expect("model_type", "llama")
    read.expect("hidden_act", "silu")
    read.expect("attention_bias", False)
    read.expect("mlp_bias", False)
    read.expect("sliding_window", None)  # of Mistral's class, which Voxtral's published text_config was written by
    read.expect("tie_word_embeddings", False)
    read.ignore("pretraining_tp")
    n_heads = read.size("num_attention_heads", 32)
    d_model = read.size("hidden_size", 4096)
    n_layers = read.size("num_hidden_layers", 32)
    cfg = DecoderConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=read.optional_size("num_key_value_heads", n_heads) or n_heads,
        d_head=read.optional_size("head_dim", d_model // n_heads) or d_model // n_heads,
        d_mlp=read.size("intermediate_size", 11008),
        d_vocab=read.size("vocab_size", 32000),
        n_ctx=read.size("max_position_embeddings", 2048),
        eps=read("rms_norm_eps", 1e-6),
        rope=rope(read),
        qkv_bias=False,
        windows=(None,) * n_layers,
    )
    read.finish()
    return cfg


def rope(read: ConfigReader) -> Rope | Llama3Rope:
    """transformers 5 keeps all in `rope_parameters`, older files in `rope_theta` and `rope_scaling`."""
    old = read.inner("rope_scaling").section
    parameters = read.inner("rope_parameters", old)
    if other := [key for key, value in old.items() if parameters.section[key] != value]:
        raise ConversionError(f"{read.where}: rope_parameters and rope_scaling contradict each other in {other[0]}.")
    theta = parameters("rope_theta", read("rope_theta", 10_000.0))
    parameters.expect("type", "default", "llama3")
    parameters.expect("rope_type", "default", "llama3")
    if parameters("rope_type", parameters("type", "default")) == "llama3":
        rotary: Rope | Llama3Rope = Llama3Rope(
            theta,
            factor=parameters.number("factor"),
            low=parameters.number("low_freq_factor"),
            high=parameters.number("high_freq_factor"),
            n_ctx=parameters.required("original_max_position_embeddings"),
        )
    else:
        rotary = Rope(theta)
    parameters.finish()
    return rotary


def windows(read: ConfigReader, n_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each block: `layer_types` where given, else the rule of Qwen2Config."""
    width = read.optional_size("sliding_window", 4096)
    first_sliding = read("max_window_layers", 28)
    layer_types = read.optional("layer_types")
    if layer_types is not None and (not isinstance(layer_types, list) or len(layer_types) != n_layers):
        raise ConversionError(
            f"{read.where}: layer_types = {layer_types!r} should name a type for each of {n_layers} layers."
        )
    if not read("use_sliding_window", False):
        if layer_types and set(layer_types) != {"full_attention"}:
            raise ConversionError(f"{read.where}: layer_types ask for sliding windows, use_sliding_window does not.")
        return (None,) * n_layers
    if layer_types is None:
        layer_types = ["sliding_attention" if i >= first_sliding else "full_attention" for i in range(n_layers)]
    known = {"full_attention": None, "sliding_attention": width}
    if not set(layer_types) <= set(known):
        raise ConversionError(
            f"{read.where}: layer_types must be among {sorted(known)}, got {sorted(set(layer_types))}."
        )
    return tuple(known[kind] for kind in layer_types)
