"""inspect-ai metrics over the metadata of our scorers' scores.

The metadata of a score has:
    options: label, positive (texts of options); when it was scored also predicted, said (the option that was written, else
    "other"), and where there is a risk: risk = P(positive), confidence = P(predicted), log_odds of the risk, if known;
    a number: target; when it was scored also prediction.

Every sample counts (metadata["scored"] tells which were scored; coverage and parse_rate are their share): one without an
option is wrong, and one without a risk or a number counts as the constant baseline does (metadata["constant"], see
`chance`), so that no run gains by answering the easy samples alone. Metrics that scikit-learn has are computed by it. A
metric that is not defined is NaN, with a warning: the AUC of one class.
"""

import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from inspect_ai.scorer import Metric, SampleScore, metric

if TYPE_CHECKING:
    import numpy

BINS = 10
_NONE = "\0"  # predicted where nothing was
_log = logging.getLogger(__name__)


def expected_calibration_error(predicted: "numpy.ndarray", actual: "numpy.ndarray", bins: int = BINS) -> float:
    """Mean distance between predicted and actual values, over bins of the predicted ones.

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


Case = dict[str, Any]
"""The metadata of a sample's score."""


def _cases(scores: list[SampleScore]) -> list[Case]:
    cases = [s.score.metadata or {} for s in scores]
    return [m for m in cases if "label" in m or "target" in m]


def _over_cases(compute: Callable[[list[Case]], float]) -> Metric:
    """Make a metric over all samples; NaN where there is none."""

    def value(scores: list[SampleScore]) -> float:
        cases = _cases(scores)
        return float(compute(cases)) if cases else math.nan

    return value


def _over_risks(compute: Callable[[list[Case]], float]) -> Metric:
    """Make a metric as `_over_cases` does; cases without a risk have the constant's option, risk and confidence."""
    return _over_cases(lambda cases: compute(_fill_unscored(cases, lambda: constant_of_labels(cases))))


def _fill_unscored(cases: list[Case], otherwise: Callable[[], Case]) -> list[Case]:
    """Give cases that were not scored the constant's values; a scorer without one takes that of the cases themselves."""
    if all(c.get("scored") for c in cases):
        return cases
    own = {} if all(c.get("scored") or "constant" in c for c in cases) else otherwise()
    return [c if c.get("scored") else c | c.get("constant", own) for c in cases]


def constant_of_labels(cases: list[Case]) -> Case:
    """Choose the constant from how often each label occurs in these cases: predicted, risk, confidence."""
    return constant_of_counts(Counter(c["label"] for c in cases), cases[0]["positive"])


def constant_of_counts(counts: Counter[str], positive: str) -> Case:
    """Choose the constant answer: the most frequent label, of several the first in order, and the shares of it and of the
    positive one.
    """
    predicted = min(counts, key=lambda label: (-counts[label], label))
    risk, confidence = (counts[label] / counts.total() for label in (positive, predicted))
    return {"predicted": predicted, "risk": risk, "confidence": confidence}


def constant_of_numbers(values: Sequence[float]) -> Case:
    """Compute the constants with the smallest absolute and the smallest squared error: median and mean."""
    return {"median": statistics.median(values), "mean": statistics.fmean(values)}


def _warn_undefined(name: str, why: str) -> float:
    _log.warning(f"{name} is not defined: {why}")
    return math.nan


def _column(cases: list[Case], name: str) -> "numpy.ndarray":
    import numpy as np

    return np.array([c[name] for c in cases])


def _correct(cases: list[Case]) -> "numpy.ndarray":
    import numpy as np

    return np.array([float(c.get("predicted") == c["label"]) for c in cases])


def _positive(cases: list[Case]) -> "numpy.ndarray":
    return (_column(cases, "label") == _column(cases, "positive")).astype(int)


def _is_scored(score: SampleScore) -> bool:
    return bool((score.score.metadata or {}).get("scored"))


def _scored_share() -> Metric:
    def value(scores: list[SampleScore]) -> float:  # a function each: inspect-ai writes a metric's name on it
        return sum(_is_scored(s) for s in scores) / len(scores) if scores else math.nan

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
    """Share of the samples whose predicted option is the label."""
    return _over_cases(lambda cases: _correct(cases).mean())


@metric
def stderr() -> Metric:
    """Standard error of that accuracy: standard deviation (n - 1) over the root of n."""
    return _over_cases(lambda cases: _standard_error(_correct(cases)))


def _standard_error(values: "numpy.ndarray") -> float:
    return values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0


