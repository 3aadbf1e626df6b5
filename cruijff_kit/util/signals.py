"""Signals that stop a run: Ctrl-C, and on a cluster USR2 (time limit, preemption) and TERM (preemption, scancel).

While a recipe trains, a signal makes it stop after its step and save its state. At any other time there is nothing to save,
and the run ends at once. Only the process that installed the handlers acts: a cluster signals its forked children too.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class Cancelled(Exception):
    """Somebody cancelled this run, but not the others of its process."""


class StopSignals:
    """Handlers of signals, from `install` on."""

    def __init__(self, *signals: signal.Signals) -> None:
        self.signals = signals
        self.interrupt_now: Callable[[], None] = self._interrupt
        """Called when there is nothing to save. It raises KeyboardInterrupt; a job sets a function that ends the process,
        because an exception is lost where a callback of some library happens to run.
        """
        self.received: signal.Signals | None = None
        """The first signal."""
        self._recipes: list[Any] = []
        self._is_saved = False
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Install the handlers. Safe to call again, and without effect outside the main thread."""
        if threading.current_thread() is threading.main_thread() and not self._previous:
            self._previous = {s: signal.signal(s, self._handle) for s in self.signals}

    def uninstall(self) -> None:
        """Restore the handlers that were there before."""
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    @contextmanager
    def stopping(self, recipe: Any) -> Iterator[None]:
        """Within this context a signal sets the recipe's `stop_requested`; a second Ctrl-C interrupts at once.

        The recipes of several runs that train together may be registered at the same time.
        """
        self._recipes.append(recipe)
        if self.received is not None:
            recipe.stop_requested = _reason(self.received)
        try:
            yield
        finally:
            self._recipes.remove(recipe)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within this context a signal interrupts at once: the recipes that train have saved their states."""
        self._is_saved = True
        try:
            yield
        finally:
            self._is_saved = False

    def _handle(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:
            return
        is_repeated = self.received is not None
        self.received = received = self.received or signal.Signals(number)
        if self._recipes and not self._is_saved and not (is_repeated and number == signal.SIGINT):
            for recipe in self._recipes:
                recipe.stop_requested = recipe.stop_requested or _reason(received)
        elif not is_repeated or number == signal.SIGINT:  # what a cluster repeats must not cut the saving short
            self.interrupt_now()

    def _interrupt(self) -> NoReturn:
        raise KeyboardInterrupt(_reason(self.received))


def _reason(received: signal.Signals | None) -> str:
    return "interrupted" if received is None or received is signal.SIGINT else f"stopped by {received.name}"
