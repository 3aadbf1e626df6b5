"""What a command answers to programs (--json): facts gathered while it works, errors as data, one JSON document.

Whoever learns a fact records it; without --json nothing is kept. docs/json.md has the shape of every answer.
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

_facts: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("facts", default=None)


@contextlib.contextmanager
def gathering() -> Iterator[dict[str, Any]]:
    """Within this context, facts are kept in the dict that it yields, and whatever prints to stdout reaches stderr.

    Also what other programs' processes and libraries in C print: the file descriptor itself is turned.
    """
    facts: dict[str, Any] = {}
    token = _facts.set(facts)
    try:
        with _descriptor_to_stderr(), contextlib.redirect_stdout(sys.stderr):
            yield facts
    finally:
        _facts.reset(token)


@contextlib.contextmanager
def _descriptor_to_stderr() -> Iterator[None]:
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError):  # somebody closed it
        yield
        return
    try:
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def wanted() -> bool:
    """Whether a program will read the answer (--json): tables for people need not be drawn, and nobody can be asked."""
    return _facts.get() is not None


def record(**facts: Any) -> None:
    """Keep facts; a later value takes the place of an earlier one."""
    if (kept := _facts.get()) is not None:
        kept |= facts


def extend(**lists: list[Any]) -> None:
    """Keep facts that come one after another: each list is put behind what its name has already."""
    if (kept := _facts.get()) is not None:
        for name, items in lists.items():
            kept[name] = [*kept.get(name, []), *items]


def recorded(name: str) -> Any:
    """A fact that was recorded; None: it was not."""
    return (_facts.get() or {}).get(name)


def at_terminal() -> bool:
    """Whether there is somebody to ask: questions go to stdout, answers come from stdin, and no program waits for JSON."""
    return not wanted() and all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def agreed(question: str) -> bool:
    """Ask the person at the terminal for a yes; call it only `at_terminal`."""
    print(f"{question} [y/N] ", end="", flush=True)  # not by input(), which may ask on a stderr that nobody sees
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False


def error(kind: str, message: str, fix: str | None, exit_code: int) -> dict[str, Any]:
    """An error as data.

    Args:
        kind: user, run, cluster or interrupted.
        fix: what to type or change; None: nothing is known.
    """
    return {"type": kind, "message": message, "fix": fix or None, "exit_code": exit_code}


def fix_in(message: str) -> str | None:
    """The part of a refusal that says what to do: "what is wrong; what to type instead (in run rank=0; ...)".

    A semicolon within brackets separates nothing, and what stands in them at the end is no part of the fix.
    """
    depth = 0
    for place, sign in enumerate(message):
        depth = max(0, depth + (sign == "(") - (sign == ")"))
        if depth == 0 and message.startswith("; ", place):
            fix = message[place + 2 :].partition(" (in run ")[0]
            return fix.removesuffix("; nothing was submitted").strip() or None
    return None


def write(answer: Any) -> None:
    """Print the one JSON document; a number that is not finite becomes null, which JSON can say."""
    text = json.dumps(_plain(answer), ensure_ascii=False, indent=1, allow_nan=False)
    with contextlib.suppress(BrokenPipeError):
        try:
            print(text, flush=True)
        except UnicodeEncodeError:  # a terminal or a pipe that is not UTF-8
            print(json.dumps(_plain(answer), indent=1, allow_nan=False), flush=True)


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
