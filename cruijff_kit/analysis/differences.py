"""Whether two configurations differ, and by how much: paired over test items, with seeds as a second random factor.

The model is that of crossed random effects: the score of configuration c, seed s, item i is mean(c) + item(i) + item by
configuration + seed(c, s) + rest. The variance of a difference of means is estimated from the mean squares of that layout,
with Satterthwaite's degrees of freedom. (Baayen et al. 2008 argue for items and subjects as crossed effects; Clark 1973 for
never leaving one out.) Why neither of the usual two: a bootstrap over two or three seeds finds only (seeds - 1) / seeds of
the variance between them (seeds that differ by 4 points and in nothing else: false positives in 22%, here in 4%), and a
mixed model by REML has these very estimates, but normal tails (tests/analysis/test_differences.py holds both beside it).

With one seed each there is only the item test: of runs, not of configurations. Right and wrong answers take McNemar's test.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

from cruijff_kit.analysis.intervals import RESAMPLES, cluster_sums, studentised
from cruijff_kit.analysis.measures import Samples, is_mean, measure, terms

if TYPE_CHECKING:
    import numpy as np

_MANY = 1000  # from so many items on a mean of differences is as good as normal
_MOST_UNITS = 2000  # of more, some are left out together in the jackknife
_CHUNK = 200  # weightings at once


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference of two means or metrics, and what is known of its error."""

    difference: float
    p: float
    """Of no difference, two-sided."""
    interval: Callable[[float], tuple[float, float]]
    """Level -> (low, high). Excludes 0 at 1 - p and below."""
    items: int
    method: str
    """The test, for people."""
    seed_deviation: float | None = None
    """Standard deviation between seeds of a configuration, in the units of the difference; None with one seed each."""


def item_values(name: str, samples: Samples) -> "np.ndarray":
    """[units] numbers whose mean is a metric of one run, and whose spread is what each item (or unit of items) does to it.

    Of a mean over items the items' own numbers; of other metrics the jackknife's pseudo-values (Tukey 1958), moved to the
    metric.
    """
    import numpy as np

    unit = samples.unit
    if is_mean(name):
        values = terms(name, samples)
        if unit is None:
            return values
        sums, sizes = cluster_sums(values, unit)
        return values.mean() + (sums - values.mean() * sizes) * len(sums) / len(values)
    n = len(samples)
    group = np.arange(n) if unit is None else unit
    count = int(group.max()) + 1
    if count > _MOST_UNITS:
        group, count = group % _MOST_UNITS, _MOST_UNITS
    whole = float(measure(name)(samples, np.ones(n)))
    left_out = []
    for first in range(0, count, _CHUNK):
        weights = (group[None, :] != np.arange(first, min(first + _CHUNK, count))[:, None]).astype(float)
        left_out.append(measure(name)(samples, weights))
    pseudo = count * whole - (count - 1) * np.concatenate(left_out)
    return pseudo - pseudo.mean() + whole


def compare(
    own: "np.ndarray", other: "np.ndarray", between_seeds: "SeedVariance | None" = None, other_is_fixed: bool = False
) -> Difference:
    """Compare two configurations (or a configuration and the base model, or chance) on the same items.

    Args:
        own, other: [seeds, items] scores, as `item_values` has them.
        between_seeds: what seeds do in all configurations of the sweep. None: each side's own; with a single seed on a
            side the item test alone.
        other_is_fixed: the other has no seeds: it was not trained.
    """

    import numpy as np

    apart = own.mean(0) - other.mean(0)
    sides = [own] if other_is_fixed else [own, other]
    if all(len(side) < 2 for side in sides) or any(len(side) < 2 for side in sides) and between_seeds is None:
        return _over_items(own.mean(0), other.mean(0)) if len(own) == len(other) == 1 else _by_t(apart)
    n, middle = len(apart), float(apart.mean())
    over_items = float(apart.var(ddof=1)) / n
    if np.isin(own, (0, 1)).all() and np.isin(other, (0, 1)).all():
        # As in `mcnemar`: where all items agree nothing has been seen of what others would do.
        middle, over_items = _with_half_an_item_more(float(apart.sum()), float((apart**2).sum()), n)
    rest = sum(_rest(side) / (len(side) * n) for side in sides if len(side) > 1)
    parts = [_seed_part(side, between_seeds) for side in sides]
    over_seeds, square = sum(part for part, _ in parts), sum(part**2 / freedom for part, freedom in parts)
    if between_seeds is not None:  # one estimate for both sides, not two that are independent
        square = over_seeds**2 / between_seeds.freedom
    # Both mean squares hold what is left over once; it counts once.
    total = over_items + max(0.0, over_seeds - rest)
    deviation = math.sqrt(max(0.0, (over_seeds - rest) / sum(1 / len(side) for side in sides)))
    if total <= 1e-24:
        return _nothing_varies(middle, n, deviation)
    freedom = total**2 / (over_items**2 / (n - 1) + square) if over_items or square else n - 1
    kind = "items and seeds as crossed random effects, t"
    found = _t(middle, math.sqrt(total), max(1.0, freedom), n, kind, deviation)
    return dataclasses.replace(found, difference=float(apart.mean()))


