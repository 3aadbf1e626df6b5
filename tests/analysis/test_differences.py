"""Differences: false positives held by simulation, against other tests, and intervals that agree with p."""

import itertools
import math

import numpy as np
import pytest
import statsmodels.stats.contingency_tables as sm
from scipy.stats import ttest_1samp

from cruijff_kit.analysis.differences import SeedVariance, compare, item_values, mcnemar, pool_seeds, with_holm
from cruijff_kit.analysis.measures import Samples, measure

from .test_intervals import options

SPREAD = 1.5  # of how hard items are, in standard deviations of the rest


def sweep(draw: np.random.Generator, configurations: int, seeds: int, n: int, *seed_points: float) -> list[np.ndarray]:
    """Configurations [seeds, items] of one true accuracy, 0.85: items differ, each configuration finds others hard, seeds
    differ by so many points of accuracy (one number, or one for each configuration).
    """
    rest = math.sqrt(3)  # item by configuration, item by seed, chance
    total = math.sqrt(SPREAD**2 + rest**2)
    centre, density = 1.0364 * total, 0.2332 / total  # of N(0, 1) at 0.85
    hard = draw.normal(0, SPREAD, n)
    made = []
    for c in range(configurations):
        points = seed_points[c % len(seed_points)]
        own, lift = draw.normal(0, 1, n), draw.normal(0, points / 100 / density, (seeds, 1))
        made.append((centre + hard + own + lift + draw.normal(0, math.sqrt(2), (seeds, n)) > 0).astype(float))
    return made


def false_positives(test, seeds: int, n: int, seed_points: float, repeats: int) -> float:
    draw = np.random.default_rng(int(seeds * 1000 + n + seed_points))
    return np.mean([test(*sweep(draw, 2, seeds, n, seed_points)) < 0.05 for _ in range(repeats)])


def over_items(own: np.ndarray, other: np.ndarray) -> float:
    return ttest_1samp(own.mean(0) - other.mean(0), 0).pvalue


def two_way_bootstrap(own: np.ndarray, other: np.ndarray) -> float:
    """p of a percentile bootstrap over items and over seeds, the textbook's alternative."""
    draw, (seeds, n), found = np.random.default_rng(0), own.shape, []
    for _ in range(200):
        items = draw.integers(0, n, n)
        a, b = (side[draw.integers(0, seeds, seeds)][:, items].mean() for side in (own, other))
        found.append(a - b)
    below = np.mean(np.array(found) <= 0)
    return 2 * min(below, 1 - below)


def ours(own: np.ndarray, other: np.ndarray) -> float:
    return compare(own, other, pool_seeds([own, other])).p  # as comparisons.py calls it


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_seeds_that_differ_are_no_finding(seeds):
    """Two configurations of one accuracy, seeds that differ by 0, 2 and 4 points: found different in 5% at most."""
    repeats, worst = 800, 0.0
    for points, n in itertools.product((0, 2, 4), (100, 300, 1000)):
        rates = [false_positives(test, seeds, n, points, repeats) for test in (ours, over_items)]
        print(f"{seeds} seeds, sd {points} points, {n} items: {rates[0]:.3f}; items alone {rates[1]:.3f}")
        worst = max(worst, rates[0])
        assert points == 0 or n == 100 or rates[1] > 0.08
    assert worst < 0.05 + 3 * math.sqrt(0.05 * 0.95 / repeats)


def test_a_bootstrap_over_two_seeds_finds_too_much():
    """0.22; 0.12 of three seeds that differ by 2 points."""
    assert false_positives(two_way_bootstrap, 2, 1000, 4, 100) > 0.12


def test_a_real_difference_is_found():
    draw, found = np.random.default_rng(0), 0
    for _ in range(100):
        own, other = sweep(draw, 2, 3, 300, 2)
        found += compare(np.maximum(own, draw.random(own.shape) < 0.6), other).p < 0.05  # 9 points better
    assert found > 80


