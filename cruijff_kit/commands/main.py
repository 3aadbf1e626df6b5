"""Every command under one name: `cruijff-kit COMMAND ...`, the same as `python -m cruijff_kit COMMAND ...`.

cruijff-kit --help lists them, with --json as {"commands": [{"name", "summary"}], "version"}. Light: a command's module is
imported only when it is asked for. A new command is a line in COMMANDS.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from cruijff_kit.commands.base import has_json_flag, run_command
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.suggest import find_nearest
from cruijff_kit.util.version import __version__

# What is typed -> what it does in a line, in the order in which one needs them; the module of that name has a `main(argv)`.
COMMANDS = {
    "data preview": "rows of your data as the model sees them, before training",
    "data convert": "data in another format: Parquet, JSON Lines or JSON",
    "train": "train and evaluate one run, or with -m a sweep, locally or on SLURM",
    "status": "the state of all runs below a folder",
    "logs": "the output of a submitted run",
    "cancel": "cancel submitted runs",
    "resume": "finish every run that is neither done nor active",
    "table": "results of finished runs, compared",
    "report": "a sweep as a page with figures, its data, and a methods paragraph",
    "evaluate": "evaluate finished runs, an adapter, or a base model",
    "heterogeneity": "compare accuracy, AUC and calibration between groups",
    "reproduce": "repeat a run from its folder, and compare the two",
    "compare": "whether a model is fine-tuned: base model against adapter",
    "embed": "embeddings and logits of a model, to a file",
    "export": "a run's adapter, or a merged model, for other programs",
    "archive": "keep the best adapters of an experiment, delete the others",
    "doctor": "check what this SLURM cluster has and what will work",
}
_HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--json"]:  # wherever it stands
        argv = [*argv[1:], "--json"]
    if argv[:1] == ["-sc"]:
        return _complete(argv)
    for words in (2, 1):
        if (name := " ".join(argv[:words])) in COMMANDS:
            sys.argv[1:] = argv[words:]  # Hydra, and the manifest of a sweep, read it there
            return importlib.import_module(module_of(name)).main(argv[words:])
    return run_command(lambda: _about(argv), has_json_flag(argv))


def _complete(argv: list[str]) -> int:
    """Complete what was typed, called by Hydra's script for the shell; Hydra itself completes the settings of train."""
    typed = os.environ.get("COMP_LINE", "").split(" ")
    if argv[1].startswith("query=") and typed[1:2] != ["train"]:
        print(" ".join(dict.fromkeys(name.split()[0] for name in COMMANDS)))
        return 0
    os.environ["COMP_LINE"] = " ".join([*typed[:1], *typed[2:]])  # as if train were a program of its own
    return importlib.import_module(module_of("train")).main(argv)


def module_of(name: str) -> str:
    """Return the module with a command's `main`."""
    return "cruijff_kit.train" if name == "train" else f"cruijff_kit.commands.{name.replace(' ', '_')}"


def _about(argv: list[str]) -> None:
    flags = [a for a in argv if a != "--json"]
    if flags and flags[0] in _HELP:
        _list([*COMMANDS])
    elif flags[1:] and flags[1] in _HELP and (subcommands := _find_subcommands(flags[0])):
        _list(subcommands)
    elif flags and flags[0] in ("-V", "--version"):
        json_output.record(version=__version__)
        print(f"cruijff-kit {__version__}")
    else:
        raise UserError(_refusal(flags))


def _list(names: list[str]) -> None:
    json_output.record(commands=[{"name": name, "summary": COMMANDS[name]} for name in names], version=__version__)
    width = max(map(len, names))
    print("usage: cruijff-kit COMMAND ...      (the same as python -m cruijff_kit COMMAND ...)\n")
    for name in names:
        print(f"  {name:{width}}  {COMMANDS[name]}")
    print("\ncruijff-kit COMMAND --help lists a command's arguments; --json prints its result as one JSON document.")
    print("exit codes: 0 done, 1 a run failed, 2 your input, 3 the cluster, 130 interrupted")


def _find_subcommands(first: str) -> list[str]:
    """Return the commands of two words that begin with this one."""
    return [name for name in COMMANDS if name.startswith(f"{first} ")]


def _refusal(argv: list[str]) -> str:
    """Return a message that the words are not a command, with a suggestion."""
    if not argv:
        return "a command is missing; cruijff-kit --help lists them"
    first, two = argv[0], " ".join(argv[:2])
    if first.startswith("-") or "=" in first:
        return f"{first} is not a command; cruijff-kit train {first} ..., or another of cruijff-kit --help"
    subcommands = _find_subcommands(first)
    near = find_nearest(two, subcommands or [*COMMANDS]) or find_nearest(first, [*COMMANDS])
    if near:
        return f"there is no command {two if subcommands else first}; did you mean cruijff-kit {near}?"
    choices = " or ".join(f"cruijff-kit {name}" for name in subcommands)
    return f"there is no command {two if subcommands else first}; {choices or 'cruijff-kit --help lists them'}"


if __name__ == "__main__":
    raise SystemExit(main())
