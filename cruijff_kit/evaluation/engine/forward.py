"""What the scheduler asks of a model: forward passes, logits, logits of options."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cruijff_kit.evaluation.engine.attention import Attention, KeysValues


@dataclass
class Pass:
    """Tokens that go through the layers: [rows, tokens] ids and positions, on the CPU. Comes to normed hidden states [rows,
    tokens, d]. attention: what each layer's queries meet.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    attention: Attention


@dataclass
class Outputs:
    """[rows, d] normed hidden states that go through the output projection. Comes to [rows, vocabulary] logits in fp32."""

    hidden: torch.Tensor


@dataclass
class OptionLogits:
    """[rows, d] normed hidden states and [tokens] ids. Comes to these tokens' logits, [rows, tokens] (engine/options)."""

    hidden: torch.Tensor
    ids: torch.Tensor


Asked = Pass | Outputs | OptionLogits


Step = Generator[Asked, torch.Tensor, Any]


class DecodingModel(Protocol):
    """What the scheduler needs of a model; engine.chat_model.ChatModel is one."""

    model: torch.nn.Module
    """The decoder: has `layers` and `max_seq_len`."""
    tokenizer: Any
    """Has `stop_tokens` and `decode`."""
    cache_dtype: torch.dtype
    """Of keys and values."""
    pack_tokens: int
    """Most tokens in one forward pass of prompts."""

    def compute(self, asked: Asked) -> torch.Tensor:
        """The tensor that a request comes to."""

    def room(self) -> int:
        """Tokens whose keys and values fit into the free memory."""

    def prefix(
        self, prompts: list[list[int]], own: int
    ) -> Generator[Asked, torch.Tensor, tuple[int, list[KeysValues] | None]]:
        """How many tokens the prompts share at their beginning, and their keys and values per layer."""
