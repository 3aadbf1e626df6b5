"""What a comparison of this size can find: the smallest difference with 80% power, and the items that a difference needs.

For right and wrong answers the power is that of the exact McNemar test, summed over what can happen; with seeds that of the
normal approximation. Two runs' answers to one item are alike: `correlation`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

POWER, ALPHA = 0.8, 0.05
WANTED = 0.05  # the difference whose items are told: 5 points of accuracy
ASSUMED_ACCURACY, ASSUMED_CORRELATION = 0.8, 0.5
_MOST_ITEMS = 1_000_000
_MOST_EXACT = 3000  # items; with more the normal approximation agrees to a tenth of a point


@dataclass(frozen=True)
class DetectableDifference:
    """The smallest difference between two of `configurations` that is found with 80% power at 5%, Holm's first step."""

    items: int
    """Test items that both answer."""
    configurations: int
    """How many are compared with the best."""
    accuracy: float | None
    """Of the better one, assumed or observed; None where the scores are errors of numbers."""
    correlation: float
    """Between the answers of two configurations to one item, assumed or observed."""
    observed: bool
    """Whether accuracy (or spread) and correlation were observed; else they are assumed."""
    difference: float | None
    """In `unit`; None: not even the largest one would be found."""
    items_for_5_points: int | None
    """Items that a difference of 5 points would need; None: more than a million, or of errors."""
    seed_deviation: float | None = None
    """Standard deviation between seeds that is counted in, as a share; None: seeds are not known to differ."""
    seeds: int = 1
    """Seeds of each configuration."""
    design_effect: float = 1.0
    """Items that tell as much as one of a unit of its own, where items of one unit (respondent, household) are alike."""
    unit: str = "share"
    """Of the difference: share (0.1: 10 points); of errors of numbers what these are in, or where nothing was observed
    "standard deviations of an item's error"."""

    def __str__(self) -> str:
        about = "observed" if self.observed else "assumed"
        of = f"{self.items} test items" + (f", {self.configurations} configurations" if self.configurations > 2 else "")
        of += f" of {self.seeds} seeds" if self.seeds > 1 else ""
        if self.design_effect > 1:
            of += f", as good as {self.items / self.design_effect:.0f} independent ones"
        if self.accuracy is None:
            amount = f"{self.difference:.3g} {self.unit}".removesuffix(" as scored")
            found = f"a difference of {amount} or more is found with 80% power"
            return f"{of}: {found} ({about}: correlation {self.correlation:.2f})"
        finds = "no difference" if self.difference is None else f"a difference of {100 * self.difference:.1f} points"
        needs = "over a million" if self.items_for_5_points is None else f"{self.items_for_5_points:,}"
        least = "can be found" if self.difference is None else "or more is found with 80% power"
        return (
            f"{of}: {finds} {least} ({about}: accuracy {self.accuracy:.2f}, correlation {self.correlation:.2f}); "
            f"5 points would need {needs} items"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the words."""
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
    """What right and wrong answers to so many items can show.

    Args:
        items: test items. configurations: that are compared with the best one; 2 for a comparison of two.
        accuracy, correlation: None: 0.8 and 0.5 are assumed.
        seed_deviation: standard deviation of a configuration's accuracy between seeds. seeds: of each configuration.
        design_effect: items that count as one, since items of one unit are alike.
    """
    observed = accuracy is not None and correlation is not None
    accuracy = ASSUMED_ACCURACY if accuracy is None else accuracy
    correlation = ASSUMED_CORRELATION if correlation is None else correlation
    alpha = ALPHA / max(1, configurations - 1)
    between = 2 * (seed_deviation or 0.0) ** 2 / seeds

    def found(difference: float, of: int) -> float:
        return power(max(1, round(of / design_effect)), accuracy, difference, correlation, alpha, between, seeds)

    return DetectableDifference(
        items, configurations, round(accuracy, 4), round(correlation, 4), observed,
        _smallest(lambda d: found(d, items), accuracy), _items(lambda n: found(WANTED, n)) if accuracy > WANTED else None,
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
    """What errors of so many numbers can show: of a paired t test, by the normal approximation.

    Args:
        items, configurations, correlation, seeds, design_effect: as for `detectable_difference`.
        deviation: standard deviation of the errors of one configuration; None: the difference is told in these.
    """
    observed = deviation is not None and correlation is not None
    correlation = ASSUMED_CORRELATION if correlation is None else correlation
    normal = NormalDist()
    reach = normal.inv_cdf(1 - ALPHA / max(1, configurations - 1) / 2) + normal.inv_cdf(POWER)
    difference = reach * math.sqrt(2 * (1 - correlation) * design_effect / items) * (deviation if observed else 1.0)
    unit = "as scored" if observed else "standard deviations of an item's error"
    return DetectableDifference(
        items, configurations, None, round(correlation, 4), observed, float(f"{difference:.4g}"), None, None, seeds,
        round(design_effect, 4), unit,
    )  # fmt: skip


def power(
    items: int,
    accuracy: float,
    difference: float,
    correlation: float,
    alpha: float = ALPHA,
    between_seeds: float = 0.0,
    seeds: int = 1,
) -> float:
    """The probability that two configurations are found to differ.

    Args:
        items: that both answer. accuracy: of the better one. difference: how much worse the other is. correlation: of their
            answers. alpha: level of the test. between_seeds: variance that seeds add to the difference. seeds: of each.
    """
    gained, lost = _changed(accuracy, difference, correlation)
    if seeds > 1 or between_seeds or items > _MOST_EXACT:
        # Seeds do not average away which items a configuration finds hard.
        variance = (gained + lost - difference**2) / items + between_seeds
        if variance <= 0:
            return 1.0
        normal = NormalDist()
        return normal.cdf(difference / math.sqrt(variance) + normal.inv_cdf(alpha / 2))
    return _mcnemar_power(items, gained, lost, alpha)


def _changed(accuracy: float, difference: float, correlation: float) -> tuple[float, float]:
    """Shares of items that only the better one, and that only the worse one has right."""
    worse = accuracy - difference
    spread = math.sqrt(accuracy * (1 - accuracy) * worse * (1 - worse))
    both = accuracy * worse + correlation * spread
    both = min(max(both, accuracy + worse - 1, 0.0), accuracy, worse)
    return accuracy - both, worse - both


def _mcnemar_power(items: int, gained: float, lost: float, alpha: float) -> float:
    """Of the exact test: over how many items change, and how many of these are gained."""
    import numpy as np
    from scipy.special import bdtr
    from scipy.stats import binom

    changed = gained + lost
    if changed <= 0:
        return 0.0
    numbers = np.arange(items + 1)
    chances = binom.pmf(numbers, items, changed)
    numbers = numbers[chances > 1e-9]
    found = 0.0
    for n in numbers.tolist():
        fewer = np.arange(n // 2 + 1)
        p = np.minimum(1, 2 * bdtr(fewer, n, 0.5))
        least = int((p < alpha).sum()) - 1  # so many of either kind at most
        if least >= 0:
            share = gained / changed
            found += chances[n] * (bdtr(least, n, share) + bdtr(least, n, 1 - share))
    return float(found)


def _smallest(found: Callable[[float], float], most: float) -> float | None:
    """The smallest difference with enough power, to a tenth of a point."""
    if found(most) < POWER:
        return None
    low, high = 0.0, most
    while high - low > 5e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) >= POWER else (middle, high)
    return round(high, 4)


def _items(found: Callable[[int], float]) -> int | None:
    """The fewest items with enough power, to about a hundredth."""
    high = 16
    while found(high) < POWER:
        high *= 2
        if high > _MOST_ITEMS:
            return None
    low = high // 2
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) >= POWER else (middle, high)
    return high
