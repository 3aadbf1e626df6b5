"""Define the requests of a scheduler to a model: forward passes, logits, and logits of options."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cruijff_kit.evaluation.engine.attention import Attention, KeysValues


@dataclass(eq=False)
class ForwardRequest:
    """Tokens that go through the layers. The result is their normed hidden states, [rows, tokens, d]."""

    ids: torch.Tensor
    """[rows, tokens], on the CPU."""
    positions: torch.Tensor
    """[rows, tokens], on the CPU."""
    attention: Attention
    """What each layer's queries attend to."""
    then: "Callable[[torch.Tensor], EngineRequest | None]"
    """Takes the result and returns the step's next request; None ends the step."""

    @property
    def size(self) -> int:
        """Tokens in the pass."""
        return self.ids.numel()


@dataclass(eq=False)
class LogitsRequest:
    """Hidden states that go through the output projection. The result is [rows, vocabulary] logits in fp32."""

    hidden: torch.Tensor
    """[rows, d], normed."""
    then: "Callable[[torch.Tensor], EngineRequest | None]"
    """As in ForwardRequest."""

    @property
    def size(self) -> int:
        """Rows to project."""
        return len(self.hidden)


@dataclass(eq=False)
class OptionLogitsRequest:
    """Hidden states whose logits of a few tokens are wanted. The result is [rows, tokens] (engine/options)."""

    hidden: torch.Tensor
    """[rows, d], normed."""
    ids: torch.Tensor
    """[tokens] of the vocabulary."""
    then: "Callable[[torch.Tensor], EngineRequest | None]"
    """As in ForwardRequest."""

    @property
    def size(self) -> int:
        """Rows to project."""
        return len(self.hidden)


EngineRequest = ForwardRequest | LogitsRequest | OptionLogitsRequest


class DecodingModel(Protocol):
    """Interface of a model that a scheduler uses; implemented by engine.chat_model.ChatModel."""

    model: torch.nn.Module
    """The decoder: has `layers` and `max_seq_len`."""
    tokenizer: Any
    """Has `stop_tokens` and `decode`."""
    cache_dtype: torch.dtype
    """Of keys and values."""
    max_prefill_tokens: int
    """Most tokens in one forward pass of prompts."""

    def compute(self, request: EngineRequest) -> torch.Tensor:
        """Compute the result of a request."""

    def count_free_cache_tokens(self) -> int:
        """Count the tokens whose keys and values fit into the free memory."""

    def find_prefix(
        self,
        prompts: list[list[int]],
        own: int,
        then: Callable[[int, list[KeysValues] | None], EngineRequest | None],
    ) -> EngineRequest | None:
        """Find what the prompts have in common at their beginning. `then` takes its length in tokens and its keys and
        values per layer; what `then` returns follows.
        """
