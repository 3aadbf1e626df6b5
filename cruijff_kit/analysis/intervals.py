"""Intervals of what one run (or a configuration of several seeds) got on a test split, over other draws of test items.

shares (accuracy)         Wilson (1927), always; clustered items count as fewer
means (mae, brier, mean)  studentised bootstrap (Efron and Tibshirani 1993, 12.5), which covers at 10 items, too
calibration errors        by inverting a simulation: they are biased, a perfectly calibrated model has one above 0
other metrics             bootstrap, bias-corrected and accelerated (BCa, Efron 1987; scipy)

Items of one respondent (household, country) are resampled together. tests/analysis/test_coverage.py shows how often each
covers the truth.
"""

import functools
import warnings
from typing import TYPE_CHECKING, NamedTuple

from cruijff_kit.analysis.measures import BINS, BOUNDS, Samples, is_computable, is_mean, measure, squared_errors, terms

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.95
SEED = 0
RESAMPLES = 1999
_MANY = 2000  # from so many items on skewness and bias are nothing, and the jackknife of BCa would take long
_SHRUNK = 2.5  # largest calibration error that is tried, as a multiple of the measured one
_SHARES = ("accuracy", "mean")  # of items that are right, where each is or is not
_CALIBRATION_ERRORS = ("c_ece", "r_ece")


class Interval(NamedTuple):
    """An interval."""

    low: float
    """Its lower end."""
    high: float
    """Its upper end."""
    method: str
    """How it was computed, for people."""


def interval_of(name: str, samples: Samples, level: float = LEVEL) -> Interval | None:
    """The interval of a metric of one run over test items; None where there is none to be had.

    Args:
        name: accuracy, mean, mae, rmse, r_squared, auc, brier, mean_error, balanced_accuracy, f1, c_ece, r_ece.
        samples: what it was computed from.
        level: share of repetitions in which it holds the truth.
    """
    import numpy as np

    if not is_computable(name, samples) or len(samples) < 2 or not np.isfinite(_value(name, samples)):
        return None
    if is_mean(name):
        values = terms(name, samples)
        if name in _SHARES and np.isin(values, (0, 1)).all():
            return Interval(*wilson(float(values.mean()), effective_items(values, samples.unit), level), "Wilson")
        return interval_of_mean(values, samples.unit, level, is_signed=name == "mean_error")
    if name == "rmse":  # the root of a mean
        squares = interval_of_mean(squared_errors(samples), samples.unit, level)
        return squares and Interval(squares.low**0.5, squares.high**0.5, squares.method)
    if name in _CALIBRATION_ERRORS:
        return _of_calibration_error(name, samples, level)
    return _of_metric(name, samples, level)


def _value(name: str, samples: Samples) -> float:
    import numpy as np

    return float(measure(name)(samples, np.ones(len(samples))))


