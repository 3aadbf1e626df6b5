"""Each configuration compared with the base model, the constant baseline (chance), and the best configuration.

Comparisons are paired by item, over the items that both answered. All tests of one page are one family for Holm's
correction. A configuration that gives every item the same answer gets no p, because its scores do not depend on the items.
Neither does one that is better than the base model, but no better than a constant: training may have changed only the form
of its answers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.configurations import Configuration
from cruijff_kit.analysis.differences import (
    Difference,
    SeedVariance,
    compare,
    correct_differences,
    item_values,
    pool_seeds,
)
from cruijff_kit.analysis.measures import BOUNDS, Samples, is_computable
from cruijff_kit.analysis.samples import align, load_constant_samples, load_samples
from cruijff_kit.analysis.validation import read_row_losses
from cruijff_kit.records.result import higher_is_better
from cruijff_kit.util.json_output import to_plain

if TYPE_CHECKING:
    import numpy as np

BASE_MODEL, CHANCE, BEST = "base model", "chance", "best"
VALIDATION = ("validation", "loss", "validation_loss")
"""Task, scorer and metric of a comparison of validation losses."""
SAME_ANSWER = "no test: one answer to all"
NO_BETTER_THAN_CHANCE = "no test: no better than chance"
_RISK_METRICS = ("auc", "brier", "r_ece")  # they do not depend on the option in the answer
MetricKey = tuple[str, str, str]
"""(task, scorer, metric)."""


@dataclass(frozen=True)
class Comparison:
    """The difference between a configuration's metric and that of a reference."""

    configuration: str
    against: str
    """The reference: base model, chance or best."""
    task: str
    scorer: str
    metric: str
    items: int
    """Number of items (or units of items, or validation rows) that both have."""
    seeds: int
    """Number of the configuration's runs."""
    difference: float
    low: float
    """Lower end of the 95% interval, which is simultaneous over all comparisons of the page."""
    high: float
    """Upper end of the interval."""
    p: float
    """Two-sided p of no difference; NaN without a test."""
    p_holm: float
    """p corrected for all tests of the page (Holm 1979)."""
    method: str
    """Name of the test, or the reason why there is none."""

    @property
    def is_different(self) -> bool:
        """Return whether the difference is significant at 5%."""
        return self.p_holm < 0.05

    @property
    def metric_key(self) -> MetricKey:
        """Return task, scorer and metric."""
        return self.task, self.scorer, self.metric

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value; a number that is not finite is null."""
        values: dict[str, Any] = to_plain(self)
        return values


@dataclass(frozen=True)
class _Contrast:
    configuration: Configuration
    against: str
    metric_key: MetricKey
    difference: Difference
    reason_untested: str = ""
    """Why there is no test; empty where there is one."""


def compare_configurations(
    configurations: list[Configuration],
    metrics: list[MetricKey],
    leaders: dict[int, Configuration],
    chosen_by: set[MetricKey],
) -> dict[str, list[Comparison]]:
    """Compare each configuration with the base model, with chance, and with the best one.

    Args:
        configurations: all configurations of the page.
        metrics: the metrics to compare.
        leaders: id of a configuration -> the leader of its ranking; without the leaders themselves.
        chosen_by: the metrics that choose the best; the validation loss is compared with the best's beside `metrics`.

    Returns:
        Name of each configuration -> its comparisons.
    """
    contrasts: list[_Contrast] = []
    for metric_key in metrics:
        seed_variance = _pool_seed_variance(configurations, metric_key)
        for c in configurations:
            contrasts += _compare_with_baselines(c, metric_key, seed_variance)
            if id(c) in leaders:
                contrasts += _compare_with_best(c, leaders[id(c)], metric_key, seed_variance)
    if VALIDATION in chosen_by:
        for c in configurations:
            if id(c) in leaders:
                contrasts += _compare_validation_losses(c, leaders[id(c)])
    return _correct_contrasts(configurations, contrasts)


def _correct_contrasts(configurations: list[Configuration], contrasts: list[_Contrast]) -> dict[str, list[Comparison]]:
    corrections = iter(correct_differences([t.difference for t in contrasts if not t.reason_untested]))
    comparisons: dict[str, list[Comparison]] = {c.name: [] for c in configurations}
    for t in contrasts:
        d = t.difference
        (low, high, p_holm), p, method = (*d.interval(0.95), math.nan), math.nan, t.reason_untested
        if not t.reason_untested:
            (low, high, p_holm), p, method = next(corrections), d.p, d.method
        if BOUNDS.get(t.metric_key[2]) == (0, 1):
            low, high = max(-1.0, low), min(1.0, high)
        comparisons[t.configuration.name].append(
            Comparison(t.configuration.name, t.against, *t.metric_key, d.items, len(t.configuration.runs), d.difference,
                       low, high, p, p_holm, method)
        )  # fmt: skip
    order = (BASE_MODEL, CHANCE, BEST)
    return {name: sorted(group, key=lambda c: order.index(c.against)) for name, group in comparisons.items()}


def _compare_with_baselines(
    c: Configuration, metric_key: MetricKey, seed_variance: SeedVariance | None
) -> Iterator[_Contrast]:
    """Compare with the constant baseline and with the base model, which were not trained."""
    task, scorer, metric = metric_key
    evaluations = c.evaluations(task)
    if not evaluations or scorer not in evaluations[0].metrics:
        return
    reason = SAME_ANSWER if _is_constant(c, metric_key) else ""
    tables = [load_samples(e.log, scorer) for e in evaluations]
    constant = [load_constant_samples(evaluations[0].log, scorer, metric)]
    base_model = [load_samples(e.log, scorer) for e in c.evaluations(task, base_model=True)[:1]]
    is_above_chance = True  # where there is no constant
    for against, reference in ((CHANCE, constant), (BASE_MODEL, base_model)):
        samples = align([*tables, *reference]) if reference else None
        if samples is None or not all(is_computable(metric, s) for s in samples):
            continue
        # With one seed the comparison is one of this run, whatever other seeds would do.
        seeds = seed_variance if len(evaluations) > 1 else None
        rows, reference_rows = _stack_values(metric, samples[:-1]), _stack_values(metric, samples[-1:])
        difference = compare(rows, reference_rows, seeds, is_reference_fixed=True)
        gain = difference.difference if higher_is_better(metric) else -difference.difference
        if against == CHANCE:
            is_above_chance = gain > 0
        elif gain > 0 and not is_above_chance:
            reason = reason or NO_BETTER_THAN_CHANCE
        yield _Contrast(c, against, metric_key, difference, reason)


def _is_constant(c: Configuration, metric_key: MetricKey) -> bool:
    """Return whether each run gives every item the same answer, so that the metric does not depend on the items."""
    task, _, metric = metric_key
    return metric not in _RISK_METRICS and all(e.constant_answer for e in c.evaluations(task))


def _compare_with_best(
    c: Configuration, best: Configuration, metric_key: MetricKey, seed_variance: SeedVariance | None
) -> Iterator[_Contrast]:
    task, scorer, metric = metric_key
    tables, reference = ([load_samples(e.log, scorer) for e in side.evaluations(task)] for side in (c, best))
    samples = align([*tables, *reference]) if tables and reference else None
    if samples is None or not all(is_computable(metric, s) for s in samples):
        return
    rows, reference_rows = _stack_values(metric, samples[: len(tables)]), _stack_values(metric, samples[len(tables) :])
    reason = SAME_ANSWER if _is_constant(c, metric_key) and _is_constant(best, metric_key) else ""
    yield _Contrast(c, BEST, metric_key, compare(rows, reference_rows, seed_variance), reason)


def _compare_validation_losses(c: Configuration, best: Configuration) -> Iterator[_Contrast]:
    """Compare validation losses row by row; not at all where a run's rows were not kept."""
    losses = read_row_losses([*c.runs, *best.runs])
    if losses is not None:
        rows, reference_rows = losses[: len(c.runs)], losses[len(c.runs) :]
        difference = compare(rows, reference_rows, pool_seeds([rows, reference_rows]))
        yield _Contrast(c, BEST, VALIDATION, difference)


