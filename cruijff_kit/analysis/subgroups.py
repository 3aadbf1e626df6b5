"""Subgroup analysis: is a model as good for every group of samples? Scores of each group with intervals, and one test for
each column.

A column of the data (sex, region) defines the groups. It is flagged where accuracy, AUC or calibration differ between its
groups significantly: one permutation test for all three (`permutation`), with Holm's correction over columns. Selection
rates, true and false positive rates and the fairness differences computed from them have intervals, but are not flagged:
statistics cannot decide whether groups should have equal selection rates.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.differences import holm
from cruijff_kit.analysis.intervals import compute_interval, null_calibration_error
from cruijff_kit.analysis.measures import Samples, compute_metric
from cruijff_kit.analysis.permutation import arrange, compare, compare_constant, make_auc_metric, make_mean_metric
from cruijff_kit.util.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from cruijff_kit.analysis.permutation import GroupComparison, Grouping, Metric

MAX_P = 0.05
"""A column whose corrected p is below this is flagged."""
MAX_AUC_STD, MAX_AUC_RANGE, MIN_Z, MIN_AUC = 0.1, 0.3, -1.5, 0.6
"""Thresholds that are noted, but not flagged: groups that do not differ at all exceed them, too (4 groups of 25 in more
than half of all cases)."""
MOST_GROUPS = 20
"""A column with more values is compared only if the user names it."""
QUALITY = ("accuracy", "auc", "calibration")
DECISIONS = ("selection_rate", "true_positive_rate", "false_positive_rate")
WORDS = {
    "accuracy": "accuracy", "auc": "AUC", "calibration": "calibration", "selection_rate": "selection rate",
    "true_positive_rate": "true positive rate", "false_positive_rate": "false positive rate",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One sample of one run, or its mean over several runs."""

    group: str
    correct: float
    """1 right, 0 wrong."""
    positive: bool | None = None
    """Whether the label is the positive (last) option; None: unknown."""
    risk: float | None = None
    """P(positive option)."""
    predicted: float | None = None
    """Whether the positive option was predicted; over several runs the share of runs in which it was."""
    order: float | None = None
    """The number that ranks the samples: log-odds of the risk; None: computed from the risk."""
    unit: str | None = None
    """The respondent (household, country) of the sample; None: its own."""
    sample: str = ""
    """Identity of the sample over runs."""


@dataclass
class SubgroupDifference:
    """A difference between groups.

    Its 95% interval is simultaneous over all differences of its kind in the report, and excludes 0 only where p is below
    0.05.
    """

    metric: str
    difference: float
    low: float
    high: float
    p: float
    """p of no difference, corrected for the metrics that were tested with it, not for columns."""
    highest: str
    """The group with the largest value; the same as `lowest` where all groups are equal."""
    lowest: str
    """The group with the smallest value."""


@dataclass
class Group:
    """One group. A number is None where it is unknown or undefined."""

    name: str
    samples: int
    units: int | None = None
    accuracy: float = math.nan
    """Share of right samples; always known."""
    auc: float | None = None
    share_positive: float | None = None
    mean_risk: float | None = None
    calibration: float | None = None
    """Mean risk less the share of positive labels (calibration in the large)."""
    r_ece: float | None = None
    """Calibration error of the risk."""
    r_ece_calibrated: float | None = None
    """Mean calibration error of a perfectly calibrated model at this number of samples."""
    selection_rate: float | None = None
    """Share of samples for which the positive option was predicted."""
    true_positive_rate: float | None = None
    """The same share of the positive samples."""
    false_positive_rate: float | None = None
    """The same share of the negative samples."""
    intervals: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> ends of its 95% interval over other samples of this group."""
    versus_others: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> difference from the mean of all other groups and the ends of its interval, as in `SubgroupDifference`."""
    z: float | None = None
    """Distance of its accuracy from the groups' mean, in standard deviations over groups (divided by n)."""
    notes: list[str] = field(default_factory=list)
    """The thresholds that it exceeds; a description, no test."""


