"""An inspect-ai model over a model in memory. The engine runs on inspect-ai's own event loop, a pass at a time.

Several models of one base share the turns of the loop, and each pass: one API a model, with a session of its own.
Samples that can go on do so between two passes, and what they ask meanwhile joins the next one: nothing polls, waits for
a time, or changes threads (where the threads of torch and of Python would wait for each other). While nothing is asked,
nothing runs.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable

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

from cruijff_kit.evaluation.engine import Answer, ChatModel, Request, Session, SharedPasses
from cruijff_kit.evaluation.generate_config import (
    DEFAULT_MAX_TOKENS,
    as_messages,
    as_requests,
    check,
    sampling_key,
    temperature,
)
from cruijff_kit.evaluation.scorers import OPTION_LOGITS, OPTION_SAID
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.redaction import active, quoted

PROVIDER = "cruijff_kit"
# A sample comes from one question to the next in about as many turns of the event loop; a turn of an idle one takes 10 us.
_QUIET_TURNS = 25


def open_model(
    chat_model: ChatModel,
    name: str,
    batch_size: int,
    finished: Callable[[], object] = lambda: None,
    turns: "Turns | None" = None,
    options: tuple[str, ...] = (),
) -> Model:
    """The model as inspect-ai's tasks see it: `cruijff_kit/NAME`.

    Args:
        chat_model: who answers.
        name: what logs call it.
        batch_size: most prompts decoded at once.
        finished: called each time an answer is complete.
        turns: that it takes with other models; None: its own.
        options: texts of one token each; every answer comes with their logits (`scorers.OPTION_LOGITS`).
    """
    model = get_model(
        f"{PROVIDER}/{name}",
        memoize=False,
        chat_model=chat_model,
        batch_size=batch_size,
        finished=finished,
        options=options,
    )
    model.api.turns = turns or model.api.turns
    return model


class Turns:
    """When passes are taken: once all samples that can ask have asked. Of one model, or of several in common passes.

    Args:
        shared: computes the passes of several; None: the one model does.
    """

    def __init__(self, shared: SharedPasses | None = None) -> None:
        self._shared, self._quiet = shared, 0
        self._open: dict[InMemoryAPI, Session] = {}

    def open(self, api: "InMemoryAPI") -> Session:
        """A session for an API, whose passes are taken from now on."""
        chat, loop = api.chat_model, asyncio.get_running_loop()
        session = self._shared.session(chat, api.batch_size) if self._shared else chat.session(api.batch_size)
        if not self._open:
            loop.call_soon(self._turn, loop)
        self._open[api] = session
        return session

    def close(self, api: "InMemoryAPI") -> None:
        """An API's session is over."""
        self._open.pop(api, None)

    def wait(self) -> None:
        """A sample has just asked; others may be about to."""
        self._quiet = 0

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._open:
            return
        self._quiet += 1
        if self._quiet > _QUIET_TURNS:
            try:
                ended = self._step()
            except BaseException as error:
                ended = dict.fromkeys(self._open, error)
                if not isinstance(error, Exception):
                    raise
            finally:
                for api, error in ended.items():
                    api.fail(error) if error else api.close()
            self._quiet = 0
        if self._open:
            loop.call_soon(self._turn, loop)

    def _step(self) -> "dict[InMemoryAPI, BaseException | None]":
        """A pass of all sessions. Returns those that have nothing more to do, or why they failed."""
        if self._shared is None:
            return {api: None for api, session in self._open.items() if not session.step()}
        failed = self._shared.step([*self._open.values()])
        return {a: failed.get(session) for a, session in self._open.items() if session in failed or not session.busy}


