"""Signals that ask a run to stop: Ctrl-C, and on a cluster USR2 (time limit, preemption) and TERM (preemption, scancel).

While a recipe trains, a signal asks it to stop after its step, when its state is saved; at any other time there is nothing
to save, and the run ends at once. Only the process that listened acts: signals of a cluster reach its forked children too.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class Cancelled(Exception):
    """Somebody cancelled this run, and not the others that it shares a process with."""


class StopSignals:
    """Listens for signals from `listen` on; `received` is the first one.

    leave: called when there is nothing to save; raises KeyboardInterrupt unless it is set to something that ends the
    process (an exception is lost where a callback of some library happens to be under way).
    """

    def __init__(self, *signals: signal.Signals) -> None:
        self.signals = signals
        self.leave: Callable[[], None] = self._interrupt
        self.received: signal.Signals | None = None
        self._recipes: list[Any] = []
        self._saved = False
        self._pid = os.getpid()
        self._usual: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Take the signals over. Safe to call again, and without effect outside the main thread."""
        if threading.current_thread() is threading.main_thread() and not self._usual:
            self._usual = {s: signal.signal(s, self._act) for s in self.signals}

    def let_go(self) -> None:
        """Give the signals back."""
        for number, usual in self._usual.items():
            signal.signal(number, usual)
        self._usual = {}

    @contextmanager
    def asking(self, recipe: Any) -> Iterator[None]:
        """Within this context a signal sets the recipe's `stop_reason`; a second Ctrl-C acts at once.

        (The runs of a pack train side by side.)
        """
        self._recipes.append(recipe)
        if self.received is not None:
            recipe.stop_reason = _reason(self.received)
        try:
            yield
        finally:
            self._recipes.remove(recipe)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Within this context there is nothing to wait for: the recipes that train have saved their states."""
        self._saved = True
        try:
            yield
        finally:
            self._saved = False

    def _act(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:
            return
        again, self.received = self.received is not None, self.received or signal.Signals(number)
        if self._recipes and not self._saved and not (again and number == signal.SIGINT):
            for recipe in self._recipes:
                recipe.stop_reason = recipe.stop_reason or _reason(self.received)
        elif not again or number == signal.SIGINT:  # what a cluster repeats must not cut the saving short
            self.leave()

    def _interrupt(self) -> NoReturn:
        raise KeyboardInterrupt(_reason(self.received))


def _reason(received: signal.Signals) -> str:
    return "interrupted" if received is signal.SIGINT else f"stopped by {received.name}"