@dataclass
class SubgroupReport:
    """The comparison of the groups of one column."""

    column: str
    samples: int
    all: Group
    """All samples as one group."""
    groups: list[Group]
    p: float | None
    """p of no difference in accuracy, AUC and calibration; None where none of them varies."""
    p_holm: float | None
    """p corrected for all columns of the analysis."""
    differences: list[SubgroupDifference]
    """The largest difference between two groups in accuracy, AUC and calibration."""
    demographic_parity: SubgroupDifference | None
    """Largest difference of selection rates (fairlearn's demographic_parity_difference)."""
    equalized_odds: SubgroupDifference | None
    """Largest difference of true or false positive rates (fairlearn's equalized_odds_difference)."""
    auc_std: float | None
    """Standard deviation of the groups' AUCs (divided by n)."""
    auc_range: float | None
    """Range of the groups' AUCs."""
    level: float
    """Level of the intervals of this column's differences: 95% for all columns together."""
    permutations: int
    flags: list[str] = field(default_factory=list)
    """Significant differences, a sentence each."""
    notes: list[str] = field(default_factory=list)
    """The thresholds that the groups exceed."""


def compare_columns(*columns: tuple[str, Sequence[Row]], permutations: int | None = None) -> list[SubgroupReport]:
    """Compare the groups of each column; p and intervals are corrected for all columns.

    Args:
        columns: a name, and the samples with their group in that column.
        permutations: number of permutations for each column; None: chosen by the numbers of samples and columns.
    Raises:
        UserError: a column with fewer than two groups.
    """
    level = 1 - MAX_P / max(1, len(columns))
    reports = []
    for column, rows in columns:
        count = permutations or _choose_permutations(len(rows), len(columns))
        reports.append(_compare_groups(column, rows, level, count))
    p_values = {i: r.p for i, r in enumerate(reports) if r.p is not None}
    for i, p_holm in zip(p_values, holm([*p_values.values()]), strict=True):
        reports[i].p_holm = p_holm
        reports[i].flags = _list_flags(reports[i], p_holm)
    return reports


