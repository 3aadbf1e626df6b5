"""What the person at the shell sees while something takes long: a bar in a terminal, a line every few seconds elsewhere.

Progress goes to stderr, results to stdout. CRUIJFF_QUIET=1 turns progress off.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

from cruijff_kit.util import redaction

_SECONDS_BETWEEN_LINES = 5.0


class _Lines:
    """Progress where there is no terminal (a job's log): now and then a line."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.note = what, total, 0, ""
        self.shown = time.monotonic()

    def advance(self, note: str = "", steps: int = 1) -> None:
        self.done, self.note = self.done + steps, note
        if time.monotonic() - self.shown >= _SECONDS_BETWEEN_LINES:
            self.shown = time.monotonic()
            say(f"{self.what} {self.done}/{self.total} {note}".rstrip())


class _Bar:
    """Progress in a terminal."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def advance(self, note: str = "", steps: int = 1) -> None:
        self._bar.update(self._task, advance=steps, note=note)


@contextmanager
def progress(what: str, total: int) -> Iterator[_Bar | _Lines]:
    """A bar of `total` steps; call `advance(note)` on what it yields after each step."""
    if not sys.stderr.isatty() or _quiet():
        yield _Lines(what, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    # What others print while data is red is muted by taking stderr away from them: the bar then needs one of its own.
    own = redaction.spare_stderr() if redaction.active() else None
    with (
        closing(own) if own else nullcontext(),
        Progress(*columns, console=Console(stderr=True, file=own), transient=True) as bar,
    ):
        yield _Bar(bar, bar.add_task(what, total=total, note=""))


def say(line: str) -> None:
    """One line about what is going on."""
    if not _quiet():
        print(line, file=redaction.voice(), flush=True)


def _quiet() -> bool:
    return os.environ.get("CRUIJFF_QUIET") == "1"
