"""Qwen-Audio and Qwen-Audio-Chat (arXiv 2311.07919): Whisper's encoder cut to the clip, states pooled in pairs, one
linear layer, and Qwen-7B.

transformers has no class for it. Checked against golden sets, which the authors' own code made. Where a batch is
padded, that code counts padding as positions; here each prompt has its own, and its own length makes the base grow.
"""

from collections.abc import Mapping
from typing import Any

from lalm_lens.adapters.linear import LinearAdapter
from lalm_lens.config import ConfigReader, DecoderConfig, DynamicNTK, EncoderConfig, LALMConfig
from lalm_lens.encoders.cut import CutWhisperEncoder
from lalm_lens.errors import ConversionError
from lalm_lens.prompts import ChatTemplate, CutClip, qwen_processor
from lalm_lens.weights import Conversion, Fused, Layout, Rule

ENCODER = (  # under the names of openai-whisper
    Rule("positional_embedding", "W_pos"),
    Rule("conv1.weight", "conv1.weight"),
    Rule("conv1.bias", "conv1.bias"),
    Rule("conv2.weight", "conv2.weight"),
    Rule("conv2.bias", "conv2.bias"),
    Rule("blocks.{i}.attn_ln.weight", "blocks.{i}.ln1.w"),
    Rule("blocks.{i}.attn_ln.bias", "blocks.{i}.ln1.b"),
    Rule("blocks.{i}.attn.query.weight", "blocks.{i}.attn.q_proj.weight"),
    Rule("blocks.{i}.attn.query.bias", "blocks.{i}.attn.q_proj.bias"),
    Rule("blocks.{i}.attn.key.weight", "blocks.{i}.attn.k_proj.weight"),  # Whisper's keys have no bias
    Rule("blocks.{i}.attn.value.weight", "blocks.{i}.attn.v_proj.weight"),
    Rule("blocks.{i}.attn.value.bias", "blocks.{i}.attn.v_proj.bias"),
    Rule("blocks.{i}.attn.out.weight", "blocks.{i}.attn.o_proj.weight"),
    Rule("blocks.{i}.attn.out.bias", "blocks.{i}.attn.o_proj.bias"),
    Rule("blocks.{i}.mlp_ln.weight", "blocks.{i}.ln2.w"),
    Rule("blocks.{i}.mlp_ln.bias", "blocks.{i}.ln2.b"),
    Rule("blocks.{i}.mlp.0.weight", "blocks.{i}.mlp.in_proj.weight"),
    Rule("blocks.{i}.mlp.0.bias", "blocks.{i}.mlp.in_proj.bias"),
    Rule("blocks.{i}.mlp.2.weight", "blocks.{i}.mlp.out_proj.weight"),
    Rule("blocks.{i}.mlp.2.bias", "blocks.{i}.mlp.out_proj.bias"),
    Rule("ln_post.weight", "ln_post.w"),
    Rule("ln_post.bias", "ln_post.b"),
)
QKV = ("q_proj", "k_proj", "v_proj")
ROWS = (
    *(rule.under(hf="transformer.audio.", ours="audio_encoder.") for rule in ENCODER),
    Rule("transformer.audio.proj.weight", "adapter.linear.weight"),
    Rule("transformer.audio.proj.bias", "adapter.linear.bias"),
    Rule("transformer.audio.audio_bos_eos_token.weight", "audio_marks.weight"),
    Rule("transformer.wte.weight", "embed.table.weight"),
    Rule("transformer.h.{i}.ln_1.weight", "blocks.{i}.ln1.w"),
    Fused("transformer.h.{i}.attn.c_attn.weight", tuple(f"blocks.{{i}}.attn.{name}.weight" for name in QKV)),
    Fused("transformer.h.{i}.attn.c_attn.bias", tuple(f"blocks.{{i}}.attn.{name}.bias" for name in QKV)),
    Rule("transformer.h.{i}.attn.c_proj.weight", "blocks.{i}.attn.o_proj.weight"),
    Rule("transformer.h.{i}.ln_2.weight", "blocks.{i}.ln2.w"),
    Rule("transformer.h.{i}.mlp.w1.weight", "blocks.{i}.mlp.in_proj.weight"),
    Rule("transformer.h.{i}.mlp.w2.weight", "blocks.{i}.mlp.gate_proj.weight"),
    Rule("transformer.h.{i}.mlp.c_proj.weight", "blocks.{i}.mlp.out_proj.weight"),
    Rule("transformer.ln_f.weight", "ln_final.w"),
    Rule("lm_head.weight", "unembed.linear.weight"),
)
SAID = frozenset(  # in the published config.json; what another file leaves out, the authors' class would decide
    "hidden_size intermediate_size kv_channels layer_norm_epsilon max_position_embeddings no_bias num_attention_heads "
    "num_hidden_layers rotary_emb_base rotary_pct seq_length tie_word_embeddings use_dynamic_ntk use_logn_attn "
    "vocab_size".split()
)
HEARD = frozenset(
    "add_audio_bos_eos_token audio_start_id avg_pool n_ctx n_head n_layer n_mels n_state output_dim".split()
)
BETWEEN = 3312  # how far `<audio>` is behind the placeholder of audio in the tokenizer


