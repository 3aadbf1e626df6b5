"""Run a command: errors explained in one line, exit codes, --json.

With `--json` a command's stdout is one JSON document: what it has to say, or {"error": {type, message, fix, exit_code}}
beside what was done by then. docs/json.md has every shape.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn

from cruijff_kit.util import json_output, redaction
from cruijff_kit.util.errors import ClusterError, InnerError, UserError, one_line
from cruijff_kit.util.process import collect_garbage_rarely
from cruijff_kit.util.suggest import suggest_flag


class ExitCode(IntEnum):
    """Exit code of a command."""

    DONE = 0
    RUN_FAILED = 1
    USER_ERROR = 2
    """The user's input."""
    CLUSTER_ERROR = 3
    INTERRUPTED = 130


_TYPES = {
    ExitCode.RUN_FAILED: "run",
    ExitCode.USER_ERROR: "user",
    ExitCode.CLUSTER_ERROR: "cluster",
    ExitCode.INTERRUPTED: "interrupted",
}


@dataclass
class CommandResult:
    """Output and exit code of a command that prints a result but does not end with 0: a table with a failed run."""

    data: Any
    exit_code: int = ExitCode.DONE


class Parser(argparse.ArgumentParser):
    """The arguments of `cruijff-kit NAME`, which all take --json."""

    def __init__(
        self, name: str, description: str, json_help: str = "the same as one JSON document", **more: Any
    ) -> None:
        super().__init__(f"cruijff-kit {name}", description=description, allow_abbrev=False, **more)
        self.add_argument("--json", action="store_true", help=json_help)

    def add_examples(self, text: str) -> None:
        """Show the lines of a text that begin with the command below the help."""
        lines = [line for line in text.splitlines() if line.startswith(f"{self.prog} ")]
        self.formatter_class = argparse.RawDescriptionHelpFormatter
        self.epilog = "\n".join(["examples:", *(f"  {line}" for line in lines)])

    def error(self, message: str) -> NoReturn:
        """Raises UserError where argparse would print its usage and leave."""
        raise UserError(f"{message}; {suggest_flag(message, self)}{self.prog} --help lists its arguments")

    def print_help(self, file: Any = None) -> None:
        """Print the help as argparse does; as JSON with --json."""
        json_output.record(help=self.format_help())
        super().print_help(file)

    def run(self, argv: Sequence[str] | None, command: Callable[[argparse.Namespace], object]) -> int:
        """Parse, run the command, and return the exit code.

        Args:
            command: gets the options; prints for people, and returns what --json prints (or an Answer; or None, where the
                facts that were recorded are the answer). With --json its own prints go to stderr.
        """
        argv = sys.argv[1:] if argv is None else list(argv)
        return run_command(lambda: command(self.parse_intermixed_args(argv)), has_json_flag(argv))


def import_from_cwd() -> None:
    """Let Python import the user's modules from the working folder; only `python -m` does that by itself."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def has_json_flag(arguments: Sequence[str]) -> bool:
    """Return whether --json is among the flags."""
    flags = list(arguments)
    return "--json" in (flags[: flags.index("--")] if "--" in flags else flags)


def run_command(command: Callable[[], object], as_json: bool = False) -> int:
    """Run a command and turn what it raises into a message on stderr and an exit code.

    With CRUIJFF_TRACEBACK=1 the traceback is shown too.

    Args:
        as_json: print what it returns (or, if that is None, the facts that were recorded), or its error beside those facts,
            as one JSON document; all that it prints itself goes to stderr.
    """
    collect_garbage_rarely()
    if not as_json:
        return _execute_command(command)[0]
    with json_output.capture() as facts:
        code, data = _execute_command(command)
    json_output.emit(facts if data is None else {**facts, **data} if isinstance(data, dict) else data)
    return code


def _execute_command(command: Callable[[], object]) -> tuple[int, Any]:
    """Return the exit code, and what the command returned or why it did not."""
    # Hydra would print its own, longer report; this makes it raise instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        returned = command()
        said = returned if isinstance(returned, CommandResult) else CommandResult(returned)
        return said.exit_code, said.data
    except SystemExit as end:  # of argparse's and Hydra's --help, of dry runs, and after a table with failed runs
        return end.code if isinstance(end.code, int) else int(end.code is not None), None
    except KeyboardInterrupt:
        folder = json_output.get("folder")
        fix = f"cruijff-kit resume {folder}" if folder else "repeat the command"
        return _end("interrupted; finished runs and their results are kept", ExitCode.INTERRUPTED, fix)
    except BrokenPipeError:  # the reader of our output left, for example `| head`
        sys.stderr.close()
    except InnerError as carried:
        return _explain(carried.error)
    except Exception as error:
        return _explain(error)
    return ExitCode.DONE, None


def _explain(error: Exception) -> tuple[int, Any]:
    from cruijff_kit.config.explain import explain

    message = explain(error)
    if message is not None:
        code = ExitCode.CLUSTER_ERROR if isinstance(error, ClusterError) else ExitCode.USER_ERROR
        return _end(f"error: {message}", code, getattr(error, "fix", None))
    where = "CRUIJFF_TRACEBACK=1 shows where"
    said = f"failed: {type(error).__name__}: {one_line(error)}"
    return _end(f"{said} ({where})", ExitCode.RUN_FAILED, json_output.extract_fix(said) or where)


def _end(message: str, code: ExitCode, fix: str | None = None) -> tuple[int, Any]:
    if os.environ.get("CRUIJFF_TRACEBACK") == "1":
        print(redaction.format_traceback(sys.exception() or Exception(message)), file=sys.stderr)
    print(message, file=sys.stderr, flush=True)
    said = re.sub(r"^(error|failed): | \(CRUIJFF_TRACEBACK=1 shows where\)$", "", message)
    return code, {"error": json_output.describe_error(_TYPES[code], said, fix or json_output.extract_fix(said), code)}
