"""Commands in forks of a server that has done the slow imports and nothing else: so they may train, which torch refuses to
a fork of a process that has computed gradients. How a command really starts is for tests that start it.
"""

import atexit
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NoReturn

from cruijff_kit.commands.main import module_of

_IMPORTED = ("cruijff_kit.evaluation.multi_run", "cruijff_kit.evaluation.prompt_check", "cruijff_kit.models.base_model",
             "cruijff_kit.training.component_checks", "cruijff_kit.recipes.lora_multi", "cruijff_kit.slurm.submit",
             "cruijff_kit.train", "inspect_ai.agent._acp.server", "scipy.special")  # fmt: skip
_SECONDS = 300
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([*_IMPORTED])


def import_all() -> None:
    """What takes seconds to import, once for all commands."""
    process = _SERVER.Process(target=int)
    process.start()
    process.join()


def forked(
    command: str, arguments: list[str], cwd: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """`cruijff-kit COMMAND ARGUMENTS` in a folder."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = _SERVER.Process(target=_become, args=(command, arguments, cwd, environment, out.name, err.name))
        process.start()
        process.join(_SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([command, *arguments], _SECONDS, out.read(), err.read())
        return subprocess.CompletedProcess([command, *arguments], process.exitcode, out.read(), err.read())


def _become(command: str, arguments: list[str], cwd: Path, environment: dict[str, str], out: str, err: str) -> NoReturn:
    """Be a command, to the end of this process."""
    code = 1
    try:
        for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
            os.dup2(os.open(name, flags | os.O_APPEND), number)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:0] = environment.get("PYTHONPATH", "").split(":") if "PYTHONPATH" in environment else []
        sys.argv = [command, *arguments]
        code = importlib.import_module(module_of(command)).main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
