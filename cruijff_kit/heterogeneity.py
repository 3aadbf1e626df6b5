"""Is a model as good for every group? `python -m cruijff_kit.heterogeneity PATH [--group NAME] [--to DIR] [--json]`.

PATH: a run's folder (of several evaluated epochs the last), an .eval log, or a CSV with the columns TRUE_LABEL,
PREDICTION, P(TRUE LABEL) and GROUP. Writes heterogeneity_report.json and group_performance.png. Accuracy by one-way
analysis of variance; the AUC of each group from P(label = 1), which is 1 - P(true label) where the label is 0.
--json: the report, and under "files" where it and the picture were written.
"""

import argparse
import csv
import json
import math
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cruijff_kit.command import Parser
from cruijff_kit.errors import UserError
from cruijff_kit.folder import folders_below, write_text
from cruijff_kit.tiers import handle, marked
from cruijff_kit.withheld import WITHHELD, active, quoted, quoted_names

REPORT, PICTURE = "heterogeneity_report.json", "group_performance.png"
_COLUMNS = ("TRUE_LABEL", "PREDICTION", "P(TRUE LABEL)")
# What is flagged.
MAX_P, MAX_AUC_STD, MAX_AUC_RANGE, MIN_Z, MIN_AUC = 0.05, 0.1, 0.3, -1.5, 0.6


@dataclass(frozen=True)
class Row:
    """One sample: its group; correct, 1 or 0; positive, whether the label is 1, and risk = P(label = 1), if known."""

    group: str
    correct: float
    positive: bool | None = None
    risk: float | None = None