def wilson(share: float, items: float, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of a share (statsmodels), inside 0 and 1 and never empty.

    Args:
        share: of the items that are right. items: how many; not whole where clustered items count as fewer.
    """
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(share * items, items, 1 - level, method="wilson")
    # On the boundary rounding must not push an end across it.
    return max(0.0, min(float(low), share)), min(1.0, max(float(high), share))


def cluster_sums(values: "np.ndarray", unit: "np.ndarray | None") -> tuple["np.ndarray", "np.ndarray"]:
    """Sums of values and numbers of items of each unit: [units], [units]."""
    import numpy as np

    if unit is None:
        return values, np.ones(len(values))
    return np.bincount(unit, weights=values), np.bincount(unit).astype(float)


def standard_error_of_mean(values: "np.ndarray", unit: "np.ndarray | None") -> tuple[float, int]:
    """Standard error of a mean over items, items of a unit together (Miller 2024, arXiv 2411.00640), and its degrees of
    freedom.
    """
    sums, sizes = cluster_sums(values, unit)
    units, mean = len(sums), values.mean()
    if units < 2:
        return float("nan"), 0
    apart = ((sums - mean * sizes) ** 2).sum() * units / (units - 1)
    return float(apart**0.5 / len(values)), units - 1


def interval_of_mean(
    values: "np.ndarray", unit: "np.ndarray | None" = None, level: float = LEVEL, is_signed: bool = False
) -> Interval | None:
    """The interval of a mean over items; None where nothing varies.

    Args:
        values: [items]. unit: [items] whose each is, numbered from 0; None: each is its own.
        is_signed: whether the mean may be below 0 though no value is.
    """
    clustered = unit is not None and unit.max() + 1 < len(unit)
    error, freedom = standard_error_of_mean(values, unit)
    if not error > 1e-12 * max(1.0, float(abs(values).max())):  # all alike: nothing tells how much others would differ
        return None
    mean = float(values.mean())
    if freedom >= _MANY:
        from scipy.stats import t

        reach = float(t.ppf((1 + level) / 2, freedom)) * error
        return Interval(mean - reach, mean + reach, "normal")
    low, high = studentised_quantiles(values, unit, ((1 - level) / 2, (1 + level) / 2))
    least = 0.0 if (values >= 0).all() and not is_signed else float("-inf")
    name = "studentised bootstrap over units" if clustered else "studentised bootstrap"
    return Interval(max(least, mean - high * error), mean - low * error, name)


def effective_items(values: "np.ndarray", unit: "np.ndarray | None") -> float:
    """How many independent items tell as much about a mean as these, some of which are of one unit."""
    n, variance = len(values), float(values.var())
    if unit is None:
        return n
    error, freedom = standard_error_of_mean(values, unit)
    if not variance > 0 or not error > 0:
        return freedom + 1
    return min(float(n), max(1.0, variance / error**2))


def studentised_quantiles(values: "np.ndarray", unit: "np.ndarray | None", at: tuple[float, ...]) -> list[float]:
    """Quantiles of (mean of a resample - mean) / standard error of that resample; finer ones from more resamples."""
    import numpy as np

    ratios = studentised(values, unit, RESAMPLES if min(at) >= 0.01 else 5 * RESAMPLES)
    return [float(q) for q in np.quantile(ratios, at)]


def studentised(values: "np.ndarray", unit: "np.ndarray | None", resamples: int) -> "np.ndarray":
    """Sorted ratios of `studentised_quantiles`. Resamples of like items, which have no error, are left out."""
    import numpy as np

    sums, sizes = cluster_sums(values, unit)
    units, mean = len(sums), float(values.mean())
    drawn = resample_weights(units, resamples)
    total = drawn @ sizes
    means = drawn @ sums / total
    apart = drawn @ sums**2 - 2 * means * (drawn @ (sums * sizes)) + means**2 * (drawn @ sizes**2)
    errors = np.sqrt(np.maximum(apart, 0) * units / (units - 1)) / total
    usable = errors > 1e-9 * max(1e-300, float(abs(values).max()))
    return np.sort((means[usable] - mean) / errors[usable])


@functools.lru_cache(maxsize=2)
def resample_weights(units: int, resamples: int) -> "np.ndarray":
    """[resamples, units]: how often each unit is in each resample; the same each time."""
    import numpy as np

    draw = np.random.default_rng(SEED)
    return draw.multinomial(units, np.full(units, 1 / units), size=resamples).astype(np.float64)


def _of_metric(name: str, samples: Samples, level: float) -> Interval | None:
    import numpy as np
    from scipy.stats import bootstrap

    compute, unit = measure(name), samples.unit
    units = len(samples) if unit is None else int(unit.max()) + 1
    if units < 2:
        return None

    def statistic(drawn: "np.ndarray", axis: int = -1) -> "np.ndarray":
        flat = drawn.reshape(-1, drawn.shape[-1])
        places = flat + np.arange(len(flat))[:, None] * units
        counts = np.bincount(places.ravel(), minlength=len(flat) * units).reshape(len(flat), units).astype(float)
        return compute(samples, counts if unit is None else counts[:, unit]).reshape(drawn.shape[:-1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bootstrap(
            (np.arange(units),), statistic, n_resamples=RESAMPLES if level < 0.98 else 5 * RESAMPLES, batch=250,
            vectorized=True, confidence_level=level, method="BCa" if units <= _MANY else "percentile", random_state=SEED,
        ).confidence_interval  # fmt: skip
    least, most = BOUNDS[name]
    if np.isfinite(found).all() and found.low < found.high:
        method = "BCa bootstrap" if units <= _MANY else "bootstrap"
        return Interval(max(least, float(found.low)), min(most, float(found.high)), method)
    return _of_perfection(name, samples, level)


def _of_perfection(name: str, samples: Samples, level: float) -> Interval | None:
    """Where all resamples give the same value, that of perfection or its opposite: as a share of as many items as the
    smaller class has, of which all (or none) were right.
    """
    value, (least, most) = _value(name, samples), BOUNDS[name]
    if value not in (least, most) or samples.label is None:
        return None
    import numpy as np

    smallest = int(np.bincount(samples.label)[np.unique(samples.label)].min())
    low, high = wilson(value, smallest, level)
    return Interval(low, high, "Wilson, of the smaller class")


def _of_calibration_error(name: str, samples: Samples, level: float) -> Interval | None:
    """The calibration errors under which the measured one would not be unusual: gaps of the bins from none to a multiple of
    the measured ones, outcomes drawn for each.
    """
    import numpy as np

    predicted, actual = _calibration_arrays(name, samples)
    counts, centres, gaps = _bins(predicted, actual)
    n, measured = counts.sum(), np.abs(gaps * counts).sum() / counts.sum()
    noise = _noise(len(counts))
    inflation = _design_effect(predicted, actual, samples.unit)
    held = []
    for share in np.linspace(0, _SHRUNK, 101):
        shares = np.clip(centres - share * gaps, 0, 1)
        deviation = np.sqrt(counts * shares * (1 - shares) * inflation)
        simulated = np.abs(counts * (centres - shares) + noise * deviation).sum(-1) / n
        if min((simulated >= measured).mean(), (simulated <= measured).mean()) > (1 - level) / 2:
            held.append(float(np.abs(counts * (centres - shares)).sum() / n))
    return Interval(min(held), max(held), "by simulation") if held else Interval(0.0, float(measured), "by simulation")


def calibrated_error(name: str, samples: Samples) -> float | None:
    """The calibration error that a perfectly calibrated model would show on average at this number of items; None for
    metrics that are no calibration errors.
    """
    import numpy as np

    if name not in _CALIBRATION_ERRORS or not is_computable(name, samples):
        return None
    predicted, actual = _calibration_arrays(name, samples)
    counts, centres, _ = _bins(predicted, actual)
    deviation = np.sqrt(counts * centres * (1 - centres) * _design_effect(predicted, actual, samples.unit))
    return float((np.abs(_noise(len(counts)) * deviation).sum(-1) / counts.sum()).mean())


def _calibration_arrays(name: str, samples: Samples) -> tuple["np.ndarray", "np.ndarray"]:
    if name == "r_ece":
        return samples.risk, samples.positive
    return samples.confidence, samples.confirmed


def _bins(predicted: "np.ndarray", actual: "np.ndarray") -> tuple["np.ndarray", "np.ndarray", "np.ndarray"]:
    """Of each bin that is not empty: items, mean of what was predicted, that less the share that came."""
    import numpy as np

    place = np.searchsorted(np.arange(1, BINS) / BINS, predicted, side="left")
    counts = np.bincount(place, minlength=BINS).astype(float)
    used = counts > 0
    centres = np.bincount(place, weights=predicted, minlength=BINS)[used] / counts[used]
    shares = np.bincount(place, weights=actual, minlength=BINS)[used] / counts[used]
    return counts[used], centres, centres - shares


@functools.lru_cache(maxsize=BINS)
def _noise(bins: int) -> "np.ndarray":
    import numpy as np

    return np.random.default_rng(SEED).standard_normal((RESAMPLES, bins))


def _design_effect(predicted: "np.ndarray", actual: "np.ndarray", unit: "np.ndarray | None") -> float:
    """How many times as large the variance of a mean is as with items of different units; 1 without units."""
    if unit is None:
        return 1.0
    gaps = actual - predicted
    clustered, _ = standard_error_of_mean(gaps, unit)
    plain, _ = standard_error_of_mean(gaps, None)
    return max(1.0, clustered**2 / plain**2) if plain > 0 else 1.0
