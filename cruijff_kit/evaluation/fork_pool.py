"""Run inspect-ai's own work for several runs in processes beside the one that has the model.

A sample costs inspect-ai milliseconds of Python, and one process spends them on one sample at a time: with a model that is
small or fast, most of an evaluation. Two workers make the evaluation of 16 runs of the tiny model 1.40 times as fast
(tests/benchmarks/README.md).

Workers are forks of this process, so that the tasks are there already. They prompt, score and log; their requests to the
model come here over a pipe. A step begins when all workers wait for one, so there are no more passes than without workers.
The remote classes have the interfaces of the model, the scheduler and the engine here (engine/interfaces).
"""

import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from cruijff_kit.evaluation.engine import (
    AnsweringModel,
    ChatModel,
    Completion,
    CompletionRequest,
    Engine,
    MultiLoraEngine,
    RequestScheduler,
    Scheduler,
)
from cruijff_kit.util.errors import one_line

CAN_FORK = sys.platform == "linux"  # elsewhere a fork of a process with threads may not live
# What these mean is decided by the process that has the model.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True)
class WorkerRequest:
    """Message of a worker that waits for completions."""

    requests: list[tuple[int, int, CompletionRequest]]
    """(id, number of the model, request)."""
    unwanted: list[int]
    """Ids of earlier requests that are dropped."""
    num_finished: int
    """Samples that have been answered since the last time."""


@dataclass(frozen=True)
class WorkerDone:
    """Last message of a worker."""

    result: Any
    """Return value of its job; None if it failed."""
    error: BaseException | None
    """Exception of its job; None if it did not fail."""
    num_finished: int
    """As in WorkerRequest."""


class RemoteModel(AnsweringModel):
    """Placeholder in a worker for model `number`."""

    def __init__(self, number: int, chat_model: ChatModel) -> None:
        self.number, self.tokenizer = number, chat_model.tokenizer

    def release(self) -> None:
        """Do nothing: the other process has the memory."""


