"""Is a model as good for every group of samples? Figures of each group with intervals, and one test for each column.

A column of the data (sex, region) says which group each sample is of. It is flagged where accuracy, AUC or calibration
differ between its groups by more than chance: one permutation test for all three (`permutation`), Holm's correction over
columns. Selection rates, true and false positive rates and the fairness differences made of them have intervals, but are
not flagged: whether groups should be selected alike is not for statistics to say.
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

    from cruijff_kit.analysis.measures import Samples
    from cruijff_kit.analysis.permutation import Comparison, Grouping, Metric

MAX_P = 0.05
"""A column whose corrected p is below this is flagged."""
MAX_AUC_STD, MAX_AUC_RANGE, MIN_Z, MIN_AUC = 0.1, 0.3, -1.5, 0.6
"""What is noted, but not flagged: groups that do not differ at all exceed these, too (4 groups of 25 in more than half of
all cases)."""
MOST_GROUPS = 20
"""A column with more of them hardly names groups; it is compared only where it was asked for."""
QUALITY = ("accuracy", "auc", "calibration")
DECISIONS = ("selection_rate", "true_positive_rate", "false_positive_rate")
WORDS = {
    "accuracy": "accuracy", "auc": "AUC", "calibration": "calibration", "selection_rate": "selection rate",
    "true_positive_rate": "true positive rate", "false_positive_rate": "false positive rate",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One sample, as one run or the mean over several runs has it."""

    group: str
    correct: float
    """1 right, 0 wrong."""
    positive: bool | None = None
    """Whether the label is the positive (last) option; None: not known."""
    risk: float | None = None
    """P(positive option)."""
    predicted: float | None = None
    """Whether the positive option was predicted; over several runs the share of them."""
    order: float | None = None
    """What ranks the samples: log-odds of the risk; None: they are to be computed from it."""
    unit: str | None = None
    """The respondent (household, country) it is of; None: it is its own."""
    sample: str = ""
    """What identifies it over runs."""


@dataclass
class Difference:
    """A difference between groups. Its interval holds the truth in 95% of repetitions together with all others of its kind
    in the report, and excludes 0 only where p is below 0.05.
    """

    metric: str
    difference: float
    low: float
    high: float
    p: float
    """Of no difference, corrected for the metrics that were tested with it, not for columns."""
    highest: str
    """The group with the largest value, and that with the smallest; the same one where all are alike."""
    lowest: str


@dataclass
class Group:
    """One group. None where a number is not known or not defined."""

    name: str
    samples: int
    units: int | None = None
    accuracy: float | None = None
    auc: float | None = None
    share_positive: float | None = None
    mean_risk: float | None = None
    calibration: float | None = None
    """Mean risk less the share of positive labels (calibration in the large)."""
    r_ece: float | None = None
    """Calibration error of the risk, and what a perfectly calibrated model would show at this number of samples."""
    r_ece_calibrated: float | None = None
    selection_rate: float | None = None
    """Share of which the positive option was predicted; then of those that are positive, and of those that are not."""
    true_positive_rate: float | None = None
    false_positive_rate: float | None = None
    intervals: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> ends of its 95% interval over other samples of this group."""
    versus_others: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> its difference from the mean of all other groups, and the interval's ends, as those of `Difference`."""
    z: float | None = None
    """How many standard deviations (over groups, n) its accuracy lies from the groups' mean."""
    notes: list[str] = field(default_factory=list)
    """Which thresholds it exceeds; a description, no test."""


