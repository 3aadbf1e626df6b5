"""An inspect-ai model over a model in memory. The engine runs on inspect-ai's own event loop, a step at a time.

Several models of one base share the iterations of the loop, and each step: one API a model, with a scheduler of its own.
Samples that can go on do so between two steps, and what they request meanwhile joins the next one. So nothing polls, waits
for a time, or changes threads (where the threads of torch and of Python would wait for each other). While nothing is
requested, nothing runs.
"""

import asyncio
import functools
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    Model,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    TopLogprob,
    get_model,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from cruijff_kit.evaluation.engine import (
    AnsweringModel,
    Completion,
    CompletionRequest,
    Engine,
    RequestScheduler,
    SingleModelEngine,
)
from cruijff_kit.evaluation.generate_config import (
    DEFAULT_MAX_TOKENS,
    as_messages,
    as_requests,
    check,
    sampling_key,
    temperature,
)
from cruijff_kit.evaluation.scorers import OPTION_LOGITS, OPTION_SAID
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.redaction import quote

PROVIDER = "cruijff_kit"
# If the number of requests is unknown: a sample needs about this many iterations of the event loop from one request
# to the next. An idle iteration takes 10 us.
_IDLE_ITERATIONS = 25


def open_model(
    chat_model: AnsweringModel,
    name: str,
    batch_size: int,
    on_done: Callable[[], object] = lambda: None,
    collector: "BatchCollector | None" = None,
    options: tuple[str, ...] = (),
    num_requests: int | None = None,
) -> Model:
    """Open a model as inspect-ai's tasks see it: `cruijff_kit/NAME`.

    Args:
        chat_model: completes the prompts.
        name: what logs call it.
        batch_size: most prompts decoded at once.
        on_done: called each time an answer is complete.
        collector: shared with other models; None: its own.
        options: texts of one token each, whose logits every answer includes (`scorers.OPTION_LOGITS`).
        num_requests: number of requests of all samples of the task; None: unknown.
    """
    model = get_model(
        f"{PROVIDER}/{name}",
        memoize=False,
        chat_model=chat_model,
        batch_size=batch_size,
        on_done=on_done,
        options=options,
        num_requests=num_requests,
    )
    model.api.collector = collector or BatchCollector(SingleModelEngine())
    model.api.collector.add(model.api)
    return model


class BatchCollector:
    """Collects requests into batches: a step begins when all open samples wait, or after a while without requests.

    Args:
        engine: computes the steps.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._num_idle = engine, 0
        self._apis: list[InMemoryAPI] = []
        self._open: dict[InMemoryAPI, RequestScheduler] = {}

    def add(self, api: "InMemoryAPI") -> None:
        """Wait for the samples of this API, too."""
        self._apis.append(api)

    def open(self, api: "InMemoryAPI") -> RequestScheduler:
        """Open a scheduler for an API, whose steps are done from now on."""
        loop = asyncio.get_running_loop()
        scheduler = self._engine.open_scheduler(api.chat_model, api.batch_size)
        if not self._open:
            loop.call_soon(self._iterate, loop)
        self._open[api] = scheduler
        return scheduler

    def close(self, api: "InMemoryAPI") -> None:
        """Do no more steps of an API's scheduler."""
        self._open.pop(api, None)

    def wait(self) -> None:
        """Wait for more: a sample has just made a request, and others may be about to."""
        self._num_idle = 0

    def _iterate(self, loop: asyncio.AbstractEventLoop) -> None:
        """One iteration of the event loop."""
        if not self._open:
            return
        self._num_idle += 1
        if self._num_idle > _IDLE_ITERATIONS or all(api.is_waiting for api in self._apis):
            try:
                finished = self._step()
            except BaseException as failure:
                finished = dict.fromkeys(self._open, failure)
                if not isinstance(failure, Exception):
                    raise
            finally:
                for api, error in finished.items():
                    api.fail(error) if error else api.close()
            self._num_idle = 0
        if self._open:
            loop.call_soon(self._iterate, loop)

    def _step(self) -> "dict[InMemoryAPI, BaseException | None]":
        """Do a step of all schedulers. Returns the APIs that are finished, and the errors of those that failed."""
        failures = self._engine.step([*self._open.values()])
        return {api: failures.get(s) for api, s in self._open.items() if s in failures or not s.is_busy}


