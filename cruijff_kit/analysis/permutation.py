"""Do metrics differ between groups of samples? One test for all of them by permutation, and intervals that agree with it.

The statistic is the largest of all standardised differences: between two groups, and between a group and the mean of all
others. What it is without differences comes from dealing the groups out anew among the samples:

- Whole units (respondents) trade their groups where all samples of each unit are of one group. The samples of a unit that
  has several groups trade them among themselves; then differences are tested inside units.
- Of metrics given the label (AUC, true and false positive rates) positive samples trade places with positive ones and
  negative ones with negative ones, so that groups may differ in their share of positive labels.

Differences are divided by standard errors of the groups at hand, so that groups may differ in variance, too (Janssen 1997;
Chung and Romano 2013). Of several metrics the largest statistic counts (Westfall and Young 1993).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

SEED = 0
_BATCH = 200_000  # samples that are dealt out at once: more at once are not faster
# A group's variance counts as if so many more samples had that of all together: small groups in which all samples are alike
# would have none.
_PRIOR = 5


@dataclass(frozen=True, eq=False)
class Grouping:
    """Samples in groups, and what trades places in a permutation: movers, which are samples or whole units."""

    mover: "np.ndarray"
    """[n] the mover that each sample is, or belongs to, from 0 on."""
    group: "np.ndarray"
    """[movers] the group of each, from 0 on; none is empty."""
    stratum: "np.ndarray"
    """[movers] movers of one stratum trade places with each other only: whole units are 0, samples their unit and 1."""

    @property
    def sizes(self) -> "np.ndarray":
        """[G] movers of each group."""
        import numpy as np

        return np.bincount(self.group)

    @property
    def as_it_is(self) -> "np.ndarray":
        """[1, movers] the movers in the order of their groups."""
        import numpy as np

        return np.argsort(self.group, kind="stable")[None]


class Estimate(NamedTuple):
    """A metric of each group under each of some arrangements, [arrangements, G] each."""

    value: "np.ndarray"
    """NaN where it is not defined."""
    variance: "np.ndarray"
    """Of the value, over other movers."""
    weight: "np.ndarray"
    """How many samples it is worth; 0 where it is not defined."""


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric that groups are compared by."""

    name: str
    estimate: Callable[["np.ndarray", "np.ndarray"], Estimate]
    """(movers in the order of their groups [arrangements, movers], movers of each group [G]) -> metric of each group."""
    classes: "np.ndarray | None" = None
    """[movers] they trade places within a class only; None: all do."""
    is_share: bool = False
    """Whether it is a share of independent samples: then groups that do not differ have the same variance."""