@dataclass
class SubgroupReport:
    """How the groups of a column compare."""

    column: str
    samples: int
    all: Group
    groups: list[Group]
    p: float | None
    """Of no difference in accuracy, AUC and calibration; None: nothing varies."""
    p_holm: float | None
    """Corrected for all columns that were compared."""
    differences: list[Difference]
    """Of accuracy, AUC and calibration, the largest between two groups."""
    demographic_parity: Difference | None
    """Of selection rates (fairlearn's demographic_parity_difference)."""
    equalized_odds: Difference | None
    """Of true or false positive rates, the larger one (fairlearn's equalized_odds_difference)."""
    auc_std: float | None
    """Standard deviation (n) and range of the groups' AUCs."""
    auc_range: float | None
    level: float
    """Of the intervals of this column's differences: 95% of all columns together."""
    permutations: int
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare_columns(*columns: tuple[str, Sequence[Row]], permutations: int | None = None) -> list[SubgroupReport]:
    """Compare the groups of each column; p and intervals are corrected for all of them.

    Args:
        columns: a name, and the samples with the group that the column says.
        permutations: how many are drawn for each column; None: as many as their number asks for.
    Raises:
        UserError: a column with fewer than two groups.
    """
    level = 1 - MAX_P / max(1, len(columns))
    reports = [
        _report(column, rows, level, permutations or _permutations(len(rows), len(columns))) for column, rows in columns
    ]
    tested = [r for r in reports if r.p is not None]
    for report, p in zip(tested, holm([r.p for r in tested]), strict=True):
        report.p_holm = p
        report.flags = _flags(report)
    return reports


def pool(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """The samples of several runs of one configuration (its seeds) as one: the mean of each sample over those that has them
    all. Accuracy and rates are then the means over runs; AUC and calibration are those of the mean risk.

    A sample that a run was asked several times counts once.
    """
    of_runs = [_by_sample(rows) for rows in runs]
    shared = [key for key in of_runs[0] if all(key in other for other in of_runs)]
    return [_mean([other[key] for other in of_runs]) for key in shared]


def _by_sample(rows: Iterable[Row]) -> dict[str, Row]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.sample, []).append(row)
    return {key: _mean(same) for key, same in found.items()}


def _mean(rows: list[Row]) -> Row:
    if len(rows) == 1:
        return rows[0]

    def mean(name: str) -> float | None:
        values = [getattr(row, name) for row in rows]
        return None if None in values else sum(values) / len(values)

    means: dict[str, Any] = {name: mean(name) for name in ("correct", "risk", "predicted", "order")}
    return replace(rows[0], **means)


@dataclass(frozen=True, eq=False)
class _Arrays:
    """Rows as arrays [n]; NaN where a number is not known."""

    names: list[str]
    group: "np.ndarray"
    correct: "np.ndarray"
    positive: "np.ndarray"
    risk: "np.ndarray"
    order: "np.ndarray"
    predicted: "np.ndarray"
    unit: "np.ndarray | None"
    """Numbers from 0 on; None where each sample is its own unit."""


def _arrays(rows: Sequence[Row]) -> _Arrays:
    import numpy as np

    def numbers(values: Iterable[float | bool | None]) -> "np.ndarray":
        return np.array([np.nan if v is None else float(v) for v in values])

    has_order = any(r.order is not None for r in rows)

    def order(row: Row) -> float | None:
        if row.order is not None or row.risk is None or not has_order:
            return row.risk if row.order is None else row.order
        return math.log(row.risk / (1 - row.risk)) if 0 < row.risk < 1 else math.copysign(math.inf, row.risk - 0.5)

    names, group = np.unique([r.group for r in rows], return_inverse=True)
    # A sample without a unit is one of its own, whatever units are called.
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


def _report(column: str, rows: Sequence[Row], level: float, permutations: int) -> SubgroupReport:
    import numpy as np

    if len({r.group for r in rows}) < 2:
        raise UserError(f"{column} names {len({r.group for r in rows})} groups; there is nothing to compare")
    arrays = _arrays(rows)
    groups = [_group(name, arrays, arrays.group == number) for number, name in enumerate(arrays.names)]
    quality, decisions = _compare(arrays, level, permutations)
    for c in (*quality, *decisions):
        for number, d in c.versus_others.items():
            groups[number].versus_others[c.metric] = [d.difference, *_bounded(c.metric, d.low, d.high)]
    differences = [_difference(c, arrays.names) for c in quality]
    decided = {c.metric: _difference(c, arrays.names) for c in decisions}
    std, reach = _describe(groups)
    report = SubgroupReport(
        column, len(rows), _group("all", arrays, np.ones(len(rows), dtype=bool)), groups,
        min((d.p for d in differences), default=None), None, differences, decided.get("selection_rate"),
        _equalized_odds(decided), std, reach, level, permutations,
    )  # fmt: skip
    report.notes = _notes(report)
    return report