def test_the_variances_are_those_of_a_mixed_model():
    """REML of statsmodels on a balanced layout: the same variance between seeds and of a difference."""
    import pandas
    from statsmodels.regression.mixed_linear_model import MixedLM

    draw = np.random.default_rng(2)
    n, seeds = 40, 4
    hard = draw.normal(0, 1, n)
    own, other = (hard + c + draw.normal(0, 1, (seeds, 1)) + draw.normal(0, 1, (seeds, n)) for c in (0.0, 0.5))
    rows = [
        {"y": side[s, i], "c": c, "seed": f"{c}{s}", "item": i, "one": 1}
        for c, side in enumerate((own, other)) for s in range(seeds) for i in range(n)
    ]  # fmt: skip
    fit = MixedLM.from_formula(
        "y ~ c", pandas.DataFrame(rows), groups="one", re_formula="0",
        vc_formula={"seed": "0 + C(seed)", "item": "0 + C(item)"},
    ).fit(reml=True)  # fmt: skip
    between = (own.mean(1).var(ddof=1) + other.mean(1).var(ddof=1)) / 2
    seed_variance = dict(zip(fit.model.exog_vc.names, fit.vcomp, strict=True))["seed"]
    assert between - fit.scale / n == pytest.approx(seed_variance, rel=0.05)
    found = compare(other, own)
    assert found.difference == pytest.approx(fit.params["c"], abs=1e-6)
    low, high = found.interval(0.95)
    assert (high - low) / 2 > 1.96 * fit.bse["c"] > 0.7 * (high - low) / 2 * 1.96 / 2.45


def test_one_seed_borrows_from_the_others():
    draw = np.random.default_rng(1)
    made = sweep(draw, 4, 3, 300, 4)
    single = made[0][:1]
    seeds = pool_seeds([single, *made[1:]])
    assert seeds.freedom == 6 and seeds.variance == pytest.approx(np.mean([m.mean(1).var(ddof=1) for m in made[1:]]))
    alone, borrowed = compare(single, made[1]), compare(single, made[1], seeds)
    assert "paired t" in alone.method and "crossed" in borrowed.method
    assert np.ptp(borrowed.interval(0.95)) > np.ptp(alone.interval(0.95))
    assert pool_seeds([single, single]) is None


@pytest.mark.parametrize("points", [(0, 0, 0, 0), (2, 2, 2, 2), (4, 4, 4, 4), (1, 4, 1, 4)])
def test_seeds_are_pooled_over_configurations(points):
    """Four of three seeds: false positives are held, and 40 points above the base model are found for certain."""
    draw, found, better = np.random.default_rng(7), [], []
    for _ in range(400):
        *made, base_model = sweep(draw, 5, 3, 300, *points, 0)
        seeds = pool_seeds(made)
        found.append(compare(made[1], made[3], seeds).p < 0.05)
        worse = np.minimum(base_model[:1], draw.random((1, 300)) < 0.5)  # by 40 points
        better.append([compare(made[1], worse, s, other_is_fixed=True).p < 0.001 for s in (seeds, None)])
    pooled, own = np.mean(better, axis=0)
    print(f"sd {points}: false positives {np.mean(found):.3f}; found {pooled:.2f}, by its own seeds alone {own:.2f}")
    assert np.mean(found) < (0.05 if len({*points}) == 1 else 0.08) + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert pooled > 0.95 and pooled >= own


def test_against_what_was_not_trained():
    """The base model and the constant baseline have no seeds: only the configuration's own count."""
    draw, rejected = np.random.default_rng(3), 0
    for _ in range(300):
        own, other = sweep(draw, 2, 3, 300, 2, 0)
        rejected += compare(own, other[:1], other_is_fixed=True).p < 0.05
    assert rejected / 300 < 0.08
    assert compare(own[:1], other[:1], other_is_fixed=True).method == "McNemar, exact"


def test_mcnemar_exactly():
    """p by counting all ways in which the items that changed could have; the interval by Agresti & Min's formula."""
    found = mcnemar(10, 1, 100)
    ways = [sum(flips) for flips in itertools.product((0, 1), repeat=11)]
    assert found.p == pytest.approx(sum(abs(w - 5.5) >= 4.5 for w in ways) / 2**11)
    reach = 1.959964 * math.sqrt(12 - 81 / 102) / 102
    assert found.interval(0.95) == pytest.approx((9 / 102 - reach, 9 / 102 + reach), abs=1e-6)
    assert found.difference == pytest.approx(0.09) and mcnemar(0, 0, 5).p == 1


@pytest.mark.parametrize(("gained", "lost", "items"), [(9, 0, 500), (5, 0, 6), (0, 7, 40), (30, 12, 200), (3, 3, 9)])
def test_mcnemar_is_that_of_statsmodels(gained, lost, items):
    expected = sm.mcnemar([[items - gained - lost, gained], [lost, 0]], exact=True).pvalue
    assert mcnemar(gained, lost, items).p == pytest.approx(expected)


