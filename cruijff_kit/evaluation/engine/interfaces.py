"""Interfaces of the engine that inspect-ai's side uses.

ChatModel, Scheduler, SingleModelEngine and MultiLoraEngine have these interfaces where the model is; the remote classes of
evaluation/fork_pool have them in a worker process, and the recorder of evaluation/prompt_check where there is no model.
"""

from collections.abc import Callable
from typing import Any, Protocol

from cruijff_kit.evaluation.engine.request import Completion, CompletionRequest


class AnsweringModel(Protocol):
    """A model that completes prompts."""

    tokenizer: Any
    """Has `prompt`, `continuation`, `decode` and `token`."""

    def release(self) -> None:
        """Free all memory that answering took."""


class RequestScheduler(Protocol):
    """Takes the requests to one model."""

    num_tokens: int
    """Tokens that have gone through the model."""

    @property
    def is_busy(self) -> bool:
        """Whether it has unfinished requests."""

    def add(
        self,
        request: CompletionRequest,
        on_done: Callable[[Completion], object],
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Add a request. `on_done` is called with its completion; it is dropped when `is_wanted` returns False."""

    def close(self) -> None:
        """Drop all requests and leave the model as it was."""


class Engine(Protocol):
    """Computes what schedulers request, a step at a time."""

    def open_scheduler(self, chat_model: Any, max_rows: int | None = None) -> Any:
        """Open a scheduler (RequestScheduler) of a model (AnsweringModel).

        Args:
            max_rows: most completions decoded at once; None: as many as memory takes.
        """

    def step(self, schedulers: list[Any]) -> dict[Any, Exception]:
        """Do a step of each scheduler. Returns the errors of those that failed."""
