"""Estimates of a configuration's metrics and losses, with intervals over test items and, if it has several, over seeds."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from cruijff_kit.analysis.configurations import Configuration, is_finite
from cruijff_kit.analysis.differences import crossed_standard_error, item_values
from cruijff_kit.analysis.intervals import (
    LEVEL,
    compute_interval,
    compute_mean_interval,
    null_calibration_error,
    wilson,
)
from cruijff_kit.analysis.measures import BOUNDS, Samples, is_computable
from cruijff_kit.analysis.samples import align, load_or_compute, load_samples
from cruijff_kit.analysis.validation import read_row_losses
from cruijff_kit.records.result import Evaluation

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A metric or loss of a configuration: the mean over its seeds, and its interval."""

    value: float
    low: float | None = None
    """Lower end of the interval; None where no method gives one."""
    high: float | None = None
    """Upper end of the interval."""
    seeds: int = 1
    """Number of runs."""
    items: int | None = None
    """Number of test items (or validation rows, or units); None where it is unknown."""
    over: str = ""
    """Population of the interval: "test items", "test items and seeds", "seeds"; empty without an interval."""
    seed_deviation: float | None = None
    """Standard deviation between seeds, without the variation between items; None with one seed."""
    if_calibrated: float | None = None
    """For a calibration error: the mean error of a perfectly calibrated model at this number of items."""
    level: float = LEVEL
    """Level of the interval."""


def estimate_evaluation(evaluation: Evaluation, scorer: str, metric: str, level: float = LEVEL) -> Estimate | None:
    """Estimate a metric of one evaluation, over test items; None where it lacks the metric."""
    value = evaluation.metrics.get(scorer, {}).get(metric)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    table = load_samples(evaluation.log, scorer)
    return _estimate_run(value, metric, table and table[1], level, evaluation, scorer)


def estimate(
    configuration: Configuration, task: str, scorer: str, metric: str, level: float = LEVEL, base_model: bool = False
) -> Estimate | None:
    """Estimate a metric of a configuration, or of its base model; None where it lacks the metric.

    Args:
        level: of the interval; a higher one for a configuration that was chosen as the best of many on these items.
        base_model: whether to estimate the base model's metric.
    """
    values = configuration.values(task, scorer, metric, base_model)
    evaluations = configuration.evaluations(task, base_model)
    if not values:
        return None
    if base_model or len(values) == 1:
        return estimate_evaluation(evaluations[0], scorer, metric, level)
    mean = sum(values) / len(values)
    samples = align([load_samples(e.log, scorer) for e in evaluations])
    if samples is None or not all(is_computable(metric, s) for s in samples):
        return _estimate_over_seeds(values, metric, level)
    if metric in ("c_ece", "r_ece"):  # they have no item values
        return _average_estimates(mean, evaluations, scorer, metric, level)
    import numpy as np

    rows = np.stack([item_values(metric, s) for s in samples])
    # Where nothing varies (all answers right), only the seeds' own intervals over items are known.
    crossed = _estimate_crossed(mean, rows, metric, level, "test items")
    return crossed or _average_estimates(mean, evaluations, scorer, metric, level)


def estimate_loss(configuration: Configuration, name: str, level: float = LEVEL) -> Estimate | None:
    """Estimate the validation loss of a configuration (over validation rows, where these were kept) or its last update's
    loss.
    """
    values = [v for r in configuration.runs if is_finite(v := r.training.get(name))]
    if not values or len(values) < len(configuration.runs):
        return None
    rows = read_row_losses(configuration.runs) if name == "validation_loss" else None
    if rows is None:
        return Estimate(values[0], level=level) if len(values) == 1 else _estimate_over_seeds(values, name, level)
    if len(rows) == 1:
        interval = compute_mean_interval(rows[0], level=level)
        if not interval:
            return Estimate(values[0], level=level)
        low, high = max(0.0, interval.low), interval.high
        return Estimate(values[0], low, high, 1, rows.shape[1], "validation rows", level=level)
    mean = sum(values) / len(values)
    crossed = _estimate_crossed(mean, rows, name, level, "validation rows")
    return crossed or _estimate_over_seeds(values, name, level)


def _estimate_run(
    value: float, metric: str, samples: Samples | None, level: float, evaluation: Evaluation, scorer: str
) -> Estimate:
    if samples is None:  # without the log: the interval of a share of right answers needs their number alone
        if metric == "accuracy":
            n = evaluation.samples
            return Estimate(value, *wilson(value, n, level), 1, n, "test items", level=level)
        return Estimate(value, level=level)

    def compute() -> list[float | None]:
        interval = compute_interval(metric, samples, level)
        return [*(interval[:2] if interval else (None, None)), null_calibration_error(metric, samples)]

    low, high, null_error = load_or_compute(evaluation.log, f"{scorer} {metric} {level}", compute)
    return Estimate(value, low, high, 1, len(samples), "" if low is None else "test items", None, null_error, level)


def _average_estimates(value: float, evaluations: list[Evaluation], scorer: str, metric: str, level: float) -> Estimate:
    """Return the mean of the intervals of the seeds, each over items alone."""
    estimates = [e for run in evaluations if (e := estimate_evaluation(run, scorer, metric, level))]
    assert len(estimates) == len(evaluations), "every run of a configuration with values has the metric"

    def mean(values: list[float | None]) -> float | None:
        numbers = [v for v in values if v is not None]
        return sum(numbers) / len(numbers) if len(numbers) == len(values) else None

    low, high = mean([e.low for e in estimates]), mean([e.high for e in estimates])
    null_error, first = mean([e.if_calibrated for e in estimates]), estimates[0]
    over = "" if low is None else first.over
    return Estimate(value, low, high, len(estimates), first.items, over, None, null_error, first.level)


def _estimate_crossed(value: float, rows: "np.ndarray", metric: str, level: float, what: str) -> Estimate | None:
    """Estimate the mean of [seeds, items] over both; None where neither varies."""
    from scipy.special import stdtrit

    seeds, items = rows.shape
    error, freedom, deviation = crossed_standard_error(rows)
    if not error > 0:
        return None
    reach = float(stdtrit(freedom, (1 + level) / 2)) * error
    over = f"{what} and seeds"
    if metric == "accuracy" and 0 < value < 1:  # Wilson's, for the number of items with this error, with t's quantile
        normal_level = 2 * NormalDist().cdf(reach / error) - 1
        low, high = wilson(value, value * (1 - value) / error**2, min(normal_level, 1 - 1e-9))
    else:
        least, most = BOUNDS.get(metric, (-math.inf, math.inf))
        low, high = max(least, value - reach), min(most, value + reach)
    return Estimate(value, low, high, seeds, items, over, deviation, None, level)


def _estimate_over_seeds(values: list[float], metric: str, level: float) -> Estimate:
    """Estimate the mean of the runs' values by Student's t, where their items are unknown."""
    from scipy.special import stdtrit

    n, mean = len(values), sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    reach = float(stdtrit(n - 1, (1 + level) / 2)) * deviation / math.sqrt(n)
    least, most = BOUNDS.get(metric, (-math.inf, math.inf))
    return Estimate(mean, max(least, mean - reach), min(most, mean + reach), n, None, "seeds", deviation, None, level)
