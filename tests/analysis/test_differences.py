"""Differences: false positives by simulation, comparisons with other tests, and intervals that agree with p."""

import itertools
import math

import numpy as np
import pytest
import statsmodels.stats.contingency_tables as sm
from scipy.stats import ttest_1samp

from cruijff_kit.analysis.differences import (
    SeedVariance,
    compare,
    correct_differences,
    item_values,
    mcnemar,
    pool_seeds,
)
from cruijff_kit.analysis.measures import Samples, compute_metric

from .test_intervals import draw_options

SPREAD = 1.5  # standard deviation of the items' difficulty, in standard deviations of the residual


def simulate(
    rng: np.random.Generator, configurations: int, seeds: int, n: int, *seed_points: float
) -> list[np.ndarray]:
    """Simulate configurations [seeds, items] of one true accuracy, 0.85.

    Items differ, each configuration finds other items hard, and seeds differ by `seed_points` points of accuracy (one
    number, or one for each configuration).
    """
    residual = math.sqrt(3)  # item by configuration, item by seed, chance
    total = math.sqrt(SPREAD**2 + residual**2)
    centre, density = 1.0364 * total, 0.2332 / total  # of N(0, 1) at 0.85
    easiness = rng.normal(0, SPREAD, n)
    rows = []
    for c in range(configurations):
        points = seed_points[c % len(seed_points)]
        interaction, shift = rng.normal(0, 1, n), rng.normal(0, points / 100 / density, (seeds, 1))
        noise = rng.normal(0, math.sqrt(2), (seeds, n))
        rows.append((centre + easiness + interaction + shift + noise > 0).astype(float))
    return rows


def false_positive_rate(test, seeds: int, n: int, seed_points: float, repeats: int) -> float:
    rng = np.random.default_rng(int(seeds * 1000 + n + seed_points))
    return np.mean([test(*simulate(rng, 2, seeds, n, seed_points)) < 0.05 for _ in range(repeats)])


def compare_item_means(a: np.ndarray, b: np.ndarray) -> float:
    return ttest_1samp(a.mean(0) - b.mean(0), 0).pvalue


def bootstrap_two_ways(a: np.ndarray, b: np.ndarray) -> float:
    """Return p of a percentile bootstrap over items and over seeds, the textbook's alternative."""
    rng, (seeds, n), differences = np.random.default_rng(0), a.shape, []
    for _ in range(200):
        items = rng.integers(0, n, n)
        mean_a, mean_b = (side[rng.integers(0, seeds, seeds)][:, items].mean() for side in (a, b))
        differences.append(mean_a - mean_b)
    share = np.mean(np.array(differences) <= 0)
    return 2 * min(share, 1 - share)


def compare_pooled(a: np.ndarray, b: np.ndarray) -> float:
    return compare(a, b, pool_seeds([a, b])).p  # as comparisons.py calls it


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_seeds_that_differ_are_no_finding(seeds):
    """Two configurations of one accuracy, seeds that differ by 0, 2 and 4 points: reported as different in 5% at most."""
    repeats, worst = 800, 0.0
    for points, n in itertools.product((0, 2, 4), (100, 300, 1000)):
        tests = (compare_pooled, compare_item_means)
        rates = [false_positive_rate(test, seeds, n, points, repeats) for test in tests]
        print(f"{seeds} seeds, sd {points} points, {n} items: {rates[0]:.3f}; items alone {rates[1]:.3f}")
        worst = max(worst, rates[0])
        assert points == 0 or n == 100 or rates[1] > 0.08
    assert worst < 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)


def test_a_bootstrap_over_two_seeds_finds_too_much():
    """The rate is 0.22; 0.12 for three seeds that differ by 2 points."""
    assert false_positive_rate(bootstrap_two_ways, 2, 1000, 4, 100) > 0.12


def test_a_real_difference_is_found():
    rng, rejections = np.random.default_rng(0), 0
    for _ in range(100):
        a, b = simulate(rng, 2, 3, 300, 2)
        rejections += compare(np.maximum(a, rng.random(a.shape) < 0.6), b).p < 0.05  # 9 points better
    assert rejections > 80


