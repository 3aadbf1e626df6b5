"""An inspect-ai model over a model in memory: requests become batches, decoded by one worker thread."""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
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

from cruijff_kit.errors import UserError
from cruijff_kit.evaluation.engine import Answer, ChatModel, Request

PROVIDER = "cruijff_kit"
_DEFAULT_MAX_TOKENS = 32
# Samples of a task arrive within milliseconds of each other; waiting this long for the next one fills the batch.
_LINGER_SECONDS = 0.02
# Greedy decoding honours none of these, so a task that asks for one is refused rather than answered otherwise.
_NOT_HONOURED = (
    "top_p",
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "best_of",
    "stop_seqs",
    "response_schema",
    "reasoning_effort",
    "reasoning_tokens",
)


def open_model(
    chat_model: ChatModel, name: str, batch_size: int, finished: Callable[[], object] = lambda: None
) -> Model:
    """The model as inspect-ai's tasks see it: `cruijff_kit/NAME`.

    Args:
        chat_model: who answers.
        name: what logs call it.
        batch_size: most prompts decoded at once.
        finished: called each time an answer is complete.
    """
    return get_model(
        f"{PROVIDER}/{name}", memoize=False, chat_model=chat_model, batch_size=batch_size, finished=finished
    )


@dataclass
class _Waiting:
    request: Request
    future: "Future[Answer]"


class InMemoryAPI(ModelAPI):
    """inspect-ai's ModelAPI over a `ChatModel`. Greedy; settings that it cannot honour are refused by name."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (inspect-ai's signature)
        *,
        chat_model: ChatModel,
        batch_size: int = 128,
        finished: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.chat_model, self.batch_size, self.finished = chat_model, batch_size, finished
        self._queue: queue.Queue[_Waiting | None] = queue.Queue()
        self._worker: threading.Thread | None = None

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer one chat.

        Raises:
            UserError: tools, or a setting that greedy decoding cannot honour.
        """
        _refuse(tools, config)
        ids = self.chat_model.tokenizer.prompt(as_messages(input))
        top = (config.top_logprobs or 0) if config.logprobs else 0
        waiting = _Waiting(Request(ids, config.max_tokens or _DEFAULT_MAX_TOKENS, top), Future())
        self._queue.put(waiting)
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, daemon=True, name="cruijff_kit-engine")
            self._worker.start()
        answer = await asyncio.wrap_future(waiting.future)
        return self._output(ids, answer, bool(config.logprobs))

    def _output(self, ids: list[int], answer: Answer, logprobs: bool) -> ModelOutput:
        tokenizer = self.chat_model.tokenizer
        message = ChatMessageAssistant(content=tokenizer.decode(answer.ids), model=self.model_name, source="generate")
        content = [
            Logprob(
                token=tokenizer.token(t.token),
                logprob=t.logprob,
                top_logprobs=[TopLogprob(token=tokenizer.token(i), logprob=p) for i, p in t.top] or None,
            )
            for t in answer.logprobs
        ]
        # Generated tokens, the stop token included, are what inspect-ai's other providers count as output.
        n_in, n_out = len(ids), len(answer.logprobs)
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=message,
                    stop_reason=answer.stop_reason,
                    logprobs=Logprobs(content=content) if logprobs else None,
                )
            ],
            usage=ModelUsage(input_tokens=n_in, output_tokens=n_out, total_tokens=n_in + n_out),
        )

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            while len(batch) < self.batch_size:
                try:
                    following = self._queue.get(timeout=_LINGER_SECONDS)
                except queue.Empty:
                    break
                if following is None:
                    self._queue.put(None)
                    break
                batch.append(following)
            self._answer(batch)

    def _answer(self, batch: list[_Waiting]) -> None:
        try:
            answers = self.chat_model.generate([w.request for w in batch], self.finished)
        except BaseException as error:  # the waiting samples must learn of anything that goes wrong here
            for w in batch:
                w.future.set_exception(error)
            return
        for w, answer in zip(batch, answers, strict=True):
            if not w.future.cancelled():
                w.future.set_result(answer)

    async def aclose(self) -> None:
        """End the worker thread."""
        self.end()

    def end(self) -> None:
        """End the worker thread and wait for it, so that the model is free again."""
        if self._worker is not None:
            self._queue.put(None)
            self._worker.join()
            self._worker = None

    def max_connections(self) -> int:
        """Samples in flight: as many as one batch takes."""
        return self.batch_size

    def max_tokens(self) -> int | None:
        """Longest answer unless the task says otherwise."""
        return _DEFAULT_MAX_TOKENS

    def connection_key(self) -> str:
        """Models in memory do not share a connection limit."""
        return f"{PROVIDER}-{id(self)}"

    def should_retry(self, ex: Exception) -> bool:
        """A failure in this process would only fail again."""
        return False


@modelapi(name=PROVIDER)
def cruijff_kit():
    """Registers the provider with inspect-ai."""
    return InMemoryAPI


def as_messages(chat: list[ChatMessage]) -> list[dict[str, str]]:
    """inspect-ai's messages as role and text."""
    return [{"role": m.role, "content": m.text} for m in chat]


def _refuse(tools: list[ToolInfo], config: GenerateConfig) -> None:
    if tools:
        raise UserError(f"the model in memory cannot call tools; the task offers {', '.join(t.name for t in tools)}")
    asked = [name for name in _NOT_HONOURED if getattr(config, name, None)]
    asked += ["temperature"] if config.temperature else []
    asked += ["num_choices"] if (config.num_choices or 1) > 1 else []
    if asked:
        raise UserError(f"decoding is greedy; the task's {', '.join(asked)} cannot be honoured, take it out")
