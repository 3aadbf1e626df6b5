"""Intervals of the scores of one run (or of a configuration of several seeds) over other samples of test items.

shares (accuracy)         Wilson (1927), always; clustered items count as fewer
means (mae, brier, mean)  studentised bootstrap (Efron and Tibshirani 1993, 12.5), which covers at 10 items, too
calibration errors        inverted simulation, because they are biased: that of a perfectly calibrated model is above 0
other metrics             bootstrap, bias-corrected and accelerated (BCa, Efron 1987; scipy)

Items of one respondent (household, country) are resampled together. tests/analysis/test_coverage.py measures how often
each interval covers the true value.
"""

import functools
import warnings
from typing import TYPE_CHECKING, NamedTuple

from cruijff_kit.analysis.measures import (
    BINS,
    BOUNDS,
    Samples,
    compute_metric,
    is_computable,
    is_mean,
    require,
    squared_errors,
    terms,
)

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95
SEED = 0
RESAMPLES = 1999
_MANY = 2000  # from this number of items on, skewness and bias are negligible, and the jackknife of BCa would be slow
_MAX_SCALE = 2.5  # largest calibration error that is tried, as a multiple of the measured one
_SHARES = ("accuracy", "mean")  # shares of right items, where every score is 0 or 1
_CALIBRATION_ERRORS = ("c_ece", "r_ece")


class Interval(NamedTuple):
    """An interval."""

    low: float
    """Lower end."""
    high: float
    """Upper end."""
    method: str
    """Name of the method, for people."""


def compute_interval(name: str, samples: Samples, level: float = LEVEL) -> Interval | None:
    """Return the interval of a metric of one run over test items; None where no method gives one.

    Args:
        name: accuracy, mean, mae, rmse, r_squared, auc, brier, mean_error, balanced_accuracy, f1, c_ece, r_ece.
        samples: the samples that the metric was computed from.
        level: share of repetitions in which the interval covers the true value.
    """
    import numpy as np

    if not is_computable(name, samples) or len(samples) < 2 or not np.isfinite(_value(name, samples)):
        return None
    if is_mean(name):
        values = terms(name, samples)
        if name in _SHARES and np.isin(values, (0, 1)).all():
            return Interval(*wilson(float(values.mean()), effective_sample_size(values, samples.unit), level), "Wilson")
        return compute_mean_interval(values, samples.unit, level, is_signed=name == "mean_error")
    if name == "rmse":  # the root of a mean
        squares = compute_mean_interval(squared_errors(samples), samples.unit, level)
        return squares and Interval(squares.low**0.5, squares.high**0.5, squares.method)
    if name in _CALIBRATION_ERRORS:
        return _invert_simulation(name, samples, level)
    return _bootstrap_metric(name, samples, level)


def _value(name: str, samples: Samples) -> float:
    import numpy as np

    return float(compute_metric(name, samples, np.ones(len(samples))))