def _permutations(samples: int, columns: int) -> int:
    """Fewer for very many samples (499 of 100,000 take 3 seconds); the smallest p must be small corrected, too."""
    return max(1999 if samples <= 5000 else 999 if samples <= 20_000 else 499, 25 * columns)


def _compare(arrays: _Arrays, level: float, permutations: int) -> "tuple[list[Comparison], list[Comparison]]":
    """Of accuracy, AUC and calibration, and of the rates: each a family of its own."""
    grouping = arrange(arrays.group, arrays.unit)
    of_quality, of_decisions = _quality(grouping, arrays), _decisions(grouping, arrays)
    quality, decisions = (compare(grouping, metrics, level, permutations) for metrics in (of_quality, of_decisions))
    varying = {c.metric for c in decisions}
    alike = [c for c in compare_constant(grouping, of_decisions, level) if c.metric not in varying]
    return quality, decisions + alike


def _quality(grouping: "Grouping", arrays: _Arrays) -> "list[Metric]":
    import numpy as np

    has_risk = np.isfinite(arrays.risk) & np.isfinite(arrays.positive)
    metrics = [make_mean_metric("accuracy", grouping, arrays.correct)]
    if has_risk.any():
        positive = has_risk & (arrays.positive == 1)
        metrics.append(make_auc_metric(grouping, np.where(has_risk, arrays.order, 0), positive, has_risk & ~positive))
        metrics.append(_mean_of(grouping, "calibration", arrays.risk - arrays.positive, has_risk))
    return metrics


def _decisions(grouping: "Grouping", arrays: _Arrays) -> "list[Metric]":
    import numpy as np

    is_known = np.isfinite(arrays.predicted)
    counted = (is_known, is_known & (arrays.positive == 1), is_known & (arrays.positive == 0))
    return [
        _mean_of(grouping, name, arrays.predicted, of_these)
        for name, of_these in zip(DECISIONS, counted, strict=True)
        if of_these.any()
    ]


def _mean_of(grouping: "Grouping", name: str, values: "np.ndarray", counted: "np.ndarray") -> "Metric":
    return make_mean_metric(name, grouping, values, None if counted.all() else counted)


def _bounded(metric: str, *ends: float) -> list[float]:
    most = 2.0 if metric == "calibration" else 1.0
    return [max(-most, min(most, end)) for end in ends]


def _difference(found: "Comparison", names: list[str]) -> Difference:
    gap = found.gap
    low, high = _bounded(found.metric, gap.low, gap.high)
    return Difference(found.metric, gap.difference, low, high, found.p, names[found.highest], names[found.lowest])


def _equalized_odds(decided: dict[str, Difference]) -> Difference | None:
    rates = [decided[name] for name in DECISIONS[1:] if name in decided]
    if len(rates) < 2:  # of samples of one class there are no odds
        return None
    largest = max(rates, key=lambda d: d.difference)
    low, high, p = max(d.low for d in rates), max(d.high for d in rates), min(d.p for d in rates)
    return replace(largest, low=low, high=high, p=p)


