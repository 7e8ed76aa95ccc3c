"""Text to tokens and back, under TransformerLens' names."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig

from lalm_lens.errors import InputError, PromptError

Text = str | Sequence[str]


class Words(nn.Module):
    """The tokenizer helpers of a model. No chat template is applied: for a prompt about a clip see `Processor`."""

    cfg: TransformerBridgeConfig
    tokenizer: Any = None  # an HF tokenizer

    @property
    def pad_token(self) -> int:
        """What stands where there is nothing; 0 without a tokenizer, or where it has none."""
        return getattr(self.tokenizer, "pad_token_id", None) or 0

    def needs_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError("This model came without a tokenizer: set `model.tokenizer`, or give it tokens.")
        return self.tokenizer

    def to_tokens(self, text: Text, prepend_bos: bool | None = None) -> Int[Tensor, "batch pos"]:
        """Token ids of one text or several of one length, on the model's device.

        `prepend_bos` is `cfg.default_prepend_bos` by default. Raises `PromptError` for texts of different lengths: bare
        tokens say nothing about padding (see `read`, or give the model the texts themselves).
        """
        tokens, is_token = self.read(text, prepend_bos)
        if not is_token.all():
            raise PromptError(
                f"The texts have {is_token.sum(-1).tolist()} tokens, and bare tokens cannot say what is padding. Give "
                "the texts to the model itself, or one at a time."
            )
        return tokens

    def read(
        self, text: Text, prepend_bos: bool | None = None
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Token ids of texts, padded on the left, and where they are no padding."""
        tokenizer, texts = self.needs_tokenizer(), [text] if isinstance(text, str) else list(text)
        rows = [list(tokenizer(each, add_special_tokens=False)["input_ids"]) for each in texts]
        if self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos:
            if tokenizer.bos_token_id is None:
                raise PromptError("This tokenizer has no token for the beginning of a text: leave prepend_bos off.")
            rows = [[tokenizer.bos_token_id, *row] for row in rows]
        if not rows or not all(rows):
            raise PromptError("An empty text has no tokens. Give at least one word.")
        n_pos = max(map(len, rows))
        tokens = torch.tensor([[self.pad_token] * (n_pos - len(row)) + row for row in rows])
        is_token = torch.tensor([[False] * (n_pos - len(row)) + [True] * len(row) for row in rows])
        return tokens.to(self.cfg.device), is_token.to(self.cfg.device)

    def to_string(self, tokens: Int[Tensor, "*batch pos"] | Sequence[int]) -> str | list[str]:
        """The text of tokens; a list of texts for a batch."""
        tokens = torch.as_tensor(tokens)
        decoded = self.needs_tokenizer().batch_decode(tokens.reshape(-1, tokens.shape[-1]))
        return decoded if tokens.ndim > 1 else decoded[0]

    def to_str_tokens(self, text: Any, prepend_bos: bool | None = None) -> list[str]:
        """Each token of one text, or of one row of tokens, as text."""
        tokens = self.to_tokens(text, prepend_bos) if isinstance(text, str) else torch.as_tensor(text)
        if tokens.ndim > 1 and len(tokens) > 1:
            raise InputError(f"Give one text or one row of tokens, not {len(tokens)}.")
        return self.needs_tokenizer().batch_decode(tokens.reshape(-1, 1))

    def to_single_token(self, text: str) -> int:
        """The token of a text that is one token, its leading space included; raises `PromptError` for another."""
        tokens = self.to_tokens(text, prepend_bos=False)[0].tolist()
        if len(tokens) != 1:
            raise PromptError(f"{text!r} is {len(tokens)} tokens, not one: {self.to_str_tokens(text, False)}.")
        return tokens[0]

    def to_single_str_token(self, token: int) -> str:
        """The text of one token."""
        return self.to_str_tokens(torch.tensor([token]))[0]
