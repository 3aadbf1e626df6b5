"""Weighted metrics compared with scikit-learn, intervals at their limits, and the bootstrap compared with scipy's."""

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn import metrics as sk

from cruijff_kit.analysis.intervals import compute_interval, effective_sample_size, standard_error_of_mean
from cruijff_kit.analysis.measures import Samples, compute_metric, find_measure
from cruijff_kit.evaluation.metrics import expected_calibration_error


def draw_options(n: int, seed: int = 0, kinds: int = 2) -> Samples:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, kinds, n)
    risk = np.round(np.clip(0.3 + 0.4 * (label == kinds - 1) + rng.normal(0, 0.25, n), 0.01, 0.99), 1)  # with ties
    predicted = np.where(risk >= 0.5, kinds - 1, rng.integers(0, max(1, kinds - 1), n))
    positive = (label == kinds - 1).astype(float)
    return Samples(
        value=(predicted == label).astype(float), label=label, predicted=predicted, positive=positive,
        predicted_positive=(predicted == kinds - 1).astype(int), risk=risk, order=risk,
        confidence=np.maximum(risk, 1 - risk), confirmed=(predicted == label).astype(float),
        target=3 * risk + rng.normal(0, 1, n), prediction=3 * risk,
    )  # fmt: skip


@pytest.mark.parametrize("kinds", [2, 4])
def test_weighted_metrics_are_scikit_learns(kinds):
    s = draw_options(60, kinds=kinds)
    weights = np.random.default_rng(1).integers(0, 4, 60).astype(float)
    expected = {
        "accuracy": sk.accuracy_score(s.label, s.predicted, sample_weight=weights),
        "auc": sk.roc_auc_score(s.positive, s.order, sample_weight=weights),
        "balanced_accuracy": sk.recall_score(s.label, s.predicted, average="macro", sample_weight=weights),
        "f1": sk.f1_score(s.positive, s.predicted_positive, sample_weight=weights),
        "brier": np.average((s.risk - s.positive) ** 2, weights=weights),
        "mae": sk.mean_absolute_error(s.target, s.prediction, sample_weight=weights),
        "rmse": sk.root_mean_squared_error(s.target, s.prediction, sample_weight=weights),
        "r_squared": sk.r2_score(s.target, s.prediction, sample_weight=weights),
    }
    for name, value in expected.items():
        assert compute_metric(name, s, np.stack([weights, 2 * weights])) == pytest.approx([value, value]), name
    plain = np.ones(60)
    assert compute_metric("r_ece", s, plain) == pytest.approx(expected_calibration_error(s.risk, s.positive))
    correct = (s.label == s.predicted).astype(float)
    assert compute_metric("c_ece", s, plain) == pytest.approx(expected_calibration_error(s.confidence, correct))
    assert find_measure("confusion") is None


def test_auc_counts_ties_as_ties():
    s = draw_options(40)
    s = Samples(value=s.value, positive=s.positive, order=np.zeros(40))
    assert compute_metric("auc", s, np.ones(40)) == 0.5


def test_the_bootstrap_is_scipys():
    """The AUC's interval from weights is the one from drawn samples, computed by scikit-learn."""
    s = draw_options(80, seed=4)
    plain = bootstrap(
        (s.positive, s.order), lambda y, x: sk.roc_auc_score(y, x), paired=True, vectorized=False, n_resamples=1999,
        method="BCa", random_state=0,
    ).confidence_interval  # fmt: skip
    assert compute_interval("auc", s)[:2] == pytest.approx((plain.low, plain.high), abs=0.012)


def test_at_the_limits():
    """A perfect score has an interval; without variation there is none."""
    label = np.array([0] * 20 + [1] * 10)
    s = Samples(
        value=np.ones(30), label=label, predicted=label, positive=label.astype(float), predicted_positive=label,
        risk=label * 1.0, order=label * 1.0, confidence=np.ones(30), confirmed=np.ones(30),
        target=np.arange(30.0), prediction=np.arange(30.0),
    )  # fmt: skip
    assert compute_interval("accuracy", s)[:2] == pytest.approx((0.8865, 1.0), abs=1e-3)
    for name in ("auc", "f1", "balanced_accuracy"):
        low, high, method = compute_interval(name, s)
        assert 0.6 < low < 0.8 and high == 1 and "smaller class" in method
    assert compute_interval("mae", s) is None and compute_interval("confusion", s) is None
    single = Samples(value=np.ones(1))
    assert compute_interval("accuracy", single) is None


def test_wider_at_a_higher_level():
    s = draw_options(50, seed=2)
    for name in ("accuracy", "auc", "mae", "rmse", "r_ece"):
        usual, strict = compute_interval(name, s), compute_interval(name, s, level=0.997)
        assert strict.low <= usual.low and strict.high >= usual.high and strict != usual, name


def test_items_of_a_unit_count_as_fewer():
    """100 respondents with 3 items each, ICC 0.5: the plain error is too small by a fifth."""
    rng, plain, clustered, means = np.random.default_rng(0), [], [], []
    unit = np.repeat(np.arange(100), 3)
    for _ in range(400):
        unit_effect, residual = rng.normal(0, 1, 100)[unit], rng.normal(0, 1, 300)
        right = (unit_effect + residual > -1.2).astype(float)
        means.append(right.mean())
        plain.append(standard_error_of_mean(right, None)[0])
        clustered.append(standard_error_of_mean(right, unit)[0])
    assert np.mean(clustered) == pytest.approx(np.std(means), rel=0.08) and np.mean(plain) < 0.9 * np.std(means)
    assert effective_sample_size(right, unit) < 250 and effective_sample_size(right, None) == 300
    assert effective_sample_size(np.ones(300), unit) == 100
