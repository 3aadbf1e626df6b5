"""What is asked of the engine, and what it answers."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; as it stands: not at all, the likeliest is taken.

    temperature, top_k and top_p as transformers defines them, in this order; None: not used. Penalties are taken off the
    logits of tokens that the answer has already: `presence` once, `frequency` for each time. bias is added to the logits.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    key: str = ""
    """Which random numbers: the same key, the same answer, whatever else is in the batch."""

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return bool(self.frequency_penalty or self.presence_penalty or self.bias)


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    ids: of the prompt, at least one. max_tokens: most tokens to add; 0: none, with `score`. top_logprobs: alternatives to
    report per token. stop_seqs: texts that end an answer. score: report the log-probabilities of so many last ids of the
    prompt. options: report the logits that these tokens have behind the prompt, whatever is sampled.
    """

    ids: list[int]
    max_tokens: int
    top_logprobs: int = 0
    stop_seqs: tuple[str, ...] = ()
    sampling: Sampling = Sampling()
    score: int = 0
    options: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was chosen, its log-probability (natural logarithm), and the likeliest (id, log-probability).

    By the model's own distribution: before temperature, cuts, penalties and bias.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Answer:
    """What the model said: ids without the stop token; one entry of logprobs per generated token, stop token included.

    stop_reason: "stop" (a stop token or a stop sequence came), "max_tokens", or "model_length" (the context is full).
    scored: log-probabilities of the prompt's last ids, where the request asked for them. option_logits: of its options.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    stop_reason: str = "max_tokens"
    scored: list[float] = field(default_factory=list)
    option_logits: list[float] = field(default_factory=list)
