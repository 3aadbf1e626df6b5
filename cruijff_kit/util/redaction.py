"""What a process that handles red data keeps to itself: the one switch, and what everything that speaks asks.

Once `begin` was called, for the rest of the process and in those that it starts: quoted values and messages of exceptions
that are not ours are replaced by WITHHELD, so are all log records and warnings of libraries; new files are the owner's
alone; what a task or metric of the user's prints goes nowhere. Imports nothing of ours: everything may import it.
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
_VARIABLE = "CRUIJFF_RED_DATA"  # so that worker processes know it before they read a row
# Set where the user has not set it, so that no .env file sets it later. W&B keeps changes of a checkout, data and all.
_ENVIRONMENT = {
    "WANDB_MODE": "offline",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "INSPECT_TELEMETRY": "",
}
_OURS = (Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[2] / "recipes")
_NAME = re.compile(r"[A-Za-z_][\w./@:-]{0,39}")  # what a column or a metric may be called to be said
_make_record = logging.Logger.makeRecord
_voice: TextIO | None = None
_warned: set[str] = set()


def active() -> bool:
    """Whether this process handles red data."""
    return os.environ.get(_VARIABLE) == "1"


def begin() -> None:
    """From now on this process, and those that it starts, keep data to themselves. Safe to call again; never undone."""
    if active() and logging.Logger.makeRecord is _record:
        return
    os.environ[_VARIABLE] = "1"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.umask(0o077)
    logging.Logger.makeRecord = _record  # type: ignore[method-assign]
    warnings.showwarning = _show_warning
    # For hooks that others install.
    traceback.TracebackException.format_exception_only = _format_exception_only  # type: ignore
    sys.excepthook = lambda kind, error, trace: print(traceback_of(error), file=sys.stderr)
    threading.excepthook = lambda args: args.exc_value and print(traceback_of(args.exc_value), file=sys.stderr)
    sys.unraisablehook = lambda args: args.exc_value and print(traceback_of(args.exc_value), file=sys.stderr)


def quoted(value: Any, length: int | None = None) -> str:
    """A value of the data as a message may quote it: its repr, cut to `length`; WITHHELD where data is red."""
    return WITHHELD if active() else repr(value)[:length]


def quoted_names(names: Iterable[str]) -> list[str]:
    """Names of columns (or splits, or metrics) as a message may list them.

    Of red data only those that look like names: without a header, a file's first row stands in their place.
    """
    names = [str(name) for name in names]
    return names if not active() or all(map(_NAME.fullmatch, names)) else []


def said(error: BaseException | str) -> str:
    """What an exception, or a foreign text, says, on one line; of red data only what an exception of ours says."""
    text = " ".join(str(error).split())
    if not text or not active() or _is_ours(error):
        return text
    if isinstance(error, OSError) and error.errno is not None:  # such as: No space left on device
        return f"{os.strerror(error.errno)} {WITHHELD}"
    return WITHHELD


def _is_ours(error: BaseException | str) -> bool:
    kind = type(error)
    made_here = f"{kind.__module__}.".startswith("cruijff_kit.")
    if not isinstance(error, BaseException) or error.__traceback__ is None:
        return made_here
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if kind.__module__.startswith("torch") and kind.__name__ == "OutOfMemoryError":
        return True
    # A float() that fails quotes its argument, and its error comes out of our own frame: builtins are not trusted.
    return (made_here or kind is FloatingPointError) and _is_in_ours(frame.f_code.co_filename)


def _is_in_ours(file: str) -> bool:
    return any(Path(file).resolve().is_relative_to(folder) for folder in _OURS)


def traceback_of(error: BaseException) -> str:
    """The traceback as text; of red data each exception's type and frames, without messages and source lines."""
    if not active():
        return "".join(traceback.format_exception(error))
    lines, seen = [], set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        frames = [
            f'  File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}'
            for frame, line in traceback.walk_tb(current.__traceback__)
        ]
        notes = getattr(current, "__notes__", []) if _is_ours(current) else []  # a worker's traceback, made here too
        lines.append("\n".join([*frames, f"{type(current).__name__}: {said(current)}", *notes]))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\nwhich was the cause of:\n".join(reversed(lines)) + "\n"


def of_log(message: str, trace: str) -> str:
    """An error as an inspect-ai log keeps it, in one line; of red data its type, and the file and line it came from."""
    if not active():
        return " ".join(message.split())
    kind = re.match(r"(\w+)\(", message.strip())
    file, line = next(reversed(places_of(trace)), ("", ""))
    if kind and kind[1] == "UserError" and file and _is_in_ours(file):
        with contextlib.suppress(ValueError, SyntaxError):
            return str(ast.literal_eval(message.strip().removeprefix("UserError(").removesuffix(")")))
    where = f" at {file}, line {line}" if file else ""
    return f"{kind[1] if kind else 'error'}{where} {WITHHELD}"


def places_of(trace: str) -> list[tuple[str, str]]:
    """File and line of each frame of a traceback in an inspect-ai log (Python's own, or rich's)."""
    found = re.findall(r'File "([^"\n]+)", line (\d+)|(?m:^│? *(/[^:\n]+):(\d+) in )', trace)
    return [(a or c, b or d) for a, b, c, d in found]


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Where data is red: within this context nothing but `voice` reaches stdout and stderr, and nobody logs.

    For code that is not ours. (Log handlers may add to a record what they know of the sample under way: so, no records.)
    """
    global _voice
    if not active() or _voice is not None:
        yield
        return
    out, err = sys.stdout, sys.stderr
    for stream in (out, err):
        stream.flush()
    kept, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    with open(os.devnull, "w") as nowhere:
        _voice = spare_stderr() or err
        sys.stdout = sys.stderr = nowhere
        os.dup2(null, 1), os.dup2(null, 2)
        logged = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logged)
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            sys.stdout, sys.stderr = out, err
            if _voice is not err:
                _voice.close()
            _voice = None
            for number in (*kept, null):
                os.close(number)


def voice() -> TextIO:
    """Where our own words go: stderr, also while others are muted."""
    return _voice or sys.stderr


def spare_stderr() -> TextIO | None:
    """A stream of its own to where stderr goes, which `muted` leaves alone; None where stderr is no file (a notebook)."""
    try:
        return os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace") if sys.stderr.fileno() == 2 else None
    except (OSError, ValueError, AttributeError):
        return None


def _record(
    logger: logging.Logger, name: str, level: int, fn: str, lno: int, msg: object, args: Any, exc_info: Any,
    func: str | None = None, extra: Any = None, sinfo: str | None = None,
) -> logging.LogRecord:  # fmt: skip
    """A log record without what it says, unless it is ours."""
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
        print(text, file=file or voice())


if active():  # a worker of a process that handles red data
    begin()