def mean_error(rows: "np.ndarray") -> tuple[float, float, float | None]:
    """Of the mean of [seeds, items]: standard error, degrees of freedom, and standard deviation between seeds (None for one
    seed). Items and seeds are crossed random effects, as in `compare`.
    """
    means, n = rows.mean(0), rows.shape[1]
    over_items = float(means.var(ddof=1)) / n
    if len(rows) < 2:
        return math.sqrt(over_items), n - 1, None
    variance, freedom = _between(rows)
    between = max(0.0, variance - _rest(rows) / n)
    total = over_items + between / len(rows)
    if total <= 1e-24:
        return 0.0, n - 1, 0.0
    spread = over_items**2 / (n - 1) + (variance / len(rows)) ** 2 / freedom
    return math.sqrt(total), max(1.0, total**2 / spread), math.sqrt(between)


def _between(side: "np.ndarray") -> tuple[float, int]:
    """Variance of the means between seeds, and its degrees of freedom."""
    return float(side.mean(1).var(ddof=1)), len(side) - 1


def _rest(side: "np.ndarray") -> float:
    """Mean square of what neither item nor seed explains."""
    left = side - side.mean(0) - side.mean(1, keepdims=True) + side.mean()
    return float((left**2).sum() / ((len(side) - 1) * (side.shape[1] - 1)))


class SeedVariance(NamedTuple):
    """Variance of a configuration's mean between seeds, pooled over all configurations, and its degrees of freedom."""

    variance: float
    freedom: int


def pool_seeds(sides: Sequence["np.ndarray"]) -> SeedVariance | None:
    """From configurations [seeds, items]; None where all have one seed."""
    found = [_between(side) for side in sides if len(side) > 1]
    freedom = sum(f for _, f in found)
    return SeedVariance(sum(v * f for v, f in found) / freedom, freedom) if freedom else None


def _seed_part(side: "np.ndarray", pooled: SeedVariance | None) -> tuple[float, int]:
    """What seeds add to the variance of a side's mean, and its degrees of freedom: its own variance between seeds, or that
    of all configurations, whichever is larger. Two or three seeds of one configuration alone find little; with the pooled
    variance alone those whose seeds differ most are found different too often (in 14%, here in 9%; sd 1 and 4 points).
    """
    if pooled is None:
        variance, freedom = _between(side)
        return variance / len(side), freedom
    own = _between(side)[0] if len(side) > 1 else 0.0
    return max(own, pooled.variance) / len(side), pooled.freedom


def _over_items(own: "np.ndarray", other: "np.ndarray") -> Difference:
    import numpy as np

    if np.isin([own, other], (0, 1)).all():
        return mcnemar(int(((own == 1) & (other == 0)).sum()), int(((own == 0) & (other == 1)).sum()), len(own))
    apart = own - other
    return _by_t(apart) if len(apart) >= _MANY else _by_bootstrap(apart)


