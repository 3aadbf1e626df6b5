"""Hydra's command line: flags, settings, and what was typed."""

import argparse
import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from cruijff_kit.config.keys import describe_unknown_key, valid_keys
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.suggest import suggest_flag

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

# Any key may be set there, so no plus is asked for.
_FREE = ("slurm.additional_parameters.", "eval.task_args.", "eval.task_args=")


def order_arguments(arguments: list[str]) -> list[str]:
    """Return the command line of a Hydra command, flags first: Hydra accepts none between two settings.

    Raises:
        UserError: an unknown flag, or a key added with + that no run has (Hydra's `--cfg` would print it).
    """
    from cruijff_kit.config.hydra_private import make_parser

    parser: Any = make_parser()
    parser.error = lambda message: _refuse_flag(message, parser)  # argparse would print its usage and exit
    settings = parser.parse_intermixed_args(arguments).overrides
    _refuse_added(settings)
    arguments, settings = add_pluses(arguments), add_pluses(settings)
    flags, remaining = [], list(settings)
    for argument in arguments:
        if remaining and argument == remaining[0]:
            remaining.pop(0)
        else:
            flags.append(argument)
    return flags + settings


def capture_output(hydra_command: Callable[[], object], arguments: list[str]) -> object:
    """Call a Hydra command for --json; return the configuration or {"help": text} that Hydra prints.

    Args:
        arguments: `order_arguments`.
    Returns:
        None if it ran something, which records its results itself.
    """
    pages = {a.partition("=")[0] for a in arguments} & {"--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help"}
    if not pages:
        hydra_command()
        return None
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        hydra_command()
    if pages & {"--cfg", "-c"}:
        import yaml

        tree = yaml.safe_load(printed.getvalue())
        number = isinstance(tree, str) and re.fullmatch(r"-?\d+e-?\d+", tree)  # Hydra's 3e-05 is text to YAML
        return float(tree) if number else tree
    return {"help": printed.getvalue()}


def _refuse_flag(message: str, parser: argparse.ArgumentParser) -> NoReturn:
    flag = re.search(r"unrecognized arguments: -+([\w.-]+)", message)
    key = flag[1].replace("-", "_") if flag else ""
    if flag and key in valid_keys():
        raise UserError(f"--{flag[1]} is not a flag; settings are written without dashes: {key}=VALUE")
    raise UserError(f"{message}; {suggest_flag(message, parser)}--help shows every flag")


def add_pluses(settings: list[str]) -> list[str]:
    """Settings as Hydra takes them: ++ before those where any key may be set, no line breaks."""
    return [escape_line_breaks(f"++{s}" if s.startswith(_FREE) else s) for s in settings]


def escape_line_breaks(setting: str) -> str:
    """Escape the line breaks of a setting for Hydra's grammar."""
    return setting.replace("\n", "${newline:}")


def _refuse_added(settings: list[str]) -> None:
    added = [match[1] for s in settings if (match := re.match(r"\+{1,2}([\w.]+)=", s))]
    if not added:
        return

    known = valid_keys()
    for key in added:
        parent = key.rpartition(".")[0]
        # Arguments of generators, tasks, torchtune's components and sbatch are known to those alone; groups have no dot.
        elsewhere = ("torchtune", "dataset.arguments", "eval.task_args", "slurm.additional_parameters")
        if key not in known and parent in known and not parent.startswith(elsewhere):
            raise UserError(describe_unknown_key(key))


@functools.lru_cache(maxsize=4096)
def parse_override(text: str) -> "Override":
    """Parse an override as Hydra does. Cached, because runs of a sweep share most: do not change the result."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(text)


def parse_overrides(texts: Iterable[str]) -> "list[Override]":
    """Parse several overrides with `parse_override`."""
    return [parse_override(text) for text in texts]


# Settings of the folder of the runs, and those that show or plan runs instead of running them.
_NOT_AGAIN = (
    "hydra.mode",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.job.",
    "scaffold",
    "dry_run",
)


def typed_arguments(hydra: Mapping[str, Any]) -> list[str]:
    """The arguments of the command behind a configuration, without -m: the folder of YAML of the user's own, and overrides.

    Args:
        hydra: Hydra's own node, as a container.
    """
    sources = hydra["runtime"]["config_sources"]
    folders = [s["path"] for s in sources if s["provider"] == "command-line"]
    overrides = [*hydra["overrides"]["hydra"], *hydra["overrides"]["task"]]
    kept = [str(o) for o in overrides if not str(o).lstrip("+~").startswith(_NOT_AGAIN)]
    return [part for folder in folders for part in ("--config-dir", folder)] + kept
