"""How our commands end: errors explained in a line, never a bare traceback for a user's mistake; exit codes.

0 done; 1 a run failed; 2 the user's input; 3 the cluster; 130 interrupted.

With `--json` a command's stdout is one JSON document: what it has to say, or {"error": {type, message, fix, exit_code}}.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from cruijff_kit import withheld
from cruijff_kit.errors import UserError, one_line

# Any key may be set there, so no plus is asked for.
_FREE = ("slurm.additional_parameters.", "eval.task_args.", "eval.task_args=")
DONE, RUN_FAILED, USER_ERROR, CLUSTER_ERROR, INTERRUPTED = 0, 1, 2, 3, 130
_TYPES = {RUN_FAILED: "run", USER_ERROR: "user", CLUSTER_ERROR: "cluster", INTERRUPTED: "interrupted"}


class PastHydra(BaseException):
    """Carries a run's error through Hydra, which would print a report of its own for any Exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(one_line(error))
        self.error = error


@dataclass
class Answer:
    """What a command has to say and how it ends, where that is not 0: a table of runs of which one failed."""

    data: Any
    exit_code: int = DONE


class Parser(argparse.ArgumentParser):
    """The arguments of `python -m cruijff_kit.NAME`, which all take --json."""

    def __init__(self, name: str, description: str, json_help: str = "the same as one JSON document") -> None:
        super().__init__(f"python -m cruijff_kit.{name}", description=description)
        self.add_argument("--json", action="store_true", help=json_help)

    def error(self, message: str) -> NoReturn:
        """Raises UserError where argparse would print its usage and leave."""
        raise UserError(f"{message}; {self.prog} --help shows what it takes")

    def run(self, argv: Sequence[str] | None, command: Callable[[argparse.Namespace], object]) -> int:
        """Parse, run the command, and return the exit code.

        Args:
            command: gets the options; prints for people, and returns what --json prints (or an Answer). With --json its
                own prints go to stderr.
        """
        argv = sys.argv[1:] if argv is None else list(argv)
        return run_command(lambda: command(self.parse_intermixed_args(argv)), "--json" in argv)


def hydra_arguments(arguments: list[str]) -> list[str]:
    """The command line of a Hydra command, flags first: Hydra itself takes none between two settings.

    Raises:
        UserError: an unknown flag, or a key added with + that no run has (Hydra's `--cfg` would print it).
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = _refuse_flag  # argparse would print its usage and exit
    settings = parser.parse_intermixed_args(arguments).overrides
    _refuse_added(settings)
    arguments, settings = freed(arguments), freed(settings)
    flags, left = [], list(settings)
    for argument in arguments:
        if left and argument == left[0]:
            left.pop(0)
        else:
            flags.append(argument)
    return flags + settings


def _refuse_flag(message: str) -> NoReturn:
    from cruijff_kit.hints import valid_keys

    flag = re.search(r"unrecognized arguments: -+([\w.-]+)", message)
    key = flag[1].replace("-", "_") if flag else ""
    if key in valid_keys():
        raise UserError(f"--{flag[1]} is not a flag; settings are written without dashes: {key}=VALUE")
    raise UserError(f"{message}; --help shows every flag")


def freed(settings: list[str]) -> list[str]:
    """Settings with the plus that Hydra wants where any key may be set."""
    return [f"++{s}" if s.startswith(_FREE) else s for s in settings]


def _refuse_added(settings: list[str]) -> None:
    added = [match[1] for s in settings if (match := re.match(r"\+{1,2}([\w.]+)=", s))]
    if not added:
        return
    from cruijff_kit.hints import unknown_key, valid_keys

    known = valid_keys()
    for key in added:
        parent = key.rpartition(".")[0]
        # Arguments of generators, tasks, torchtune's components and sbatch are known to those alone; groups have no dot.
        elsewhere = ("torchtune", "dataset.arguments", "eval.task_args", "slurm.additional_parameters")
        if key not in known and parent in known and not parent.startswith(elsewhere):
            raise UserError(unknown_key(key))


def run_command(command: Callable[[], object], as_json: bool = False) -> int:
    """Run a command and turn what it raises into a message on stderr and an exit code.

    With CRUIJFF_TRACEBACK=1 the traceback is shown too.

    Args:
        as_json: print what it returns, or its error, as one JSON document; all that it prints itself goes to stderr.
    """
    if not as_json:
        return _ended(command)[0]
    with contextlib.redirect_stdout(sys.stderr):
        code, answer = _ended(command)
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(answer, ensure_ascii=False, indent=1), flush=True)
    return code


def _ended(command: Callable[[], object]) -> tuple[int, Any]:
    """The exit code, and what the command returned or why it did not."""
    # Hydra would print its own, longer report; this makes it raise instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        returned = command()
        answer = returned if isinstance(returned, Answer) else Answer(returned)
        return answer.exit_code, answer.data
    except KeyboardInterrupt:
        return _end("interrupted; finished runs and their results are kept", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, for example `| head`
        sys.stderr.close()
    except PastHydra as carried:
        return _explain(carried.error)
    except Exception as error:
        return _explain(error)
    return DONE, None


def _explain(error: Exception) -> tuple[int, Any]:
    from cruijff_kit.cluster.client import ClusterError
    from cruijff_kit.hints import explain

    message = explain(error)
    if message is not None:
        return _end(f"error: {message}", CLUSTER_ERROR if isinstance(error, ClusterError) else USER_ERROR)
    return _end(f"failed: {type(error).__name__}: {one_line(error)} (CRUIJFF_TRACEBACK=1 shows where)", RUN_FAILED)


def _end(message: str, code: int) -> tuple[int, Any]:
    if os.environ.get("CRUIJFF_TRACEBACK") == "1":
        print(withheld.traceback_of(sys.exception() or Exception(message)), file=sys.stderr)
    print(message, file=sys.stderr, flush=True)
    said = message.removeprefix("error: ")
    fix = (
        said.partition("; ")[2] if code in (USER_ERROR, CLUSTER_ERROR) else ""
    )  # "what is wrong; what to type instead"
    return code, {"error": {"type": _TYPES[code], "message": said, "fix": fix or None, "exit_code": code}}
