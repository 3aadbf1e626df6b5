"""Commands in a fork of the test's process, which has done the slow imports. They may do all but train: torch refuses to
compute gradients in a fork of a process that has computed some."""

import importlib
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, NoReturn


def import_all() -> None:
    """What takes seconds to import, once for all commands."""
    for name in ("evaluation.evaluate", "evaluation.prompts", "models.base", "training.components", "train"):
        importlib.import_module(f"cruijff_kit.{name}")


def forked(
    module: str, arguments: list[str], cwd: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """`python -m cruijff_kit.MODULE ARGUMENTS` in a folder."""
    import_all()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            _become(module, arguments, cwd, environment, out, err)
        _, status = os.waitpid(child, 0)
        for file in (out, err):
            file.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess([module, *arguments], code, out.read(), err.read())


def _become(module: str, arguments: list[str], cwd: Path, environment: dict[str, str], out: IO, err: IO) -> NoReturn:
    """Be a command, to the end of this process."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = environment.get("PYTHONPATH", "").split(":") if "PYTHONPATH" in environment else []
        sys.argv = [module, *arguments]
        code = importlib.import_module(f"cruijff_kit.{module}").main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
