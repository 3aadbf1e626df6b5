"""What a configuration got, with its interval: over other test items, and with several seeds over other seeds, too."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from cruijff_kit.analysis.configurations import Configuration
from cruijff_kit.analysis.differences import item_values, mean_error
from cruijff_kit.analysis.intervals import LEVEL, calibrated_error, interval_of, interval_of_mean, wilson
from cruijff_kit.analysis.measures import BOUNDS, Samples, is_computable
from cruijff_kit.analysis.samples import align, cached, load_samples
from cruijff_kit.analysis.validation import read_row_losses
from cruijff_kit.records.result import Evaluation

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A number of a configuration: the mean over its seeds, and its interval."""

    value: float
    low: float | None = None
    """End of the interval; None where there is none to be had."""
    high: float | None = None
    seeds: int = 1
    items: int | None = None
    """Test items (or validation rows, or units) that it is over; None where these are not known."""
    over: str = ""
    """What the interval is over: "test items", "test items and seeds", "seeds"; empty without one."""
    seed_deviation: float | None = None
    """Standard deviation between seeds, items left aside; None with one seed."""
    if_calibrated: float | None = None
    """Of a calibration error: what a perfectly calibrated model would show at so many items."""
    level: float = LEVEL


def estimate_evaluation(cell: Evaluation, scorer: str, metric: str, level: float = LEVEL) -> Estimate | None:
    """A metric of one evaluation, over test items; None where it has none."""
    value = cell.metrics.get(scorer, {}).get(metric)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    found = load_samples(cell.log, scorer)
    return _of_one(value, metric, found and found[1], level, cell, scorer)


def estimate(
    configuration: Configuration, task: str, scorer: str, metric: str, level: float = LEVEL, base_model: bool = False
) -> Estimate | None:
    """A metric of a configuration; None where it has none.

    Args:
        level: of the interval; a higher one for a configuration that was chosen as the best of many on these items.
        base_model: of the base model instead.
    """
    values = configuration.values(task, scorer, metric, base_model)
    cells = configuration.evaluations(task, base_model)
    if not values:
        return None
    if base_model or len(values) == 1:
        return estimate_evaluation(cells[0], scorer, metric, level)
    mean = sum(values) / len(values)
    found = align([load_samples(e.log, scorer) for e in cells])
    if found is None or not all(is_computable(metric, s) for s in found):
        return _over_seeds(values, metric, level)
    if metric in ("c_ece", "r_ece"):  # they have no item values
        return _of_each(mean, [estimate_evaluation(e, scorer, metric, level) for e in cells])
    import numpy as np

    rows = np.stack([item_values(metric, s) for s in found])
    # Where nothing varies (all answers right), what each seed's items leave open is all that is known.
    together = _of_many(mean, rows, metric, level, "test items")
    return together or _of_each(mean, [estimate_evaluation(e, scorer, metric, level) for e in cells])


def estimate_loss(configuration: Configuration, name: str, level: float = LEVEL) -> Estimate | None:
    """The validation loss (over validation rows, where these were kept) or the last update's loss of a configuration."""
    values = [r.training.get(name) for r in configuration.runs]
    if not values or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return None
    rows = read_row_losses(configuration.runs) if name == "validation_loss" else None
    if rows is None:
        return Estimate(values[0], level=level) if len(values) == 1 else _over_seeds(values, name, level)
    if len(rows) == 1:
        found = interval_of_mean(rows[0], level=level)
        if not found:
            return Estimate(values[0], level=level)
        return Estimate(values[0], max(0.0, found.low), found.high, 1, rows.shape[1], "validation rows", level=level)
    mean = sum(values) / len(values)
    return _of_many(mean, rows, name, level, "validation rows") or _over_seeds(values, name, level)


def _of_one(
    value: float, metric: str, samples: Samples | None, level: float, cell: Evaluation, scorer: str
) -> Estimate:
    if samples is None:  # the log is gone: a share of right answers needs no more than their number
        if metric == "accuracy":
            return Estimate(value, *wilson(value, cell.samples, level), 1, cell.samples, "test items", level=level)
        return Estimate(value, level=level)

    def compute() -> list[float | None]:
        found = interval_of(metric, samples, level)
        return [*(found[:2] if found else (None, None)), calibrated_error(metric, samples)]

    low, high, expected = cached(cell.log, f"{scorer} {metric} {level}", compute)
    return Estimate(value, low, high, 1, len(samples), "" if low is None else "test items", None, expected, level)


def _of_each(value: float, alone: list[Estimate]) -> Estimate:
    """The mean of each seed's interval, over items alone."""

    def mean(values: list[float | None]) -> float | None:
        return None if None in values else sum(values) / len(values)

    low, high = mean([e.low for e in alone]), mean([e.high for e in alone])
    calibrated, one = mean([e.if_calibrated for e in alone]), alone[0]
    return Estimate(
        value, low, high, len(alone), one.items, "" if low is None else one.over, None, calibrated, one.level
    )


def _of_many(value: float, rows: "np.ndarray", metric: str, level: float, what: str) -> Estimate | None:
    """[seeds, items] -> the estimate over both; None where neither varies."""
    from scipy.special import stdtrit

    seeds, items = rows.shape
    error, freedom, deviation = mean_error(rows)
    if not error > 0:
        return None
    reach = float(stdtrit(freedom, (1 + level) / 2)) * error
    over = f"{what} and seeds"
    if metric == "accuracy" and 0 < value < 1:  # Wilson's, of as many items as have this error, with t's quantile
        reach_of = 2 * NormalDist().cdf(reach / error) - 1
        low, high = wilson(value, value * (1 - value) / error**2, min(reach_of, 1 - 1e-9))
    else:
        least, most = BOUNDS.get(metric, (-math.inf, math.inf))
        low, high = max(least, value - reach), min(most, value + reach)
    return Estimate(value, low, high, seeds, items, over, deviation, None, level)


def _over_seeds(values: list[float], metric: str, level: float) -> Estimate:
    """Student's t over the runs' values, where nothing is known of their items."""
    from scipy.special import stdtrit

    n, mean = len(values), sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    reach = float(stdtrit(n - 1, (1 + level) / 2)) * deviation / math.sqrt(n)
    least, most = BOUNDS.get(metric, (-math.inf, math.inf))
    return Estimate(mean, max(least, mean - reach), min(most, mean + reach), n, None, "seeds", deviation, None, level)
