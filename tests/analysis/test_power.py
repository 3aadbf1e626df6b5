"""Power, compared with simulations of the test itself."""

import numpy as np
import pytest
from scipy.stats import ttest_rel

from cruijff_kit.analysis.differences import mcnemar
from cruijff_kit.analysis.power import _discordant_shares, detectable_difference, detectable_error, power


def simulate_power(
    items: int, accuracy: float, difference: float, correlation: float, alpha: float, repeats: int = 1500
):
    gained, lost = _discordant_shares(accuracy, difference, correlation)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(items, [gained, lost, 1 - gained - lost], repeats)
    return np.mean([mcnemar(int(g), int(lo), items).p < alpha for g, lo, _ in counts])


@pytest.mark.parametrize(
    ("items", "accuracy", "difference", "correlation", "alpha"),
    [
        (100, 0.8, 0.1, 0.5, 0.05),
        (100, 0.8, 0.05, 0.7, 0.05),
        (300, 0.9, 0.06, 0.3, 0.05 / 7),
        (1000, 0.6, 0.05, 0.6, 0.05),
    ],
)
def test_power_is_that_of_the_test(items, accuracy, difference, correlation, alpha):
    assert power(items, accuracy, difference, correlation, alpha) == pytest.approx(
        simulate_power(items, accuracy, difference, correlation, alpha), abs=0.04
    )


def test_of_many_items_the_approximation_agrees():
    assert power(2999, 0.8, 0.03, 0.5) == pytest.approx(power(3001, 0.8, 0.03, 0.5), abs=0.03)


def test_detectable_difference_and_needed_items():
    few, many = detectable_difference(100), detectable_difference(1000)
    assert few.difference > 0.08 > many.difference > 0.02 and not few.observed
    assert power(100, 0.8, few.difference, 0.5) == pytest.approx(0.8, abs=0.01)
    assert power(few.items_for_5_points, 0.8, 0.05, 0.5) == pytest.approx(0.8, abs=0.02)
    assert detectable_difference(100, configurations=8).difference > few.difference
    assert detectable_difference(100, correlation=0.9).difference < few.difference
    assert detectable_difference(3).difference is None and "no difference can be found" in str(detectable_difference(3))
    assert "100 test items: a difference of" in str(few) and "assumed: accuracy 0.80, correlation 0.50" in str(few)
    assert few.to_dict()["difference"] == few.difference and few.to_dict()["text"] == str(few)
    observed = detectable_difference(100, 4, 0.7, 0.6)
    assert observed.observed and "4 configurations" in str(observed) and "observed" in str(observed)


def test_errors_of_numbers():
    """By simulation of the paired t test: 80% of repetitions find the difference, 5% find one where there is none."""
    d = detectable_error(60, deviation=3.0, correlation=0.4)
    rng = np.random.default_rng(0)
    errors = rng.multivariate_normal([0, 0], [[9, 3.6], [3.6, 9]], (4000, 60))
    for shift, share in ((d.difference, 0.8), (0.0, 0.05)):
        assert np.mean(ttest_rel(errors[..., 0] + shift, errors[..., 1], axis=1).pvalue < 0.05) == pytest.approx(
            share, abs=0.02
        )
    assumed = detectable_error(100, 4)
    assert "4 configurations: a difference of 0.324 standard deviations of an item's error" in str(assumed)
    assert assumed.items_for_5_points is None and assumed.accuracy is None
    assert detectable_error(100, 4, design_effect=4.0).difference == pytest.approx(2 * assumed.difference, rel=1e-3)


def test_items_of_one_unit_count_as_fewer():
    independent, clustered = (
        detectable_difference(300, 2, 0.8, 0.5),
        detectable_difference(300, 2, 0.8, 0.5, design_effect=3.0),
    )
    assert clustered.difference == detectable_difference(100, 2, 0.8, 0.5).difference > independent.difference
    assert "300 test items, as good as 100 independent ones" in str(clustered)


def test_seeds_add_to_the_error():
    plain, noisy = (detectable_difference(300, 2, 0.8, 0.5, deviation, 3) for deviation in (0.0, 0.04))
    assert noisy.difference > plain.difference + 0.02 and "of 3 seeds" in str(noisy)
    assert detectable_difference(300, 2, 0.8, 0.5, 0.04, 3).items_for_5_points is None
