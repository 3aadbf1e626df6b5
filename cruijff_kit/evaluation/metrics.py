"""What the scorers' samples come to: inspect-ai metrics over what each score's metadata says.

A sample of a scorer of ours carries, when it was scored (metadata["scored"]):
    options: label, predicted, positive (texts of options), said (the option that was written, else "other");
    a risk: also risk = P(positive), confidence = P(predicted);     a number: prediction, target.
Those that were not scored are left out of every metric but coverage and parse_rate. scikit-learn computes what it has.
A metric that is not defined is NaN: of no sample, which coverage shows; the AUC of one class, which a warning says.
"""

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from inspect_ai.scorer import Metric, SampleScore, metric

if TYPE_CHECKING:
    import numpy

BINS = 10
_log = logging.getLogger(__name__)


def expected_calibration_error(predicted: "numpy.ndarray", actual: "numpy.ndarray", bins: int = BINS) -> float:
    """Mean distance between what was predicted and what came, over bins of what was predicted.

    sum_b n_b / n |mean(predicted in b) - mean(actual in b)| with equal bins (lo, hi], 0 in the first
    (Guo et al. 2017, On Calibration of Modern Neural Networks).

    Args:
        predicted: [samples], probabilities. actual: [samples], 0 or 1.
    """
    import numpy as np

    edges = np.arange(1, bins) / bins
    place = np.searchsorted(edges, predicted, side="left")
    gaps = np.bincount(place, weights=predicted - actual, minlength=bins)
    return float(np.abs(gaps).sum() / len(predicted))


def _scored(scores: list[SampleScore]) -> list[dict[str, Any]]:
    found = [s.score.metadata or {} for s in scores]
    return [m for m in found if m.get("scored")]


def _of_scored(compute: Callable[[list[dict[str, Any]]], float]) -> Metric:
    """A metric over the samples that were scored; NaN where there is none."""

    def value(scores: list[SampleScore]) -> float:
        cases = _scored(scores)
        return float(compute(cases)) if cases else math.nan

    return value


def _undefined(name: str, why: str) -> float:
    _log.warning(f"{name} is not defined: {why}")
    return math.nan


def _column(cases: list[dict[str, Any]], name: str) -> "numpy.ndarray":
    import numpy as np

    return np.array([c[name] for c in cases])


def _correct(cases: list[dict[str, Any]]) -> "numpy.ndarray":
    return (_column(cases, "predicted") == _column(cases, "label")).astype(float)


def _positive(cases: list[dict[str, Any]]) -> "numpy.ndarray":
    return (_column(cases, "label") == _column(cases, "positive")).astype(int)


def _scored_share() -> Metric:
    def value(scores: list[SampleScore]) -> float:  # a function each: inspect-ai writes a metric's name on it
        return len(_scored(scores)) / len(scores) if scores else math.nan

    return value


@metric
def coverage() -> Metric:
    """Share of the samples that could be scored."""
    return _scored_share()


@metric
def parse_rate() -> Metric:
    """Share of the answers in which a number was found."""
    return _scored_share()


@metric
def accuracy() -> Metric:
    """Share of the scored samples whose predicted option is the label."""
    return _of_scored(lambda cases: _correct(cases).mean())


@metric
def stderr() -> Metric:
    """Standard error of that accuracy: standard deviation (n - 1) over the root of n."""
    return _of_scored(lambda cases: _standard_error(_correct(cases)))


def _standard_error(values: "numpy.ndarray") -> float:
    return values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0


@metric
def balanced_accuracy() -> Metric:
    """Mean over the classes of the share of each that was predicted (scikit-learn)."""

    def compute(cases: list[dict[str, Any]]) -> float:
        import numpy as np
        from sklearn.metrics import recall_score

        labels, predicted = _column(cases, "label"), _column(cases, "predicted")
        return recall_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)

    return _of_scored(compute)


@metric
def f1() -> Metric:
    """F1 of the last option; 0 where it is neither predicted nor wanted (scikit-learn)."""

    def compute(cases: list[dict[str, Any]]) -> float:
        from sklearn.metrics import f1_score

        predicted = _column(cases, "predicted") == _column(cases, "positive")
        return f1_score(_positive(cases), predicted.astype(int), zero_division=0)

    return _of_scored(compute)


@metric
def auc() -> Metric:
    """Area under the ROC curve of the risk (scikit-learn)."""

    def compute(cases: list[dict[str, Any]]) -> float:
        from sklearn.metrics import roc_auc_score

        actual = _positive(cases)
        if len(set(actual)) < 2:
            return _undefined("auc", f"all {len(actual)} scored samples are of one class")
        return roc_auc_score(actual, _column(cases, "risk"))

    return _of_scored(compute)


@metric
def brier() -> Metric:
    """Mean squared distance of the risk from 1 (label is the last option) or 0."""
    return _of_scored(lambda cases: ((_column(cases, "risk") - _positive(cases)) ** 2).mean())


@metric
def c_ece() -> Metric:
    """Calibration error of the confidence: the predicted option's probability against being right."""
    return _of_scored(lambda cases: expected_calibration_error(_column(cases, "confidence"), _correct(cases)))


@metric
def r_ece() -> Metric:
    """Calibration error of the risk: P(last option) against the label being the last option."""
    return _of_scored(lambda cases: expected_calibration_error(_column(cases, "risk"), _positive(cases)))


@metric
def confusion() -> Metric:
    """Counts by label (last option: positive) and by what was written, and the share of positive labels.

    Keys: true_positives, false_negatives, false_positives, true_negatives; other, what was written and is no option, or
    was not scored; class_balance.
    """

    def value(scores: list[SampleScore]) -> dict[str, float]:
        cases = _scored(scores)
        named = {(True, True): "true_positives", (True, False): "false_negatives",
                 (False, True): "false_positives", (False, False): "true_negatives"}  # fmt: skip
        counts = dict.fromkeys(named.values(), 0)
        for c in cases:
            if c["said"] != "other":
                counts[named[c["label"] == c["positive"], c["said"] == c["positive"]]] += 1
        balance = float(_positive(cases).mean()) if cases else math.nan
        return {**counts, "other": len(scores) - sum(counts.values()), "class_balance": balance}

    return value


@metric
def mae() -> Metric:
    """Mean absolute error (scikit-learn)."""
    return _of_numbers("mean_absolute_error")


@metric
def rmse() -> Metric:
    """Root of the mean squared error (scikit-learn)."""
    return _of_numbers("root_mean_squared_error")


@metric
def r_squared() -> Metric:
    """Share of the targets' variance that the predictions explain (scikit-learn); NaN where targets do not vary."""

    def compute(cases: list[dict[str, Any]]) -> float:
        from sklearn.metrics import r2_score

        targets = _column(cases, "target")
        if len(set(targets)) < 2:
            return _undefined("r_squared", f"the {len(targets)} targets do not vary")
        return r2_score(targets, _column(cases, "prediction"))

    return _of_scored(compute)


def _of_numbers(function: str) -> Metric:
    def compute(cases: list[dict[str, Any]]) -> float:
        import sklearn.metrics

        return getattr(sklearn.metrics, function)(_column(cases, "target"), _column(cases, "prediction"))

    return _of_scored(compute)
