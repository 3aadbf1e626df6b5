"""The report's section on runs that did not finish, with their reasons."""

from typing import Any

from cruijff_kit.analysis.report.document import Section, Table, several
from cruijff_kit.analysis.report.load import Run, Runs


def failed(runs: Runs) -> Section:
    """Failed, cancelled and interrupted runs, those under way, and post-hoc evaluations that are missing."""
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
    section.text.append("cruijff-kit resume continues the unfinished runs.")
    return section


def _rows(run: Run) -> list[list[Any]]:
    info, result = run.info, run.result
    rows = []
    changes = ", ".join(f"{k}={v}" for k, v in info.changes.items()) or None
    end = [info.step, info.total_steps, info.restarts, changes, info.folder]
    if run.unreadable:
        rows.append([run.label, info.state, None, "unreadable result", run.unreadable, None, *end])
    elif info.state != "done":
        error = result.error if result else None
        why = [error.phase, error.type, error.message, error.cause] if error else [None, None, info.reason, info.cause]
        rows.append([run.label, info.state, *why, *end])
    if result and result.posthoc_error:
        error = result.posthoc_error
        rows.append([run.label, "done, evaluation missing", error.phase, error.type, error.message, error.cause, *end])
    return rows
