"""Reproduce a run from its folder: `cruijff-kit reproduce RUN_DIR [--check] [--to DIR] [--json]`.

It first prints the run's provenance and the differences from now: code, packages, data, base model, tasks, machine. It
refuses if the data or the base model is missing or has changed. Then it repeats the run in a new folder, and compares
losses step by step, adapters, metrics and answers. The verdict is identical, equal within rounding (exit code 0), or
different (1).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from cruijff_kit.analysis.reproduction import DIFFERENT, ReproductionReport, compare_results
from cruijff_kit.commands.base import CommandResult, ExitCode, Parser, import_from_cwd
from cruijff_kit.records.result import RunResult, read_result
from cruijff_kit.records.run_folder import RunFolder, find_folders
from cruijff_kit.records.saved_config import reload_with
from cruijff_kit.runs.plan import plan_run
from cruijff_kit.runs.provenance import SAME, Dependency, Provenance, collect_provenance
from cruijff_kit.runs.run import train_then_eval
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.progress import say

NAME = "reproduction.json"
_MATTERS = "can change results"


def reproduce(run: Path, target: Path | None, check_only: bool) -> CommandResult:
    """Check the provenance of a run, repeat the run, and compare; return the JSON output and the exit code.

    Raises:
        UserError: the run cannot be reproduced; nothing was run.
        Exception: the error of the new run.
    """
    result = _read_finished(run)
    run = run.absolute()
    new = _new_folder(result, target)
    provenance = collect_provenance(run, result)
    print_provenance(provenance)
    _refuse(provenance)
    report: dict[str, Any] = {"run": str(run), "provenance": [asdict(r) for r in provenance.rows]}
    config = reload_with(run, new, provenance.changed | {"run_name": new.name}, provenance.places)
    if check_only:
        plan_run(config)
        print("the run can be reproduced")
        return CommandResult(report | {"ready": True})

    say(f"reproducing the run in {new}")
    reproduced = train_then_eval(config, result.swept)
    reproduction = compare_results(run, result, new, reproduced)
    report |= {"new": str(new)} | reproduction.to_dict()
    RunFolder(new).write(NAME, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print_report(reproduction, new)
    return CommandResult(report, ExitCode.RUN_FAILED if reproduction.verdict == DIFFERENT else ExitCode.DONE)


def _read_finished(run: Path) -> RunResult:
    """Return the result of a run that can be repeated.

    Raises:
        UserError: no run, several runs, an unfinished run, or an evaluation of a model that was trained elsewhere.
    """
    if not run.is_dir():
        raise UserError(f"no such folder: {run}")
    if not (run / "result.json").is_file():
        runs = find_folders(run, "result.json")
        fix = f"; give the folder of a single run, for example {runs[0]}" if runs else "; give a run's folder"
        raise UserError(f"{run} is not a run (it has no result.json){fix}")
    result = read_result(run / "result.json")
    if result.status != "done":
        raise UserError(f"{run} is {result.status}, so there is no result to compare with; finish it first: "
                        f"cruijff-kit resume {run}")  # fmt: skip
    if result.settings.get("lr") is None:
        raise UserError(f"{run} is an evaluation of a model that was not trained here; use cruijff-kit evaluate")
    return result


def _new_folder(result: RunResult, target: Path | None) -> Path:
    if target is None:
        time = f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
        return Path("multirun", result.experiment, time, f"{result.name}-reproduced").absolute()
    target = target.expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to {target} is not empty; choose a new folder")
    return target


def _refuse(provenance: Provenance) -> None:
    refusals = provenance.refusals
    if refusals:
        changes = ", ".join(f"{r.what} {r.state} (then {r.then}, now {r.now})" for r in refusals)
        raise UserError(f"cannot reproduce: the inputs changed: {changes}; " + "; ".join(r.fix for r in refusals))


def print_provenance(provenance: Provenance) -> None:
    """Print the recorded provenance, the present one, and their differences."""
    rows = [(r.what, _shorten_commit(r.then), _shorten_commit(r.now), _format_state(r)) for r in provenance.rows]
    _print_table("provenance", ("", "then", "now", ""), rows, lambda row: "bold" if _MATTERS in row[3] else "")


def _format_state(row: Dependency) -> str:
    """Format the state, with the effect of a difference on results."""
    return row.state if row.state == SAME else f"{row.state}: {_MATTERS if row.matters else 'changes no result'}"


def print_report(reproduction: ReproductionReport, new: Path) -> None:
    """Print the checks and the verdict."""
    rows = [
        (f.what, f.verdict or "not compared", "" if f.distance is None else f"{f.distance:.3g}", f.note)
        for f in reproduction.checks
    ]
    header = ("", "verdict", "difference", "")
    _print_table("then and now", header, rows, lambda row: "bold" if row[1] == DIFFERENT else "")
    num_skipped = sum(f.verdict is None for f in reproduction.checks)
    print(f"{reproduction.verdict}{f' ({num_skipped} not compared)' if num_skipped else ''}: {new}")


def _shorten_commit(text: str) -> str:
    """Shorten a commit to ten digits; leave any other text as it is."""
    commit, plus, suffix = text.partition("+")
    is_commit = len(commit) == 40 and all(c in "0123456789abcdef" for c in commit)
    return commit[:10] + plus + suffix if is_commit else text


def _print_table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]], style: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, title_justify="left")
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row), style=style(row))
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = Parser("reproduce", "Repeat a run from its folder, and compare the two.")
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="the folder of a finished run")
    parser.add_argument("--check", action="store_true", help="only list the differences; run nothing")
    parser.add_argument("--to", metavar="DIR", type=Path, help="the new run's folder; default: a new one in multirun/")
    import_from_cwd()
    return parser.run(argv, lambda o: reproduce(o.run, o.to, o.check))


if __name__ == "__main__":
    raise SystemExit(main())