class Difference(NamedTuple):
    """A difference of a metric between groups, with its simultaneous interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """How a metric differs between groups."""

    metric: str
    p: float
    """Of no difference in this metric, corrected for the metrics that were tested with it."""
    gap: Difference
    """The largest difference between two groups. The interval excludes 0 only where p is below 1 - level."""
    highest: int
    """The group with the largest value."""
    lowest: int
    """That with the smallest."""
    versus_others: dict[int, Difference]
    """Group -> its value less the mean of all others, which are weighted by their numbers of samples."""


def arrange(group: "np.ndarray", unit: "np.ndarray | None" = None) -> Grouping:
    """The grouping of samples.

    Args:
        group: [n] the group of each sample, from 0 on; none is empty.
        unit: [n] the respondent (household, country) of each, from 0 on; None: each is its own.
    """
    import numpy as np

    n = len(group)
    if unit is None:
        return Grouping(np.arange(n), group, np.zeros(n, dtype=np.int64))
    of_unit = np.zeros(int(unit.max()) + 1, dtype=np.int64)
    of_unit[unit] = group
    is_whole = np.ones(len(of_unit), dtype=bool)
    is_whole[unit[group != of_unit[unit]]] = False
    # Whole units are numbered first, then the samples of all others.
    alone = ~is_whole[unit]
    mover = np.where(alone, is_whole.sum() + np.cumsum(alone) - 1, (np.cumsum(is_whole) - 1)[unit])
    stratum = np.concatenate([np.zeros(is_whole.sum(), dtype=np.int64), 1 + unit[alone]])
    return Grouping(mover, np.concatenate([of_unit[is_whole], group[alone]]), stratum)


def mean_metric(name: str, grouping: Grouping, values: "np.ndarray", counted: "np.ndarray | None" = None) -> Metric:
    """A metric that is the mean of a number of each sample.

    Args:
        values: [n]. counted: [n] whether a sample counts; None: all do. Where some do not (the negative ones, for a true
            positive rate), those that count trade groups among themselves.
    """
    import numpy as np

    counts = np.ones(len(values)) if counted is None else counted.astype(float)
    sums, sizes = np.bincount(grouping.mover, np.where(counts > 0, values, 0.0)), np.bincount(grouping.mover, counts)
    squares, alike = sums**2, bool(np.isin(sizes, (0, 1)).all())  # then sums times sizes are the sums

    def estimate(order: "np.ndarray", sizes_of: "np.ndarray") -> Estimate:
        starts = np.cumsum(sizes_of) - sizes_of

        def total(of_movers: "np.ndarray") -> "np.ndarray":
            return np.add.reduceat(of_movers[order], starts, axis=1)

        n, of_sums = total(sizes), total(sums)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = of_sums / n
            apart = total(squares) - 2 * mean * (of_sums if alike else total(sums * sizes))
            apart += mean**2 * (n if alike else total(sizes**2))
            return Estimate(mean, np.maximum(apart, 0) / n**2, n)

    is_share = (
        not grouping.stratum.any() and len(sums) == len(values) and bool(np.isin(values[counts > 0], (0, 1)).all())
    )
    return Metric(name, estimate, None if counted is None else _classes(grouping, counts), is_share)


def auc_metric(grouping: Grouping, order_by: "np.ndarray", positive: "np.ndarray", negative: "np.ndarray") -> Metric:
    """The area under the ROC curve, with the variance of DeLong et al. (1988).

    Args:
        order_by: [n] what ranks the samples.
        positive, negative: [n] whether they are; a sample that is neither does not count.
    """
    import numpy as np

    ranked = np.lexsort((positive, order_by))  # of equal risks the negative samples first
    mover, is_positive, is_negative = grouping.mover[ranked], positive[ranked] * 1.0, negative[ranked] * 1.0
    values, block = np.unique(order_by[ranked], return_inverse=True)
    is_tied, samples_in = len(values) < len(ranked), np.bincount(mover)
    movers = len(samples_in)

    def estimate(order: "np.ndarray", sizes_of: "np.ndarray") -> Estimate:
        shape = rounds, groups = len(order), len(sizes_of)
        group_of = np.empty((rounds, movers), dtype=np.int16)
        np.put_along_axis(group_of, order, np.repeat(np.arange(groups, dtype=np.int16), sizes_of)[None], axis=1)
        part = (np.arange(rounds)[:, None] * groups + group_of).ravel()
        lengths = np.tile(sizes_of, rounds)
        if movers < len(mover):
            lengths = np.bincount(part, np.tile(samples_in, rounds), rounds * groups).astype(np.int64)
        by_group = np.argsort(group_of[:, mover], axis=1, kind="stable")  # inside each group by risk
        classes = is_positive[by_group].ravel(), is_negative[by_group].ravel()
        placed = _place(lengths, *classes, block[by_group].ravel() if is_tied else None)
        if movers < len(mover):  # the samples of a unit together
            of_mover = (np.arange(rounds)[:, None] * movers + mover[by_group]).ravel()
            variance = np.bincount(part, np.bincount(of_mover, placed.apart, rounds * movers) ** 2, rounds * groups)
        else:
            variance = np.add.reduceat(placed.apart**2, np.cumsum(lengths) - lengths)
        return Estimate(placed.value.reshape(shape), variance.reshape(shape), placed.weight.reshape(shape))

    return Metric("auc", estimate, _classes(grouping, positive))


def _classes(grouping: Grouping, is_in: "np.ndarray") -> "np.ndarray":
    """[movers] 0: none of the mover's samples is in, 2: all are, 1: some."""
    import numpy as np

    share = np.bincount(grouping.mover, is_in) / np.bincount(grouping.mover)
    return np.where(share == 0, 0, np.where(share == 1, 2, 1))


