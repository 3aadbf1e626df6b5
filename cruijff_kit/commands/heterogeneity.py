"""Is a model as good for every group? `cruijff-kit heterogeneity PATH [--group NAME] [--to DIR] [--json]`.

PATH: a run's folder (of several evaluated epochs the last), an .eval log, or a CSV with the columns TRUE_LABEL, PREDICTION,
P(TRUE LABEL) and those that name groups. Compares the groups of each column (analysis.subgroups), of all that name groups
unless --group says which. Writes heterogeneity_report.json and group_performance.png.
--json: the report, and under "files" where it and the picture were written.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cruijff_kit.analysis.subgroup_samples import read_samples
from cruijff_kit.analysis.subgroups import (
    MAX_P,
    WORDS,
    Group,
    SubgroupDifference,
    SubgroupReport,
    compare_columns,
    format_p,
    is_different,
)
from cruijff_kit.commands.base import Parser
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import write_text

REPORT, PICTURE = "heterogeneity_report.json", "group_performance.png"
_WIDTH = 100
_FIRST = ("n", "accuracy", "AUC", "bias")  # what stands in the first of two tables
_LEGEND = {
    "bias": "mean risk less the share of positive labels",
    "ECE (cal.)": "calibration error of the risk (that of a perfectly calibrated model)",
}


def draw(reports: list[SubgroupReport], path: Path) -> None:
    """Accuracy (bars) and AUC (diamonds) of each group with 95% intervals as a PNG, a panel a column."""
    from matplotlib.figure import Figure

    heights = [1.2 + 0.4 * len(report.groups) for report in reports]
    figure = Figure(figsize=(7, 0.4 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(reports), squeeze=False, height_ratios=heights)[:, 0]
    for axes, report in zip(panels, reports, strict=True):
        groups = sorted(report.groups, key=lambda g: g.accuracy)
        colours = ["tab:red" if is_different(g) else "tab:blue" for g in groups]
        axes.barh(range(len(groups)), [g.accuracy for g in groups], color=colours, alpha=0.6, label="accuracy (95%)")
        for place, g in enumerate(groups):
            for name, offset, colour in (("accuracy", 0.12, "black"), ("auc", -0.12, "grey")):
                if name in g.intervals:
                    axes.plot(g.intervals[name], [place + offset] * 2, color=colour, linewidth=1.2)
        known = [(g.auc, place - 0.12) for place, g in enumerate(groups) if g.auc is not None]
        if known:
            axes.scatter(*zip(*known, strict=True), marker="D", color="black", zorder=3, label="AUC (95%)")
        axes.axvline(report.all.accuracy, linestyle="--", color="grey", label="accuracy, all")
        names = [f"{g.name} (n={g.samples})" for g in groups]
        axes.set(yticks=range(len(groups)), yticklabels=names, xlim=(0, 1.05), title=_format_verdict(report))
    panels[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _format_verdict(report: SubgroupReport) -> str:
    if report.p is None:
        return f"{report.column}: nothing varies"
    text = f"{report.column}: no difference between groups found ({format_p(report)})"
    of_units = f"; {report.all.units} units of {report.samples} samples" if report.all.units else ""
    return (report.flags[0] if report.flags else text) + of_units


def _format_report(report: SubgroupReport) -> str:
    """Format the groups of a column as a table, or two, then the largest differences between them."""
    cells = [_format_cells(g) for g in [*report.groups, report.all]]
    kept = [column for column in cells[0] if any(row[column] for row in cells)]
    names = [g.name for g in report.groups] + ["all"]
    room = _WIDTH - sum(2 + _measure_width(cells, column) for column in kept)
    parts = [kept]
    if room < min(20, max(5, *map(len, names))):
        parts = [[c for c in kept if c in _FIRST], [c for c in kept if c not in _FIRST]]
    lines = [_format_verdict(report)]
    for part in filter(None, parts):
        lines += _format_table(names, cells, part)
    lines += [f"{column}: {_LEGEND[column]}" for column in kept if column in _LEGEND]
    found = [(WORDS[d.metric], d) for d in report.differences]
    found += [("demographic parity", report.demographic_parity), ("equalised odds", report.equalized_odds)]
    of_all = "" if report.level == 1 - MAX_P else " (95% for all columns together)"
    lines.append(f"largest differences between two groups, with {100 * report.level:.4g}% intervals{of_all}")
    lines += [_format_difference(name, d) for name, d in found if d is not None]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _format_table(names: list[str], cells: list[dict[str, str]], columns: list[str]) -> list[str]:
    """Return lines of at most _WIDTH letters: of the header, then of each group."""
    widths = {column: _measure_width(cells, column) for column in columns}
    room = max(8, _WIDTH - sum(widths.values()) - 2 * len(widths))
    width = min(room, max(5, *map(len, names)))
    lines = []
    for name, row in [("group", {c: c for c in columns}), *zip(names, cells, strict=True)]:
        shown = "  ".join(f"{row[column]:>{w}}" for column, w in widths.items())
        lines.append(f"{_cut(name, width):{width}}  {shown}".rstrip())
    return lines


def _measure_width(cells: list[dict[str, str]], column: str) -> int:
    return max(len(column), *(len(row[column]) for row in cells))


def _format_cells(group: Group) -> dict[str, str]:
    """Format each figure with its 95% interval, "" where there is none."""

    def value(number: float | None, name: str, sign: str = "") -> str:
        if number is None:
            return ""
        ends = group.intervals.get(name)
        return f"{number:{sign}.2f}" + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")

    calibrated = "" if group.r_ece_calibrated is None else f" ({group.r_ece_calibrated:.2f})"
    return {
        "n": str(group.samples), "accuracy": value(group.accuracy, "accuracy"), "AUC": value(group.auc, "auc"),
        "bias": value(group.calibration, "calibration", "+"), "selected": value(group.selection_rate, "selection_rate"),
        "TPR": value(group.true_positive_rate, "true_positive_rate"),
        "FPR": value(group.false_positive_rate, "false_positive_rate"),
        "ECE (cal.)": value(group.r_ece, "r_ece") + calibrated,
    }  # fmt: skip


def _format_difference(name: str, d: SubgroupDifference) -> str:
    who = "all alike" if d.highest == d.lowest else f"{_cut(d.highest, 18)} over {_cut(d.lowest, 18)}"
    return f"  {name:18}  {d.difference:.3f} [{d.low:.3f}, {d.high:.3f}]  {format_p(d):9}  {who}"


def _cut(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    samples = read_samples(options.path, options.group, options.unit)
    reports = compare_columns(*samples.columns.items())
    to: Path = options.to or (options.path if options.path.is_dir() else options.path.parent)
    tree: dict[str, Any] = {
        "source": str(samples.source),
        "columns": [asdict(r) for r in reports],
        "left_out": samples.left_out,
        "flags": [flag for r in reports for flag in r.flags],
    }
    write_text(to / REPORT, json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if not options.json:
        left_out = [f"left out: {', '.join(samples.left_out)}"] if samples.left_out else []
        told = [*left_out, *(tree["flags"] or ["nothing flagged"]), f"written to {to / REPORT}"]
        print("\n\n".join([*map(_format_report, reports), "\n".join(told)]))
    files: dict[str, str | None] = {"report": str(to / REPORT), "picture": None}
    try:
        draw(reports, to / PICTURE)
        files["picture"] = str(to / PICTURE)
    except UserError as error:  # the report is there without it
        print(f"no {PICTURE}: {error}", file=sys.stderr)
    return tree | {"files": files}


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = Parser(
        "heterogeneity", "Whether accuracy, AUC or calibration differ between groups.", "print the report as JSON"
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="a run's folder, an .eval log, or a CSV")
    parser.add_argument(
        "--group", metavar="NAME", action="append",
        help="column, or key of the samples' metadata; again for more of them; default: all that name groups",
    )  # fmt: skip
    parser.add_argument(
        "--unit", metavar="NAME",
        help="column or key of the unit (respondent, household) whose samples belong together; default: the log's own",
    )  # fmt: skip
    parser.add_argument("--to", metavar="DIR", type=Path, help="where to write; default: beside what is read")
    return parser.run(argv, _compare)


if __name__ == "__main__":
    raise SystemExit(main())
