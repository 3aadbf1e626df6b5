"""The report's section on unfinished runs, with the reasons."""

from typing import Any

from cruijff_kit.analysis.report.document import Section, Table, format_count
from cruijff_kit.analysis.report.load import ReportRun, Runs


def build_failures(runs: Runs) -> Section:
    """Build the section: failed, cancelled, interrupted and active runs, and missing post-hoc evaluations."""
    section = Section("failures", "Failures and unfinished runs")
    rows = [row for r in runs.all_runs for row in _make_rows(r)]
    if not rows:
        section.absent = f"{format_count(len(runs.all_runs), 'run')}, all done, none with an error"
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
    section.blocks.append(Table("failures", "Unfinished runs, with reasons", header, rows))
    section.text.append("cruijff-kit resume continues the unfinished runs.")
    return section


def _make_rows(run: ReportRun) -> list[list[Any]]:
    info, result = run.info, run.result
    rows = []
    changes = ", ".join(f"{k}={v}" for k, v in info.changes.items()) or None
    end = [info.step, info.total_steps, info.restarts, changes, info.folder]
    if run.result_error:
        rows.append([run.label, info.state, None, "unreadable result", run.result_error, None, *end])
    elif info.state != "done":
        error = result.error if result else None
        reasons = (
            [error.phase, error.type, error.message, error.cause] if error else [None, None, info.reason, info.cause]
        )
        rows.append([run.label, info.state, *reasons, *end])
    if result and result.posthoc_error:
        error = result.posthoc_error
        rows.append([run.label, "done, evaluation missing", error.phase, error.type, error.message, error.cause, *end])
    return rows
