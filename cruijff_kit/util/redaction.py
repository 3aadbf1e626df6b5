"""Redact sensitive (red) data from everything this process prints or logs.

After `enable`, in this process and its children: quoted values, messages of foreign exceptions, and log records and
warnings of libraries are replaced by WITHHELD; only the owner can open new files; what a user's task or metric prints is
discarded. This module imports nothing of ours, so that every module may import it.
"""

import ast
import contextlib
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

WITHHELD = "(withheld: red data)"
_VARIABLE = "CRUIJFF_RED_DATA"  # worker processes inherit it, before they read a row
# Set unless the user has set it, so that no .env file sets it later. W&B saves the changes of a checkout, with any data.
_ENVIRONMENT = {
    "WANDB_MODE": "offline",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "INSPECT_TELEMETRY": "",
}
_OURS = (Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[2] / "recipes")
_NAME = re.compile(r"[A-Za-z_][\w./@:-]{0,39}")  # a name of a column or a metric that may be shown
_make_record = logging.Logger.makeRecord
_stderr: TextIO | None = None
_warned: set[str] = set()


def is_enabled() -> bool:
    """Whether this process handles red data."""
    return os.environ.get(_VARIABLE) == "1"


def enable() -> None:
    """Redact data in this process and its children from now on. Safe to call again; it cannot be undone."""
    if is_enabled() and logging.Logger.makeRecord is _make_redacted_record:
        return
    os.environ[_VARIABLE] = "1"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.umask(0o077)
    logging.Logger.makeRecord = _make_redacted_record  # type: ignore[method-assign, assignment]
    warnings.showwarning = _show_warning
    # For hooks that others install.
    traceback.TracebackException.format_exception_only = _format_exception_only  # type: ignore
    sys.excepthook = lambda kind, error, trace: print(format_traceback(error), file=sys.stderr)
    threading.excepthook = lambda args: args.exc_value and print(format_traceback(args.exc_value), file=sys.stderr)
    sys.unraisablehook = lambda args: args.exc_value and print(format_traceback(args.exc_value), file=sys.stderr)


def quote(value: Any, length: int | None = None) -> str:
    """Quote a value of the data for a message: its repr, cut to `length` letters; WITHHELD if data is red."""
    return WITHHELD if is_enabled() else repr(value)[:length]


def quote_names(names: Iterable[str]) -> list[str]:
    """Return the names of columns (or splits, or metrics) that a message may list.

    If data is red and one does not look like a name, none: a file without a header has its first row in their place.
    """
    names = [str(name) for name in names]
    return names if not is_enabled() or all(map(_NAME.fullmatch, names)) else []


def safe_message(error: BaseException | str) -> str:
    """Return the text of an exception, or a foreign text, in one line; if data is red, only that of our own exceptions."""
    text = " ".join(str(error).split())
    if not text or not is_enabled() or _is_ours(error):
        return text
    if isinstance(error, OSError) and error.errno is not None:  # such as: No space left on device
        return f"{os.strerror(error.errno)} {WITHHELD}"
    return WITHHELD


def _is_ours(error: BaseException | str) -> bool:
    kind = type(error)
    is_our_type = f"{kind.__module__}.".startswith("cruijff_kit.")
    if not isinstance(error, BaseException) or error.__traceback__ is None:
        return is_our_type
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if kind.__module__.startswith("torch") and kind.__name__ == "OutOfMemoryError":
        return True
    # A float() that fails quotes its argument, and its error comes out of our own frame: builtins are not trusted.
    return (is_our_type or kind is FloatingPointError) and _is_our_file(frame.f_code.co_filename)


def _is_our_file(file: str) -> bool:
    return any(Path(file).resolve().is_relative_to(folder) for folder in _OURS)


