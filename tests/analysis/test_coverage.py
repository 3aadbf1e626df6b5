"""How often intervals cover the truth, by simulation: what scikit-learn computes on very many samples is the truth."""

import numpy as np
import pytest
from scipy.special import expit, logit, ndtri

from cruijff_kit.analysis.estimates import _estimate_crossed
from cruijff_kit.analysis.intervals import compute_interval, null_calibration_error, wilson
from cruijff_kit.analysis.measures import Samples, compute_metric
from cruijff_kit.analysis.rankings import Ranking

METRICS = ("accuracy", "auc", "balanced_accuracy", "f1", "brier", "mae", "rmse", "r_squared", "c_ece", "r_ece")


def drawn(draw: np.random.Generator, n: int, slope: float, units: int | None = None) -> Samples:
    """Labels with known probabilities, risks that are too sure by `slope`, numbers with an error; units of like items."""
    unit = None if units is None else np.repeat(np.arange(units), -(-n // units))[:n]
    shared = 0 if unit is None else draw.normal(0, 1.0, units)[unit]
    chance = expit(draw.normal(0, 1.2 if unit is None else 0.6, n) + shared)
    positive = (draw.random(n) < chance).astype(float)
    risk = expit(logit(chance) * slope)
    predicted = (risk >= 0.5).astype(int)
    numbers = logit(risk)
    target = numbers + draw.normal(0, 1, n) + shared
    return Samples(
        value=(predicted == positive).astype(float), label=positive.astype(int), predicted=predicted, positive=positive,
        predicted_positive=predicted, risk=risk, order=risk, confidence=np.maximum(risk, 1 - risk),
        confirmed=(predicted == positive).astype(float), target=target, prediction=numbers, unit=unit,
    )  # fmt: skip


def coverage(n: int, repeats: int, slope: float = 1.4, units: int | None = None, **more) -> dict[str, float]:
    """Metric -> the share of repetitions in which its interval holds the value of very many samples."""
    draw = np.random.default_rng(0)
    many = drawn(draw, 400_000, slope, None if units is None else 400_000 * units // n)
    truth = {m: float(compute_metric(m, many, np.ones(len(many)))) for m in METRICS}
    held = dict.fromkeys(METRICS, 0)
    for _ in range(repeats):
        samples = drawn(draw, n, slope, units)
        for m in METRICS:
            found = compute_interval(m, samples, **more)
            held[m] += found is not None and found.low - 1e-9 <= truth[m] <= found.high + 1e-9
    return {m: h / repeats for m, h in held.items()}


@pytest.mark.parametrize("n", [20, 100, 300])
def test_intervals_cover(n):
    """Of 100 repetitions each; of calibration errors other intervals hold the truth in 0 to 80."""
    found = coverage(n, 100)
    print(n, {m: round(c, 2) for m, c in found.items()})
    assert min(c for m, c in found.items() if "ece" not in m) >= 0.87 and min(found.values()) >= 0.8
    assert np.mean([c for m, c in found.items() if "ece" not in m]) > 0.92


def test_units_are_resampled_together():
    """40 units of 5 like items: intervals that take the items for independent cover far less."""
    found = coverage(200, 100, units=40)
    print({m: round(c, 3) for m, c in found.items()})
    assert min(found[m] for m in ("accuracy", "auc", "brier", "mae", "rmse")) > 0.88, found


def test_shares_are_wilsons_always():
    """Covers near 0 and 1, where Wald does not (0.879 at n=50, p=0.9), and more right answers have a higher lower end."""
    for n, p in ((50, 0.9), (100, 0.95), (20, 0.5)):
        rights = np.random.default_rng(1).binomial(n, p, 4000)
        ends = {k: wilson(k / n, n) for k in set(rights.tolist())}
        assert 0.93 < np.mean([ends[k][0] <= p <= ends[k][1] for k in rights.tolist()]) < 0.98
    lows = [wilson(k / 30, 30)[0] for k in range(31)]
    assert lows == sorted(lows) and lows[30] > lows[29] and lows[0] == 0 and wilson(1.0, 30)[1] == 1


@pytest.mark.parametrize("truth", [0.7, 0.97])
def test_shares_over_items_and_seeds(truth):
    """Three seeds of 40 and 200 items, as hard for all seeds or for each by chance; seeds that differ or do not."""
    draw = np.random.default_rng(3)
    for n, like, between in ((40, 0.0, 0.0), (40, 0.9, 0.3), (200, 0.5, 0.0), (200, 0.9, 0.3)):
        held = 0
        for _ in range(300):
            hard = draw.normal(0, like**0.5, (1, n)) + draw.normal(0, (1 - like) ** 0.5, (3, n))
            rows = (hard + draw.normal(0, between, (3, 1)) < ndtri(truth) * (1 + between**2) ** 0.5).astype(float)
            found = _estimate_crossed(rows.mean(), rows, "accuracy", 0.95, "test items")
            low, high = (found.low, found.high) if found else wilson(rows.mean(), n)
            held += low - 1e-9 <= truth <= high + 1e-9
        print(f"share {truth}, {n} items, likeness {like}, between seeds {between}: {held / 300:.3f}")
        assert held / 300 > 0.9


def test_a_small_sample_of_a_skewed_number():
    """The percentile bootstrap covers 0.80 here."""
    draw, held = np.random.default_rng(2), 0
    for _ in range(300):
        errors = draw.lognormal(0, 1, 10)
        samples = Samples(value=errors, target=np.zeros(10), prediction=errors)
        low, high, method = compute_interval("mae", samples)
        held += low <= np.exp(0.5) <= high
    assert held / 300 > 0.88 and method == "studentised bootstrap"


def test_what_a_calibrated_model_would_show():
    """0.10 at 100 items: drawn again and again, by the plain definition."""
    draw = np.random.default_rng(3)
    for n, expected in ((60, 0.127), (100, 0.100), (1000, 0.032)):
        found = [null_calibration_error("r_ece", drawn(draw, n, 1.0)) for _ in range(20)]
        plain = [float(compute_metric("r_ece", s, np.ones(n))) for s in (drawn(draw, n, 1.0) for _ in range(200))]
        assert np.mean(found) == pytest.approx(np.mean(plain), rel=0.08) == pytest.approx(expected, rel=0.08)
    assert null_calibration_error("auc", drawn(draw, 50, 1.0)) is None


def test_the_best_of_sixteen_equal_runs():
    """Chosen on the test split its score is too high, and a plain interval too seldom holds the truth; ours does in 95%."""
    draw, truth, n, runs = np.random.default_rng(4), 0.8, 100, 16
    found = Ranking("accuracy", ("count", "match", "accuracy"), "test", True, [None] * runs)
    best = draw.binomial(n, truth, (400, runs)).max(1) / n
    held = {}
    for level in (0.95, found.level):
        held[level] = np.mean([low <= truth <= high for low, high in (wilson(b, n, level) for b in best)])
    plain, ours = held.values()
    print(f"best of {runs}: {100 * (best.mean() - truth):.1f} points too high; plain {plain:.3f}, ours {ours:.3f}")
    assert best.mean() - truth > 0.05 and plain < 0.8 and ours >= 0.95
