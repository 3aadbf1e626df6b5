"""Coverage of intervals by simulation: the true value is the metric of very many samples."""

import numpy as np
import pytest
from scipy.special import expit, logit, ndtri

from cruijff_kit.analysis.estimates import _estimate_crossed
from cruijff_kit.analysis.intervals import compute_interval, null_calibration_error, wilson
from cruijff_kit.analysis.measures import Samples, compute_metric
from cruijff_kit.analysis.rankings import Ranking

METRICS = ("accuracy", "auc", "balanced_accuracy", "f1", "brier", "mae", "rmse", "r_squared", "c_ece", "r_ece")


def draw_samples(rng: np.random.Generator, n: int, slope: float, units: int | None = None) -> Samples:
    """Draw labels with known probabilities, risks that are too extreme by `slope`, and numbers with an error.

    Items of one of `units` units are correlated.
    """
    unit = None if units is None else np.repeat(np.arange(units), -(-n // units))[:n]
    unit_effect = 0 if unit is None else rng.normal(0, 1.0, units)[unit]
    chance = expit(rng.normal(0, 1.2 if unit is None else 0.6, n) + unit_effect)
    positive = (rng.random(n) < chance).astype(float)
    risk = expit(logit(chance) * slope)
    predicted = (risk >= 0.5).astype(int)
    numbers = logit(risk)
    target = numbers + rng.normal(0, 1, n) + unit_effect
    return Samples(
        value=(predicted == positive).astype(float), label=positive.astype(int), predicted=predicted, positive=positive,
        predicted_positive=predicted, risk=risk, order=risk, confidence=np.maximum(risk, 1 - risk),
        confirmed=(predicted == positive).astype(float), target=target, prediction=numbers, unit=unit,
    )  # fmt: skip


def coverage(n: int, repeats: int, slope: float = 1.4, units: int | None = None, **options) -> dict[str, float]:
    """Return metric -> the share of repetitions in which its interval covers the value of very many samples."""
    rng = np.random.default_rng(0)
    many = draw_samples(rng, 400_000, slope, None if units is None else 400_000 * units // n)
    truth = {m: float(compute_metric(m, many, np.ones(len(many)))) for m in METRICS}
    hits = dict.fromkeys(METRICS, 0)
    for _ in range(repeats):
        samples = draw_samples(rng, n, slope, units)
        for m in METRICS:
            interval = compute_interval(m, samples, **options)
            hits[m] += interval is not None and interval.low - 1e-9 <= truth[m] <= interval.high + 1e-9
    return {m: h / repeats for m, h in hits.items()}


@pytest.mark.parametrize("n", [20, 100, 300])
def test_intervals_cover(n):
    """In 100 repetitions each; other intervals of calibration errors cover the true value in 0 to 80."""
    shares = coverage(n, 100)
    print(n, {m: round(c, 2) for m, c in shares.items()})
    assert min(c for m, c in shares.items() if "ece" not in m) >= 0.87 and min(shares.values()) >= 0.8
    assert np.mean([c for m, c in shares.items() if "ece" not in m]) > 0.92


def test_units_are_resampled_together():
    """40 units of 5 correlated items: intervals for independent items cover far less."""
    shares = coverage(200, 100, units=40)
    print({m: round(c, 3) for m, c in shares.items()})
    assert min(shares[m] for m in ("accuracy", "auc", "brier", "mae", "rmse")) > 0.88, shares


def test_shares_are_wilsons_always():
    """They cover near 0 and 1, where Wald's do not (0.879 at n=50, p=0.9); the lower end rises with the right answers."""
    for n, p in ((50, 0.9), (100, 0.95), (20, 0.5)):
        rights = np.random.default_rng(1).binomial(n, p, 4000)
        ends = {k: wilson(k / n, n) for k in set(rights.tolist())}
        assert 0.93 < np.mean([ends[k][0] <= p <= ends[k][1] for k in rights.tolist()]) < 0.98
    lows = [wilson(k / 30, 30)[0] for k in range(31)]
    assert lows == sorted(lows) and lows[30] > lows[29] and lows[0] == 0 and wilson(1.0, 30)[1] == 1


@pytest.mark.parametrize("truth", [0.7, 0.97])
def test_shares_over_items_and_seeds(truth):
    """Three seeds of 40 and 200 items, with a difficulty that seeds share or not, and seeds that differ or do not."""
    rng = np.random.default_rng(3)
    for n, likeness, seed_deviation in ((40, 0.0, 0.0), (40, 0.9, 0.3), (200, 0.5, 0.0), (200, 0.9, 0.3)):
        hits = 0
        for _ in range(300):
            difficulty = rng.normal(0, likeness**0.5, (1, n)) + rng.normal(0, (1 - likeness) ** 0.5, (3, n))
            rows = (
                difficulty + rng.normal(0, seed_deviation, (3, 1)) < ndtri(truth) * (1 + seed_deviation**2) ** 0.5
            ).astype(float)
            e = _estimate_crossed(rows.mean(), rows, "accuracy", 0.95, "test items")
            low, high = (e.low, e.high) if e else wilson(rows.mean(), n)
            hits += low - 1e-9 <= truth <= high + 1e-9
        print(f"share {truth}, {n} items, likeness {likeness}, between seeds {seed_deviation}: {hits / 300:.3f}")
        assert hits / 300 > 0.9


def test_a_small_sample_of_a_skewed_number():
    """The percentile bootstrap covers 0.80 here."""
    rng, hits = np.random.default_rng(2), 0
    for _ in range(300):
        errors = rng.lognormal(0, 1, 10)
        samples = Samples(value=errors, target=np.zeros(10), prediction=errors)
        low, high, method = compute_interval("mae", samples)
        hits += low <= np.exp(0.5) <= high
    assert hits / 300 > 0.88 and method == "studentised bootstrap"


def test_what_a_calibrated_model_would_show():
    """It is 0.10 at 100 items, as in a simulation by the definition."""
    rng = np.random.default_rng(3)
    for n, expected in ((60, 0.127), (100, 0.100), (1000, 0.032)):
        errors = [null_calibration_error("r_ece", draw_samples(rng, n, 1.0)) for _ in range(20)]
        plain = [float(compute_metric("r_ece", s, np.ones(n))) for s in (draw_samples(rng, n, 1.0) for _ in range(200))]
        assert np.mean(errors) == pytest.approx(np.mean(plain), rel=0.08) == pytest.approx(expected, rel=0.08)
    assert null_calibration_error("auc", draw_samples(rng, 50, 1.0)) is None


def test_the_best_of_sixteen_equal_runs():
    """Chosen on the test split, its score is too high: a plain interval covers too rarely, the corrected one in 95%."""
    rng, truth, n, runs = np.random.default_rng(4), 0.8, 100, 16
    ranking = Ranking("accuracy", ("count", "match", "accuracy"), "test", True, [None] * runs)
    best = rng.binomial(n, truth, (400, runs)).max(1) / n
    hits = {}
    for level in (0.95, ranking.level):
        hits[level] = np.mean([low <= truth <= high for low, high in (wilson(b, n, level) for b in best)])
    plain, corrected = hits.values()
    print(
        f"best of {runs}: {100 * (best.mean() - truth):.1f} points too high; plain {plain:.3f}, corrected {corrected:.3f}"
    )
    assert best.mean() - truth > 0.05 and plain < 0.8 and corrected >= 0.95