def wilson(share: float, items: float, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's interval of a share (statsmodels), inside 0 and 1 and never empty.

    Args:
        share: share of right items.
        items: number of items; not a whole number where clustered items count as fewer.
        level: of the interval.
    """
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(share * items, items, 1 - level, method="wilson")
    # On the boundary, rounding must not push an end across it.
    return max(0.0, min(float(low), share)), min(1.0, max(float(high), share))


def cluster_sums(values: "np.ndarray", unit: "np.ndarray | None") -> tuple["np.ndarray", "np.ndarray"]:
    """Return the sum of the values and the number of items of each unit: [units], [units]."""
    import numpy as np

    if unit is None:
        return values, np.ones(len(values))
    return np.bincount(unit, weights=values), np.bincount(unit).astype(float)


def standard_error_of_mean(values: "np.ndarray", unit: "np.ndarray | None") -> tuple[float, int]:
    """Return the standard error of a mean over items, clustered by unit (Miller 2024, arXiv 2411.00640), and its degrees
    of freedom.
    """
    sums, sizes = cluster_sums(values, unit)
    units, mean = len(sums), values.mean()
    if units < 2:
        return float("nan"), 0
    squares = ((sums - mean * sizes) ** 2).sum() * units / (units - 1)
    return float(squares**0.5 / len(values)), units - 1


def compute_mean_interval(
    values: "np.ndarray", unit: "np.ndarray | None" = None, level: float = LEVEL, is_signed: bool = False
) -> Interval | None:
    """Return the interval of a mean over items; None where no value differs from the others.

    Args:
        values: [items].
        unit: [items] the number of each item's unit, from 0 on; None: each item is its own unit.
        level: of the interval.
        is_signed: whether the mean may be below 0 although no value is.
    """
    is_clustered = unit is not None and unit.max() + 1 < len(unit)
    error, freedom = standard_error_of_mean(values, unit)
    if not error > 1e-12 * max(1.0, float(abs(values).max())):  # equal values do not show how much others would differ
        return None
    mean = float(values.mean())
    if freedom >= _MANY:
        from scipy.stats import t

        reach = float(t.ppf((1 + level) / 2, freedom)) * error
        return Interval(mean - reach, mean + reach, "normal")
    low, high = studentised_quantiles(values, unit, ((1 - level) / 2, (1 + level) / 2))
    least = 0.0 if (values >= 0).all() and not is_signed else float("-inf")
    name = "studentised bootstrap over units" if is_clustered else "studentised bootstrap"
    return Interval(max(least, mean - high * error), mean - low * error, name)


def effective_sample_size(values: "np.ndarray", unit: "np.ndarray | None") -> float:
    """Return the number of independent items whose mean would have the standard error of these clustered ones."""
    n, variance = len(values), float(values.var())
    if unit is None:
        return n
    error, freedom = standard_error_of_mean(values, unit)
    if not variance > 0 or not error > 0:
        return freedom + 1
    return min(float(n), max(1.0, variance / error**2))


def studentised_quantiles(
    values: "np.ndarray", unit: "np.ndarray | None", probabilities: tuple[float, ...]
) -> list[float]:
    """Return quantiles of `studentised_ratios`; extreme ones from more resamples."""
    import numpy as np

    ratios = studentised_ratios(values, unit, RESAMPLES if min(probabilities) >= 0.01 else 5 * RESAMPLES)
    return [float(q) for q in np.quantile(ratios, probabilities)]


def studentised_ratios(values: "np.ndarray", unit: "np.ndarray | None", resamples: int) -> "np.ndarray":
    """Return (mean of a resample - mean) / standard error of that resample, sorted.

    Resamples of equal items, whose error is 0, are omitted.
    """
    import numpy as np

    sums, sizes = cluster_sums(values, unit)
    units, mean = len(sums), float(values.mean())
    weights = resample_weights(units, resamples)
    total = weights @ sizes
    means = weights @ sums / total
    squares = weights @ sums**2 - 2 * means * (weights @ (sums * sizes)) + means**2 * (weights @ sizes**2)
    errors = np.sqrt(np.maximum(squares, 0) * units / (units - 1)) / total
    is_usable = errors > 1e-9 * max(1e-300, float(abs(values).max()))
    return np.sort((means[is_usable] - mean) / errors[is_usable])


@functools.lru_cache(maxsize=2)
def resample_weights(units: int, resamples: int) -> "np.ndarray":
    """Return [resamples, units] how often each unit is in each resample; the same at each call."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    return rng.multinomial(units, np.full(units, 1 / units), size=resamples).astype(np.float64)


def _bootstrap_metric(name: str, samples: Samples, level: float) -> Interval | None:
    import numpy as np
    from scipy.stats import bootstrap

    unit = samples.unit
    units = len(samples) if unit is None else int(unit.max()) + 1
    if units < 2:
        return None

    def statistic(resamples: "np.ndarray", axis: int = -1) -> "np.ndarray":
        flat = resamples.reshape(-1, resamples.shape[-1])
        cells = flat + np.arange(len(flat))[:, None] * units
        counts = np.bincount(cells.ravel(), minlength=len(flat) * units).reshape(len(flat), units).astype(float)
        values = compute_metric(name, samples, counts if unit is None else counts[:, unit])
        return values.reshape(resamples.shape[:-1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = bootstrap(
            (np.arange(units),), statistic, n_resamples=RESAMPLES if level < 0.98 else 5 * RESAMPLES, batch=250,
            vectorized=True, confidence_level=level, method="BCa" if units <= _MANY else "percentile", random_state=SEED,
        ).confidence_interval  # fmt: skip
    least, most = BOUNDS[name]
    if np.isfinite(ends).all() and ends.low < ends.high:
        method = "BCa bootstrap" if units <= _MANY else "bootstrap"
        return Interval(max(least, float(ends.low)), min(most, float(ends.high)), method)
    return _compute_extreme_interval(name, samples, level)


def _compute_extreme_interval(name: str, samples: Samples, level: float) -> Interval | None:
    """Return the interval of a metric at its best or worst value, which all resamples share: that of a share in which
    all (or none) of the items of the smallest class are right.
    """
    value, (least, most) = _value(name, samples), BOUNDS[name]
    if value not in (least, most) or samples.label is None:
        return None
    import numpy as np

    smallest = int(np.bincount(samples.label)[np.unique(samples.label)].min())
    low, high = wilson(value, smallest, level)
    return Interval(low, high, "Wilson, of the smaller class")


def _invert_simulation(name: str, samples: Samples, level: float) -> Interval | None:
    """Return the range of true calibration errors under which the measured one would not be unusual.

    The gaps of the bins are scaled from 0 to a multiple of the measured ones; outcomes are simulated for each scale.
    """
    import numpy as np

    predicted, actual = _calibration_arrays(name, samples)
    counts, centres, gaps = _bin(predicted, actual)
    n, measured = counts.sum(), np.abs(gaps * counts).sum() / counts.sum()
    noise = _noise(len(counts))
    inflation = _design_effect(predicted, actual, samples.unit)
    plausible = []
    for scale in np.linspace(0, _MAX_SCALE, 101):
        shares = np.clip(centres - scale * gaps, 0, 1)
        deviation = np.sqrt(counts * shares * (1 - shares) * inflation)
        simulated = np.abs(counts * (centres - shares) + noise * deviation).sum(-1) / n
        if min((simulated >= measured).mean(), (simulated <= measured).mean()) > (1 - level) / 2:
            plausible.append(float(np.abs(counts * (centres - shares)).sum() / n))
    low, high = (min(plausible), max(plausible)) if plausible else (0.0, float(measured))
    return Interval(low, high, "by simulation")


def null_calibration_error(name: str, samples: Samples) -> float | None:
    """Return the mean calibration error of a perfectly calibrated model at this number of items; None for metrics that
    are not calibration errors.
    """
    import numpy as np

    if name not in _CALIBRATION_ERRORS or not is_computable(name, samples):
        return None
    predicted, actual = _calibration_arrays(name, samples)
    counts, centres, _ = _bin(predicted, actual)
    deviation = np.sqrt(counts * centres * (1 - centres) * _design_effect(predicted, actual, samples.unit))
    return float((np.abs(_noise(len(counts)) * deviation).sum(-1) / counts.sum()).mean())


def _calibration_arrays(name: str, samples: Samples) -> tuple["np.ndarray", "np.ndarray"]:
    if name == "r_ece":
        return require(samples.risk), require(samples.positive)
    return require(samples.confidence), require(samples.confirmed)


def _bin(predicted: "np.ndarray", actual: "np.ndarray") -> tuple["np.ndarray", "np.ndarray", "np.ndarray"]:
    """Return, for each bin with items, their number, their mean prediction, and its difference from the actual share."""
    import numpy as np

    bins = np.searchsorted(np.arange(1, BINS) / BINS, predicted, side="left")
    counts = np.bincount(bins, minlength=BINS).astype(float)
    has_items = counts > 0
    counts = counts[has_items]
    centres = np.bincount(bins, weights=predicted, minlength=BINS)[has_items] / counts
    shares = np.bincount(bins, weights=actual, minlength=BINS)[has_items] / counts
    return counts, centres, centres - shares


@functools.lru_cache(maxsize=BINS)
def _noise(bins: int) -> "np.ndarray":
    import numpy as np

    return np.random.default_rng(SEED).standard_normal((RESAMPLES, bins))


def _design_effect(predicted: "np.ndarray", actual: "np.ndarray", unit: "np.ndarray | None") -> float:
    """Return the variance of a mean of clustered items, divided by that of independent ones (Kish 1965); at least 1."""
    if unit is None:
        return 1.0
    gaps = actual - predicted
    cluster_error, _ = standard_error_of_mean(gaps, unit)
    plain_error, _ = standard_error_of_mean(gaps, None)
    return max(1.0, cluster_error**2 / plain_error**2) if plain_error > 0 else 1.0
