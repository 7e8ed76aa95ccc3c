"""The reference for DeSTA: transformers' own Whisper, BERT and Llama, tiny and random, put together as the papers say.

Nothing here imports lalm_lens, so that nothing of it can vouch for itself.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from reference import randomise, recorded
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperForConditionalGeneration
from transformers.models.bert.modeling_bert import BertEncoder

GOLDEN = Path(__file__).parent / "golden"
N_CTX, N_VOCAB = 100, 464  # as the golden sets' feature extractors and tokenizers need


@dataclass(frozen=True)
class Shape:
    """What differs between the checkpoints that are tested. `taps` index the blocks' outputs in DeSTA2.5, and in DeSTA2
    the hidden states, of which the first is what enters the first block."""

    model_type: str
    whisper_id: str
    taps: tuple[int, ...]
    n_encoder: int
    n_mels: int = 80
    n_queries: int = 5
    n_qformer: int = 2
    n_kv_heads: int = 2
    d_encoder: int = 24
    rope: dict = field(default_factory=dict, hash=False)

    @property
    def is_first(self) -> bool:
        return self.model_type == "DestaModel"


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {
    "desta2_tiny": Shape("DestaModel", "openai/whisper-tiny", (0, 1, 2, 3), 4, n_kv_heads=1),
    "desta2_small": Shape("DestaModel", "openai/whisper-small", (2, 5, 8, 11), 12, n_queries=3, d_encoder=32),
    "desta25_tiny": Shape("desta25", "openai/whisper-tiny", (0, 1, 2, 3), 4, n_kv_heads=4, n_qformer=3, rope=LLAMA3),
    "desta25_small": Shape("desta25", "openai/whisper-small", (2, 5, 8, 11), 12, n_queries=7, rope=LLAMA3),
}


class Connector(nn.Module):
    """As the authors name its parts."""

    def __init__(self, shape: Shape, d_model: int, n_heads: int = 4, d_mlp: int = 3072):
        super().__init__()
        config = BertConfig(
            hidden_size=shape.d_encoder,
            num_hidden_layers=shape.n_qformer,
            num_attention_heads=n_heads,
            intermediate_size=d_mlp,
            is_decoder=True,
            add_cross_attention=True,
        )
        config._attn_implementation = "eager"  # sdpa would make it causal
        self.layer_prompts = nn.ParameterList(torch.randn(1, shape.n_queries, shape.d_encoder) for _ in shape.taps)
        self.layer_weights = nn.Parameter(torch.randn(shape.n_queries, len(shape.taps)))
        self.qformer = BertEncoder(config)
        self.proj = nn.Sequential(nn.LayerNorm(shape.d_encoder), nn.Linear(shape.d_encoder, d_model))

    def forward(self, tapped: list[Tensor]) -> Tensor:
        looked = [
            self.qformer(prompt.expand(len(state), -1, -1), encoder_hidden_states=state, use_cache=False)[0]
            for prompt, state in zip(self.layer_prompts, tapped, strict=True)
        ]
        weights = self.layer_weights.softmax(-1)
        return self.proj(sum(state * weights[:, tap, None] for tap, state in enumerate(looked)))


@dataclass(frozen=True)
class Reference:
    shape: Shape
    whisper: WhisperForConditionalGeneration
    llama: LlamaForCausalLM
    connector: Connector

    @classmethod
    def of(cls, shape: Shape, seed: int = 0) -> "Reference":
        torch.manual_seed(seed)
        parts = (whisper(shape), llama(shape), Connector(shape, 32))
        return cls(shape, *(randomise(part).eval() for part in parts))

    @torch.no_grad()
    def states(self, tokens: Tensor, mel: Tensor, audio_token: int) -> dict[str, Tensor]:
        """Of one prompt with its clip: the tapped states, what every block returns, the merged embeddings, logits."""
        encoder, blocks = self.whisper.model.encoder, self.llama.model.layers
        modules = {f"encoder.{n}": layer for n, layer in enumerate(encoder.layers)}
        with recorded(modules) as heard:
            hidden = encoder(mel, output_hidden_states=True).hidden_states
        tapped = [hidden[n] if self.shape.is_first else heard[f"encoder.{n}"] for n in self.shape.taps]
        with recorded({f"qformer.{n}": layer for n, layer in enumerate(self.connector.qformer.layer)}) as of_last_tap:
            audio = self.connector(tapped)
        embed = self.llama.model.embed_tokens(tokens)
        embed[tokens == audio_token] = audio.flatten(0, 1).to(embed.dtype)
        with recorded({f"decoder.{n}": layer for n, layer in enumerate(blocks)}) as read:
            logits = self.llama(inputs_embeds=embed, use_cache=False).logits
        tapped = {f"tap.{n}": state for n, state in enumerate(tapped)}
        return {**heard, **tapped, **of_last_tap, **read, "audio": audio, "embed": embed, "logits": logits}

    def save(self, folder: Path, copies: bool = True, narrow: bool = False) -> dict[str, Path]:
        """In the published layout; `copies` repeats the configs of the parts, `narrow` stores the parts in 16 bits.
        Where the parts are."""
        parts = {"whisper": folder / "whisper", "llm": folder / "llm"}
        if narrow:
            self.whisper.half(), self.llama.bfloat16()
        self.whisper.save_pretrained(parts["whisper"])
        self.llama.save_pretrained(parts["llm"])
        theirs = GOLDEN / ("desta2/checkpoint/llama" if self.shape.is_first else "desta25/checkpoint/llm")
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(theirs / name, parts["llm"])
        shutil.copy(GOLDEN / "desta2/checkpoint/whisper/preprocessor_config.json", parts["whisper"])
        own = {name: tensor.contiguous() for name, tensor in self.connector.state_dict().items()}
        if self.shape.is_first:
            torch.save(own, folder / "qformer_connector.pth")
        else:
            own = {f"perception.connector.{name}": tensor for name, tensor in own.items()}
            save_file(own, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config(copies)))
        return parts

    def config(self, copies: bool) -> dict:
        shape = self.shape
        config = {"model_type": shape.model_type, "prompt_size": shape.n_queries, "torch_dtype": "float32"}
        of_parts = [its.config.to_diff_dict() if copies else None for its in (self.whisper, self.llama)]
        if shape.is_first:
            ids = {"whisper_model_id": shape.whisper_id, "llama_model_id": "meta-llama/Meta-Llama-3-8B-Instruct"}
            names = ("whisper_config", "llama_config")
        else:
            ids = {"encoder_model_id": shape.whisper_id, "llm_model_id": "DeSTA-ntu/Llama-3.1-8B-Instruct"}
            ids |= {"connector_mode": "qformer_1", "use_lora": False, "target_layer_ids": list(shape.taps)}
            ids |= {"qformer_num_hidden_layers": shape.n_qformer, "audio_locator": "<|AUDIO|>"}
            ids |= {"placeholder_token": "<|reserved_special_token_87|>", "info": "DeSTA"}
            names = ("encoder_config", "llm_config")
        return config | ids | {name: its for name, its in zip(names, of_parts, strict=True) if its is not None}


def whisper(shape: Shape) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            num_mel_bins=shape.n_mels,
            d_model=shape.d_encoder,
            encoder_layers=shape.n_encoder,
            encoder_attention_heads=4,
            encoder_ffn_dim=40,
            max_source_positions=N_CTX,
            decoder_layers=1,
            decoder_attention_heads=4,
            decoder_ffn_dim=16,
            vocab_size=40,
            max_target_positions=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
        )
    )


def llama(shape: Shape) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=N_VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=shape.n_kv_heads,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 500_000.0, "rope_type": "default", **shape.rope},
            bos_token_id=1,
            eos_token_id=2,
            attn_implementation="eager",
        )
    )
