"""Metrics of evaluated samples under weights, for many weightings at once, as resampling and the jackknife need them.

A sample is an entry of each array of `Samples`; a weight is how often it counts. With all weights 1 every metric equals
that of evaluation/metrics.py (tests compare them with scikit-learn).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BINS = 10  # of a calibration error, as in evaluation/metrics.py


@dataclass(frozen=True, eq=False)
class Samples:
    """The scores of one scorer for n samples; arrays that the scorer does not give are None."""

    value: "np.ndarray"
    """[n] the score: 1 right, 0 wrong; or a distance from the target."""
    label: "np.ndarray | None" = None
    """[n] the right option, as a number from 0 on; the positive one is the largest."""
    predicted: "np.ndarray | None" = None
    """[n] the predicted option, numbered as `label`; -1: none."""
    positive: "np.ndarray | None" = None
    """[n] whether the label is the positive option, 0 or 1."""
    predicted_positive: "np.ndarray | None" = None
    """[n] whether the positive option was predicted, 0 or 1."""
    risk: "np.ndarray | None" = None
    """[n] P(positive option)."""
    order: "np.ndarray | None" = None
    """[n] the number that ranks the samples from negative to positive: log-odds, or the risk."""
    confidence: "np.ndarray | None" = None
    """[n] P(predicted option)."""
    confirmed: "np.ndarray | None" = None
    """[n] whether the option of that probability is the label, 0 or 1."""
    target: "np.ndarray | None" = None
    """[n] the right number."""
    prediction: "np.ndarray | None" = None
    """[n] the predicted number; for an answer without a number, the constant with the smallest absolute error."""
    prediction_for_squares: "np.ndarray | None" = None
    """[n] as `prediction`, but with the constant of the smallest squared error; None: the same as `prediction`."""
    chance: "np.ndarray | None" = None
    """[n] the score of the constant baseline."""
    unit: "np.ndarray | None" = None
    """[n] the respondent (household, country) of each sample, as a number from 0 on; None: each sample has its own."""

    def __len__(self) -> int:
        return len(self.value)


def require(array: "np.ndarray | None") -> "np.ndarray":
    """Return an array of `Samples` that the metric needs (`NEEDS`), so that it is not None."""
    assert array is not None
    return array


BOUNDS: dict[str, tuple[float, float]] = dict.fromkeys(
    ("accuracy", "auc", "balanced_accuracy", "f1", "brier", "c_ece", "r_ece"), (0.0, 1.0)
)
BOUNDS |= dict.fromkeys(("mae", "rmse", "loss", "validation_loss"), (0.0, math.inf)) | {"r_squared": (-math.inf, 1.0)}
"""Metric -> its smallest and its largest possible value."""
NEEDS = {
    "auc": ("positive", "order"), "brier": ("risk", "positive"), "balanced_accuracy": ("label", "predicted"),
    "f1": ("positive", "predicted_positive"), "c_ece": ("confidence", "confirmed"), "r_ece": ("risk", "positive"),
    "mae": ("prediction", "target"), "rmse": ("prediction", "target"), "r_squared": ("prediction", "target"),
}  # fmt: skip
"""Metric -> the arrays that it needs beside `value`."""


def is_computable(name: str, samples: Samples) -> bool:
    """Return whether a metric is known here, the samples have the arrays that it needs, and it is defined for them."""
    if name not in _MEASURES or any(getattr(samples, need) is None for need in NEEDS.get(name, ())):
        return False
    if name == "auc":
        return bool(0 < require(samples.positive).sum() < len(samples))
    return name != "r_squared" or bool(require(samples.target).min() < require(samples.target).max())


Measure = Callable[[Samples, "np.ndarray"], "np.ndarray"]
"""(samples, weights [..., n]) -> values [...]."""


def find_measure(name: str) -> Measure | None:
    """Return the function that computes a metric under weights; None for a metric that is not known here."""
    return _MEASURES.get(name)


def compute_metric(name: str, samples: Samples, weights: "np.ndarray") -> "np.ndarray":
    """Return the values [...] of a metric that `is_computable`, under weights [..., n]."""
    return _MEASURES[name](samples, weights)


def is_mean(name: str) -> bool:
    """Return whether a metric is a mean of one number for each sample."""
    return name in _TERMS


def terms(name: str, samples: Samples) -> "np.ndarray":
    """Return [n] the numbers whose mean is the metric, where `is_mean`."""
    return _TERMS[name](samples)


def _mean(values: "np.ndarray", weights: "np.ndarray") -> "np.ndarray":
    mean: np.ndarray = weights @ values / weights.sum(-1)
    return mean


def _mean_of_terms(name: str) -> Measure:
    return lambda samples, weights: _mean(_TERMS[name](samples), weights)


def _auc(s: Samples, weights: "np.ndarray") -> "np.ndarray":
    """Return P(a positive sample ranks above a negative one), ties counted half (Mann and Whitney 1947); one class: 0.5."""
    import numpy as np

    order, is_positive = require(s.order), require(s.positive)
    _, rank = np.unique(order, return_inverse=True)
    groups = np.argsort(rank, kind="stable")
    starts = np.flatnonzero(np.diff(rank[groups], prepend=-1))
    positive = np.add.reduceat((weights * is_positive)[..., groups], starts, axis=-1)
    negative = np.add.reduceat((weights * (1 - is_positive))[..., groups], starts, axis=-1)
    smaller = np.cumsum(negative, -1) - negative
    pairs = positive.sum(-1) * negative.sum(-1)
    concordant = (positive * (smaller + negative / 2)).sum(-1)
    return np.where(pairs > 0, concordant / np.where(pairs > 0, pairs, 1), 0.5)


def _balanced_accuracy(s: Samples, weights: "np.ndarray") -> "np.ndarray":
    import numpy as np

    labels, predicted, recalls = require(s.label), require(s.predicted), []
    for label in np.unique(labels):
        class_weights = weights * (labels == label)
        total = class_weights.sum(-1)
        hits = class_weights @ (predicted == label).astype(float)
        recalls.append(np.where(total > 0, hits / np.where(total > 0, total, 1), np.nan))
    mean: np.ndarray = np.nanmean(recalls, axis=0)
    return mean


def _f1(s: Samples, weights: "np.ndarray") -> "np.ndarray":
    import numpy as np

    positive, predicted = require(s.positive), require(s.predicted_positive)
    true_positives = weights @ (positive * predicted).astype(float)
    total = weights @ (positive + predicted).astype(float)
    return np.where(total > 0, 2 * true_positives / np.where(total > 0, total, 1), 0.0)


def _calibration_error(predicted: "np.ndarray", actual: "np.ndarray", weights: "np.ndarray") -> "np.ndarray":
    import numpy as np

    bins = np.searchsorted(np.arange(1, BINS) / BINS, predicted, side="left")
    gaps = (predicted - actual)[:, None] * (bins[:, None] == np.arange(BINS))
    error: np.ndarray = np.abs(weights @ gaps).sum(-1) / weights.sum(-1)
    return error


def squared_errors(s: Samples) -> "np.ndarray":
    """Return [n] the squared distances from the right numbers."""
    prediction = s.prediction if s.prediction_for_squares is None else s.prediction_for_squares
    squares: np.ndarray = (require(prediction) - require(s.target)) ** 2
    return squares


def _rmse(s: Samples, weights: "np.ndarray") -> "np.ndarray":
    return _mean(squared_errors(s), weights) ** 0.5


def _r_squared(s: Samples, weights: "np.ndarray") -> "np.ndarray":
    import numpy as np

    target = require(s.target)
    variance = _mean(target**2, weights) - _mean(target, weights) ** 2
    error = _mean(squared_errors(s), weights)
    return np.where(variance > 1e-12, 1 - error / np.where(variance > 1e-12, variance, 1), np.nan)


# Metric -> the numbers whose mean is the metric.
_TERMS: dict[str, Callable[[Samples], "np.ndarray"]] = {
    "accuracy": lambda s: s.value,
    "mean": lambda s: s.value,
    "mae": lambda s: abs(require(s.prediction) - require(s.target)),
    "brier": lambda s: (require(s.risk) - require(s.positive)) ** 2,
    "mean_error": lambda s: require(s.risk) - require(s.positive),  # of the risk: calibration in the large
}
_MEASURES: dict[str, Measure] = {name: _mean_of_terms(name) for name in _TERMS} | {
    "auc": _auc,
    "balanced_accuracy": _balanced_accuracy,
    "f1": _f1,
    "c_ece": lambda s, w: _calibration_error(require(s.confidence), require(s.confirmed), w),
    "r_ece": lambda s, w: _calibration_error(require(s.risk), require(s.positive), w),
    "rmse": _rmse,
    "r_squared": _r_squared,
}
