"""The report's section on groups: is the best configuration as good for every group that the samples' metadata name?"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cruijff_kit.analysis.report.calibration import best_configurations
from cruijff_kit.analysis.report.document import Chart, Section, Table, listed, several, shown
from cruijff_kit.analysis.report.figures import GREY, PALETTE, chart, figure, fitted
from cruijff_kit.analysis.report.load import Run, Runs
from cruijff_kit.analysis.subgroup_samples import are_shares, read_logs
from cruijff_kit.analysis.subgroups import (
    DECISIONS,
    MOST_GROUPS,
    WORDS,
    Group,
    Row,
    SubgroupReport,
    compare_columns,
    is_different,
)
from cruijff_kit.records.result import has_red_data

MOST_COLUMNS = 8
_READING = (
    "Accuracy, AUC and calibration (mean risk less the share of positive labels) are tested together, once for each "
    "column, by permutation of the groups; p is corrected for the columns (Holm). So are selection, true and false "
    "positive rates. The intervals of the differences in the ones, and of those in the others, hold simultaneously in 95% "
    "of repetitions; those of a single group's figures hold for it alone. ECE is that of the risk, beside it what a "
    "perfectly calibrated model would show. Notes describe; groups that do not differ have them, too."
)


@dataclass
class _Task:
    """A task of the runs of one configuration."""

    who: str
    columns: dict[str, list[Row]]
    left_out: list[str]
    """Columns that are not compared."""


def groups(runs: Runs) -> Section:
    """A chart and its tables for each column of each task of the best configuration; p is corrected for all of them."""
    section = Section("groups", "Groups of samples")
    tasks = [
        _read(own, task)
        for own in best_configurations(runs)
        for task in dict.fromkeys(e.task for e in own[0].result.evaluation)
    ]
    tasks = [t for t in tasks if t.columns]
    if not tasks:
        section.absent = "no column of the test samples names groups that could be compared"
        return section
    reports = iter(compare_columns(*(column for task in tasks for column in task.columns.items())))
    for task in tasks:
        found = list(itertools.islice(reports, len(task.columns)))
        section.text.append(_sentence(task, found))
        for report in found:
            _add(section, report, task.who)
    section.text.append(_READING)
    return section


def _add(section: Section, report: SubgroupReport, who: str) -> None:
    number = len(section.charts) + 1
    name = f"groups_{number}_{''.join(c if c.isascii() and c.isalnum() else '_' for c in report.column)[:30]}"
    section.blocks += [_chart(report, who, name), *tables(report, name), _differences(report, name)]


def _read(runs: Sequence[Run], task: str) -> _Task:
    """The samples of a task as the runs of one configuration (one for each seed) have answered them."""
    from cruijff_kit.evaluation.eval_logs import reported_groups  # inspect-ai

    more = f" and {len(runs) - 1} more seeds" if len(runs) > 1 else ""
    found = _Task(f"Task {task}, {runs[0].label}{more}", {}, [])
    logs = [Path(run.last(task).log) for run in runs]
    try:
        # Of data that was marked as red since, nobody has said what may be told.
        if any(
            has_red_data(run.result) and reported_groups(str(log)) is None for run, log in zip(runs, logs, strict=True)
        ):
            return found
        samples = read_logs(logs)
    except Exception:  # a log that is gone or broken
        return found
    if are_shares(samples.columns):  # else scores are distances, which have no accuracy
        named = [column for column, rows in samples.columns.items() if len({r.group for r in rows}) > 1]
        found.columns = {column: samples.columns[column] for column in named[:MOST_COLUMNS]}
        found.left_out = samples.left_out + named[MOST_COLUMNS:]
    return found


def _sentence(task: _Task, reports: list[SubgroupReport]) -> str:
    flags = [flag for report in reports for flag in report.flags]
    text = f"{task.who}: {several(len(reports), 'column')} that name{'s' if len(reports) == 1 else ''} groups; "
    text += "; ".join(flags) if flags else "no difference between groups was found in accuracy, AUC or calibration"
    more = (
        f" Left out, because they have too few samples or more than {MOST_GROUPS} groups: {', '.join(task.left_out)}."
    )
    return f"{text}." + (more if task.left_out else "")


def tables(report: SubgroupReport, name: str) -> list[Table]:
    """Each group's figures with their 95% intervals: how good the model is, then what it decides, where that is known."""
    quality = {"accuracy": "accuracy", "auc": "AUC", "calibration": "mean risk - share positive", "r_ece": "ECE"}
    notes = [
        *("; ".join(g.notes) for g in report.groups),
        "; ".join(note for note in report.notes if not any(n in note for g in report.groups for n in g.notes)),
    ]
    rows = [_row(g, quality) for g in (*report.groups, report.all)]
    for g, row, note in zip((*report.groups, report.all), rows, notes, strict=True):
        versus = g.versus_others.get("accuracy", [None, None, None])
        row |= {"versus others: accuracy": versus[0], "versus others: low": versus[1], "versus others: high": versus[2]}
        row |= {"ECE (calibrated)": g.r_ece_calibrated, "notes": note}
    rates = [_row(g, {metric: WORDS[metric] for metric in DECISIONS}) for g in (*report.groups, report.all)]
    found = [
        _table(report, f"{name}_table", f"Groups by {report.column}, with 95% intervals", rows),
        _table(report, f"{name}_rates", f"What is predicted for groups by {report.column}, with 95% intervals", rates),
    ]
    return [table for table in found if len(table.columns) > 2]