@dataclass
class Group:
    """One group: samples, accuracy with its standard error, AUC (None: one class only, or no probabilities).

    z: how many standard deviations (over groups, n) its accuracy lies from the groups' mean. outlier: why it is one.
    """

    name: str
    samples: int
    accuracy: float
    stderr: float | None
    auc: float | None
    z: float | None = None
    outlier: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What the groups come to; None where a number is not defined.

    f, p: of the one-way analysis of variance of accuracy. auc_std (n), auc_range: over the groups that have an AUC.
    flags: what was found, in words; none: the groups are alike as far as this can tell.
    """

    source: str
    samples: int
    accuracy: float
    auc: float | None
    groups: list[Group]
    f: float | None
    p: float | None
    auc_std: float | None
    auc_range: float | None
    flags: list[str]


def heterogeneity(rows: list[Row], source: str = "") -> Report:
    """Compare the groups of the rows.

    Raises:
        UserError: fewer than two groups.
    """
    import numpy as np

    by_group: dict[str, list[Row]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    if len(by_group) < 2:
        raise UserError(f"{source} has {len(by_group)} groups; there is nothing to compare (--group names the column)")
    groups = [_group(name, by_group[name]) for name in sorted(by_group)]
    accuracies = np.array([g.accuracy for g in groups])
    for g in groups:
        g.z = float((g.accuracy - accuracies.mean()) / accuracies.std()) if accuracies.std() > 1e-12 else None
        g.outlier = [f"z of accuracy {g.z:.2f} < {MIN_Z}"] if g.z is not None and g.z < MIN_Z else []
        g.outlier += [f"AUC {g.auc:.3f} < {MIN_AUC}"] if g.auc is not None and g.auc < MIN_AUC else []
    f, p = _anova([[r.correct for r in by_group[g.name]] for g in groups])
    aucs = np.array([g.auc for g in groups if g.auc is not None])
    std, reach = (float(aucs.std()), float(np.ptp(aucs))) if len(aucs) > 1 else (None, None)
    accuracy = float(np.mean([r.correct for r in rows]))
    return Report(source, len(rows), accuracy, _auc(rows), groups, f, p, std, reach, _flags(groups, p, std, reach))


def _group(name: str, rows: list[Row]) -> Group:
    import numpy as np

    correct = np.array([r.correct for r in rows])
    error = float(correct.std(ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 else None
    return Group(name, len(rows), float(correct.mean()), error, _auc(rows))


def _auc(rows: list[Row]) -> float | None:
    known = [(r.positive, r.risk) for r in rows if r.risk is not None]
    if len({positive for positive, _ in known}) < 2:
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*zip(*known, strict=True)))


def _anova(values: list[list[float]]) -> tuple[float | None, float | None]:
    """F and p; None where nothing varies or no group has two samples. Perfect groups that differ have p = 0."""
    if len({v for group in values for v in group}) < 2 or all(len(group) < 2 for group in values):
        return None, None
    import warnings

    from scipy.stats import f_oneway

    with warnings.catch_warnings():  # groups without variance: F is infinite, p 0
        warnings.simplefilter("ignore")
        f, p = f_oneway(*values)
    return (float(f) if math.isfinite(f) else None), (float(p) if math.isfinite(p) else None)


def _flags(groups: list[Group], p: float | None, std: float | None, reach: float | None) -> list[str]:
    flags = [f"accuracy differs between groups (p = {p:.2g} < {MAX_P})"] if p is not None and p < MAX_P else []
    flags += (
        [f"AUC varies: standard deviation {std:.3f} > {MAX_AUC_STD}"] if std is not None and std > MAX_AUC_STD else []
    )
    flags += [f"AUC varies: range {reach:.3f} > {MAX_AUC_RANGE}"] if reach is not None and reach > MAX_AUC_RANGE else []
    return flags + [f"{g.name}: {why}" for g in groups for why in g.outlier]


def read_rows(path: Path, group: str | None) -> tuple[list[Row], Path]:
    """The samples of a CSV, a log or a run, and the file that they come from.

    Args:
        group: the CSV's column or the samples' metadata; None: GROUP in a CSV, "group" in a log.
    Raises:
        UserError: no such file, no such group, or cells that cannot be read.
    """
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    if path.suffix.lower() == ".csv":
        handle(marked(path))
        return _numbered(_from_csv(path, group or "GROUP")), path
    from cruijff_kit.evaluation.items import group_rows, groups_named  # inspect-ai

    name = group or "group"
    logs = _logs(path)
    for log in logs:
        _refuse_other_columns(log, name)
    found = {log: [Row(**r) for r in group_rows(str(log), name)] for log in logs}
    found = {log: rows for log, rows in found.items() if rows}
    if len(found) > 1:
        raise UserError(f"{path} holds several logs with groups; give one, for example {min(found)}")
    if not found:
        there = dict.fromkeys(key for log in logs for key in groups_named(str(log)))
        hint = (
            f"; there are {', '.join(there)}"
            if there
            else "; columns of the data set beside input and output get there"
        )
        raise UserError(f"no sample of {path} has {name!r} in its metadata{hint} (--group NAME says which it is)")
    ((log, rows),) = found.items()
    if not all(0 <= r.correct <= 1 for r in rows):
        raise UserError(f"the scores of {log} are not right or wrong but numbers; groups are compared by accuracy")
    return rows, log


def _numbered(rows: list[Row]) -> list[Row]:
    """The rows of a CSV of red data with numbers for their groups: nobody has said that their names may be told."""
    if not active():
        return rows
    names = {name: f"group {number}" for number, name in enumerate(sorted({r.group for r in rows}), 1)}
    return [replace(r, group=names[r.group]) for r in rows]


def _refuse_other_columns(log: Path, group: str) -> None:
    from cruijff_kit.evaluation.items import told_groups  # inspect-ai

    told = told_groups(str(log))
    if told is not None and group not in told:
        there = f"dataset.group_columns has {', '.join(told)} (--group)" if told else "dataset.group_columns is empty"
        raise UserError(f"{log} is of red data, whose groups may be named by some columns only; {there}")


def _logs(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    from cruijff_kit.result import read_result

    if not (path / "result.json").is_file():
        runs = folders_below(path, "result.json")
        instead = f", for example {min(runs)}" if runs else ""
        raise UserError(f"{path} is no run; give a run's folder, an .eval log or a CSV{instead}")
    last = {e.task: Path(e.log) for e in read_result(path / "result.json").evaluation}  # of several epochs the last one
    return [log for log in last.values() if log.is_file()]


def _from_csv(path: Path, group: str) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        lacking = [c for c in (*_COLUMNS, group) if c not in (reader.fieldnames or [])]
        if lacking:
            there = ", ".join(quoted_names(reader.fieldnames or [])) or WITHHELD
            raise UserError(f"{path} has no column {', '.join(lacking)}; it has {there} (--group names the group's)")
        return [_csv_row(cells, group, f"{path}, line {reader.line_num}") for cells in reader]


def _csv_row(cells: dict[str, str], group: str, where: str) -> Row:
    label, prediction, share = ((cells[c] or "").strip() for c in _COLUMNS)
    try:
        positive, p = {0.0: False, 1.0: True}[float(label)], float(share)
    except (ValueError, KeyError):
        said = f"TRUE_LABEL {quoted(label)} must be 0 or 1, P(TRUE LABEL) {quoted(share)} a number"
        raise UserError(f"{where}: {said}") from None
    if not 0 <= p <= 1:
        raise UserError(f"{where}: P(TRUE LABEL) {quoted(p)} must be in [0, 1]")
    try:
        correct = float(prediction) == float(label)
    except ValueError:  # an answer that is neither label is wrong
        correct = False
    return Row(cells[group], float(correct), positive, p if positive else 1 - p)


def draw(report: Report, path: Path) -> None:
    """Accuracy (bars, 95% intervals) and AUC (diamonds) of each group as a PNG."""
    from matplotlib.figure import Figure

    groups = sorted(report.groups, key=lambda g: g.accuracy)
    figure = Figure(figsize=(7, 1.5 + 0.4 * len(groups)), layout="constrained")
    axes, places = figure.subplots(), range(len(groups))
    colours = ["tab:red" if g.outlier else "tab:blue" for g in groups]
    errors = [1.96 * (g.stderr or 0) for g in groups]
    axes.barh(places, [g.accuracy for g in groups], xerr=errors, color=colours, alpha=0.7, label="accuracy (95%)")
    known = [(g.auc, place) for place, g in enumerate(groups) if g.auc is not None]
    if known:
        axes.scatter(*zip(*known, strict=True), marker="D", color="black", zorder=3, label="AUC")
    axes.axvline(report.accuracy, linestyle="--", color="grey", label="accuracy, all")
    axes.set(yticks=places, yticklabels=[f"{g.name} (n={g.samples})" for g in groups], xlim=(0, 1.05))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _text(report: Report) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    width = max(5, *(len(g.name) for g in report.groups))
    lines = [f"{'group':{width}}  samples  accuracy    AUC"]
    for g in [*report.groups, Group("all", report.samples, report.accuracy, None, report.auc)]:
        lines.append(f"{g.name:{width}}  {g.samples:7}  {number(g.accuracy):>8}  {number(g.auc):>5}")
    return "\n".join([*lines, *(report.flags or ["nothing flagged"])])


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    rows, source = read_rows(options.path, options.group)
    report = heterogeneity(rows, str(source))
    to: Path = options.to or (options.path if options.path.is_dir() else options.path.parent)
    tree: dict[str, Any] = asdict(report)
    write_text(to / REPORT, json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if not options.json:
        print(f"{_text(report)}\nwritten to {to / REPORT}")
    files: dict[str, str | None] = {"report": str(to / REPORT), "picture": None}
    try:
        draw(report, to / PICTURE)
        files["picture"] = str(to / PICTURE)
    except UserError as error:  # the report is there without it
        print(f"no {PICTURE}: {error}", file=sys.stderr)
    return tree | {"files": files}


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = Parser(
        "heterogeneity", "Accuracy and AUC of each group, and whether they differ.", "print the report as JSON"
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="a run's folder, an .eval log, or a CSV")
    parser.add_argument("--group", metavar="NAME", help="column, or key of the samples' metadata (GROUP; group)")
    parser.add_argument("--to", metavar="DIR", type=Path, help="where to write; default: beside what is read")
    return parser.run(argv, _compare)


if __name__ == "__main__":
    raise SystemExit(main())
