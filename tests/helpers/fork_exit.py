"""What a fork of a test's process does with its streams and at its end. Nothing of the product is imported here."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def redirect_streams(out: str | Path, err: str | Path) -> None:
    """Read nothing, and append stdout and stderr to two files."""
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        os.dup2(os.open(name, flags | os.O_CREAT | os.O_APPEND), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115


def run_to_exit(work: Callable[[], int | None]) -> NoReturn:
    """Call a function and end this process as Python would: its exit code, a traceback, what is registered for the end."""
    code = 1
    try:
        code = work() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