def _table(report: SubgroupReport, name: str, caption: str, rows: list[dict[str, Any]]) -> Table:
    kept = [c for c in rows[0] if c == "notes" or any(row[c] is not None for row in rows)]
    marked = {i for i, g in enumerate(report.groups) if is_different(g)}
    cells = [
        [g.name, g.samples, *(row[c] for c in kept)] for g, row in zip((*report.groups, report.all), rows, strict=True)
    ]
    return Table(name, caption, [report.column, "samples", *kept], cells, marked)


def _row(group: Group, figures: dict[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for metric, words in figures.items():
        ends = group.intervals.get(metric, [None, None])
        row |= {words: getattr(group, metric), f"{words} low": ends[0], f"{words} high": ends[1]}
    return row


def _differences(report: SubgroupReport, name: str) -> Table:
    found = [(WORDS[d.metric], d) for d in report.differences]
    found += [("demographic parity difference", report.demographic_parity)]
    found += [("equalised odds difference", report.equalized_odds)]
    rows = [[what, d.difference, d.low, d.high, d.p, d.highest, d.lowest] for what, d in found if d is not None]
    caption = f"The largest differences between two groups by {report.column}"
    if report.p is not None:
        caption += f": p = {shown(report.p)}, corrected {shown(report.p_holm)} (Holm)"
    return Table(f"{name}_differences", caption, ["", "difference", "low", "high", "p", "highest", "lowest"], rows)


def _chart(report: SubgroupReport, who: str, name: str) -> Chart:
    ordered = sorted(report.groups, key=lambda g: g.accuracy)
    header = [report.column, "samples", "accuracy", "low", "high", "AUC", "AUC low", "AUC high", "differs"]
    rows = [[g.name, g.samples, g.accuracy, *g.intervals.get("accuracy", [None, None]), g.auc,
             *g.intervals.get("auc", [None, None]), is_different(g)] for g in ordered]  # fmt: skip
    what = listed(["accuracy", *(["AUC"] if any(g.auc is not None for g in ordered) else [])])
    data = Table(name, f"{who}: {what} by {report.column}, with 95% intervals", header, rows)
    with figure(5.1, 1.3 + 0.3 * len(rows)) as drawn:
        axes = drawn.subplots()
        axes.axvline(report.all.accuracy, color=GREY, linestyle="--", linewidth=1.2, label="accuracy of all")
        for place, g in enumerate(ordered):
            _draw_group(axes, g, place)
        names = [f"{fitted(g.name, 30)} (n={g.samples})" + (" differs" if is_different(g) else "") for g in ordered]
        axes.set(yticks=range(len(rows)), yticklabels=names, xlim=(-0.02, 1.02), ylim=(-0.6, len(rows) - 0.4))
        axes.grid(False, axis="y")
        drawn.legend(*_once(axes), loc="outside lower left", ncols=3)
        alt = f"{data.caption}: " + "; ".join(f"{r[0]} {shown(r[2])}" for r in rows)
        return chart(drawn, data, alt)


def _draw_group(axes: Any, group: Group, place: int) -> None:
    for metric, value, marker, colour, up in (
        ("accuracy", group.accuracy, "o", PALETTE[7] if is_different(group) else PALETTE[0], 0.1),
        ("auc", group.auc, "D", PALETTE[4], -0.1),
    ):
        if metric in group.intervals:
            axes.plot(group.intervals[metric], [place + up] * 2, color=colour, linewidth=2, alpha=0.5)
        if value is not None:
            label = WORDS[metric]
            axes.plot([value], [place + up], marker, color=colour, markersize=4.5, linestyle="", label=label)


def _once(axes: Any) -> tuple[list[Any], list[str]]:
    """Each name of a legend once."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    return [*found.values()], [*found]
