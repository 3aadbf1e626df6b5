"""Show the state of all runs below a folder: `cruijff-kit status DIR [--watch] [--json]`.

A row combines what the run says itself and what SLURM says. Runs of this machine are shown too. --json: a list, a row
(slurm.run_states.RunInfo) for each run; with --watch the rows of the last look.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from cruijff_kit.analysis.status_table import have_ended, make_status_table, watch
from cruijff_kit.commands.base import CommandResult, ExitCode, Parser
from cruijff_kit.records.run_status import RunState
from cruijff_kit.slurm.run_states import collect_states, find_runs
from cruijff_kit.util.progress import say


def _show(options: argparse.Namespace) -> CommandResult:
    runs = find_runs(options.folder)
    code, trouble = ExitCode.DONE, None
    if options.watch:
        infos = watch(str(options.folder), runs, have_ended)
        code = (
            ExitCode.RUN_FAILED
            if any(info.state in (RunState.FAILED, RunState.CANCELLED) for info in infos)
            else ExitCode.DONE
        )
    else:
        infos, trouble = collect_states(runs)
    if options.json and trouble:
        say(f"SLURM does not answer: {trouble}")
    elif not options.json and not (options.watch and sys.stdout.isatty()):
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        console.print(make_status_table(str(options.folder), infos, trouble, console.width))
    return CommandResult([asdict(info) for info in infos], code)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code: 1 if a run that was watched failed."""
    parser = Parser("status", "Show the state of all runs below a folder.", "every row, as one JSON list")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a run, a sweep, or any folder above them")
    parser.add_argument("--watch", action="store_true", help="look again every few seconds until every run has ended")
    return parser.run(argv, _show)


if __name__ == "__main__":
    raise SystemExit(main())