def test_the_variances_are_those_of_a_mixed_model():
    """REML of statsmodels on a balanced layout: the same variance between seeds and of a difference."""
    import pandas
    from statsmodels.regression.mixed_linear_model import MixedLM

    rng = np.random.default_rng(2)
    n, seeds = 40, 4
    easiness = rng.normal(0, 1, n)
    a, b = (easiness + c + rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 1, (seeds, n)) for c in (0.0, 0.5))
    rows = [
        {"y": side[s, i], "c": c, "seed": f"{c}{s}", "item": i, "one": 1}
        for c, side in enumerate((a, b)) for s in range(seeds) for i in range(n)
    ]  # fmt: skip
    fit = MixedLM.from_formula(
        "y ~ c", pandas.DataFrame(rows), groups="one", re_formula="0",
        vc_formula={"seed": "0 + C(seed)", "item": "0 + C(item)"},
    ).fit(reml=True)  # fmt: skip
    variance = (a.mean(1).var(ddof=1) + b.mean(1).var(ddof=1)) / 2
    seed_variance = dict(zip(fit.model.exog_vc.names, fit.vcomp, strict=True))["seed"]
    assert variance - fit.scale / n == pytest.approx(seed_variance, rel=0.05)
    difference = compare(b, a)
    assert difference.difference == pytest.approx(fit.params["c"], abs=1e-6)
    low, high = difference.interval(0.95)
    assert (high - low) / 2 > 1.96 * fit.bse["c"] > 0.7 * (high - low) / 2 * 1.96 / 2.45


def test_one_seed_uses_the_variance_of_the_others():
    rng = np.random.default_rng(1)
    rows = simulate(rng, 4, 3, 300, 4)
    single = rows[0][:1]
    seeds = pool_seeds([single, *rows[1:]])
    assert seeds.freedom == 6 and seeds.variance == pytest.approx(np.mean([m.mean(1).var(ddof=1) for m in rows[1:]]))
    item_test, pooled_test = compare(single, rows[1]), compare(single, rows[1], seeds)
    assert "paired t" in item_test.method and "crossed" in pooled_test.method
    assert np.ptp(pooled_test.interval(0.95)) > np.ptp(item_test.interval(0.95))
    assert pool_seeds([single, single]) is None


@pytest.mark.parametrize("points", [(0, 0, 0, 0), (2, 2, 2, 2), (4, 4, 4, 4), (1, 4, 1, 4)])
def test_seeds_are_pooled_over_configurations(points):
    """Four configurations of three seeds: false positives stay few, and 40 points above the base model are always found."""
    rng, errors, hits = np.random.default_rng(7), [], []
    for _ in range(400):
        *rows, base_model = simulate(rng, 5, 3, 300, *points, 0)
        seeds = pool_seeds(rows)
        errors.append(compare(rows[1], rows[3], seeds).p < 0.05)
        worse = np.minimum(base_model[:1], rng.random((1, 300)) < 0.5)  # by 40 points
        hits.append([compare(rows[1], worse, s, is_reference_fixed=True).p < 0.001 for s in (seeds, None)])
    pooled_power, own_power = np.mean(hits, axis=0)
    rate = np.mean(errors)
    print(
        f"sd {points}: false positives {rate:.3f}; power {pooled_power:.2f}, with its own seeds alone {own_power:.2f}"
    )
    assert rate < (0.05 if len({*points}) == 1 else 0.08) + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert pooled_power > 0.95 and pooled_power >= own_power


def test_a_fixed_reference_has_no_seeds():
    """The base model and the constant baseline were not trained: only the configuration's own seeds count."""
    rng, rejections = np.random.default_rng(3), 0
    for _ in range(300):
        a, b = simulate(rng, 2, 3, 300, 2, 0)
        rejections += compare(a, b[:1], is_reference_fixed=True).p < 0.05
    assert rejections / 300 < 0.08
    assert compare(a[:1], b[:1], is_reference_fixed=True).method == "McNemar, exact"


def test_mcnemar_exactly():
    """p by enumeration of the discordant items' outcomes; the interval by Agresti & Min's formula."""
    difference = mcnemar(10, 1, 100)
    counts = [sum(flips) for flips in itertools.product((0, 1), repeat=11)]
    assert difference.p == pytest.approx(sum(abs(c - 5.5) >= 4.5 for c in counts) / 2**11)
    reach = 1.959964 * math.sqrt(12 - 81 / 102) / 102
    assert difference.interval(0.95) == pytest.approx((9 / 102 - reach, 9 / 102 + reach), abs=1e-6)
    assert difference.difference == pytest.approx(0.09) and mcnemar(0, 0, 5).p == 1


@pytest.mark.parametrize(("gained", "lost", "items"), [(9, 0, 500), (5, 0, 6), (0, 7, 40), (30, 12, 200), (3, 3, 9)])
def test_mcnemar_is_that_of_statsmodels(gained, lost, items):
    expected = sm.mcnemar([[items - gained - lost, gained], [lost, 0]], exact=True).pvalue
    assert mcnemar(gained, lost, items).p == pytest.approx(expected)


