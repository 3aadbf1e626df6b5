"""The report's section on groups of samples: is the best run as good for every group that the samples' metadata name?"""

from typing import Any

from statsmodels.stats.multitest import multipletests

from cruijff_kit.errors import UserError
from cruijff_kit.heterogeneity import Report, Row, heterogeneity
from cruijff_kit.report.calibration import best_runs
from cruijff_kit.report.document import Chart, Section, Table, shown
from cruijff_kit.report.drawing import GREY, PALETTE, chart, figure, fitted

Z = 1.96
from cruijff_kit.report.runs import Run, Runs
from cruijff_kit.tiers import withholds

MOST_GROUPS = 20  # of a column; more of them are hardly groups
MOST_COLUMNS = 8


def groups(runs: Runs) -> Section:
    """A chart and a table for each column of each task of the best run."""
    section = Section("groups", "Groups of samples")
    for run in best_runs(runs):
        for task in dict.fromkeys(e.task for e in run.result.evaluation):
            _add(section, run, task)
    if not section.blocks:
        section.text, section.absent = [], "no column of the test samples names groups that could be compared"
    return section


def _add(section: Section, run: Run, task: str) -> None:
    reports, left_out = _reports(run, task)
    if not reports:
        return
    number = sum(isinstance(b, Chart) for b in section.blocks) + 1
    corrected = list(multipletests([r.p if r.p is not None else 1.0 for r in reports.values()], method="holm")[1])
    section.text.append(_sentence(run, task, reports, corrected, left_out))
    for (column, report), p in zip(reports.items(), corrected, strict=True):
        name = f"groups_{number}_{''.join(c if c.isascii() and c.isalnum() else '_' for c in column)[:30]}"
        section.blocks += [_chart(report, column, run, task, name), _table(report, column, p, name)]
        number += 1


def _reports(run: Run, task: str) -> tuple[dict[str, Report], list[str]]:
    """Column -> how its groups compare; and the columns that are left out."""
    from cruijff_kit.evaluation.items import group_rows, groups_named, told_groups  # inspect-ai

    log = run.last(task).log
    found: dict[str, Report] = {}
    left_out = []
    try:
        marked_since = withholds(run.result) and told_groups(log) is None  # then nobody has said what may be told
        columns = [] if marked_since else groups_named(log)
    except Exception:  # a log that is gone or broken
        return {}, []
    for column in columns:
        rows = [Row(**r) for r in group_rows(log, column)]
        if len({r.group for r in rows}) > MOST_GROUPS or len(found) == MOST_COLUMNS:
            left_out.append(column)
        elif all(0 <= r.correct <= 1 for r in rows):  # else scores are distances, which have no accuracy
            try:
                found[column] = heterogeneity(rows, log)
            except UserError:  # a single group, once what was not scored is left out
                left_out.append(column)
    return found, left_out


def _sentence(run: Run, task: str, reports: dict[str, Report], corrected: list[float], left_out: list[str]) -> str:
    flagged = [column for column, report in reports.items() if report.flags]
    differ = [c for c, p in zip(reports, corrected, strict=True) if p < 0.05]
    text = f"{run.label}, task {task}: {len(reports)} columns name groups; "
    text += f"something is flagged in {', '.join(flagged)}" if flagged else "nothing is flagged"
    text += ". Corrected for the number of columns (Holm), accuracy differs "
    text += f"between groups by {', '.join(differ)}." if differ else "between groups of none of them."
    more = f" Left out, for want of samples or with more than {MOST_GROUPS} groups: {', '.join(left_out)}."
    return text + (more if left_out else "")


def _table(report: Report, column: str, p: float, name: str) -> Table:
    rows: list[list[Any]] = [
        [g.name, g.samples, g.accuracy, g.stderr, g.auc, g.z, "; ".join(g.outlier)] for g in report.groups
    ]
    rows.append(["all", report.samples, report.accuracy, None, report.auc, None, "; ".join(_of_all(report))])
    caption = f"Groups by {column}"
    if report.p is not None:
        caption += f": analysis of variance of accuracy, p = {shown(report.p)}, corrected {shown(p)} (Holm)"
    header = [column, "samples", "accuracy", "standard error", "AUC", "z", "flags"]
    return Table(f"{name}_table", caption, header, rows, {i for i, g in enumerate(report.groups) if g.outlier})


def _of_all(report: Report) -> list[str]:
    own = {f"{g.name}: {why}" for g in report.groups for why in g.outlier}
    return [f for f in report.flags if f not in own]


def _chart(report: Report, column: str, run: Run, task: str, name: str) -> Chart:
    ordered = sorted(report.groups, key=lambda g: g.accuracy)
    rows = [[g.name, g.samples, g.accuracy, g.stderr, g.auc, bool(g.outlier)] for g in ordered]
    header = [column, "samples", "accuracy", "standard error", "AUC", "flagged"]
    data = Table(name, f"Task {task}, {run.label}: accuracy (95% intervals) and AUC by {column}", header, rows)
    with figure(5.1, 1.3 + 0.3 * len(rows)) as drawn:
        axes = drawn.subplots()
        axes.axvline(report.accuracy, color=GREY, linestyle="--", linewidth=1.2, label="accuracy of all")
        for place, g in enumerate(ordered):
            colour, reach = PALETTE[7] if g.outlier else PALETTE[0], Z * (g.stderr or 0)
            ends = [max(0.0, g.accuracy - reach), min(1.0, g.accuracy + reach)]
            axes.plot(ends, [place, place], color=colour, linewidth=2, alpha=0.5)
            axes.plot([g.accuracy], [place], "o", color=colour, label="accuracy" if place == 0 else None)
        known = [(g.auc, place) for place, g in enumerate(ordered) if g.auc is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "D", color=PALETTE[4], markersize=4.5, linestyle="", label="AUC")
        names = [f"{fitted(g.name, 30)} (n={g.samples})" + (" flagged" if g.outlier else "") for g in ordered]
        axes.set(yticks=range(len(rows)), yticklabels=names, xlim=(-0.02, 1.02), ylim=(-0.6, len(rows) - 0.4))
        axes.grid(False, axis="y")
        drawn.legend(loc="outside lower left", ncols=3)
        alt = f"{data.caption}: " + "; ".join(f"{r[0]} {shown(r[2])}" for r in rows)
        return chart(drawn, data, alt)