class _Placements(NamedTuple):
    value: "np.ndarray"
    """[parts] AUC of each; NaN where there is one class."""
    weight: "np.ndarray"
    """[parts] how many samples it is worth."""
    apart: "np.ndarray"
    """[m] what each sample adds to the distance of the AUC from its expectation."""


def _place(
    lengths: "np.ndarray", positive: "np.ndarray", negative: "np.ndarray", block: "np.ndarray | None"
) -> _Placements:
    """The AUC of each part of a row of samples.

    Args:
        lengths: [parts] samples of each part; none is empty.
        positive, negative: [m] 0 or 1; inside a part samples stand by risk, of equals the negative ones first.
        block: [m] equal risks have the same number; None: none are equal.
    """
    import numpy as np

    begins = np.cumsum(lengths) - lengths

    def spread(of_parts: "np.ndarray") -> "np.ndarray":
        return np.repeat(of_parts, lengths)

    positives, negatives = (np.add.reduceat(kind, begins) for kind in (positive, negative))
    negatives_before, positives_until = np.cumsum(negative) - negative, np.cumsum(positive)
    below, over = negatives_before, positives_until
    if block is not None:  # equals count half: what was counted when their block began and when it ended
        first = np.ones(len(positive), dtype=bool)
        first[1:] = block[1:] != block[:-1]
        first[begins] = True
        last = np.where(np.append(first[1:], True), positives_until, len(positive))
        below = (below + np.maximum.accumulate(negatives_before * first)) / 2
        over = (over + np.minimum.accumulate(last[::-1])[::-1]) / 2
    below = below - spread(np.cumsum(negatives) - negatives)  # of a positive sample
    over = spread(np.cumsum(positives)) - over  # of a negative one, which stands before its equals
    some_positives, some_negatives = np.maximum(positives, 1), np.maximum(negatives, 1)
    won = positive * below / spread(some_negatives) + negative * over / spread(some_positives)
    value = np.add.reduceat(won * positive, begins) / some_positives
    is_defined = (positives > 0) & (negatives > 0)
    share = spread(is_defined * 1.0) * (positive / spread(some_positives) + negative / spread(some_negatives))
    weight = positives * negatives / np.maximum(positives + negatives, 1)
    return _Placements(np.where(is_defined, value, np.nan), weight, share * (won - spread(value)))


def compare(grouping: Grouping, metrics: Sequence[Metric], level: float, permutations: int) -> list[Comparison]:
    """How each metric differs between the groups; one that fewer than two groups have, or that does not vary, is left out.

    Args:
        level: that all intervals together hold the truth with, if all metrics are of one family.
        permutations: how many are drawn.
    """
    import numpy as np

    tested = [t for metric in metrics if (t := _try(grouping, metric, permutations)) is not None]
    if not tested:
        return []
    statistics = np.array([t.statistics for t in tested])
    # In units of what is large for each metric, so that all have the same chance of being the largest (Beran 1988).
    scale = np.quantile(statistics, 0.9, axis=1, keepdims=True)
    statistics /= np.where(scale > 0, scale, 1)
    largest = np.sort(statistics.max(axis=0))

    def share_above(statistic: "np.ndarray") -> "np.ndarray":
        return 1 - np.searchsorted(largest, statistic, side="left") / len(largest)

    # The largest statistic that is not significant. Where that is the largest of all, as there are few arrangements, it
    # says little, and intervals are at least as wide as those of normal values.
    is_usual = share_above(largest) > 1 - level - 1e-12
    critical = scale[:, 0] * largest[is_usual].max() * (1 + 1e-9)
    if is_usual.all():
        contrasts = len(tested) * len(grouping.sizes) * (len(grouping.sizes) + 1) / 2
        critical = np.maximum(critical, NormalDist().inv_cdf(1 - (1 - level) / contrasts / 2))
    p = share_above(statistics[:, 0])
    return [_comparison(t, float(of_metric), float(c)) for t, of_metric, c in zip(tested, p, critical, strict=True)]