def _group(name: str, arrays: _Arrays, own: "np.ndarray") -> Group:
    import numpy as np

    group = Group(name, int(own.sum()), None if arrays.unit is None else len(np.unique(arrays.unit[own])))
    _add(group, "accuracy", "accuracy", _samples(arrays, own, arrays.correct))
    has_risk = own & np.isfinite(arrays.risk) & np.isfinite(arrays.positive)
    if has_risk.any():
        risks = _samples(arrays, has_risk, arrays.correct)
        group.mean_risk, group.share_positive = float(risks.risk.mean()), float(risks.positive.mean())
        _add(group, "calibration", "mean_error", risks)
        _add(group, "r_ece", "r_ece", risks)
        group.r_ece_calibrated = null_calibration_error("r_ece", risks)
        if 0 < group.share_positive < 1:
            _add(group, "auc", "auc", risks)
    elif np.isfinite(arrays.positive[own]).all():
        group.share_positive = float(arrays.positive[own].mean())
    is_known = own & np.isfinite(arrays.predicted)
    counted = (is_known, is_known & (arrays.positive == 1), is_known & (arrays.positive == 0))
    for name, of_these in zip(DECISIONS, counted, strict=True):
        if of_these.any():
            _add(group, name, "accuracy", _samples(arrays, of_these, arrays.predicted))
    return group


def _samples(arrays: _Arrays, own: "np.ndarray", value: "np.ndarray") -> "Samples":
    import numpy as np

    unit = None if arrays.unit is None else np.unique(arrays.unit[own], return_inverse=True)[1]
    if unit is not None and unit.max() + 1 == len(unit):
        unit = None
    positive = arrays.positive[own]
    label = positive.astype(int) if np.isfinite(positive).all() else None
    return Samples(
        value[own], label=label, positive=positive, risk=arrays.risk[own], order=arrays.order[own], unit=unit
    )


def _add(group: Group, name: str, metric: str, samples: "Samples") -> None:
    import numpy as np

    setattr(group, name, float(compute_metric(metric, samples, np.ones(len(samples)))))
    interval = compute_interval(metric, samples)
    if interval is not None:
        group.intervals[name] = [interval.low, interval.high]


def _describe(groups: list[Group]) -> tuple[float | None, float | None]:
    """Sets z and notes of each group; the standard deviation and the range of the AUCs."""
    import numpy as np

    accuracies = np.array([g.accuracy for g in groups])
    for g in groups:
        g.z = float((g.accuracy - accuracies.mean()) / accuracies.std()) if accuracies.std() > 1e-12 else None
        g.notes = [f"z of accuracy {g.z:.2f} < {MIN_Z}"] if g.z is not None and g.z < MIN_Z else []
        g.notes += [f"AUC {g.auc:.3f} < {MIN_AUC}"] if g.auc is not None and g.auc < MIN_AUC else []
    aucs = np.array([g.auc for g in groups if g.auc is not None])
    return (float(aucs.std()), float(np.ptp(aucs))) if len(aucs) > 1 else (None, None)


def _notes(report: SubgroupReport) -> list[str]:
    std, reach = report.auc_std, report.auc_range
    notes = [f"AUC: standard deviation {std:.3f} > {MAX_AUC_STD}"] if std is not None and std > MAX_AUC_STD else []
    notes += [f"AUC: range {reach:.3f} > {MAX_AUC_RANGE}"] if reach is not None and reach > MAX_AUC_RANGE else []
    return notes + [f"{g.name}: {note}" for g in report.groups for note in g.notes]


def _flags(report: SubgroupReport) -> list[str]:
    if report.p_holm >= MAX_P:
        return []
    what = [WORDS[d.metric] for d in report.differences if d.p < MAX_P]
    verb = "differs" if len(what) == 1 else "differ"
    return [f"{report.column}: {' and '.join(what)} {verb} between groups ({format_p(report)})"]


def is_different(group: Group) -> bool:
    """Whether an interval of its accuracy, AUC or calibration less that of all other groups excludes 0."""
    found = (group.versus_others.get(name) for name in QUALITY)
    return any(d is not None and not d[1] <= 0 <= d[2] for d in found)


def format_p(report: "SubgroupReport | Difference") -> str:
    """p for people; of a column also the corrected one, where there are several."""
    p, p_holm = report.p, getattr(report, "p_holm", report.p)
    text = f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"
    return text if p_holm == p else f"{text}, corrected for all columns {p_holm:.2g}"
