"""Commands in forks of a server that has done the slow imports and nothing else: so they may train, which torch refuses to
a fork of a process that has computed gradients. How a command really starts is for tests that start it.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing import reduction
from pathlib import Path
from typing import Any, NoReturn

from fork_exit import redirect_streams, run_to_exit

from cruijff_kit.commands.main import module_of

_IMPORTED = ("cruijff_kit.evaluation.multi_run", "cruijff_kit.evaluation.prompt_check", "cruijff_kit.models.base_model",
             "cruijff_kit.training.component_checks", "cruijff_kit.recipes.lora_multi",
             "cruijff_kit.recipes.lora_distributed", "cruijff_kit.slurm.submit", "cruijff_kit.train",
             "inspect_ai.agent._acp.server", "scipy.special")  # fmt: skip
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

    def work() -> int:
        redirect_streams(out, err)
        os.chdir(cwd)
        _set_environment(environment)
        sys.argv = [command, *arguments]
        return importlib.import_module(module_of(command)).main()

    run_to_exit(work)


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(":") if "PYTHONPATH" in environment else []


class ForkedWorker:
    """A worker of the distributed recipe in a fork; takes what `subprocess.Popen` gets there, and acts as it does."""

    def __init__(self, command: list[str], stdin: int, pass_fds: list[int], env: dict[str, str], text: bool) -> None:
        assert (command[:-1], stdin, text) == ([sys.executable, "-u", "-m"], subprocess.PIPE, True)
        (pipe,) = pass_fds
        theirs, ours = os.pipe()
        self.stdin = os.fdopen(ours, "w")
        self._process = _SERVER.Process(
            target=_become_worker, args=(command[-1], _Descriptor(theirs), _Descriptor(pipe), pipe, env)
        )
        self._process.start()
        os.close(theirs)
        self.pid, self.kill = self._process.pid, self._process.kill

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def wait(self) -> None:
        """Wait for its end."""
        self._process.join()


class _Descriptor:
    """A file descriptor that is handed to a fork, where it is a number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (reduction.DupFd(self.number),)


def _detach(descriptor: Any) -> int:
    return descriptor.detach()


def _become_worker(module: str, stdin: int, pipe: int, number: int, environment: dict[str, str]) -> NoReturn:
    """Be a program that reads its task from stdin and writes to the descriptor of a number."""

    def work() -> None:
        os.dup2(stdin, 0)
        os.dup2(pipe, number)
        sys.stdin = open(0)  # noqa: SIM115
        _set_environment(environment)
        importlib.import_module(module).main()

    run_to_exit(work)