def test_p_and_interval_say_the_same():
    """For every level: 0 is outside the interval exactly where p is below."""
    draw = np.random.default_rng(4)
    kinds = {
        "bootstrap": [compare(draw.exponential(1 + k / 10, (1, 40)), draw.exponential(1, (1, 40))) for k in range(12)],
        "t": [compare(draw.normal(k / 20, 1, (3, 80)), draw.normal(0, 1, (3, 80))) for k in range(12)],
        "mcnemar": [mcnemar(g, lost, 120) for g, lost in itertools.product(range(0, 30, 4), (0, 2, 5))],
    }
    for kind, found in kinds.items():
        for d, alpha in itertools.product(found, (0.2, 0.05, 0.01, 0.002)):
            low, high = d.interval(1 - alpha)
            outside = not low <= 0 <= high
            assert outside == (d.p < alpha) or d.p == pytest.approx(alpha, rel=0.05), (kind, d, alpha)
            assert low <= d.difference <= high


def test_holm_and_its_intervals():
    draw = np.random.default_rng(5)
    for _ in range(20):
        found = [mcnemar(int(g), int(lost), 100) for g, lost in draw.integers(0, 25, (8, 2))]
        by_hand = sorted(range(8), key=lambda i: found[i].p)
        highest, expected = 0.0, {}
        for rank, i in enumerate(by_hand):
            highest = max(highest, min(1.0, (8 - rank) * found[i].p))
            expected[i] = highest
        for i, (low, high, p) in enumerate(with_holm(found)):
            assert p == pytest.approx(expected[i])
            assert (not low <= 0 <= high) == (p < 0.05)
            assert low <= found[i].difference <= high
    assert with_holm([]) == []


def test_simultaneous_intervals_hold_together():
    """Six runs of one accuracy against a seventh: all six intervals at once in 95%."""
    draw, held = np.random.default_rng(6), 0
    for _ in range(60):
        *runs, best = sweep(draw, 7, 1, 200, 0)
        held += all(low <= 0 <= high for low, high, _ in with_holm([compare(r, best) for r in runs]))
    assert held / 60 > 0.88


@pytest.mark.parametrize("name", ["auc", "rmse", "balanced_accuracy", "f1", "r_squared", "accuracy"])
def test_pseudo_values_know_the_error(name):
    """Their mean is the metric; their standard error is that of the metric over other draws of items."""
    found = [options(120, seed) for seed in range(120)]
    values = [float(measure(name)(s, np.ones(120))) for s in found]
    each = [item_values(name, s) for s in found]
    assert [v.mean() for v in each] == pytest.approx(values)
    assert np.mean([v.std(ddof=1) / np.sqrt(120) for v in each]) == pytest.approx(np.std(values), rel=0.2)


def test_units_are_one_item():
    unit = np.repeat(np.arange(30), 4)
    s = options(120)
    clustered = Samples(**{**vars(s), "unit": unit})
    for name in ("accuracy", "auc", "mae"):
        values = item_values(name, clustered)
        assert len(values) == 30 and values.mean() == pytest.approx(float(measure(name)(s, np.ones(120))))


def test_nothing_varies():
    same = compare(np.full((1, 5), 0.5), np.full((1, 5), 0.5))
    assert same.p == 1 and same.interval(0.95) == (0, 0)
    shifted = compare(np.full((1, 5), 0.7), np.full((1, 5), 0.5))
    assert shifted.p == 1 and shifted.interval(0.95) == (-math.inf, math.inf)


def test_all_right_with_several_seeds_is_no_certainty():
    """Items that agree in every seed say as little of others as one seed's do; McNemar's interval is the yardstick."""
    right, wrong, between = np.ones((3, 40)), np.zeros((1, 40)), SeedVariance(0.0, 6)
    found, one = compare(right, wrong, between, other_is_fixed=True), compare(right[:1], wrong)
    assert (
        found.difference == 1
        and found.p < 1e-6
        and found.interval(0.95)[0] == pytest.approx(one.interval(0.95)[0], abs=0.01)
    )
    nothing = compare(np.zeros((3, 40)), np.zeros((3, 40)), between)
    low, high = nothing.interval(0.95)
    assert nothing.p == 1 and low == pytest.approx(-high) and 0.02 < high < 0.1
    rows = right.copy()
    rows[0, 0] = 0
    nearly = compare(rows, wrong, SeedVariance(0.005**2, 6), other_is_fixed=True)
    assert nearly.interval(0.95)[0] < 0.95
