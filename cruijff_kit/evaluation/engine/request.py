"""Requests to the engine, and the completions that it returns."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. By default nothing is sampled: the likeliest token is chosen.

    temperature, top_k and top_p apply in this order, as transformers defines them.
    """

    temperature: float = 0.0
    top_p: float | None = None
    """None: not used."""
    top_k: int | None = None
    """None: not used."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time that the completion has the token."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of a token that the completion has."""
    bias: dict[int, float] = field(default_factory=dict)
    """Token -> what is added to its logit."""
    key: str = ""
    """Seed of the random numbers: the same key gives the same completion, whatever else is in the batch."""

    @property
    def changes_logits(self) -> bool:
        """Whether logits change before a token is chosen."""
        return bool(self.frequency_penalty or self.presence_penalty or self.bias)


@dataclass(frozen=True)
class CompletionRequest:
    """A prompt to continue."""

    ids: list[int]
    """Tokens of the prompt, at least one."""
    max_tokens: int
    """Most tokens to add; 0: none, where only scores or option logits are wanted."""
    top_logprobs: int = 0
    """Alternatives to report per token."""
    stop_seqs: tuple[str, ...] = ()
    """Texts that end a completion."""
    sampling: Sampling = Sampling()
    score: int = 0
    """Report the log-probabilities of so many last ids of the prompt."""
    options: tuple[int, ...] = ()
    """Report the logits that these tokens have behind the prompt, whatever is sampled."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was chosen. Probabilities are the model's own: before temperature, cuts, penalties and bias."""

    token: int
    logprob: float
    """Natural logarithm."""
    top: list[tuple[int, float]]
    """The likeliest tokens, (id, log-probability)."""


@dataclass
class Completion:
    """Tokens that the model generated, with their probabilities."""

    ids: list[int] = field(default_factory=list)
    """Generated tokens, without the stop token."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One entry per generated token, the stop token included."""
    stop_reason: str = "max_tokens"
    """"stop" (a stop token or stop sequence came), "max_tokens", or "model_length" (the context is full)."""
    scored: list[float] = field(default_factory=list)
    """Log-probabilities of the prompt's last ids, as many as `score` of the request."""
    option_logits: list[float] = field(default_factory=list)
    """Logits of the request's options."""
