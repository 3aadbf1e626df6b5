"""inspect-ai's own work for several runs, in processes beside the one that has the model.

A sample costs inspect-ai milliseconds of Python, and one process spends them on one sample at a time: with a model that is
small or fast, most of an evaluation. Workers are forks of this process, so that the tasks are there already. They prompt,
score and log; what they ask the model comes here over a pipe. A pass is taken when all workers wait for one: they are as
few as without workers.
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

from cruijff_kit.evaluation.engine import Answer, ChatModel, Request, Session, SharedPasses
from cruijff_kit.util.errors import one_line

CAN_FORK = sys.platform == "linux"  # elsewhere a fork of a process with threads may not live
_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR2,
)  # what they mean is for the process that has the model to say


@dataclass(frozen=True)
class _Asked:
    """What a worker says when it waits. requests: id, whose, what. unwanted: ids that are given up. finished: samples that
    have been answered since the last time.
    """

    requests: list[tuple[int, int, Request]]
    unwanted: list[int]
    finished: int


@dataclass(frozen=True)
class _Ended:
    """The last that a worker says: what came of its work, or what it raised."""

    found: Any
    error: BaseException | None
    finished: int


class AskingModel:
    """Stands in a worker for the model of run `number`."""

    def __init__(self, number: int, chat: ChatModel) -> None:
        self.number, self.tokenizer = number, chat.tokenizer

    def release(self) -> None:
        """It has nothing to give back."""


@dataclass(eq=False)
class _AskingSession:
    """As Session, of a worker."""

    number: int
    asked: "AskingPasses"
    open: dict[int, tuple[Callable[[Answer], object], Callable[[], bool]]] = field(default_factory=dict)
    tokens: int = 0  # the other side counts them

    def add(self, request: Request, done: Callable[[Answer], object], wanted: Callable[[], bool]) -> None:
        id = next(self.asked.ids)
        self.open[id] = done, wanted
        self.asked.requests.append((id, self.number, request))

    @property
    def busy(self) -> bool:
        return bool(self.open)

    def close(self) -> None:
        self.asked.unwanted += self.open
        self.open = {}


class AskingPasses:
    """As SharedPasses, of a worker: asks for passes, and waits."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.ids = connection, itertools.count()
        self.requests: list[tuple[int, int, Request]] = []
        self.unwanted: list[int] = []
        self._finished = 0

    def session(self, chat: AskingModel, most_rows: int | None = None) -> _AskingSession:
        """As SharedPasses.session."""
        return _AskingSession(chat.number, self)

    def finished(self) -> None:
        """A sample has been answered."""
        self._finished += 1

    def step(self, sessions: list[_AskingSession]) -> dict[_AskingSession, Exception]:
        """As SharedPasses.step, or several of them: until an answer is there."""
        for session in sessions:
            for id in [id for id, (_, wanted) in session.open.items() if not wanted()]:
                del session.open[id]
                self.unwanted.append(id)
        of = {id: session for session in sessions for id in session.open}
        if not of:
            return {}
        asked = _Asked(self.requests, self.unwanted, self.taken())
        self.requests, self.unwanted = [], []
        try:
            self.connection.send(asked)
            answers = self.connection.recv()
        except (EOFError, ConnectionError):  # the process that has the model is gone
            os._exit(1)
        failed = {}
        for id, answer in answers:
            session = of[id]
            if isinstance(answer, Exception):
                failed[session] = answer
            else:
                session.open.pop(id)[0](answer)
        return failed

    def taken(self) -> int:
        """Samples that were answered since this was asked last."""
        finished, self._finished = self._finished, 0
        return finished


@dataclass(eq=False)
class _Worker:
    """connection: to it. wanted: ids of what it waits for, and whose each is."""

    process: Any
    connection: Connection
    wanted: dict[int, int] = field(default_factory=dict)
    replies: list[tuple[int, Answer | Exception]] = field(default_factory=list)

    def hear(self) -> _Asked | _Ended:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join(1)
            raise RuntimeError(f"a worker process was lost (exit code {self.process.exitcode})") from error

    def told(self, id: int, answer: Answer | Exception) -> None:
        if self.wanted.pop(id, None) is not None:
            self.replies.append((id, answer))

    def reply(self) -> None:
        self.connection.send(self.replies)
        self.replies = []


