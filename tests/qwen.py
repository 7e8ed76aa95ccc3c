"""The reference for Qwen-Audio, of which transformers has no class: random checkpoints in the published layout, and two
models made of them. One is of transformers' parts, with everything unfused; it knows nothing of prompts beyond the
trained length. The other is a decoder by hand in float64, which does.
"""

import base64
import json
import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

State = dict[str, Tensor]
WORDS = (
    "system user assistant You  are  a  helpful Audio What  is  the  gender  of  speaker  in  speech  options "
    "The  male  female 's 12"
)
N_MARKS = 3522  # of the real tokenizer, behind its pieces


PATTERN = (  # what the authors give to tiktoken: digits stand alone, whatever pieces there are
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pieces() -> list[bytes]:
    """Every byte, and some words with all that they begin with."""
    words = [word.replace("_", " ") for word in WORDS.replace("  ", " _").split(" ")]
    found = [bytes([n]) for n in range(256)]
    for word in map(str.encode, words):
        found += [word[:n] for n in range(2, len(word) + 1) if word[:n] not in found]
    return found


def write_tiktoken(folder: Path, lines: list[bytes]) -> None:
    listed = (f"{base64.b64encode(piece).decode()} {n}\n" for n, piece in enumerate(lines))
    (folder / "qwen.tiktoken").write_text("".join(listed))


N_PIECES = len(pieces())
START = N_PIECES + N_MARKS - 2  # `<audio>`; `</audio>` is the last of all
CONFIG = {
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "kv_channels": 16,
    "vocab_size": N_PIECES + N_MARKS + 9,  # more than the tokenizer has
    "max_position_embeddings": 8192,
    "seq_length": 2048,
    "layer_norm_epsilon": 1e-05,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
    "audio": {
        "n_mels": 80,
        "n_ctx": 1500,
        "n_state": 32,
        "n_head": 4,
        "n_layer": 2,
        "output_dim": 64,
        "avg_pool": True,
        "add_audio_bos_eos_token": True,
        "audio_start_id": START,
    },
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Of every tensor of a checkpoint, as the authors' code names them."""
    d, d_mlp, audio = config["hidden_size"], config["intermediate_size"] // 2, config["audio"]
    e = audio["n_state"]
    block = {
        "ln_1.weight": (d,),
        "attn.c_attn.weight": (3 * d, d),
        "attn.c_attn.bias": (3 * d,),
        "attn.c_proj.weight": (d, d),
        "ln_2.weight": (d,),
        "mlp.w1.weight": (d_mlp, d),
        "mlp.w2.weight": (d_mlp, d),
        "mlp.c_proj.weight": (d, d_mlp),
    }
    heard = {
        **{f"attn.{name}.weight": (e, e) for name in ("query", "key", "value", "out")},
        **{f"attn.{name}.bias": (e,) for name in ("query", "value", "out")},
        **{f"{name}.{part}": (e,) for name in ("attn_ln", "mlp_ln") for part in ("weight", "bias")},
        "mlp.0.weight": (4 * e, e),
        "mlp.0.bias": (4 * e,),
        "mlp.2.weight": (e, 4 * e),
        "mlp.2.bias": (e,),
    }
    front = {
        "positional_embedding": (audio["n_ctx"], e),
        "conv1.weight": (e, audio["n_mels"], 3),
        "conv1.bias": (e,),
        "conv2.weight": (e, e, 3),
        "conv2.bias": (e,),
        "ln_post.weight": (e,),
        "ln_post.bias": (e,),
        "proj.weight": (d, e),
        "proj.bias": (d,),
        "audio_bos_eos_token.weight": (2, d),
        **{f"blocks.{i}.{name}": its for i in range(audio["n_layer"]) for name, its in heard.items()},
    }
    return {
        "transformer.wte.weight": (config["vocab_size"], d),
        **{f"transformer.h.{i}.{name}": its for i in range(config["num_hidden_layers"]) for name, its in block.items()},
        "transformer.ln_f.weight": (d,),
        **{f"transformer.audio.{name}": its for name, its in front.items()},
        "lm_head.weight": (config["vocab_size"], d),
    }


@cache
def state(seed: int = 0) -> State:
    """Weights of all kinds are random, those of norms and positions too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=generator)
        if name.endswith("weight") and ("ln_" in name or "_ln" in name):
            return (1 + 0.3 * x).clamp(0.3, 1.9)
        if len(shape) == 1:
            return 0.5 * x if "c_attn" in name else 0.2 * x
        if name in ("transformer.wte.weight", "transformer.audio.audio_bos_eos_token.weight"):
            return 0.03 * x
        return x * (2.0 if name == "lm_head.weight" else 1.0) / math.prod(shape[1:]) ** 0.5

    return {name: draw(name, shape) for name, shape in shapes(CONFIG).items()}


def config(**changed: object) -> dict:
    return {**CONFIG, **changed}


def save(folder: Path, seed: int = 0, **changed: object) -> Path:
    """A checkpoint with its tokenizer, and code beside it that must never run."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(**changed)))
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "chatml", "eos_token_id": N_PIECES}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "QWenTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
            }
        )
    )
    for name in ("modeling_qwen", "tokenization_qwen", "configuration_qwen"):
        (folder / f"{name}.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    write_tiktoken(folder, pieces())
    save_file(state(seed), folder / "model.safetensors")
    return folder


# --- of transformers' parts ------------------------------------------------------------------------------------


@cache
def qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    """The decoder with queries, keys and values taken apart."""
    config = Qwen2Config(
        vocab_size=CONFIG["vocab_size"],
        hidden_size=CONFIG["hidden_size"],
        intermediate_size=CONFIG["intermediate_size"] // 2,
        num_hidden_layers=CONFIG["num_hidden_layers"],
        num_attention_heads=CONFIG["num_attention_heads"],
        num_key_value_heads=CONFIG["num_attention_heads"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs, its = state(seed), {}
    for i in range(config.num_hidden_layers):
        ours, to = f"transformer.h.{i}.", f"model.layers.{i}."
        for part in ("weight", "bias"):
            for name, tensor in zip("qkv", theirs[f"{ours}attn.c_attn.{part}"].chunk(3), strict=True):
                its[f"{to}self_attn.{name}_proj.{part}"] = tensor
        its[f"{to}self_attn.o_proj.weight"] = theirs[f"{ours}attn.c_proj.weight"]
        its[f"{to}mlp.gate_proj.weight"] = theirs[f"{ours}mlp.w2.weight"]
        its[f"{to}mlp.up_proj.weight"] = theirs[f"{ours}mlp.w1.weight"]
        its[f"{to}mlp.down_proj.weight"] = theirs[f"{ours}mlp.c_proj.weight"]
        its[f"{to}input_layernorm.weight"] = theirs[f"{ours}ln_1.weight"]
        its[f"{to}post_attention_layernorm.weight"] = theirs[f"{ours}ln_2.weight"]
    its["model.embed_tokens.weight"] = theirs["transformer.wte.weight"]
    its["model.norm.weight"] = theirs["transformer.ln_f.weight"]
    its["lm_head.weight"] = theirs["lm_head.weight"]
    model = Qwen2ForCausalLM(config).eval()
    model.load_state_dict(its)
    return model


def whisper(n_states: int, seed: int = 0) -> WhisperEncoder:
    """The encoder of clips that make so many states, without its last norm."""
    audio, front = CONFIG["audio"], "transformer.audio."
    config = WhisperConfig(
        num_mel_bins=audio["n_mels"],
        d_model=audio["n_state"],
        encoder_layers=audio["n_layer"],
        encoder_attention_heads=audio["n_head"],
        encoder_ffn_dim=4 * audio["n_state"],
        max_source_positions=n_states,
        attn_implementation="eager",
    )
    names = {
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "out": "self_attn.out_proj",
        "attn_ln": "self_attn_layer_norm",
        "mlp_ln": "final_layer_norm",
        "0": "fc1",
        "2": "fc2",
    }
    its: State = {}
    for name, tensor in state(seed).items():
        parts = name.removeprefix(front).split(".")
        if parts[0] == "blocks":
            its[f"layers.{parts[1]}.{names[parts[-2]]}.{parts[-1]}"] = tensor
        elif parts[0] in ("conv1", "conv2"):
            its[".".join(parts)] = tensor
    its["embed_positions.weight"] = state(seed)[f"{front}positional_embedding"][:n_states]
    encoder = WhisperEncoder(config).eval()
    encoder.layer_norm = nn.Identity()
    encoder.load_state_dict(its)
    return encoder


@torch.no_grad()
def heard(mel: Tensor, n_frames: int, seed: int = 0) -> dict[str, Tensor]:
    """Stages of one clip up to the embeddings of its positions: mel features [mel, frames] of a padded window."""
    n_states, its = (n_frames + 1) // 2, state(seed)
    out = whisper(n_states, seed)(mel[None, :, : 2 * n_states], output_hidden_states=True)
    pairs = out.last_hidden_state[0][: n_states // 2 * 2].unflatten(0, (-1, 2)).mean(1)
    front = "transformer.audio."
    normed = F.layer_norm(pairs, pairs.shape[-1:], its[f"{front}ln_post.weight"], its[f"{front}ln_post.bias"])
    projected = F.linear(normed, its[f"{front}proj.weight"], its[f"{front}proj.bias"])
    return {"encoder.0": out.hidden_states[1][0], "encoder.out": normed, "projected": projected}


@torch.no_grad()
def embedded(tokens: list[int], mel: Tensor, n_frames: int, seed: int = 0) -> Tensor:
    """What one prompt with a clip gives to the decoder: [pos, d_model]."""
    its, first = state(seed), tokens.index(START)
    begins, ends = its["transformer.audio.audio_bos_eos_token.weight"]
    clip = torch.stack([begins, *heard(mel, n_frames, seed)["projected"], ends])
    embed = its["transformer.wte.weight"][tokens].clone()
    assert tokens[first + len(clip) - 1] == START + 1
    embed[first : first + len(clip)] = clip
    return embed


# --- by hand ---------------------------------------------------------------------------------------------------


def by_hand(embed: Tensor, n_trained: int, n_prompt: int, seed: int = 0) -> Tensor:
    """Logits of [pos, d_model] in float64; the first `n_prompt` positions are the prompt, the rest was written."""
    its = {name: tensor.double() for name, tensor in state(seed).items()}
    n_heads, n_pos, x = CONFIG["num_attention_heads"], len(embed), embed.double()
    d_head = x.shape[1] // n_heads
    alpha, limit = 1, n_trained
    while n_prompt > limit:
        alpha, limit = 2 * alpha + 1, 2 * limit
    theta = 10_000.0 * alpha ** (d_head / (d_head - 2))
    turns = torch.polar(
        torch.ones(n_pos, 1, d_head // 2, dtype=torch.float64),
        torch.outer(torch.arange(n_pos).double(), theta ** -(torch.arange(0, d_head, 2).double() / d_head))[:, None],
    )
    growth = torch.tensor([max(1.0, math.log(pos, n_trained)) for pos in range(1, n_pos + 1)], dtype=torch.float64)

    def norm(x: Tensor, w: Tensor) -> Tensor:
        return w * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def turned(x: Tensor) -> Tensor:
        by_head = x.reshape(n_pos, n_heads, 2, d_head // 2)
        z = torch.complex(by_head[:, :, 0], by_head[:, :, 1]) * turns
        return torch.cat([z.real, z.imag], dim=-1)

    for i in range(CONFIG["num_hidden_layers"]):
        block = {name.removeprefix(f"transformer.h.{i}."): its[name] for name in its if f".h.{i}." in name}
        fused = norm(x, block["ln_1.weight"]) @ block["attn.c_attn.weight"].T + block["attn.c_attn.bias"]
        q, k, v = fused.chunk(3, dim=-1)
        q, k, v = turned(q) * growth[:, None, None], turned(k), v.reshape(n_pos, n_heads, d_head)
        scores = torch.einsum("qhd,khd->hqk", q, k) / d_head**0.5
        scores = scores.masked_fill(torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1), -math.inf)
        z = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(n_pos, -1)
        x = x + z @ block["attn.c_proj.weight"].T
        normed = norm(x, block["ln_2.weight"])
        up, gate = normed @ block["mlp.w1.weight"].T, normed @ block["mlp.w2.weight"].T
        x = x + (up * gate * torch.sigmoid(gate)) @ block["mlp.c_proj.weight"].T
    return norm(x, its["transformer.ln_f.weight"]) @ its["lm_head.weight"].T
