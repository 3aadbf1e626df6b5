"""Power of a comparison: the smallest difference with 80% power, and the number of items that a difference needs.

For right and wrong answers the power is that of the exact McNemar test, summed over its outcomes; with seeds that of the
normal approximation. The answers of two runs to one item are correlated: `correlation`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

POWER, ALPHA = 0.8, 0.05
TARGET_DIFFERENCE = 0.05  # the difference whose number of items is reported: 5 points of accuracy
ASSUMED_ACCURACY, ASSUMED_CORRELATION = 0.8, 0.5
_MAX_ITEMS = 1_000_000
_MAX_EXACT_ITEMS = 3000  # with more items the normal approximation agrees to a tenth of a point


@dataclass(frozen=True)
class DetectableDifference:
    """The smallest difference between two of `configurations` that is found with 80% power at 5%, Holm's first step."""

    items: int
    """Number of test items that both answer."""
    configurations: int
    """Number of configurations, the best included."""
    accuracy: float | None
    """Accuracy of the better one, assumed or observed; None where the scores are errors of numbers."""
    correlation: float
    """Correlation of the answers of two configurations to one item, assumed or observed."""
    observed: bool
    """Whether accuracy (or the errors' deviation) and correlation were observed; otherwise they are assumed."""
    difference: float | None
    """The difference in `unit`; None where even the largest one has less power."""
    items_for_5_points: int | None
    """Number of items that a difference of 5 points needs; None for more than a million, and for errors."""
    seed_deviation: float | None = None
    """Standard deviation of accuracy between seeds, as a share; None where it is unknown and counts as 0."""
    seeds: int = 1
    """Number of seeds of each configuration."""
    design_effect: float = 1.0
    """Variance of a mean of items that share units (respondents, households), divided by that of independent items."""
    unit: str = "share"
    """Unit of the difference: share (0.1: 10 points); for errors "as scored", or, if nothing was observed, "standard
    deviations of an item's error"."""

    def __str__(self) -> str:
        source = "observed" if self.observed else "assumed"
        size = f"{self.items} test items"
        size += f", {self.configurations} configurations" if self.configurations > 2 else ""
        size += f" of {self.seeds} seeds" if self.seeds > 1 else ""
        if self.design_effect > 1:
            size += f", as good as {self.items / self.design_effect:.0f} independent ones"
        if self.accuracy is None:
            amount = f"{self.difference:.3g} {self.unit}".removesuffix(" as scored")
            finding = f"a difference of {amount} or more is found with 80% power"
            return f"{size}: {finding} ({source}: correlation {self.correlation:.2f})"
        if self.difference is None:
            finding = "no difference can be found"
        else:
            finding = f"a difference of {100 * self.difference:.1f} points or more is found with 80% power"
        items = "over a million" if self.items_for_5_points is None else f"{self.items_for_5_points:,}"
        assumptions = f"{source}: accuracy {self.accuracy:.2f}, correlation {self.correlation:.2f}"
        return f"{size}: {finding} ({assumptions}); 5 points would need {items} items"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value, with the sentence as `text`."""
        return asdict(self) | {"text": str(self)}


def detectable_difference(
    items: int,
    configurations: int = 2,
    accuracy: float | None = None,
    correlation: float | None = None,
    seed_deviation: float | None = None,
    seeds: int = 1,
    design_effect: float = 1.0,
) -> DetectableDifference:
    """Return the detectable difference of right and wrong answers.

    Args:
        items: number of test items.
        configurations: number of configurations, of which the best is compared with each other one.
        accuracy: accuracy of the better one; None: 0.8 is assumed.
        correlation: correlation of two configurations' answers; None: 0.5 is assumed.
        seed_deviation: standard deviation of a configuration's accuracy between seeds.
        seeds: number of seeds of each configuration.
        design_effect: variance of a mean of these items, divided by that of independent ones.
    """
    is_observed = accuracy is not None and correlation is not None
    accuracy = ASSUMED_ACCURACY if accuracy is None else accuracy
    correlation = ASSUMED_CORRELATION if correlation is None else correlation
    alpha = ALPHA / max(1, configurations - 1)
    seed_part = 2 * (seed_deviation or 0.0) ** 2 / seeds

    def compute(difference: float, n: int) -> float:
        return power(max(1, round(n / design_effect)), accuracy, difference, correlation, alpha, seed_part, seeds)

    difference = _find_smallest_difference(lambda d: compute(d, items), accuracy)
    has_target = accuracy > TARGET_DIFFERENCE
    needed_items = _find_fewest_items(lambda n: compute(TARGET_DIFFERENCE, n)) if has_target else None
    return DetectableDifference(
        items, configurations, round(accuracy, 4), round(correlation, 4), is_observed, difference, needed_items,
        seed_deviation, seeds, round(design_effect, 4),
    )  # fmt: skip


def detectable_error(
    items: int,
    configurations: int = 2,
    deviation: float | None = None,
    correlation: float | None = None,
    seeds: int = 1,
    design_effect: float = 1.0,
) -> DetectableDifference:
    """Return the detectable difference of errors of numbers: that of a paired t test, by the normal approximation.

    Args:
        items, configurations, correlation, seeds, design_effect: as for `detectable_difference`.
        deviation: standard deviation of the errors of one configuration; None: it is the unit of the difference.
    """
    if deviation is not None and correlation is not None:
        is_observed, scale, unit = True, deviation, "as scored"
    else:
        is_observed, scale, unit = False, 1.0, "standard deviations of an item's error"
    correlation = ASSUMED_CORRELATION if correlation is None else correlation
    normal = NormalDist()
    reach = normal.inv_cdf(1 - ALPHA / max(1, configurations - 1) / 2) + normal.inv_cdf(POWER)
    difference = reach * math.sqrt(2 * (1 - correlation) * design_effect / items) * scale
    return DetectableDifference(
        items, configurations, None, round(correlation, 4), is_observed, float(f"{difference:.4g}"), None, None, seeds,
        round(design_effect, 4), unit,
    )  # fmt: skip


def power(
    items: int,
    accuracy: float,
    difference: float,
    correlation: float,
    alpha: float = ALPHA,
    seed_variance: float = 0.0,
    seeds: int = 1,
) -> float:
    """Return the probability that a test finds a difference between two configurations.

    Args:
        items: number of items that both answer.
        accuracy: accuracy of the better one.
        difference: its accuracy less that of the worse one.
        correlation: correlation of their answers.
        alpha: level of the test.
        seed_variance: variance that seeds add to the difference.
        seeds: number of seeds of each configuration.
    """
    gained, lost = _discordant_shares(accuracy, difference, correlation)
    if seeds > 1 or seed_variance or items > _MAX_EXACT_ITEMS:
        # More seeds do not remove the variance of which items a configuration finds hard.
        variance = (gained + lost - difference**2) / items + seed_variance
        if variance <= 0:
            return 1.0
        normal = NormalDist()
        return normal.cdf(difference / math.sqrt(variance) + normal.inv_cdf(alpha / 2))
    return _mcnemar_power(items, gained, lost, alpha)


def _discordant_shares(accuracy: float, difference: float, correlation: float) -> tuple[float, float]:
    """Return the shares of items that only the better one has right, and that only the worse one has right."""
    worse = accuracy - difference
    deviations = math.sqrt(accuracy * (1 - accuracy) * worse * (1 - worse))
    joint = accuracy * worse + correlation * deviations
    joint = min(max(joint, accuracy + worse - 1, 0.0), accuracy, worse)
    return accuracy - joint, worse - joint


def _mcnemar_power(items: int, gained: float, lost: float, alpha: float) -> float:
    """Sum the power of the exact test over the number of discordant items."""
    import numpy as np
    from scipy.special import bdtr
    from scipy.stats import binom

    discordant = gained + lost
    if discordant <= 0:
        return 0.0
    numbers = np.arange(items + 1)
    probabilities = binom.pmf(numbers, items, discordant)
    numbers = numbers[probabilities > 1e-9]
    total = 0.0
    for n in numbers.tolist():
        p = np.minimum(1, 2 * bdtr(np.arange(n // 2 + 1), n, 0.5))
        critical = int((p < alpha).sum()) - 1  # the test rejects if the smaller of gained and lost is at most this
        if critical >= 0:
            share = gained / discordant
            total += probabilities[n] * (bdtr(critical, n, share) + bdtr(critical, n, 1 - share))
    return float(total)


def _find_smallest_difference(compute_power: Callable[[float], float], most: float) -> float | None:
    """Find the smallest difference with 80% power, to a twentieth of a point; None where `most` has less."""
    if compute_power(most) < POWER:
        return None
    low, high = 0.0, most
    while high - low > 5e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if compute_power(middle) >= POWER else (middle, high)
    return round(high, 4)


def _find_fewest_items(compute_power: Callable[[int], float]) -> int | None:
    """Find the fewest items with 80% power, to about a hundredth; None for more than a million."""
    high = 16
    while compute_power(high) < POWER:
        high *= 2
        if high > _MAX_ITEMS:
            return None
    low = high // 2
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if compute_power(middle) >= POWER else (middle, high)
    return high
