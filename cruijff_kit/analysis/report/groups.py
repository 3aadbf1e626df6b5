"""The report's section on groups: the best configuration's scores for each group in the metadata of the samples."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cruijff_kit.analysis.report.calibration import best_configuration_runs
from cruijff_kit.analysis.report.document import Chart, Section, Table, format_count, format_value, join_words
from cruijff_kit.analysis.report.figures import GREY, PALETTE, make_chart, open_figure, shorten
from cruijff_kit.analysis.report.load import Runs, RunWithResult
from cruijff_kit.analysis.subgroup_samples import are_shares, read_logs
from cruijff_kit.analysis.subgroups import (
    DECISIONS,
    MOST_GROUPS,
    WORDS,
    Group,
    Row,
    SubgroupDifference,
    SubgroupReport,
    compare_columns,
    is_different,
)
from cruijff_kit.records.result import has_red_data

MAX_COLUMNS = 8
_EXPLANATION = (
    "Accuracy, AUC and calibration (mean risk minus the share of positive labels) are tested together for each column, by "
    "permutation of the groups; p is corrected for the columns (Holm). The selection rate and the true and false positive "
    "rates are tested together in the same way. The intervals of the differences in either set of metrics hold "
    "simultaneously in 95% of repetitions; the interval of a single group's metric holds for that group alone. ECE is the "
    "expected calibration error of the risk, given with its expected value for a perfectly calibrated model. Notes are "
    "descriptive: groups that do not differ have notes, too."
)


@dataclass
class _Task:
    """A task of the runs of one configuration."""

    label: str
    columns: dict[str, list[Row]]
    excluded_columns: list[str]
    """Columns that are not compared: too few samples, or too many groups."""


def build_groups(runs: Runs) -> Section:
    """Build the section: a chart and tables for each column of each task of the best configuration.

    p is corrected for all columns of all tasks.
    """
    section = Section("groups", "Groups of samples")
    tasks = [
        _read_task(group, task)
        for group in best_configuration_runs(runs)
        for task in dict.fromkeys(e.task for e in group[0].result.evaluation)
    ]
    tasks = [t for t in tasks if t.columns]
    if not tasks:
        section.absent = "no column of the test samples names groups that can be compared"
        return section
    reports = iter(compare_columns(*(column for task in tasks for column in task.columns.items())))
    for task in tasks:
        task_reports = list(itertools.islice(reports, len(task.columns)))
        section.text.append(_describe_task(task, task_reports))
        for report in task_reports:
            _add_group_blocks(section, report, task.label)
    section.text.append(_EXPLANATION)
    return section


def _add_group_blocks(section: Section, report: SubgroupReport, label: str) -> None:
    number = len(section.charts) + 1
    name = f"groups_{number}_{''.join(c if c.isascii() and c.isalnum() else '_' for c in report.column)[:30]}"
    section.blocks += [
        _draw_chart(report, label, name),
        *make_tables(report, name),
        _make_difference_table(report, name),
    ]


def _read_task(runs: Sequence[RunWithResult], task: str) -> _Task:
    """Read the samples of a task from the logs of one configuration's runs (one for each seed)."""
    from cruijff_kit.evaluation.eval_logs import reported_groups  # inspect-ai

    seeds = f" and {format_count(len(runs) - 1, 'more seed')}" if len(runs) > 1 else ""
    result = _Task(f"Task {task}, {runs[0].label}{seeds}", {}, [])
    evaluations = [e for run in runs if (e := run.last_evaluation(task))]
    if len(evaluations) < len(runs):  # a seed was not evaluated on the task
        return result
    logs = [Path(e.log) for e in evaluations]
    try:
        # If the data became red after the run, nobody has decided which groups may be reported.
        if any(
            has_red_data(run.result) and reported_groups(str(log)) is None for run, log in zip(runs, logs, strict=True)
        ):
            return result
        samples = read_logs(logs)
    except Exception:  # a log is missing or broken
        return result
    if are_shares(samples.columns):  # otherwise scores are distances, which have no accuracy
        columns = [column for column, rows in samples.columns.items() if len({r.group for r in rows}) > 1]
        result.columns = {column: samples.columns[column] for column in columns[:MAX_COLUMNS]}
        result.excluded_columns = samples.left_out + columns[MAX_COLUMNS:]
    return result


def _describe_task(task: _Task, reports: list[SubgroupReport]) -> str:
    flags = [flag for report in reports for flag in report.flags]
    text = f"{task.label}: {format_count(len(reports), 'column')} that name{'s' if len(reports) == 1 else ''} groups; "
    text += "; ".join(flags) if flags else "no difference between groups was found in accuracy, AUC or calibration"
    columns = ", ".join(task.excluded_columns)
    omission = f" Omitted (too few samples, or more than {MOST_GROUPS} groups): {columns}." if columns else ""
    return f"{text}.{omission}"