class InMemoryAPI(ModelAPI):
    """inspect-ai's ModelAPI over a `ChatModel`. Greedy by default; `settings` says what it honours and what it refuses.

    Attributes:
        turns: when its passes are taken. tokens: how many have gone through the model.
    """

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
        options: tuple[str, ...] = (),
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.chat_model, self.batch_size, self.finished = chat_model, batch_size, finished
        self.options, self.turns, self.tokens = options, Turns(), 0
        # The first that was computed counts: an equal prompt in another batch may come out rounded otherwise.
        self._logits: dict[bytes, list[float]] = {}
        self._session: Session | None = None
        self._open: set[asyncio.Future[Answer]] = set()
        self._asked: Counter[str] = Counter()

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
        ids = self.chat_model.tokenizer.prompt(messages)
        options = {text: self._option_id(messages, text) for text in self.options}
        asked_before = 0
        if temperature(config):
            key = sampling_key(ids, config)
            asked_before, self._asked[key] = self._asked[key], self._asked[key] + 1
        answers = await self._answers(as_requests(ids, config, asked_before, tuple(options.values())))
        self.finished()
        output = self._output(ids, answers, config)
        if options:
            first = answers[0].logprobs[0].token if answers[0].logprobs else None
            said = next((text for text, token in options.items() if token == first), None)
            output.metadata = {OPTION_LOGITS: self._kept_logits(ids, options, answers[0]), OPTION_SAID: said}
        return output

    async def option_logits(self, input: list[ChatMessage], options: list[str]) -> dict[str, float]:
        """The logit of each option's token at the beginning of an answer to a chat. Nothing is decoded.

        Raises:
            UserError: a chat that the model cannot read, or an option that is not one token.
        """
        messages = as_messages(input)
        ids = self.chat_model.tokenizer.prompt(messages)
        found = {text: self._option_id(messages, text) for text in options}
        (answer,) = await self._answers([Request(ids, 0, options=tuple(found.values()))])
        return self._kept_logits(ids, found, answer)

    def _kept_logits(self, ids: list[int], options: dict[str, int], answer: Answer) -> dict[str, float]:
        asked = hashlib.sha256(f"{ids} {options}".encode()).digest()
        return dict(zip(options, self._logits.setdefault(asked, answer.option_logits), strict=True))

    def _option_id(self, messages: list[dict[str, str]], option: str) -> int:
        tokenizer = self.chat_model.tokenizer
        ids = tokenizer.continuation(messages, option)
        if len(ids) != 1:
            spelt = quoted(ids) if active() else " ".join(repr(tokenizer.token(i)) for i in ids)
            raise UserError(
                f"risk_scorer: the option {quoted(option)} is {len(ids)} tokens of this model ({spelt}), not a single one; "
                "choose options that are one token each, such as digits or letters"
            )
        return ids[0]

    async def score(self, input: list[ChatMessage], choices: list[str]) -> list[list[float]]:
        """Log-probabilities of each choice's tokens, its end token last, as the answer to a chat. Nothing is decoded.

        Raises:
            UserError: a chat that the model cannot read.
        """
        messages = as_messages(input)
        examples = [self.chat_model.tokenizer.example(messages, choice) for choice in choices]
        requests = [Request(ids, 0, score=len(ids) - prompt) for ids, prompt in examples]
        return [answer.scored for answer in await self._answers(requests)]

    async def _answers(self, requests: list[Request]) -> list[Answer]:
        loop = asyncio.get_running_loop()
        if self._session is None:
            self._session = self.turns.open(self)
        self.turns.wait()
        futures = []
        for request in requests:
            future = loop.create_future()
            self._session.add(request, self._answered(future), lambda future=future: not future.cancelled())
            futures.append(future)
            self._open.add(future)
            future.add_done_callback(self._open.discard)
        return await asyncio.gather(*futures)

    def _answered(self, future: "asyncio.Future[Answer]") -> Callable[[Answer], None]:
        def answered(answer: Answer) -> None:
            if not future.done():  # else the sample was cancelled meanwhile
                future.set_result(answer)

        return answered

    def fail(self, error: BaseException) -> None:
        """The samples that wait must learn of anything that goes wrong."""
        self.close()
        for future in list(self._open):
            if not future.done():
                future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    def close(self) -> None:
        """Nothing more is asked for now."""
        self.turns.close(self)
        if self._session is not None:
            self.tokens += self._session.tokens
            self._session.close()
            self._session = None

    def _output(self, ids: list[int], answers: list[Answer], config: GenerateConfig) -> ModelOutput:
        # Generated tokens, the stop token included, are what inspect-ai's other providers count as output.
        n_in, n_out = len(ids), sum(len(a.logprobs) for a in answers)
        return ModelOutput(
            model=self.model_name,
            choices=[self._choice(a, config) for a in answers],
            usage=ModelUsage(input_tokens=n_in, output_tokens=n_out, total_tokens=n_in + n_out),
        )

    def _choice(self, answer: Answer, config: GenerateConfig) -> ChatCompletionChoice:
        tokenizer = self.chat_model.tokenizer
        text = tokenizer.decode(answer.ids)
        text = text[: min((at for s in config.stop_seqs or [] if (at := text.find(s)) >= 0), default=len(text))]
        logprobs = None
        if config.logprobs or config.top_logprobs:
            content = [
                Logprob(
                    token=tokenizer.token(t.token),
                    logprob=t.logprob,
                    top_logprobs=[TopLogprob(token=tokenizer.token(i), logprob=p) for i, p in t.top] or None,
                )
                for t in answer.logprobs
            ]
            logprobs = Logprobs(content=content)
        message = ChatMessageAssistant(content=text, model=self.model_name, source="generate")
        return ChatCompletionChoice(message=message, stop_reason=answer.stop_reason, logprobs=logprobs)

    async def aclose(self) -> None:
        """As `end`."""
        self.end()

    def end(self) -> None:
        """Leave the model as it was and give back the memory that evaluation took."""
        self.close()
        self._open.clear()
        self.chat_model.release()

    def max_connections(self) -> int:
        """Samples in flight: as many as one batch takes."""
        return self.batch_size

    def max_tokens(self) -> int | None:
        """Longest answer unless the task says otherwise."""
        return DEFAULT_MAX_TOKENS

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
