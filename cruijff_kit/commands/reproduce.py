"""Make a run again from its folder: `cruijff-kit reproduce RUN_DIR [--check] [--to DIR] [--json]`.

First it says what differs from then: code, packages, data, base model, tasks, machine. Data or a base model that is gone or
has changed is refused. Then the run is made anew in a folder of its own, and compared: losses step by step, adapters,
metrics and answers. The verdict is identical, equal within rounding (exit code 0), or different (1).
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


def reproduce(run: Path, to: Path | None, check_only: bool) -> CommandResult:
    """Check, make again, compare; what --json prints, with the exit code.

    Raises:
        UserError: the run cannot be reproduced; nothing was run.
        Exception: whatever failed in the new run.
    """
    result = _read_finished(run)
    run = run.absolute()
    new = _new_folder(result, to)
    provenance = collect_provenance(run, result)
    show_provenance(provenance)
    _refuse(provenance)
    report: dict[str, Any] = {"run": str(run), "conditions": [asdict(r) for r in provenance.rows]}
    config = reload_with(run, new, provenance.changed | {"run_name": new.name}, provenance.places)
    if check_only:
        plan_run(config)
        print("it can be reproduced")
        return CommandResult(report | {"ready": True})

    say(f"reproducing it in {new}")
    again = train_then_eval(config, result.swept)
    agreement = compare_results(run, result, new, again)
    report |= {"new": str(new)} | agreement.to_dict()
    RunFolder(new).write(NAME, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    show_report(agreement, new)
    return CommandResult(report, ExitCode.RUN_FAILED if agreement.verdict == DIFFERENT else ExitCode.DONE)


def _read_finished(run: Path) -> RunResult:
    """The result of a run that can be made again.

    Raises:
        UserError: no run, several, one that is not finished, or one that was never trained here.
    """
    if not run.is_dir():
        raise UserError(f"no such folder: {run}")
    if not (run / "result.json").is_file():
        runs = find_folders(run, "result.json")
        instead = f"; give the folder of one, for example {runs[0]}" if runs else "; give a run's folder"
        raise UserError(f"{run} is no run (it has no result.json){instead}")
    result = read_result(run / "result.json")
    if result.status != "done":
        raise UserError(f"{run} is {result.status}, so there is no result to compare with; finish it first: "
                        f"cruijff-kit resume {run}")  # fmt: skip
    if result.settings.get("lr") is None:
        raise UserError(f"{run} is an evaluation of a model that was not trained here; use cruijff-kit evaluate")
    return result


def _new_folder(result: RunResult, to: Path | None) -> Path:
    if to is None:
        time = f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
        return Path("multirun", result.experiment, time, f"{result.name}-reproduced").absolute()
    to = to.expanduser().absolute()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {to} is not empty; choose a new folder")
    return to


def _refuse(provenance: Provenance) -> None:
    refusals = provenance.refusals
    if refusals:
        what = ", ".join(f"{r.what} {r.state} (then {r.then}, now {r.now})" for r in refusals)
        raise UserError(f"cannot reproduce: the inputs changed: {what}; " + "; ".join(r.fix for r in refusals))


def show_provenance(provenance: Provenance) -> None:
    """Print what was recorded, what is here, and where they differ."""
    rows = [(r.what, _short(r.then), _short(r.now), _state(r)) for r in provenance.rows]
    _table("conditions", ("", "then", "now", ""), rows, lambda row: "bold" if _MATTERS in row[3] else "")


def _state(row: Dependency) -> str:
    """The state, and where it is not the same, whether that can change results."""
    return row.state if row.state == SAME else f"{row.state}: {_MATTERS if row.matters else 'changes no result'}"


def show_report(agreement: ReproductionReport, new: Path) -> None:
    """Print what was compared, and the verdict."""
    rows = [
        (f.what, f.agreement or "not compared", "" if f.distance is None else f"{f.distance:.3g}", f.note)
        for f in agreement.checks
    ]
    _table("then and now", ("", "agreement", "difference", ""), rows, lambda row: "bold" if row[1] == DIFFERENT else "")
    left_out = sum(f.agreement is None for f in agreement.checks)
    print(f"{agreement.verdict}{f' ({left_out} not compared)' if left_out else ''}: {new}")


def _short(text: str) -> str:
    """A commit in as many digits as people read."""
    commit, plus, rest = text.partition("+")
    whole = len(commit) == 40 and all(c in "0123456789abcdef" for c in commit)
    return commit[:10] + plus + rest if whole else text


def _table(title: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], style: Any) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row), style=style(row))
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = Parser("reproduce", "Repeat a run from its folder, and compare the two.")
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="the folder of a finished run")
    parser.add_argument("--check", action="store_true", help="only list the differences; run nothing")
    parser.add_argument("--to", metavar="DIR", type=Path, help="the new run's folder; default: a new one in multirun/")
    import_from_cwd()
    return parser.run(argv, lambda o: reproduce(o.run, o.to, o.check))


if __name__ == "__main__":
    raise SystemExit(main())
