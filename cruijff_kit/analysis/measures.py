"""Metrics of evaluated samples under weights, many weightings at once: what resampling and the jackknife need.

A sample is an entry of each array of `Samples`; a weighting says how often it counts. With all weights 1 every metric is
that of evaluation/metrics.py (tests hold them against scikit-learn).
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
    """What one scorer says of n samples; arrays that the scorer does not give are None."""

    value: "np.ndarray"
    """[n] the score itself: 1 right, 0 wrong; or a distance from the target."""
    label: "np.ndarray | None" = None
    """[n] the right option, as a number from 0 on; the positive one is the largest."""
    predicted: "np.ndarray | None" = None
    """[n] the predicted option, numbered likewise; -1: none."""
    positive: "np.ndarray | None" = None
    """[n] whether the label is the positive option, 0 or 1."""
    predicted_positive: "np.ndarray | None" = None
    """[n] whether the positive option was predicted, 0 or 1."""
    risk: "np.ndarray | None" = None
    """[n] P(positive option)."""
    order: "np.ndarray | None" = None
    """[n] what ranks the samples from negative to positive: log-odds, or the risk."""
    confidence: "np.ndarray | None" = None
    """[n] P(predicted option)."""
    confirmed: "np.ndarray | None" = None
    """[n] whether the option of that probability is the label, 0 or 1."""
    target: "np.ndarray | None" = None
    """[n] the right number."""
    prediction: "np.ndarray | None" = None
    """[n] the predicted number; where there is none, the constant with the smallest absolute error."""
    prediction_for_squares: "np.ndarray | None" = None
    """[n] likewise, with the constant of the smallest squared error; None: as `prediction`."""
    chance: "np.ndarray | None" = None
    """[n] the score that the constant baseline gets on each."""
    unit: "np.ndarray | None" = None
    """[n] the respondent (household, country) that each sample is of, as a number from 0 on; None: each is its own."""

    def __len__(self) -> int:
        return len(self.value)


BOUNDS: dict[str, tuple[float, float]] = dict.fromkeys(
    ("accuracy", "auc", "balanced_accuracy", "f1", "brier", "c_ece", "r_ece"), (0.0, 1.0)
)
BOUNDS |= dict.fromkeys(("mae", "rmse", "loss", "validation_loss"), (0.0, math.inf)) | {"r_squared": (-math.inf, 1.0)}
"""Metric -> the least and the most that it can be."""
NEEDS = {
    "auc": ("positive", "order"), "brier": ("risk", "positive"), "balanced_accuracy": ("label", "predicted"),
    "f1": ("positive", "predicted_positive"), "c_ece": ("confidence", "confirmed"), "r_ece": ("risk", "positive"),
    "mae": ("prediction", "target"), "rmse": ("prediction", "target"), "r_squared": ("prediction", "target"),
}  # fmt: skip
"""Metric -> the arrays that it needs beside `value`."""


def is_computable(name: str, samples: Samples) -> bool:
    """Whether a metric is one of ours, these samples have what it needs, and it is defined for them."""
    if name not in _MEASURES or any(getattr(samples, need) is None for need in NEEDS.get(name, ())):
        return False
    if name == "auc":
        return 0 < samples.positive.sum() < len(samples)
    return name != "r_squared" or samples.target.min() < samples.target.max()


Measure = Callable[[Samples, "np.ndarray"], "np.ndarray"]
"""(samples, weights [..., n]) -> values [...]."""


def measure(name: str) -> Measure | None:
    """The metric of this name under weights; None: it is not known how it comes about."""
    return _MEASURES.get(name)


def is_mean(name: str) -> bool:
    """Whether a metric is a mean of one number for each sample."""
    return name in _TERMS


def terms(name: str, samples: Samples) -> "np.ndarray":
    """[n] the numbers whose mean a metric is, where `is_mean`."""
    return _TERMS[name](samples)


def _mean(values: "np.ndarray", weights: "np.ndarray") -> "np.ndarray":
    return weights @ values / weights.sum(-1)


def _of_terms(name: str) -> Measure:
    return lambda samples, weights: _mean(_TERMS[name](samples), weights)


def _auc(s: Samples, weights: "np.ndarray") -> "np.ndarray":
    """P(a positive sample stands above a negative one), ties counted half (Mann and Whitney 1947). One class: 0.5."""
    import numpy as np

    _, place = np.unique(s.order, return_inverse=True)
    groups = np.argsort(place, kind="stable")
    begins = np.flatnonzero(np.diff(place[groups], prepend=-1))
    positive = np.add.reduceat((weights * s.positive)[..., groups], begins, axis=-1)
    negative = np.add.reduceat((weights * (1 - s.positive))[..., groups], begins, axis=-1)
    below = np.cumsum(negative, -1) - negative
    pairs = positive.sum(-1) * negative.sum(-1)
    won = (positive * (below + negative / 2)).sum(-1)
    return np.where(pairs > 0, won / np.where(pairs > 0, pairs, 1), 0.5)


def _balanced_accuracy(s: Samples, weights: "np.ndarray") -> "np.ndarray":
    import numpy as np

    recalls = []
    for label in np.unique(s.label):
        own = weights * (s.label == label)
        total = own.sum(-1)
        recalls.append(
            np.where(total > 0, own @ (s.predicted == label).astype(float) / np.where(total > 0, total, 1), np.nan)
        )
    return np.nanmean(recalls, axis=0)


def _f1(s: Samples, weights: "np.ndarray") -> "np.ndarray":
    import numpy as np

    both = weights @ (s.positive * s.predicted_positive).astype(float)
    either = weights @ (s.positive + s.predicted_positive).astype(float)
    return np.where(either > 0, 2 * both / np.where(either > 0, either, 1), 0.0)


def _calibration_error(predicted: "np.ndarray", actual: "np.ndarray", weights: "np.ndarray") -> "np.ndarray":
    import numpy as np

    place = np.searchsorted(np.arange(1, BINS) / BINS, predicted, side="left")
    gaps = (predicted - actual)[:, None] * (place[:, None] == np.arange(BINS))
    return np.abs(weights @ gaps).sum(-1) / weights.sum(-1)


def squared_errors(s: Samples) -> "np.ndarray":
    """[n] squared distances from the right numbers."""
    return ((s.prediction if s.prediction_for_squares is None else s.prediction_for_squares) - s.target) ** 2


def _rmse(s: Samples, weights: "np.ndarray") -> "np.ndarray":
    return _mean(squared_errors(s), weights) ** 0.5


def _r_squared(s: Samples, weights: "np.ndarray") -> "np.ndarray":
    import numpy as np

    centre = _mean(s.target, weights)
    varies = _mean(s.target**2, weights) - centre**2
    left = _mean(squared_errors(s), weights)
    return np.where(varies > 1e-12, 1 - left / np.where(varies > 1e-12, varies, 1), np.nan)


# Metric -> the numbers whose mean it is.
_TERMS: dict[str, Callable[[Samples], "np.ndarray"]] = {
    "accuracy": lambda s: s.value,
    "mean": lambda s: s.value,
    "mae": lambda s: abs(s.prediction - s.target),
    "brier": lambda s: (s.risk - s.positive) ** 2,
    "mean_error": lambda s: s.risk - s.positive,  # of the risk: calibration in the large
}
_MEASURES: dict[str, Measure] = {name: _of_terms(name) for name in _TERMS} | {
    "auc": _auc,
    "balanced_accuracy": _balanced_accuracy,
    "f1": _f1,
    "c_ece": lambda s, w: _calibration_error(s.confidence, s.confirmed, w),
    "r_ece": lambda s, w: _calibration_error(s.risk, s.positive, w),
    "rmse": _rmse,
    "r_squared": _r_squared,
}
