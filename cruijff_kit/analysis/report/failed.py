"""The report's section on runs that did not finish, with their reasons."""

from typing import Any

from cruijff_kit.analysis.report.document import Section, Table, several
from cruijff_kit.analysis.report.load import Run, Runs


def failed(runs: Runs) -> Section:
    """Failed, cancelled and interrupted runs, those under way, and late evaluations that are missing."""
    section = Section("failures", "Failures and unfinished runs")
    rows = [row for r in runs.all for row in _rows(r)]
    if not rows:
        section.absent = f"{several(len(runs.all), 'run')}, all done, none of them with an error"
        return section
    header = [
        "run",
        "state",
        "phase",
        "type",
        "message",
        "cause",
        "step",
        "of",
        "restarts",
        "changed by retries",
        "folder",
    ]
    section.blocks.append(Table("failures", "Runs that did not finish, and why", header, rows))
    section.text.append("cruijff-kit resume goes on with what is not done.")
    return section


def _rows(run: Run) -> list[list[Any]]:
    view, result = run.view, run.result
    rows = []
    changes = ", ".join(f"{k}={v}" for k, v in view.changes.items()) or None
    end = [view.step, view.total_steps, view.restarts, changes, view.folder]
    if run.unreadable:
        rows.append([run.label, view.state, None, "unreadable result", run.unreadable, None, *end])
    elif view.state != "done":
        error = result.error if result else None
        why = [error.phase, error.type, error.message, error.cause] if error else [None, None, view.reason, view.cause]
        rows.append([run.label, view.state, *why, *end])
    if result and result.late_error:
        late = result.late_error
        rows.append([run.label, "done, evaluation missing", late.phase, late.type, late.message, late.cause, *end])
    return rows