def format_traceback(error: BaseException) -> str:
    """Format a traceback; if data is red, only each exception's type and frames, without messages and source lines."""
    if not is_enabled():
        return "".join(traceback.format_exception(error))
    lines, visited = [], set()
    current: BaseException | None = error
    while current is not None and id(current) not in visited:
        visited.add(id(current))
        frames = [
            f'  File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}'
            for frame, line in traceback.walk_tb(current.__traceback__)
        ]
        notes = getattr(current, "__notes__", []) if _is_ours(current) else []  # a worker's, already redacted
        lines.append("\n".join([*frames, f"{type(current).__name__}: {safe_message(current)}", *notes]))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\nwhich was the cause of:\n".join(reversed(lines)) + "\n"


def redact_log(message: str, trace: str) -> str:
    """Format an error of an inspect-ai log in one line; if data is red, only its type, and the file and line it came from.

    Args:
        message: repr of the exception. trace: its traceback, Python's own or rich's.
    """
    if not is_enabled():
        return " ".join(message.split())
    kind = re.match(r"(\w+)\(", message.strip())
    file, line = next(reversed(parse_frames(trace)), ("", ""))
    if kind and kind[1] == "UserError" and file and _is_our_file(file):
        with contextlib.suppress(ValueError, SyntaxError):
            return str(ast.literal_eval(message.strip().removeprefix("UserError(").removesuffix(")")))
    where = f" at {file}, line {line}" if file else ""
    return f"{kind[1] if kind else 'error'}{where} {WITHHELD}"


def parse_frames(trace: str) -> list[tuple[str, str]]:
    """Return (file, line) of each frame of a traceback in an inspect-ai log (Python's own, or rich's)."""
    frames = re.findall(r'File "([^"\n]+)", line (\d+)|(?m:^│? *(/[^:\n]+):(\d+) in )', trace)
    return [(a or c, b or d) for a, b, c, d in frames]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard what foreign code prints and logs in this context, if data is red; only `get_stderr` still reaches stderr.

    Log records are dropped whole, because handlers may add what they know of the current sample.
    """
    global _stderr
    if not is_enabled() or _stderr is not None:
        yield
        return
    out, err = sys.stdout, sys.stderr
    for stream in (out, err):
        stream.flush()
    saved, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    with open(os.devnull, "w") as nowhere:
        _stderr = duplicate_stderr() or err
        sys.stdout = sys.stderr = nowhere
        os.dup2(null, 1), os.dup2(null, 2)
        disabled_level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled_level)
            os.dup2(saved[0], 1), os.dup2(saved[1], 2)
            sys.stdout, sys.stderr = out, err
            if _stderr is not err:
                _stderr.close()
            _stderr = None
            for number in (*saved, null):
                os.close(number)


def get_stderr() -> TextIO:
    """Return the stream for our own messages: stderr, also within `silence`."""
    return _stderr or sys.stderr


def duplicate_stderr() -> TextIO | None:
    """Open another stream to stderr, which `silence` leaves alone; None where stderr is no file (in a notebook)."""
    try:
        return os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace") if sys.stderr.fileno() == 2 else None
    except (OSError, ValueError, AttributeError):
        return None


def _make_redacted_record(
    logger: logging.Logger, name: str, level: int, fn: str, lno: int, msg: object, args: Any, exc_info: Any,
    func: str | None = None, extra: Any = None, sinfo: str | None = None,
) -> logging.LogRecord:  # fmt: skip
    """Make a log record; its message is replaced unless it is ours."""
    if not name.startswith("cruijff_kit"):
        msg, args, extra, sinfo = f"{name} said something {WITHHELD}", (), None, None
    return _make_record(logger, name, level, fn, lno, msg, args, None, func, extra, sinfo)


def _format_exception_only(error: traceback.TracebackException, **_: Any) -> Iterator[str]:
    yield f"{error.exc_type.__name__}: {WITHHELD}\n"


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    text = f"{filename}:{lineno}: {category.__name__} {WITHHELD}"
    if text not in _warned:
        _warned.add(text)
        print(text, file=file or get_stderr())


if is_enabled():  # a worker of a process that handles red data
    enable()