def mcnemar(gained: int, lost: int, items: int) -> Difference:
    """Exact McNemar test, with Agresti and Min's interval (2005, Statistics in Medicine 24): half an item more a cell.

    Where the two disagree on whether there is a difference, the interval's end near 0 is that of the exact test.

    Args:
        gained: items that only the first has right. lost: that only the second has. items: all.
    """
    from scipy.special import bdtr, betaincinv

    middle, variance = _with_half_an_item_more(gained - lost, gained + lost, items)
    error = math.sqrt(variance)
    exact = min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))
    more, less = max(gained, lost), min(gained, lost)

    def interval(level: float) -> tuple[float, float]:
        reach = NormalDist().inv_cdf((1 + level) / 2) * error
        low, high = max(-1.0, middle - reach), min(1.0, middle + reach)
        if (exact < 1 - level) == (low <= 0 <= high) and more:
            least = float(
                betaincinv(more, less + 1, (1 - level) / 2)
            )  # Clopper and Pearson's, of the items that changed
            near = (2 * least - 1) * (gained + lost) / items
            low, high = (near, high) if gained > lost else (low, -near)
        return low, high

    return Difference((gained - lost) / items, exact, interval, items, "McNemar, exact")


def _with_half_an_item_more(total: float, squares: float, items: int) -> tuple[float, float]:
    """Mean of paired differences of right and wrong answers, and its variance, with half an item more in each of the four
    cells (Agresti and Min 2005).

    Args:
        total, squares: the sum of the differences over items, and of their squares.
    """
    n = items + 2
    return total / n, (squares + 1 - total**2 / n) / n**2


def _by_bootstrap(apart: "np.ndarray") -> Difference:
    """Studentised bootstrap over items; p from the same distribution as the interval."""

    n, mean = len(apart), float(apart.mean())
    error = float(apart.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    if error <= 1e-12 * max(1.0, abs(mean)):
        return _nothing_varies(mean, n)
    ratios = studentised(apart, None, 5 * RESAMPLES)
    drawn, observed = len(ratios), mean / error

    def interval(level: float) -> tuple[float, float]:
        tail = int(
            (1 - level) / 2 * (drawn + 1)
        )  # ratios beyond each end; at a level finer than the draws, the last one
        low, high = ratios[max(0, tail - 1)], ratios[min(drawn - 1, drawn - tail)]
        return mean - float(high) * error, mean - float(low) * error

    beyond = min((ratios <= observed).sum(), (ratios >= observed).sum())
    return Difference(
        mean, min(1.0, 2 * float(beyond + 1) / (drawn + 1)), interval, n, "studentised bootstrap over items"
    )


def _by_t(apart: "np.ndarray") -> Difference:
    n, mean = len(apart), float(apart.mean())
    error = float(apart.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    if error <= 1e-12 * max(1.0, abs(mean)):
        return _nothing_varies(mean, n)
    return _t(mean, error, n - 1, n, "paired t over items", None)


def _t(difference: float, error: float, freedom: float, items: int, method: str, deviation: float | None) -> Difference:
    from scipy.special import stdtr, stdtrit  # Student's t without scipy.stats, which takes half a second to import

    def interval(level: float) -> tuple[float, float]:
        reach = float(stdtrit(freedom, (1 + level) / 2)) * error
        return difference - reach, difference + reach

    return Difference(
        difference, 2 * float(stdtr(freedom, -abs(difference) / error)), interval, items, method, deviation
    )


def _nothing_varies(difference: float, items: int, deviation: float | None = None) -> Difference:
    """Every item has the same difference: where it is 0 there is none, else nothing tells how sure it is."""
    least, most = (difference, difference) if difference == 0 else (-math.inf, math.inf)
    return Difference(difference, 1.0, lambda level: (least, most), items, "no item differs", deviation)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979, statsmodels), in the order of the arguments."""
    if not p:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(value) for value in multipletests(p, method="holm")[1]]


def with_holm(found: Sequence[Difference], level: float = 0.95) -> list[tuple[float, float, float]]:
    """(low, high, p) of each difference, corrected for all of them: p by Holm (1979, statsmodels), intervals that hold
    together (Bonferroni) and that exclude 0 exactly where p is below 1 - level.
    """
    alpha, rows = 1 - level, []
    for d, p in zip(found, holm([d.p for d in found]), strict=True):
        low, high = d.interval(1 - alpha / len(found))
        if p >= alpha and not low <= 0 <= high:  # an exact test may say less than its interval
            low, high = min(low, 0.0), max(high, 0.0)
        elif p < alpha and low <= 0 <= high:  # a later step of Holm's: the end near 0 at the level of that step
            near_low, near_high = d.interval(1 - alpha * d.p / p)
            low, high = (near_low, high) if d.difference > 0 else (low, near_high)
        rows.append((low, high, p))
    return rows