def compare_alike(grouping: Grouping, metrics: Sequence[Metric], level: float) -> list[Comparison]:
    """Of the metrics of one family those that do not vary at all: differences of 0, with p = 1.

    There is nothing to permute: intervals are made of Wilson's limits (Newcombe 1998), with Bonferroni's correction. Movers
    count, not samples: a unit whose samples are all alike may always be so.
    """
    import numpy as np

    found, groups = [], len(grouping.sizes)
    contrasts = max(1, len(metrics)) * groups * (groups + 1) / 2
    critical = NormalDist().inv_cdf(1 - (1 - level) / contrasts / 2)
    for metric in metrics:
        observed = metric.estimate(grouping.as_it_is, grouping.sizes)
        value = np.round(observed.value, 12)
        counted = None if metric.classes is None else metric.classes > 0
        weight = np.bincount(grouping.group, counted, groups)[None]
        if (
            (observed.weight > 0).sum() < 2
            or np.nanmin(value) < np.nanmax(value)
            or np.nanmax(observed.variance) > 1e-12
        ):
            continue
        same = Estimate(value, np.zeros_like(value), weight)
        tested = _Tested(replace(metric, is_share=True), 0.0, same, value, np.zeros(1))
        with np.errstate(invalid="ignore"):
            found.append(_comparison(tested, 1.0, critical))
    return found


@dataclass(frozen=True, eq=False)
class _Tested:
    """A metric that was tried."""

    metric: Metric
    one: float
    """The variance of a single sample over all groups."""
    observed: Estimate
    """[1, G] as it is."""
    centred: "np.ndarray"
    """[1, G] the values that the test goes by."""
    statistics: "np.ndarray"
    """[1 + permutations] the largest standardised difference: as it is, then of each permutation."""


def _try(grouping: Grouping, metric: Metric, permutations: int) -> _Tested | None:
    """None: nothing varies, or fewer than two groups have the metric."""
    import numpy as np

    of_all = metric.estimate(grouping.as_it_is, np.array([len(grouping.group)]))
    observed = metric.estimate(grouping.as_it_is, grouping.sizes)
    one = float(of_all.variance[0, 0] * of_all.weight[0, 0])
    if not one > 1e-12 or (observed.weight > 0).sum() < 2:
        return None
    drawn = [metric.estimate(order, grouping.sizes) for order in _orders(grouping, metric.classes, permutations)]
    raw = _test(Estimate(*map(np.concatenate, zip(observed, *drawn, strict=True))), metric, one)
    if grouping.stratum.any():  # of units in which more is right some groups may have more samples
        has = raw.weight > 0
        mean = np.where(has, raw.value, 0).sum(axis=0) / np.maximum(has.sum(axis=0), 1)
        raw = raw._replace(value=raw.value - mean)
    # What is equal but for the order of sums must stay equal.
    return _Tested(metric, one, observed, raw.value[:1], np.round(_largest(raw), 9))


def _steady(raw: Estimate, one: float) -> Estimate:
    """With variances that are drawn towards that of all samples."""
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):
        of_sample = (raw.weight**2 * raw.variance + _PRIOR * one) / (raw.weight + _PRIOR)
        return raw._replace(variance=of_sample / raw.weight)


def _test(raw: Estimate, metric: Metric, one: float) -> Estimate:
    """With the variances that the test goes by: those without differences."""
    import numpy as np

    with np.errstate(divide="ignore"):
        return raw._replace(variance=one / raw.weight) if metric.is_share else _steady(raw, one)