@metric
def balanced_accuracy() -> Metric:
    """Mean over the classes of the share of each that was predicted (scikit-learn)."""

    def compute(cases: list[Case]) -> float:
        import numpy as np
        from sklearn.metrics import recall_score

        labels, predicted = _column(cases, "label"), np.array([c.get("predicted", _NONE) for c in cases])
        return recall_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)

    return _over_cases(compute)


@metric
def f1() -> Metric:
    """F1 of the last option; 0 where it is neither predicted nor wanted (scikit-learn)."""

    def compute(cases: list[Case]) -> float:
        from sklearn.metrics import f1_score

        predicted = [int(c.get("predicted") == c["positive"]) for c in cases]
        return f1_score(_positive(cases), predicted, zero_division=0)

    return _over_cases(compute)


@metric
def auc() -> Metric:
    """Area under the ROC curve of the risk (scikit-learn); by its log-odds where they are known, as risks round to 1."""

    def compute(cases: list[Case]) -> float:
        import numpy as np
        from sklearn.metrics import roc_auc_score

        actual = _positive(cases)
        if len(set(actual)) < 2:
            return _warn_undefined("auc", f"all {len(actual)} samples are of one class")
        ranks = np.unique(_order(cases), return_inverse=True)[1]  # scikit-learn takes no infinite log-odds
        return roc_auc_score(actual, ranks)

    return _over_risks(compute)


def _order(cases: list[Case]) -> list[float]:
    """Return numbers in the order of the cases' risks."""
    if not any("log_odds" in c for c in cases) or any(c.get("scored") and "log_odds" not in c for c in cases):
        return [c["risk"] for c in cases]
    return [c["log_odds"] if "log_odds" in c else _log_odds(c["risk"]) for c in cases]


def _log_odds(risk: float) -> float:
    return math.log(risk / (1 - risk)) if 0 < risk < 1 else math.copysign(math.inf, risk - 0.5)


@metric
def brier() -> Metric:
    """Mean squared distance of the risk from 1 (label is the last option) or 0."""
    return _over_risks(lambda cases: ((_column(cases, "risk") - _positive(cases)) ** 2).mean())


@metric
def c_ece() -> Metric:
    """Calibration error of the confidence: the predicted option's probability against being right."""
    return _over_risks(lambda cases: expected_calibration_error(_column(cases, "confidence"), _correct(cases)))


@metric
def r_ece() -> Metric:
    """Calibration error of the risk: P(last option) against the label being the last option."""
    return _over_risks(lambda cases: expected_calibration_error(_column(cases, "risk"), _positive(cases)))


@metric
def confusion() -> Metric:
    """Counts by label (last option: positive) and by the option that was written, and the share of positive labels.

    Keys: true_positives, false_negatives, false_positives, true_negatives; other: not an option, or not scored;
    class_balance.
    """

    def value(scores: list[SampleScore]) -> dict[str, float]:
        cases = _cases(scores)
        names = {(True, True): "true_positives", (True, False): "false_negatives",
                 (False, True): "false_positives", (False, False): "true_negatives"}  # fmt: skip
        counts = dict.fromkeys(names.values(), 0)
        for c in cases:
            if c.get("said", "other") != "other":
                counts[names[c["label"] == c["positive"], c["said"] == c["positive"]]] += 1
        balance = float(_positive(cases).mean()) if cases else math.nan
        return {**counts, "other": len(scores) - sum(counts.values()), "class_balance": balance}

    return value


@metric
def mae() -> Metric:
    """Mean absolute error (scikit-learn)."""
    return _over_numbers("mean_absolute_error", "median")


@metric
def rmse() -> Metric:
    """Root of the mean squared error (scikit-learn)."""
    return _over_numbers("root_mean_squared_error", "mean")


@metric
def r_squared() -> Metric:
    """Share of the targets' variance that the predictions explain (scikit-learn); NaN where targets do not vary."""
    return _over_numbers("r2_score", "mean")


def _over_numbers(function: str, constant: str) -> Metric:
    """Make one of scikit-learn's metrics; cases without a number have the constant that is best for it."""

    def compute(cases: list[Case]) -> float:
        import sklearn.metrics

        targets = _column(cases, "target")
        if function == "r2_score" and len(set(targets)) < 2:
            return _warn_undefined("r_squared", f"the {len(targets)} targets do not vary")
        filled = _fill_unscored(cases, lambda: constant_of_numbers(targets.tolist()))
        predictions = [c["prediction"] if c.get("scored") else c[constant] for c in filled]
        return getattr(sklearn.metrics, function)(targets, predictions)

    return _over_cases(compute)
