"""Shares of settings: by hand; false positives without differences; coverage of the intervals."""

import itertools

import numpy as np
import pytest

from cruijff_kit.analysis.effects import are_one_to_one, decompose, find_overlapping


def grid(*levels: int) -> list[np.ndarray]:
    """Return the levels of each setting in a full grid."""
    return [np.array(p) for p in zip(*itertools.product(*map(range, levels)), strict=True)]


def simulate(rng, truth, seeds: int, items: int, seed_sd: float) -> tuple[list[list[float]], np.ndarray]:
    """Simulate the runs' values and their items: items differ, and differ between configurations, too."""
    base_difficulty, rows = rng.normal(0, 0.35, items), []
    for true in truth:
        difficulty = base_difficulty + rng.normal(0, 0.15, items)
        rows += [true + rng.normal(0, seed_sd) + difficulty + rng.normal(0, 0.15, items) for _ in range(seeds)]
    return [[float(r.mean()) for r in rows[i * seeds : (i + 1) * seeds]] for i in range(len(truth))], np.array(rows)


def test_shares_with_seeds_alone_are_epsilon_squared():
    """Kelley (1935), by hand: (square between levels - df x error) / total, over means of two seeds."""
    rng = np.random.default_rng(0)
    places = grid(3, 2)
    values = [[0.1 * a + 0.02 * b + x for x in rng.normal(0, 0.02, 2)] for a, b in zip(*places, strict=True)]
    mean = np.mean(values, axis=1)
    error = np.var(values, axis=1, ddof=1).mean() / 2
    total = ((mean - mean.mean()) ** 2).sum()
    square = sum(2 * (mean[places[0] == k].mean() - mean.mean()) ** 2 for k in range(3))
    share = decompose(places, values).shares[0]
    assert share.share == pytest.approx((square - 2 * error) / total)
    assert share.low <= share.share <= share.high


def test_overlapping_settings():
    a, b = grid(3, 3)
    assert find_overlapping([a, b]) == [] and not are_one_to_one(a, b)
    assert find_overlapping([a, a]) == [0, 1] and are_one_to_one([1, 2, 2], ["x", "y", "y"])
    assert not are_one_to_one([1, 1, 2], ["x", "y", "z"])
    cells = [0, 1, 3, 8]  # (0, 0), (0, 1), (1, 0) and, separate from them, (2, 2)
    assert find_overlapping([a[cells], b[cells]]) == [0, 1] and find_overlapping([a[:-1], b[:-1]]) == []
    d = decompose([np.array([0, 1, 2]), np.array([0, 1, 2])], [[0.0, 0.1], [1.0, 1.1], [2.0, 2.1]])
    assert d.p < 0.05 and d.shares == [None, None] and d.overlapping == [0, 1]
    crossed = [np.repeat(p, 2) for p in ([0, 0, 1, 1], [0, 1, 2, 3])] + [
        np.tile([0, 1], 4)
    ]  # the first is in the second
    d = decompose(crossed, [[10.0 * c + 0.1 * s for s in (0, 1)] for c in crossed[2]])
    assert d.shares[:2] == [None, None] and d.shares[2].share > 0.9 and d.overlapping == [0, 1]
    assert decompose([a], [[float(v)] for v in a]).p is None


@pytest.mark.parametrize(
    ("levels", "seeds", "items", "seed_sd"),
    [((4, 4), 1, 100, 0.0), ((2,), 1, 30, 0.0), ((3, 3), 3, 100, 0.03), ((2, 2), 2, 100, 0.05)],
)
def test_false_positives_without_differences(levels, seeds, items, seed_sd):
    rng, places, rejections = np.random.default_rng(1), grid(*levels), 0
    for _ in range(150):
        values, rows = simulate(rng, np.zeros(len(places[0])), seeds, items, seed_sd)
        rejections += decompose(places, values, rows).p < 0.05
    print(levels, seeds, items, seed_sd, rejections / 150)
    assert rejections / 150 < 0.1


def test_false_positives_with_right_and_wrong_answers():
    rng, rejections = np.random.default_rng(2), 0
    for _ in range(150):
        right = rng.normal(0, 0.8, 60) + rng.normal(0, 0.6, (12, 60)) < 1.2
        rejections += decompose([np.arange(12)], [[float(r.mean())] for r in right], right * 1.0).p < 0.05
    assert rejections / 150 < 0.08


@pytest.mark.parametrize(("seeds", "seed_sd", "missing"), [(1, 0.0, []), (3, 0.02, []), (1, 0.0, [1, 6, 11])])
def test_intervals_cover(seeds, seed_sd, missing):
    """They cover the share of the variance of the measured values: noise counts in the total."""
    rng, places = np.random.default_rng(3), grid(4, 3)
    places = [np.delete(p, missing) for p in places]
    truth = 0.03 * places[0] + 0.03 * places[1]
    repeats = [decompose(places, *simulate(rng, truth, seeds, 200, seed_sd)) for _ in range(120)]
    total = np.mean([np.var([np.mean(v) for v in simulate(rng, truth, seeds, 200, seed_sd)[0]]) for _ in range(300)])
    expected = []
    for pair in (places, places[::-1]):
        indicators = [np.eye(int(p.max()) + 1)[p] for p in pair]
        reduced_fit = indicators[1] @ np.linalg.lstsq(indicators[1], truth, rcond=None)[0]
        design = np.concatenate(indicators, axis=1)
        fit = design @ np.linalg.lstsq(design, truth, rcond=None)[0]
        expected.append(((fit - reduced_fit) ** 2).sum() / (total * len(truth)))
    shares = [d.shares for d in repeats if d.shares]
    assert len(shares) > 110
    for i, true in enumerate(expected):
        coverage = np.mean([s[i].low <= true <= s[i].high for s in shares])
        print(seeds, missing, round(true, 2), round(np.mean([s[i].share for s in shares]), 2), coverage)
        assert coverage > 0.88 and np.mean([s[i].share for s in shares]) == pytest.approx(true, abs=0.06)
