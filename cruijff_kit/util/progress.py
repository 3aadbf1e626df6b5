"""Show progress: a bar in a terminal, a line every few seconds elsewhere.

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
    """Progress without a terminal (in a job's log): a line every few seconds."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._last_shown = time.monotonic()

    def advance(self, note: str = "", steps: int = 1) -> None:
        self._done += steps
        if time.monotonic() - self._last_shown >= _SECONDS_BETWEEN_LINES:
            self._last_shown = time.monotonic()
            say(f"{self._label} {self._done}/{self._total} {note}".rstrip())


class _Bar:
    """Progress in a terminal."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def advance(self, note: str = "", steps: int = 1) -> None:
        self._bar.update(self._task, advance=steps, note=note)


@contextmanager
def progress(label: str, total: int) -> Iterator[_Bar | _Lines]:
    """Show a bar of `total` steps; call `advance(note)` on what this context yields after each step."""
    if not sys.stderr.isatty() or _quiet():
        yield _Lines(label, total)
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
    # redaction.silence() takes stderr away from libraries while data is red, so the bar needs a stream of its own.
    stream = redaction.duplicate_stderr() if redaction.is_enabled() else None
    with (
        closing(stream) if stream else nullcontext(),
        Progress(*columns, console=Console(stderr=True, file=stream), transient=True) as bar,
    ):
        yield _Bar(bar, bar.add_task(label, total=total, note=""))


def say(line: str) -> None:
    """Print a line to stderr unless progress is turned off."""
    if not _quiet():
        print(line, file=redaction.get_stderr(), flush=True)


def _quiet() -> bool:
    return os.environ.get("CRUIJFF_QUIET") == "1"