def pool(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Average each sample over several runs of one configuration (its seeds); samples that a run lacks are omitted.

    Accuracy and rates are then the means over runs; AUC and calibration are those of the mean risk. A sample that occurs
    several times in a run is averaged first.
    """
    tables = [_average_samples(rows) for rows in runs]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    return [_average_rows([table[key] for table in tables]) for key in shared]


def _average_samples(rows: Iterable[Row]) -> dict[str, Row]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.sample, []).append(row)
    return {key: _average_rows(group) for key, group in groups.items()}


def _average_rows(rows: list[Row]) -> Row:
    if len(rows) == 1:
        return rows[0]

    def mean(name: str) -> float | None:
        values = [getattr(row, name) for row in rows]
        return None if None in values else sum(values) / len(values)

    means: dict[str, Any] = {name: mean(name) for name in ("correct", "risk", "predicted", "order")}
    return replace(rows[0], **means)


@dataclass(frozen=True, eq=False)
class _Arrays:
    """Rows as arrays [n]; NaN where a number is unknown."""

    names: list[str]
    group: "np.ndarray"
    correct: "np.ndarray"
    positive: "np.ndarray"
    risk: "np.ndarray"
    order: "np.ndarray"
    predicted: "np.ndarray"
    unit: "np.ndarray | None"
    """Numbers from 0 on; None where each sample is its own unit."""


def _make_arrays(rows: Sequence[Row]) -> _Arrays:
    import numpy as np

    def numbers(values: Iterable[float | bool | None]) -> "np.ndarray":
        return np.array([np.nan if v is None else float(v) for v in values])

    has_order = any(r.order is not None for r in rows)

    def order(row: Row) -> float | None:
        if row.order is not None or row.risk is None or not has_order:
            return row.risk if row.order is None else row.order
        return math.log(row.risk / (1 - row.risk)) if 0 < row.risk < 1 else math.copysign(math.inf, row.risk - 0.5)

    names, group = np.unique([r.group for r in rows], return_inverse=True)
    # A sample without a unit is its own unit; the prefixes keep its name apart from those of the units.
    units = np.unique(
        [f"={r.unit}" if r.unit is not None else f"#{i}" for i, r in enumerate(rows)], return_inverse=True
    )[1]
    return _Arrays(
        [str(name) for name in names],
        group,
        numbers(r.correct for r in rows),
        numbers(r.positive for r in rows),
        numbers(r.risk for r in rows),
        numbers(map(order, rows)),
        numbers(r.predicted for r in rows),
        units if units.max() + 1 < len(rows) else None,
    )


def _compare_groups(column: str, rows: Sequence[Row], level: float, permutations: int) -> SubgroupReport:
    import numpy as np

    if len({r.group for r in rows}) < 2:
        raise UserError(f"{column} names {len({r.group for r in rows})} groups; there is nothing to compare")
    arrays = _make_arrays(rows)
    groups = [_make_group(name, arrays, arrays.group == number) for number, name in enumerate(arrays.names)]
    quality, decisions = _compare_metrics(arrays, level, permutations)
    for c in (*quality, *decisions):
        for number, d in c.versus_others.items():
            groups[number].versus_others[c.metric] = [d.difference, *_clip(c.metric, d.low, d.high)]
    differences = [_make_difference(c, arrays.names) for c in quality]
    rates = {c.metric: _make_difference(c, arrays.names) for c in decisions}
    auc_std, auc_range = _describe_groups(groups)
    report = SubgroupReport(
        column, len(rows), _make_group("all", arrays, np.ones(len(rows), dtype=bool)), groups,
        min((d.p for d in differences), default=None), None, differences, rates.get("selection_rate"),
        _equalized_odds(rates), auc_std, auc_range, level, permutations,
    )  # fmt: skip
    report.notes = _list_notes(report)
    return report


def _choose_permutations(samples: int, columns: int) -> int:
    """Return fewer for very many samples (499 of 100,000 take 3 seconds), but enough for a small p after correction."""
    return max(1999 if samples <= 5000 else 999 if samples <= 20_000 else 499, 25 * columns)


def _compare_metrics(
    arrays: _Arrays, level: float, permutations: int
) -> "tuple[list[GroupComparison], list[GroupComparison]]":
    """Compare accuracy, AUC and calibration, which are one family, and the rates, which are another."""
    grouping = arrange(arrays.group, arrays.unit)
    quality_metrics, decision_metrics = _quality_metrics(grouping, arrays), _decision_metrics(grouping, arrays)
    quality = compare(grouping, quality_metrics, level, permutations)
    decisions = compare(grouping, decision_metrics, level, permutations)
    names = {c.metric for c in decisions}
    constant = [c for c in compare_constant(grouping, decision_metrics, level) if c.metric not in names]
    return quality, decisions + constant


def _quality_metrics(grouping: "Grouping", arrays: _Arrays) -> "list[Metric]":
    import numpy as np

    has_risk = np.isfinite(arrays.risk) & np.isfinite(arrays.positive)
    metrics = [make_mean_metric("accuracy", grouping, arrays.correct)]
    if has_risk.any():
        positive = has_risk & (arrays.positive == 1)
        metrics.append(make_auc_metric(grouping, np.where(has_risk, arrays.order, 0), positive, has_risk & ~positive))
        metrics.append(_make_metric(grouping, "calibration", arrays.risk - arrays.positive, has_risk))
    return metrics


def _decision_metrics(grouping: "Grouping", arrays: _Arrays) -> "list[Metric]":
    masks = _decision_masks(arrays)
    return [_make_metric(grouping, name, arrays.predicted, mask) for name, mask in masks.items() if mask.any()]


def _decision_masks(arrays: _Arrays) -> "dict[str, np.ndarray]":
    """Return name of a rate -> [n] whether a sample counts for it."""
    import numpy as np

    is_known = np.isfinite(arrays.predicted)
    masks = (is_known, is_known & (arrays.positive == 1), is_known & (arrays.positive == 0))
    return dict(zip(DECISIONS, masks, strict=True))


def _make_metric(grouping: "Grouping", name: str, values: "np.ndarray", is_counted: "np.ndarray") -> "Metric":
    return make_mean_metric(name, grouping, values, None if is_counted.all() else is_counted)


def _clip(metric: str, *ends: float) -> list[float]:
    """Return the ends of an interval, within the bounds of the metric's differences."""
    bound = 2.0 if metric == "calibration" else 1.0
    return [max(-bound, min(bound, end)) for end in ends]


def _make_difference(c: "GroupComparison", names: list[str]) -> SubgroupDifference:
    low, high = _clip(c.metric, c.gap.low, c.gap.high)
    return SubgroupDifference(c.metric, c.gap.difference, low, high, c.p, names[c.highest], names[c.lowest])


def _equalized_odds(rates: dict[str, SubgroupDifference]) -> SubgroupDifference | None:
    odds = [rates[name] for name in DECISIONS[1:] if name in rates]
    if len(odds) < 2:  # samples of one class have only one of the two rates
        return None
    largest = max(odds, key=lambda d: d.difference)
    low, high, p = max(d.low for d in odds), max(d.high for d in odds), min(d.p for d in odds)
    return replace(largest, low=low, high=high, p=p)


def _make_group(name: str, arrays: _Arrays, is_member: "np.ndarray") -> Group:
    import numpy as np

    units = None if arrays.unit is None else len(np.unique(arrays.unit[is_member]))
    group = Group(name, int(is_member.sum()), units)
    _add_metric(group, "accuracy", "accuracy", _select(arrays, is_member, arrays.correct))
    has_risk = is_member & np.isfinite(arrays.risk) & np.isfinite(arrays.positive)
    if has_risk.any():
        risks = _select(arrays, has_risk, arrays.correct)
        group.mean_risk = float(arrays.risk[has_risk].mean())
        group.share_positive = float(arrays.positive[has_risk].mean())
        _add_metric(group, "calibration", "mean_error", risks)
        _add_metric(group, "r_ece", "r_ece", risks)
        group.r_ece_calibrated = null_calibration_error("r_ece", risks)
        if 0 < group.share_positive < 1:
            _add_metric(group, "auc", "auc", risks)
    elif np.isfinite(arrays.positive[is_member]).all():
        group.share_positive = float(arrays.positive[is_member].mean())
    for rate, is_counted in _decision_masks(arrays).items():
        if (is_member & is_counted).any():
            _add_metric(group, rate, "accuracy", _select(arrays, is_member & is_counted, arrays.predicted))
    return group


def _select(arrays: _Arrays, is_member: "np.ndarray", value: "np.ndarray") -> Samples:
    """Return the members as samples whose score is `value`."""
    import numpy as np

    unit = None if arrays.unit is None else np.unique(arrays.unit[is_member], return_inverse=True)[1]
    if unit is not None and unit.max() + 1 == len(unit):
        unit = None
    positive, risk, order = arrays.positive[is_member], arrays.risk[is_member], arrays.order[is_member]
    label = positive.astype(int) if np.isfinite(positive).all() else None
    return Samples(value[is_member], label=label, positive=positive, risk=risk, order=order, unit=unit)


def _add_metric(group: Group, name: str, metric: str, samples: Samples) -> None:
    """Set an attribute of the group to a metric of samples, with its interval."""
    import numpy as np

    setattr(group, name, float(compute_metric(metric, samples, np.ones(len(samples)))))
    interval = compute_interval(metric, samples)
    if interval is not None:
        group.intervals[name] = [interval.low, interval.high]


def _describe_groups(groups: list[Group]) -> tuple[float | None, float | None]:
    """Set z and notes of each group; return the standard deviation and the range of the AUCs."""
    import numpy as np

    accuracies: np.ndarray = np.array([g.accuracy for g in groups])
    deviations = accuracies - accuracies.mean()
    for g, deviation in zip(groups, deviations, strict=True):
        g.z = float(deviation / accuracies.std()) if accuracies.std() > 1e-12 else None
        g.notes = [f"z of accuracy {g.z:.2f} < {MIN_Z}"] if g.z is not None and g.z < MIN_Z else []
        g.notes += [f"AUC {g.auc:.3f} < {MIN_AUC}"] if g.auc is not None and g.auc < MIN_AUC else []
    aucs = np.array([g.auc for g in groups if g.auc is not None])
    return (float(aucs.std()), float(np.ptp(aucs))) if len(aucs) > 1 else (None, None)


def _list_notes(report: SubgroupReport) -> list[str]:
    std, auc_range, notes = report.auc_std, report.auc_range, []
    if std is not None and std > MAX_AUC_STD:
        notes.append(f"AUC: standard deviation {std:.3f} > {MAX_AUC_STD}")
    if auc_range is not None and auc_range > MAX_AUC_RANGE:
        notes.append(f"AUC: range {auc_range:.3f} > {MAX_AUC_RANGE}")
    return notes + [f"{g.name}: {note}" for g in report.groups for note in g.notes]


def _list_flags(report: SubgroupReport, p_holm: float) -> list[str]:
    if p_holm >= MAX_P:
        return []
    metrics = [WORDS[d.metric] for d in report.differences if d.p < MAX_P]
    verb = "differs" if len(metrics) == 1 else "differ"
    return [f"{report.column}: {' and '.join(metrics)} {verb} between groups ({format_p(report)})"]


def is_different(group: Group) -> bool:
    """Return whether an interval of the group's difference from all others in accuracy, AUC or calibration excludes 0."""
    differences = [group.versus_others[name] for name in QUALITY if name in group.versus_others]
    return any(not low <= 0 <= high for _, low, high in differences)


def format_p(report: "SubgroupReport | SubgroupDifference") -> str:
    """Return p for people; for a column of several also the corrected one."""
    p, p_holm = report.p, getattr(report, "p_holm", report.p)
    assert p is not None, "a column without p has nothing to report"
    text = f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"
    return text if p_holm == p else f"{text}, corrected for all columns {p_holm:.2g}"