class InMemoryAPI(ModelAPI):
    """inspect-ai's ModelAPI over a model in memory. Greedy by default; see `generate_config` for its settings."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (inspect-ai's signature)
        *,
        chat_model: AnsweringModel,
        batch_size: int = 128,
        on_done: Callable[[], object] = lambda: None,
        options: tuple[str, ...] = (),
        num_requests: int | None = None,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.chat_model, self.batch_size, self.on_done, self.options = chat_model, batch_size, on_done, options
        self.collector: BatchCollector
        self.num_tokens = 0
        """Tokens that have gone through the model."""
        # The first that was computed counts: an equal prompt in another batch may come out rounded otherwise.
        self._logits: dict[bytes, list[float]] = {}
        self._scheduler: RequestScheduler | None = None
        self._open: set[asyncio.Future[Completion]] = set()
        self._waiting: set[_Ask] = set()
        self._num_left = num_requests  # requests that are not answered yet, including those that wait
        self._num_requests: Counter[str] = Counter()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one chat.

        Raises:
            UserError: tools, a setting that cannot be honoured, a chat that the model cannot read, or an option that is not
                one token.
        """
        check(tools, tool_choice, config)
        messages = as_messages(input)
        ids = self.chat_model.tokenizer.encode_prompt(messages)
        options = {text: self._option_id(messages, text) for text in self.options}
        num_before = 0
        if temperature(config):
            key = sampling_key(ids, config)
            num_before, self._num_requests[key] = self._num_requests[key], self._num_requests[key] + 1
        completions = await self._complete(as_requests(ids, config, num_before, tuple(options.values())))
        self.on_done()
        output = self._output(ids, completions, config)
        if options:
            first = completions[0].logprobs[0].token if completions[0].logprobs else None
            answer = next((text for text, token in options.items() if token == first), None)
            output.metadata = {OPTION_LOGITS: self._first_logits(ids, options, completions[0]), OPTION_SAID: answer}
        return output

    async def option_logits(self, input: list[ChatMessage], options: list[str]) -> dict[str, float]:
        """Return the logit of each option's token at the beginning of an answer to a chat. Nothing is decoded.

        Raises:
            UserError: a chat that the model cannot read, or an option that is not one token.
        """
        messages = as_messages(input)
        ids = self.chat_model.tokenizer.encode_prompt(messages)
        tokens = {text: self._option_id(messages, text) for text in options}
        (completion,) = await self._complete([CompletionRequest(ids, 0, options=tuple(tokens.values()))])
        return self._first_logits(ids, tokens, completion)

    def _first_logits(self, ids: list[int], options: dict[str, int], completion: Completion) -> dict[str, float]:
        """Return the logits of the first request of this prompt with these options."""
        key = hashlib.sha256(f"{ids} {options}".encode()).digest()
        return dict(zip(options, self._logits.setdefault(key, completion.option_logits), strict=True))

    def _option_id(self, messages: list[dict[str, str]], option: str) -> int:
        tokenizer = self.chat_model.tokenizer
        ids = tokenizer.encode_continuation(messages, option)
        if len(ids) != 1:
            spelt = quote(ids) if redaction.is_enabled() else " ".join(repr(tokenizer.id_to_token(i)) for i in ids)
            raise UserError(
                f"risk_scorer: the option {quote(option)} is {len(ids)} tokens of this model ({spelt}), not a single one; "
                "choose options that are one token each, such as digits or letters"
            )
        return ids[0]

    async def score(self, input: list[ChatMessage], choices: list[str]) -> list[list[float]]:
        """Log-probabilities of each choice's tokens, its end token last, as the answer to a chat. Nothing is decoded.

        Raises:
            UserError: a chat that the model cannot read.
        """
        messages = as_messages(input)
        examples = [self.chat_model.tokenizer.encode_example(messages, choice) for choice in choices]
        requests = [CompletionRequest(ids, 0, score=len(ids) - prompt) for ids, prompt in examples]
        return [completion.scored for completion in await self._complete(requests)]

    async def _complete(self, requests: list[CompletionRequest]) -> list[Completion]:
        """Wait for the completions of one sample's requests."""
        loop = asyncio.get_running_loop()
        if self._scheduler is None:
            self._scheduler = self.collector.open(self)
        self.collector.wait()
        futures, ask = [], _Ask(len(requests))
        self._waiting.add(ask)
        for request in requests:
            future = loop.create_future()
            self._scheduler.add(
                request, functools.partial(self._resolve, future, ask), functools.partial(_is_wanted, future)
            )
            futures.append(future)
            self._open.add(future)
            future.add_done_callback(self._open.discard)
        try:
            return await asyncio.gather(*futures)
        finally:
            self._waiting.discard(ask)

    def _resolve(self, future: "asyncio.Future[Completion]", ask: "_Ask", completion: Completion) -> None:
        if not future.done():  # else the sample was cancelled meanwhile
            future.set_result(completion)
        ask.num_open -= 1
        if not ask.num_open and self._num_left is not None:
            self._num_left -= 1
        if not ask.num_open:
            self._waiting.discard(ask)

    @property
    def is_waiting(self) -> bool:
        """Return whether all open samples of inspect-ai wait: as many as `batch_size`, or all that remain."""
        return self._num_left is not None and len(self._waiting) >= min(self.batch_size, self._num_left)

    def fail(self, error: BaseException) -> None:
        """Pass an error on to the samples that wait."""
        self.close()
        for future in list(self._open):
            if not future.done():
                future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    def close(self) -> None:
        """Close the scheduler until the next request."""
        self.collector.close(self)
        if self._scheduler is not None:
            self.num_tokens += self._scheduler.num_tokens
            self._scheduler.close()
            self._scheduler = None

    def _output(self, ids: list[int], completions: list[Completion], config: GenerateConfig) -> ModelOutput:
        # Generated tokens, the stop token included, are what inspect-ai's other providers count as output.
        n_in, n_out = len(ids), sum(len(c.logprobs) for c in completions)
        return ModelOutput(
            model=self.model_name,
            choices=[self._choice(c, config) for c in completions],
            usage=ModelUsage(input_tokens=n_in, output_tokens=n_out, total_tokens=n_in + n_out),
        )

    def _choice(self, completion: Completion, config: GenerateConfig) -> ChatCompletionChoice:
        tokenizer = self.chat_model.tokenizer
        text = tokenizer.decode(completion.ids)
        text = text[: min((at for s in config.stop_seqs or [] if (at := text.find(s)) >= 0), default=len(text))]
        logprobs = None
        if config.logprobs or config.top_logprobs:
            content = [
                Logprob(
                    token=tokenizer.id_to_token(t.token),
                    logprob=t.logprob,
                    top_logprobs=[TopLogprob(token=tokenizer.id_to_token(i), logprob=p) for i, p in t.top] or None,
                )
                for t in completion.logprobs
            ]
            logprobs = Logprobs(content=content)
        message = ChatMessageAssistant(content=text, model=self.model_name, source="generate")
        return ChatCompletionChoice(message=message, stop_reason=completion.stop_reason, logprobs=logprobs)

    async def aclose(self) -> None:
        """Do the same as `end`."""
        self.end()

    def end(self) -> None:
        """Leave the model as it was and free the memory that evaluation took."""
        self.close()
        self._open.clear()
        self.chat_model.release()

    def max_connections(self) -> int:
        """Samples in flight: as many as one batch takes."""
        return self.batch_size

    def max_tokens(self) -> int | None:
        """Return the maximum length of an answer if the task sets none."""
        return DEFAULT_MAX_TOKENS

    def connection_key(self) -> str:
        """Return a key of this model alone: models in memory do not share a connection limit."""
        return f"{PROVIDER}-{id(self)}"

    def should_retry(self, ex: Exception) -> bool:
        """Return False: a failure in this process would recur."""
        return False


@dataclass(eq=False)
class _Ask:
    """Simultaneous requests of one sample."""

    num_open: int
    """Requests that are not complete."""


def _is_wanted(future: asyncio.Future) -> bool:
    return not future.cancelled()


@modelapi(name=PROVIDER)
def cruijff_kit():
    """Register the provider with inspect-ai."""
    return InMemoryAPI