def _orders(grouping: Grouping, classes: "np.ndarray | None", permutations: int) -> Iterator["np.ndarray"]:
    """[some permutations, movers] who comes to which place; places stand in the order of their groups."""
    import numpy as np

    strata = grouping.stratum * 3.0 + (0 if classes is None else classes)
    places = grouping.group[np.lexsort((grouping.group, strata))]
    by_group = np.argsort(places, kind="stable")
    size = max(1, _BATCH // len(grouping.group))
    for batch, done in enumerate(range(0, permutations, size)):
        yield _deal(strata.tobytes(), batch, min(size, permutations - done))[:, by_group]


@functools.lru_cache(maxsize=64)
def _deal(strata: bytes, batch: int, size: int) -> "np.ndarray":
    """[size, movers] the movers by stratum, inside each in a random order: the same one in each column and for all metrics,
    so far as their strata allow it.
    """
    import numpy as np

    stratum = np.frombuffer(strata)
    draw = np.random.default_rng([SEED, batch])
    return np.argsort(stratum + draw.random((size, len(stratum))), axis=1).astype(np.int32)


def _largest(estimate: Estimate) -> "np.ndarray":
    """[arrangements] the largest standardised difference between two groups, or a group and all others."""
    import numpy as np

    has = estimate.weight > 0
    value, variance = np.where(has, estimate.value, 0), np.where(has, estimate.variance, np.inf)
    largest = np.zeros(len(value))
    for g in range(value.shape[1] - 1):
        apart = np.abs(value[:, [g]] - value[:, g + 1 :]) / np.sqrt(variance[:, [g]] + variance[:, g + 1 :])
        np.maximum(largest, apart.max(axis=1), out=largest)
    others = _others(Estimate(value, np.where(has, variance, 0), estimate.weight))
    with np.errstate(invalid="ignore"):
        apart = np.abs(value - others.value) / np.sqrt(variance + others.variance)
    return np.maximum(largest, np.nan_to_num(apart, nan=0).max(axis=1))


def _others(estimate: Estimate) -> Estimate:
    """Of each group the weighted mean of all others."""
    import numpy as np

    value, variance, weight = estimate

    def total(summed: "np.ndarray") -> "np.ndarray":
        return summed.sum(axis=-1, keepdims=True) - summed

    others = total(weight)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Estimate(total(weight * value) / others, total(weight**2 * variance) / others**2, others)


def _comparison(tested: _Tested, p: float, critical: float) -> Comparison:
    import numpy as np

    metric, has = tested.metric, tested.observed.weight[0] > 0
    groups = np.flatnonzero(has)
    steady, by_test = _steady(tested.observed, tested.one), _test(tested.observed, metric, tested.one)
    own = Estimate(*(a[0, has] for a in steady))
    centred = Estimate(*(a[0, has] for a in by_test._replace(value=tested.centred)))
    others, centred_others = _others(own), _others(centred)
    below, above = _reaches(own, critical, metric.is_share)
    others_below, others_above = _reaches(others, critical, metric.is_share)

    def between(difference: Any, low: Any, high: Any, tested: Estimate) -> Any:
        """A Difference of arrays. Intervals hold 0 where the test does not tell the difference from 0."""
        is_unclear = ~(np.round(np.abs(tested.value) / np.sqrt(tested.variance), 9) > critical)
        low, high = difference - low, difference + high
        return Difference(
            difference, np.where(is_unclear, np.minimum(low, 0), low), np.where(is_unclear, np.maximum(high, 0), high)
        )

    a, b = np.triu_indices(len(groups), 1)
    pairs = between(
        own.value[a] - own.value[b], np.hypot(below[a], above[b]), np.hypot(above[a], below[b]),
        Estimate(centred.value[a] - centred.value[b], centred.variance[a] + centred.variance[b], centred.weight[a]),
    )  # fmt: skip
    versus = between(
        own.value - others.value, np.hypot(below, others_above), np.hypot(above, others_below),
        Estimate(centred.value - centred_others.value, centred.variance + centred_others.variance, centred.weight),
    )  # fmt: skip
    gap = Difference(
        float(np.ptp(own.value)),
        float(max(0, np.max(pairs.low), np.max(-pairs.high))),
        float(max(np.max(pairs.high), np.max(-pairs.low))),
    )
    highest, lowest = (int(groups[pick(own.value)]) for pick in (np.argmax, np.argmin))
    of_each = {int(g): Difference(*map(float, d)) for g, *d in zip(groups, *versus, strict=True)}
    return Comparison(metric.name, p, gap, highest, lowest, of_each)


def _reaches(estimate: Estimate, critical: float, is_share: bool) -> "tuple[np.ndarray, np.ndarray]":
    """How far the limits of each value lie below and above it. Of shares they are Wilson's, so that those of differences
    are Newcombe's (1998), which hold 0 as the test does.
    """
    import numpy as np

    if not is_share:
        reach = critical * np.sqrt(estimate.variance)
        return reach, reach
    value, more = estimate.value, critical**2 / estimate.weight
    centre = (value + more / 2) / (1 + more)
    half = np.sqrt(value * (1 - value) * more + more**2 / 4) / (1 + more)
    return value - centre + half, centre + half - value