def _stack_values(metric: str, samples: list[Samples]) -> "np.ndarray":
    """Return [seeds, items] the item values of each run."""
    import numpy as np

    return np.stack([item_values(metric, s) for s in samples])


def _pool_seed_variance(configurations: list[Configuration], metric_key: MetricKey) -> SeedVariance | None:
    """Pool the variance between seeds of all configurations that have several."""
    task, scorer, metric = metric_key
    sides = []
    for c in configurations:
        samples = align([load_samples(e.log, scorer) for e in c.evaluations(task)]) if len(c.runs) > 1 else None
        if samples and all(is_computable(metric, s) for s in samples):
            sides.append(_stack_values(metric, samples))
    return pool_seeds(sides)


def format_comparison(comparisons: list[Comparison], against: str, metric_key: MetricKey) -> str:
    """Return a cell of the table: difference [interval] corrected p."""
    for c in comparisons:
        if (c.against, c.metric_key) == (against, metric_key):
            ends = f"{_format_signed(c.low)}, {_format_signed(c.high)}"
            return f"{_format_signed(c.difference)} [{ends}] {_format_p(c)}"
    return ""


def _format_p(c: Comparison) -> str:
    if math.isnan(c.p_holm):
        return c.method
    return "p<0.001" if c.p_holm < 0.001 else f"p={c.p_holm:.3f}"


def _format_signed(value: float) -> str:
    if not math.isfinite(value):
        return "-" if value < 0 else "+"
    return f"{value:+.2f}" if abs(value) < 10 else f"{value:+.3g}"


def make_csv_columns(comparisons: list[Comparison]) -> dict[str, float | int | str]:
    """Return columns of results.csv: "versus AGAINST TASK/SCORER/METRIC FIELD"."""
    names = ("difference", "low", "high", "p", "p_holm", "items")
    return {f"versus {c.against} {'/'.join(c.metric_key)} {k}": getattr(c, k) for c in comparisons for k in names}