def test_p_and_interval_agree():
    """At every level, 0 is outside the interval exactly where p is below 1 - level."""
    rng = np.random.default_rng(4)
    kinds = {
        "bootstrap": [compare(rng.exponential(1 + k / 10, (1, 40)), rng.exponential(1, (1, 40))) for k in range(12)],
        "t": [compare(rng.normal(k / 20, 1, (3, 80)), rng.normal(0, 1, (3, 80))) for k in range(12)],
        "mcnemar": [mcnemar(g, lost, 120) for g, lost in itertools.product(range(0, 30, 4), (0, 2, 5))],
    }
    for kind, differences in kinds.items():
        for d, alpha in itertools.product(differences, (0.2, 0.05, 0.01, 0.002)):
            low, high = d.interval(1 - alpha)
            excludes_0 = not low <= 0 <= high
            assert excludes_0 == (d.p < alpha) or d.p == pytest.approx(alpha, rel=0.05), (kind, d, alpha)
            assert low <= d.difference <= high


def test_holm_and_its_intervals():
    rng = np.random.default_rng(5)
    for _ in range(20):
        differences = [mcnemar(int(g), int(lost), 100) for g, lost in rng.integers(0, 25, (8, 2))]
        order = sorted(range(8), key=lambda i: differences[i].p)
        highest, expected = 0.0, {}
        for rank, i in enumerate(order):
            highest = max(highest, min(1.0, (8 - rank) * differences[i].p))
            expected[i] = highest
        for i, (low, high, p) in enumerate(correct_differences(differences)):
            assert p == pytest.approx(expected[i])
            assert (not low <= 0 <= high) == (p < 0.05)
            assert low <= differences[i].difference <= high
    assert correct_differences([]) == []


def test_simultaneous_intervals_cover_together():
    """Six runs of one accuracy compared with a seventh: all six intervals cover 0 in 95%."""
    rng, covered = np.random.default_rng(6), 0
    for _ in range(60):
        *runs, best = simulate(rng, 7, 1, 200, 0)
        covered += all(low <= 0 <= high for low, high, _ in correct_differences([compare(r, best) for r in runs]))
    assert covered / 60 > 0.88


@pytest.mark.parametrize("name", ["auc", "rmse", "balanced_accuracy", "f1", "r_squared", "accuracy"])
def test_pseudo_values_have_the_error_of_the_metric(name):
    """Their mean is the metric; their standard error is that of the metric over other samples of items."""
    samples = [draw_options(120, seed) for seed in range(120)]
    metrics = [float(compute_metric(name, s, np.ones(120))) for s in samples]
    pseudo = [item_values(name, s) for s in samples]
    assert [v.mean() for v in pseudo] == pytest.approx(metrics)
    assert np.mean([v.std(ddof=1) / np.sqrt(120) for v in pseudo]) == pytest.approx(np.std(metrics), rel=0.2)


def test_units_are_one_item():
    unit = np.repeat(np.arange(30), 4)
    s = draw_options(120)
    clustered = Samples(**{**vars(s), "unit": unit})
    for name in ("accuracy", "auc", "mae"):
        values = item_values(name, clustered)
        assert len(values) == 30 and values.mean() == pytest.approx(float(compute_metric(name, s, np.ones(120))))


def test_all_items_have_one_difference():
    zero = compare(np.full((1, 5), 0.5), np.full((1, 5), 0.5))
    assert zero.p == 1 and zero.interval(0.95) == (0, 0)
    constant = compare(np.full((1, 5), 0.7), np.full((1, 5), 0.5))
    assert constant.p == 1 and constant.interval(0.95) == (-math.inf, math.inf)


def test_all_right_with_several_seeds_is_no_certainty():
    """Items that agree in every seed tell as little about other items as those of one seed: McNemar's interval."""
    right, wrong, seeds = np.ones((3, 40)), np.zeros((1, 40)), SeedVariance(0.0, 6)
    perfect, single = compare(right, wrong, seeds, is_reference_fixed=True), compare(right[:1], wrong)
    assert perfect.difference == 1 and perfect.p < 1e-6
    assert perfect.interval(0.95)[0] == pytest.approx(single.interval(0.95)[0], abs=0.01)
    zero = compare(np.zeros((3, 40)), np.zeros((3, 40)), seeds)
    low, high = zero.interval(0.95)
    assert zero.p == 1 and low == pytest.approx(-high) and 0.02 < high < 0.1
    rows = right.copy()
    rows[0, 0] = 0
    almost_perfect = compare(rows, wrong, SeedVariance(0.005**2, 6), is_reference_fixed=True)
    assert almost_perfect.interval(0.95)[0] < 0.95