def make_tables(report: SubgroupReport, name: str) -> list[Table]:
    """Return two tables of the groups with 95% intervals: the quality of predictions, and rates of decisions if known."""
    quality = {"accuracy": "accuracy", "auc": "AUC", "calibration": "mean risk - share positive", "r_ece": "ECE"}
    notes = [
        *("; ".join(g.notes) for g in report.groups),
        "; ".join(note for note in report.notes if not any(n in note for g in report.groups for n in g.notes)),
    ]
    rows = [_make_row(g, quality) for g in (*report.groups, report.all)]
    for g, row, note in zip((*report.groups, report.all), rows, notes, strict=True):
        versus = g.versus_others.get("accuracy", [None, None, None])
        row |= {"versus others: accuracy": versus[0], "versus others: low": versus[1], "versus others: high": versus[2]}
        row |= {"ECE (calibrated)": g.r_ece_calibrated, "notes": note}
    rates = [_make_row(g, {metric: WORDS[metric] for metric in DECISIONS}) for g in (*report.groups, report.all)]
    tables = [
        _make_table(report, f"{name}_table", f"Groups by {report.column}, with 95% intervals", rows),
        _make_table(report, f"{name}_rates", f"Predictions for groups by {report.column}, with 95% intervals", rates),
    ]
    return [table for table in tables if len(table.columns) > 2]


def _make_table(report: SubgroupReport, name: str, caption: str, rows: list[dict[str, Any]]) -> Table:
    columns = [c for c in rows[0] if c == "notes" or any(row[c] is not None for row in rows)]
    highlights = {i for i, g in enumerate(report.groups) if is_different(g)}
    groups = (*report.groups, report.all)
    cells = [[g.name, g.samples, *(row[c] for c in columns)] for g, row in zip(groups, rows, strict=True)]
    return Table(name, caption, [report.column, "samples", *columns], cells, highlights)


def _make_row(group: Group, figures: dict[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for metric, label in figures.items():
        interval = group.intervals.get(metric, [None, None])
        row |= {label: getattr(group, metric), f"{label} low": interval[0], f"{label} high": interval[1]}
    return row


def _make_difference_table(report: SubgroupReport, name: str) -> Table:
    differences: list[tuple[str, SubgroupDifference | None]] = [(WORDS[d.metric], d) for d in report.differences]
    differences += [("demographic parity difference", report.demographic_parity)]
    differences += [("equalised odds difference", report.equalized_odds)]
    rows = [[label, d.difference, d.low, d.high, d.p, d.highest, d.lowest] for label, d in differences if d is not None]
    caption = f"The largest differences between two groups by {report.column}"
    if report.p is not None:
        caption += f": p = {format_value(report.p)}, corrected {format_value(report.p_holm)} (Holm)"
    return Table(f"{name}_differences", caption, ["", "difference", "low", "high", "p", "highest", "lowest"], rows)


def _draw_chart(report: SubgroupReport, task_label: str, name: str) -> Chart:
    sorted_groups = sorted(report.groups, key=lambda g: g.accuracy)
    header = [report.column, "samples", "accuracy", "low", "high", "AUC", "AUC low", "AUC high", "differs"]
    rows = [[g.name, g.samples, g.accuracy, *g.intervals.get("accuracy", [None, None]), g.auc,
             *g.intervals.get("auc", [None, None]), is_different(g)] for g in sorted_groups]  # fmt: skip
    metrics = join_words(["accuracy", *(["AUC"] if any(g.auc is not None for g in sorted_groups) else [])])
    data = Table(name, f"{task_label}: {metrics} by {report.column}, with 95% intervals", header, rows)
    with open_figure(5.1, 1.3 + 0.3 * len(rows)) as fig:
        axes = fig.subplots()
        axes.axvline(report.all.accuracy, color=GREY, linestyle="--", linewidth=1.2, label="accuracy of all")
        for position, g in enumerate(sorted_groups):
            _draw_group(axes, g, position)
        names = [
            f"{shorten(g.name, 30)} (n={g.samples})" + (" differs" if is_different(g) else "") for g in sorted_groups
        ]
        axes.set(yticks=range(len(rows)), yticklabels=names, xlim=(-0.02, 1.02), ylim=(-0.6, len(rows) - 0.4))
        axes.grid(False, axis="y")
        fig.legend(*_unique_handles(axes), loc="outside lower left", ncols=3)
        alt = f"{data.caption}: " + "; ".join(f"{r[0]} {format_value(r[2])}" for r in rows)
        return make_chart(fig, data, alt)


def _draw_group(axes: Any, group: Group, position: int) -> None:
    for metric, value, marker, colour, offset in (
        ("accuracy", group.accuracy, "o", PALETTE[7] if is_different(group) else PALETTE[0], 0.1),
        ("auc", group.auc, "D", PALETTE[4], -0.1),
    ):
        if metric in group.intervals:
            axes.plot(group.intervals[metric], [position + offset] * 2, color=colour, linewidth=2, alpha=0.5)
        if value is not None:
            label = WORDS[metric]
            axes.plot([value], [position + offset], marker, color=colour, markersize=4.5, linestyle="", label=label)


def _unique_handles(axes: Any) -> tuple[list[Any], list[str]]:
    """Return the handles and names of a legend, each name once."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    return [*handles.values()], [*handles]