def config(hf: Mapping[str, Any]) -> LALMConfig:
    read = ConfigReader(hf, "config.json")
    read.expect("model_type", "qwen")
    if not isinstance(hf.get("audio"), Mapping):
        raise ConversionError("config.json has no section `audio`: this Qwen hears nothing. Give a Qwen-Audio.")
    if lacking := sorted(SAID - set(hf)) or sorted(HEARD - set(hf["audio"])):
        raise ConversionError(f"config.json does not say {', '.join(lacking)}, which have no defaults.")
    decoder = decoder_config(read)
    encoder, start = audio_config(read.inner("audio"), decoder.d_model)
    read.finish()
    return LALMConfig(
        model_type="qwen",
        decoder=decoder,
        encoder=encoder,
        audio_token=start - BETWEEN,
        audio_marks=(start, start + 1),
    )


def decoder_config(read: ConfigReader) -> DecoderConfig:
    for key, value in {
        "no_bias": True,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "use_cache_quantization": False,
        "tie_word_embeddings": False,
    }.items():
        read.expect(key, value)
    read.ignore("attn_dropout_prob", "emb_dropout_prob", "bf16", "fp16", "fp32", "softmax_in_fp32", "use_flash_attn")
    read.ignore("onnx_safe", "tokenizer_type", "use_cache_kernel")
    n_heads, d_model = read.size("num_attention_heads", 32), read.size("hidden_size", 4096)
    n_layers, n_trained = read.size("num_hidden_layers", 32), read.size("seq_length", 2048)
    d_mlp, odd = divmod(read.size("intermediate_size", 22016), 2)
    read.expect("kv_channels", d_model // n_heads)
    if odd or d_model % n_heads or n_trained < 2:
        raise ConversionError(
            f"{read.where}: intermediate_size is of two halves, hidden_size of {n_heads} heads, seq_length 2 or more."
        )
    return DecoderConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_model // n_heads,
        d_mlp=d_mlp,
        d_vocab=read.size("vocab_size", 155947),
        n_ctx=read.size("max_position_embeddings", 8192),
        eps=read("layer_norm_epsilon", 1e-5),
        rope=DynamicNTK(read("rotary_emb_base", 10_000.0), n_trained),
        qkv_bias=True,
        windows=(None,) * n_layers,
        log_n=n_trained,
    )


def audio_config(read: ConfigReader, d_model: int) -> tuple[EncoderConfig, int]:
    """The encoder, and the token that stands before a clip."""
    read.expect("output_dim", d_model)
    read.expect("avg_pool", True)
    read.expect("add_audio_bos_eos_token", True)
    d_encoder = read.size("n_state", 1280)
    cfg = EncoderConfig(
        n_layers=read.size("n_layer", 32),
        d_model=d_encoder,
        n_heads=read.size("n_head", 20),
        d_mlp=4 * d_encoder,
        n_mels=read.size("n_mels", 80),
        n_ctx=read.size("n_ctx", 1500),
    )
    start = read("audio_start_id", 155163)
    read.finish()
    return cfg, start


QWEN_AUDIO = Conversion(
    model_type="qwen",
    config=config,
    encoder=lambda cfg: CutWhisperEncoder(cfg.encoder),
    adapter=lambda cfg: LinearAdapter(cfg.encoder.d_model, cfg.decoder.d_model),
    rows=lambda cfg: ROWS,
    layouts=(Layout(),),
    template=ChatTemplate(placeholder="[[[AUDIO:modality]]]", before="<audio>", after="</audio>"),
    hearing=CutClip(),
    hf_class=None,
    frame_mask=None,
    processor=qwen_processor,
    stop_tokens=(151644, 151645),  # <|im_start|> and <|im_end|>: the authors' code knows them, and no file
)
