"""Turns inspect-ai's GenerateConfig into requests to the engine, and refuses by name what the engine does not support.

Defaults: greedy unless the temperature is above 0, or top_p or top_k is given (then temperature 1); seed 0; unlike
transformers, no top_k. Log-probabilities are those of the chosen tokens under the model's own distribution, before
temperature, cuts, penalties and bias (inspect-ai's hf provider has them from the same logits, but reports the likeliest
token in place of the chosen one).
"""

import hashlib
from typing import Any

from inspect_ai.model import ChatMessage, GenerateConfig
from inspect_ai.tool import ToolChoice, ToolInfo

from cruijff_kit.evaluation.engine import CompletionRequest, Sampling
from cruijff_kit.util.errors import UserError

DEFAULT_MAX_TOKENS = 32
SUPPORTED = {
    "max_tokens", "temperature", "top_p", "top_k", "seed", "num_choices", "stop_seqs", "logprobs", "top_logprobs",
    "frequency_penalty", "presence_penalty", "logit_bias",
}  # fmt: skip
# inspect-ai handles these before or behind the model, or they make no difference to a model in memory.
NOT_OURS = {
    "max_retries", "timeout", "attempt_timeout", "max_connections", "adaptive_connections", "system_message",
    "max_tool_output", "cache", "cache_prompt", "fail_on_refusal", "reasoning_history",
}  # fmt: skip
_ABSENT: tuple[Any, ...] = (None, False, "none", [], {}, "")
_LEAST = {"max_tokens": 1, "temperature": 0, "top_k": 1, "num_choices": 1, "top_logprobs": 0}


def check(tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig) -> None:
    """Raise UserError for tools, for settings that cannot be honoured, and for values that make no sense."""
    if tools and tool_choice != "none":
        raise UserError(f"the model in memory cannot call tools; the task offers {', '.join(t.name for t in tools)}")
    allowed = SUPPORTED | NOT_OURS
    refused = [n for n in GenerateConfig.model_fields if n not in allowed and getattr(config, n) not in _ABSENT]
    if refused:
        raise UserError(
            f"the model in memory does not support {', '.join(refused)}; remove {'it' if len(refused) == 1 else 'them'} "
            f"from the task's GenerateConfig, which may have {', '.join(sorted(SUPPORTED))}"
        )
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"{name}={value}: must be at least {least}")
    if config.top_p is not None and not 0 < config.top_p <= 1:
        raise UserError(f"top_p={config.top_p}: must be above 0 and at most 1")
    if "" in (config.stop_seqs or []):
        raise UserError("stop_seqs: an empty text would end every answer")
    if (config.num_choices or 1) > 1 and not temperature(config):
        raise UserError(f"num_choices={config.num_choices}: greedy choices would all be the same; set a temperature")


def temperature(config: GenerateConfig) -> float:
    """Return the temperature; 0: greedy."""
    if config.temperature is None:
        return 1.0 if config.top_p is not None or config.top_k is not None else 0.0
    return config.temperature


def sampling_key(ids: list[int], config: GenerateConfig) -> str:
    """Hash the inputs of a prompt's random numbers, except the choice and the number of earlier requests."""
    return hashlib.sha256(f"{config.seed or 0} {ids}".encode()).hexdigest()


def as_requests(
    ids: list[int], config: GenerateConfig, num_before: int, options: tuple[int, ...] = ()
) -> list[CompletionRequest]:
    """Make a request for each choice.

    Args:
        ids: of the prompt.
        config: as `check` lets pass.
        num_before: number of earlier requests of the prompt with this seed; another epoch draws other numbers.
        options: ids whose logits come with the first choice; they depend on the prompt alone.
    """
    heat, key = temperature(config), sampling_key(ids, config)
    return [
        CompletionRequest(
            ids,
            config.max_tokens or DEFAULT_MAX_TOKENS,
            top_logprobs=config.top_logprobs or 0,
            stop_seqs=tuple(config.stop_seqs or ()),
            sampling=Sampling(
                heat,
                config.top_p if heat else None,
                config.top_k if heat else None,
                config.frequency_penalty or 0.0,
                config.presence_penalty or 0.0,
                {int(token): bias for token, bias in (config.logit_bias or {}).items()},
                f"{key} {num_before} {choice}" if heat else "",
            ),
            options=() if choice else options,
        )
        for choice in range(config.num_choices or 1)
    ]


def as_messages(chat: list[ChatMessage]) -> list[dict[str, str]]:
    """Turn inspect-ai's messages into role and text.

    Raises:
        UserError: a message is more than text.
    """
    for m in chat:
        if m.role == "tool" or getattr(m, "tool_calls", None):
            raise UserError("the model in memory cannot call tools; the task's messages have a tool call")
        content_types = (
            [] if isinstance(m.content, str) else [c.type for c in m.content if c.type not in ("text", "reasoning")]
        )
        if content_types:
            raise UserError(f"the model in memory reads text only; a message of the task has {content_types[0]}")
    return [{"role": m.role, "content": m.text} for m in chat]