@dataclass(eq=False)
class _RemoteScheduler(RequestScheduler):
    """Sends requests to the scheduler of model `number`."""

    number: int
    """Number of the model in the process that has the models."""
    engine: "RemoteEngine"
    """Engine of this worker."""
    open: dict[int, tuple[Callable[[Completion], object], Callable[[], bool]]] = field(default_factory=dict)
    """id of an unfinished request -> its on_done and is_wanted."""
    num_tokens: int = 0
    """Always 0: the process that has the models counts tokens."""

    def add(
        self,
        request: CompletionRequest,
        on_done: Callable[[Completion], object],
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        id = next(self.engine.ids)
        self.open[id] = on_done, is_wanted
        self.engine.requests.append((id, self.number, request))

    @property
    def is_busy(self) -> bool:
        return bool(self.open)

    def close(self) -> None:
        self.engine.unwanted += self.open
        self.open = {}


class RemoteEngine(Engine):
    """Engine of a worker: the process that has the models computes the steps."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.ids = connection, itertools.count()
        self.requests: list[tuple[int, int, CompletionRequest]] = []
        self.unwanted: list[int] = []
        self._num_finished = 0

    def open_scheduler(self, chat_model: RemoteModel, max_rows: int | None = None) -> _RemoteScheduler:
        """Open a scheduler as Engine.open_scheduler does; the process that has the models sets `max_rows`."""
        return _RemoteScheduler(chat_model.number, self)

    def count_finished(self) -> None:
        """Count a sample that has been answered."""
        self._num_finished += 1

    def step(self, schedulers: list[_RemoteScheduler]) -> dict[_RemoteScheduler, Exception]:
        """Send the requests and wait until a completion arrives, which may take several steps of Engine.step."""
        for scheduler in schedulers:
            for id in [id for id, (_, is_wanted) in scheduler.open.items() if not is_wanted()]:
                del scheduler.open[id]
                self.unwanted.append(id)
        by_id = {id: scheduler for scheduler in schedulers for id in scheduler.open}
        if not by_id:
            return {}
        request = WorkerRequest(self.requests, self.unwanted, self.pop_finished_count())
        self.requests, self.unwanted = [], []
        try:
            self.connection.send(request)
            replies = self.connection.recv()
        except (EOFError, ConnectionError):  # the process that has the model is gone
            os._exit(1)
        failures = {}
        for id, reply in replies:
            scheduler = by_id[id]
            if isinstance(reply, Exception):
                failures[scheduler] = reply
            else:
                scheduler.open.pop(id)[0](reply)
        return failures

    def pop_finished_count(self) -> int:
        """Return how many samples have been answered since the last call."""
        count, self._num_finished = self._num_finished, 0
        return count


@dataclass(eq=False)
class _Worker:
    process: Any
    connection: Connection
    open: dict[int, int] = field(default_factory=dict)
    """id of a request that it waits for -> number of the model."""
    replies: list[tuple[int, Completion | BaseException]] = field(default_factory=list)
    """(id, reply) that are not yet sent."""

    def receive(self) -> WorkerRequest | WorkerDone:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join(1)
            raise RuntimeError(f"a worker process was lost (exit code {self.process.exitcode})") from error

    def reply(self, id: int, reply: Completion | BaseException) -> None:
        if self.open.pop(id, None) is not None:
            self.replies.append((id, reply))

    def send_replies(self) -> None:
        self.connection.send(self.replies)
        self.replies = []


def run_in_workers(
    jobs: list[Callable[[RemoteEngine], Any]],
    chat_models: dict[int, ChatModel],
    max_rows: dict[int, int],
    on_done: Callable[..., object],
) -> tuple[list[Any], Counter[int]]:
    """Run each job in a process of its own; here, compute what they request.

    Args:
        jobs: called with the engine of their models, which are RemoteModel.
        chat_models: the models by number; they share a base.
        max_rows: of each model, as Scheduler's.
        on_done: called with steps=N when N samples have been answered.
    Returns:
        What each job returned, and the tokens that went through each model.
    Raises:
        RuntimeError: a worker was lost. BaseException: what the first failed job raised.
    """
    workers: list[_Worker] = []
    try:
        for job in jobs:
            workers.append(_start_worker(job, [w.connection for w in workers]))
        server = _Server(MultiLoraEngine([*chat_models.values()]), chat_models, max_rows)
        ends = server.serve(workers, on_done)
    finally:
        for worker in workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.join()
    for end in ends:
        if end.error is not None:
            raise end.error
    return [end.result for end in ends], server.num_tokens


class _Server:
    """Serves workers in the process that has the models."""

    def __init__(self, engine: MultiLoraEngine, chat_models: dict[int, ChatModel], max_rows: dict[int, int]) -> None:
        self.engine, self.chat_models, self.max_rows = engine, chat_models, max_rows
        self.num_tokens: Counter[int] = Counter()
        self._schedulers: dict[int, Scheduler] = {}
        self._worker_of: dict[int, _Worker] = {}  # number of a model -> the worker with its task

    def serve(self, workers: list[_Worker], on_done: Callable[..., object]) -> list[WorkerDone]:
        """Serve until all workers are done. Returns what each sent last, in order."""
        ends: dict[_Worker, WorkerDone] = {}
        running = [*workers]
        try:
            while len(ends) < len(workers):
                for worker in running:
                    message = worker.receive()
                    if message.num_finished:
                        on_done(steps=message.num_finished)
                    if isinstance(message, WorkerDone):
                        ends[worker] = message
                        worker.open.clear()
                    else:
                        self._add(worker, message)
                self._step()
                running = [worker for worker in workers if worker.replies]
                for worker in running:
                    worker.send_replies()
        finally:
            for number in [*self._schedulers]:
                self._close(number)
        return [ends[worker] for worker in workers]

    def _add(self, worker: _Worker, message: WorkerRequest) -> None:
        for id in message.unwanted:
            worker.open.pop(id, None)
        for id, number, request in message.requests:
            worker.open[id] = number
            if number not in self._schedulers:
                self._schedulers[number] = self.engine.open_scheduler(self.chat_models[number], self.max_rows[number])
                self._worker_of[number] = worker
            try:
                self._schedulers[number].add(
                    request,
                    lambda completion, worker=worker, id=id: worker.reply(id, completion),  # type: ignore[misc]
                    lambda worker=worker, id=id: id in worker.open,  # type: ignore[misc]
                )
            except Exception as error:
                worker.reply(id, _make_sendable(error))

    def _step(self) -> None:
        """Do a step of all schedulers."""
        schedulers = {number: self._schedulers[number] for number in sorted(self._schedulers)}
        if not schedulers:
            return
        try:
            failures = self.engine.step([*schedulers.values()])
        except Exception as failure:
            failures = dict.fromkeys(schedulers.values(), failure)
        for number, scheduler in schedulers.items():
            if scheduler in failures:
                worker, error = self._worker_of[number], _make_sendable(failures[scheduler])
                for id in [id for id, of in worker.open.items() if of == number]:
                    worker.reply(id, error)
            if scheduler in failures or not scheduler.is_busy:
                self._close(number)

    def _close(self, number: int) -> None:
        scheduler = self._schedulers.pop(number)
        self.num_tokens[number] += scheduler.num_tokens
        scheduler.close()


def _start_worker(job: Callable[[RemoteEngine], Any], others: list[Connection]) -> _Worker:
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe()
    process = context.Process(target=_work, args=(job, its, [ours, *others]), daemon=True)
    process.start()
    its.close()
    return _Worker(process, ours)


def _work(job: Callable[[RemoteEngine], Any], connection: Connection, others: list[Connection]) -> None:
    """Run a job, in a worker."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for other in others:  # else the end of the other process would not be noticed
        other.close()
    gc.freeze()  # what was there before the fork stays as it is, and in memory that the processes share
    engine, result, failure = RemoteEngine(connection), None, None
    try:
        result = job(engine)
    except BaseException as error:
        failure = _make_sendable(error)
    with contextlib.suppress(ConnectionError):
        connection.send(WorkerDone(result, failure, engine.pop_finished_count()))


def _make_sendable(error: BaseException) -> BaseException:
    """Return the error if it can go through a pipe, else one with its type and message."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {one_line(error)}")
