"""Collect a command's JSON output (--json): values recorded while it works, errors as data, one JSON document.

Any module may record a value; without --json nothing is stored. docs/json.md has the shape of every document.
"""

import contextlib
import contextvars
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_output: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("output", default=None)


@contextlib.contextmanager
def capture() -> Iterator[dict[str, Any]]:
    """Collect recorded values in the dict that this context yields, and redirect stdout to stderr meanwhile.

    The file descriptor itself is redirected, so that child processes and C libraries print to stderr too.
    """
    values: dict[str, Any] = {}
    token = _output.set(values)
    try:
        with _descriptor_to_stderr(), contextlib.redirect_stdout(sys.stderr):
            yield values
    finally:
        _output.reset(token)


@contextlib.contextmanager
def _descriptor_to_stderr() -> Iterator[None]:
    try:
        sys.stdout.flush()
        stdout = os.dup(1)
    except (OSError, ValueError):  # somebody closed it
        yield
        return
    try:
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def is_enabled() -> bool:
    """Whether a program reads the output (--json): then no table is drawn, and no question is put to a person."""
    return _output.get() is not None


def record(**values: Any) -> None:
    """Store values under their names; a later one replaces an earlier one."""
    if (output := _output.get()) is not None:
        output |= values


def append(**lists: list[Any]) -> None:
    """Append each list to the one that is stored under its name."""
    if (output := _output.get()) is not None:
        for name, items in lists.items():
            output[name] = [*output.get(name, []), *items]


def get(name: str) -> Any:
    """Return a recorded value; None if there is none."""
    return (_output.get() or {}).get(name)


def is_tty() -> bool:
    """Whether a person can be asked: stdin and stdout are a terminal, and no program waits for JSON."""
    return not is_enabled() and all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def confirm(question: str) -> bool:
    """Ask the person at the terminal for a yes; call it only if `is_tty()`."""
    print(f"{question} [y/N] ", end="", flush=True)  # not by input(), which may ask on a stderr that nobody sees
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False


def describe_error(kind: str, message: str, fix: str | None, exit_code: int) -> dict[str, Any]:
    """Return an error as data.

    Args:
        kind: user, run, cluster or interrupted.
        fix: what to type or change; None if that is not known.
    """
    return {"type": kind, "message": message, "fix": fix or None, "exit_code": exit_code}


def extract_fix(message: str) -> str | None:
    """Return the part of a message that says what to do: "what is wrong; what to type instead (in run rank=0; ...)".

    A semicolon within brackets does not count, and brackets at the end do not belong to the fix.
    """
    depth = 0
    for index, letter in enumerate(message):
        depth = max(0, depth + (letter == "(") - (letter == ")"))
        if depth == 0 and message.startswith("; ", index):
            fix = message[index + 2 :].partition(" (in run ")[0]
            return fix.removesuffix("; nothing was submitted").strip() or None
    return None


def emit(document: Any) -> None:
    """Print the one JSON document."""
    text = json.dumps(to_plain(document), ensure_ascii=False, indent=1, allow_nan=False)
    with contextlib.suppress(BrokenPipeError):
        try:
            print(text, flush=True)
        except UnicodeEncodeError:  # a terminal or a pipe that is not UTF-8
            print(json.dumps(to_plain(document), indent=1, allow_nan=False), flush=True)


def to_plain(value: Any) -> Any:
    """Convert dataclasses, tuples, sets and paths to what JSON has; a number that is not finite becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [to_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