def work_apart(
    works: list[Callable[[AskingPasses], Any]],
    chats: dict[int, ChatModel],
    most_rows: dict[int, int],
    finished: Callable[..., object],
) -> tuple[list[Any], Counter[int]]:
    """Do each piece of work in a process of its own; here, answer what it asks.

    Args:
        works: called with what to ask for passes; their models are AskingModel.
        chats: the models by number; they share a base. most_rows: as Session's.
        finished: called with steps=N when samples have been answered.
    Returns:
        What each came to, and the tokens that went through each model.
    Raises:
        RuntimeError: a worker was lost. BaseException: what the first of them raised.
    """
    workers: list[_Worker] = []
    try:
        for work in works:
            workers.append(_started(work, [w.connection for w in workers]))
        answering = _Answering(SharedPasses([*chats.values()]), chats, most_rows)
        ended = answering.until_ended(workers, finished)
    finally:
        for worker in workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.join()
    for one in ended:
        if one.error is not None:
            raise one.error
    return [one.found for one in ended], answering.tokens


class _Answering:
    """The side that has the models."""

    def __init__(self, shared: SharedPasses, chats: dict[int, ChatModel], most_rows: dict[int, int]) -> None:
        self.shared, self.chats, self.most_rows = shared, chats, most_rows
        self.tokens: Counter[int] = Counter()
        self._sessions: dict[int, Session] = {}
        self._worker: dict[int, _Worker] = {}  # of each run

    def until_ended(self, workers: list[_Worker], finished: Callable[..., object]) -> list[_Ended]:
        """Answer until all have ended; what they came to, in order."""
        ended: dict[_Worker, _Ended] = {}
        working = [*workers]
        try:
            while len(ended) < len(workers):
                for worker in working:
                    heard = worker.hear()
                    if heard.finished:
                        finished(steps=heard.finished)
                    if isinstance(heard, _Ended):
                        ended[worker] = heard
                        worker.wanted.clear()
                    else:
                        self._add(worker, heard)
                self._step()
                working = [worker for worker in workers if worker.replies]
                for worker in working:
                    worker.reply()
        finally:
            for number in [*self._sessions]:
                self._close(number)
        return [ended[worker] for worker in workers]

    def _add(self, worker: _Worker, asked: _Asked) -> None:
        for id in asked.unwanted:
            worker.wanted.pop(id, None)
        for id, number, request in asked.requests:
            worker.wanted[id] = number
            if number not in self._sessions:
                self._sessions[number] = self.shared.session(self.chats[number], self.most_rows[number])
                self._worker[number] = worker
            try:
                self._sessions[number].add(
                    request,
                    lambda answer, worker=worker, id=id: worker.told(id, answer),
                    lambda worker=worker, id=id: id in worker.wanted,
                )
            except Exception as error:
                worker.told(id, _sendable(error))

    def _step(self) -> None:
        """A pass of all runs that ask for one."""
        asking = {number: self._sessions[number] for number in sorted(self._sessions)}
        if not asking:
            return
        try:
            failed = self.shared.step([*asking.values()])
        except Exception as error:
            failed = dict.fromkeys(asking.values(), error)
        for number, session in asking.items():
            if session in failed:
                worker, error = self._worker[number], _sendable(failed[session])
                for id in [id for id, of in worker.wanted.items() if of == number]:
                    worker.told(id, error)
            if session in failed or not session.busy:
                self._close(number)

    def _close(self, number: int) -> None:
        session = self._sessions.pop(number)
        self.tokens[number] += session.tokens
        session.close()


def _started(work: Callable[[AskingPasses], Any], others: list[Connection]) -> _Worker:
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe()
    process = context.Process(target=_work, args=(work, its, [ours, *others]), daemon=True)
    process.start()
    its.close()
    return _Worker(process, ours)


def _work(work: Callable[[AskingPasses], Any], connection: Connection, others: list[Connection]) -> None:
    """What a worker does."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    for other in others:  # else nobody would learn that the other end is gone
        other.close()
    gc.freeze()  # what was there before the fork stays as it is, and in memory that the processes share
    passes, found, failed = AskingPasses(connection), None, None
    try:
        found = work(passes)
    except BaseException as error:
        failed = _sendable(error)
    with contextlib.suppress(ConnectionError):
        connection.send(_Ended(found, failed, passes.taken()))


def _sendable(error: BaseException) -> BaseException:
    """The error, if it can go through a pipe, else one that says as much."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {one_line(error)}")
