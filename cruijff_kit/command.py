"""How our commands end: errors explained in a line, never a bare traceback for a user's mistake; exit codes.

0 done; 1 a run failed; 2 the user's input; 3 the cluster; 130 interrupted.

With `--json` a command's stdout is one JSON document: what it has to say, or {"error": {type, message, fix, exit_code}}
beside what was done by then. docs/json.md has every shape.
"""

import argparse
import contextlib
import gc
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from cruijff_kit import answer, withheld
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

    def __init__(
        self, name: str, description: str, json_help: str = "the same as one JSON document", **more: Any
    ) -> None:
        super().__init__(f"python -m cruijff_kit.{name}", description=description, allow_abbrev=False, **more)
        self.add_argument("--json", action="store_true", help=json_help)

    def error(self, message: str) -> NoReturn:
        """Raises UserError where argparse would print its usage and leave."""
        raise UserError(f"{message}; {_meant(message, self)}{self.prog} --help shows what it takes")

    def print_help(self, file: Any = None) -> None:
        """As argparse; with --json the help is data too."""
        answer.record(help=self.format_help())
        super().print_help(file)

    def run(self, argv: Sequence[str] | None, command: Callable[[argparse.Namespace], object]) -> int:
        """Parse, run the command, and return the exit code.

        Args:
            command: gets the options; prints for people, and returns what --json prints (or an Answer; or None, where the
                facts that were recorded are the answer). With --json its own prints go to stderr.
        """
        argv = sys.argv[1:] if argv is None else list(argv)
        return run_command(lambda: command(self.parse_intermixed_args(argv)), json_asked(argv))


def json_asked(arguments: Sequence[str]) -> bool:
    """Whether --json stands among the flags."""
    flags = list(arguments)
    return "--json" in (flags[: flags.index("--")] if "--" in flags else flags)


def _meant(message: str, parser: argparse.ArgumentParser) -> str:
    """ "did you mean --follow? ", where a flag that does not exist is like one that does."""
    from cruijff_kit.hints import nearest

    flag = re.search(r"unrecognized arguments: (?:.* )?(--?[\w-]+)", message)
    near = nearest(flag[1], [*parser._option_string_actions]) if flag else None
    return f"did you mean {near}? " if near else ""


def hydra_arguments(arguments: list[str]) -> list[str]:
    """The command line of a Hydra command, flags first: Hydra itself takes none between two settings.

    Raises:
        UserError: an unknown flag, or a key added with + that no run has (Hydra's `--cfg` would print it).
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = lambda message: _refuse_flag(message, parser)  # argparse would print its usage and exit
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


def printed_as_data(hydra_command: Callable[[], object], arguments: list[str]) -> object:
    """Call a Hydra command for --json: what Hydra prints of itself becomes data, the configuration or {"help": text}.

    Args:
        arguments: `hydra_arguments`.
    Returns:
        None, if it was to run something: what came of that is recorded.
    """
    asked = {a.partition("=")[0] for a in arguments} & {"--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help"}
    if not asked:
        hydra_command()
        return None
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        hydra_command()
    if asked & {"--cfg", "-c"}:
        import yaml

        tree = yaml.safe_load(printed.getvalue())
        number = isinstance(tree, str) and re.fullmatch(r"-?\d+e-?\d+", tree)  # Hydra's 3e-05 is text to YAML
        return float(tree) if number else tree
    return {"help": printed.getvalue()}


def _refuse_flag(message: str, parser: argparse.ArgumentParser) -> NoReturn:
    from cruijff_kit.hints import valid_keys

    flag = re.search(r"unrecognized arguments: -+([\w.-]+)", message)
    key = flag[1].replace("-", "_") if flag else ""
    if key in valid_keys():
        raise UserError(f"--{flag[1]} is not a flag; settings are written without dashes: {key}=VALUE")
    raise UserError(f"{message}; {_meant(message, parser)}--help shows every flag")


def freed(settings: list[str]) -> list[str]:
    """Settings as Hydra takes them: with its plus where any key may be set, in one line."""
    return [without_breaks(f"++{s}" if s.startswith(_FREE) else s) for s in settings]


def without_breaks(setting: str) -> str:
    """A setting whose line breaks are written as Hydra's grammar can take them."""
    return setting.replace("\n", "${newline:}")


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
        as_json: print what it returns (or, if that is None, the facts that were recorded), or its error beside those facts,
            as one JSON document; all that it prints itself goes to stderr.
    """
    collect_rarely()
    if not as_json:
        return _ended(command)[0]
    with answer.gathering() as facts:
        code, data = _ended(command)
    answer.write(facts if data is None else {**facts, **data} if isinstance(data, dict) else data)
    return code


def collect_rarely() -> None:
    """Let Python look for garbage every 10,000 objects instead of 700: for a run that is soon over, that was an eighth of
    its time, most of it during imports."""
    gc.set_threshold(10_000)


def _ended(command: Callable[[], object]) -> tuple[int, Any]:
    """The exit code, and what the command returned or why it did not."""
    # Hydra would print its own, longer report; this makes it raise instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        returned = command()
        said = returned if isinstance(returned, Answer) else Answer(returned)
        return said.exit_code, said.data
    except SystemExit as end:  # of argparse's and Hydra's --help, of dry runs, and after a table with failed runs
        return end.code if isinstance(end.code, int) else int(end.code is not None), None
    except KeyboardInterrupt:
        folder = answer.recorded("folder")
        fix = f"python -m cruijff_kit.resume {folder}" if folder else "give the command again"
        return _end("interrupted; finished runs and their results are kept", INTERRUPTED, fix)
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
        code = CLUSTER_ERROR if isinstance(error, ClusterError) else USER_ERROR
        return _end(f"error: {message}", code, getattr(error, "fix", None))
    where = "CRUIJFF_TRACEBACK=1 shows where"
    said = f"failed: {type(error).__name__}: {one_line(error)}"
    return _end(f"{said} ({where})", RUN_FAILED, answer.fix_in(said) or where)


def _end(message: str, code: int, fix: str | None = None) -> tuple[int, Any]:
    if os.environ.get("CRUIJFF_TRACEBACK") == "1":
        print(withheld.traceback_of(sys.exception() or Exception(message)), file=sys.stderr)
    print(message, file=sys.stderr, flush=True)
    said = re.sub(r"^(error|failed): | \(CRUIJFF_TRACEBACK=1 shows where\)$", "", message)
    return code, {"error": answer.error(_TYPES[code], said, fix or answer.fix_in(said), code)}
