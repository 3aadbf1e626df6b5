"""Permutation test of whether metrics differ between groups of samples, and intervals that agree with it.

The statistic is the largest of all standardised differences: between two groups, and between a group and the mean of all
others. Its null distribution comes from permuting the group labels of the samples:

- Whole units (respondents) exchange their groups if all samples of each unit are of one group. The samples of a unit that
  has several groups exchange them among themselves; then differences are tested within units.
- For metrics given the label (AUC, true and false positive rates), positive samples are permuted among positive ones and
  negative ones among negative ones, so that groups may differ in their share of positive labels.

Differences are divided by standard errors of the groups, so that groups may differ in variance, too (Janssen 1997; Chung
and Romano 2013). For several metrics the largest statistic counts (Westfall and Young 1993).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

SEED = 0
_BATCH = 200_000  # samples that are permuted together: larger batches are not faster
# A group's variance is shrunk as if it had this number of further samples with the variance of all samples together:
# otherwise a small group of equal samples would have a variance of 0.
_PRIOR = 5


@dataclass(frozen=True, eq=False)
class Grouping:
    """Samples in groups, and the movers that a permutation exchanges: samples, or whole units."""

    mover: "np.ndarray"
    """[n] the mover of each sample, from 0 on."""
    group: "np.ndarray"
    """[movers] the group of each mover, from 0 on; no group is empty."""
    stratum: "np.ndarray"
    """[movers] movers are permuted within a stratum: 0 for whole units, otherwise 1 + the sample's unit."""

    @property
    def sizes(self) -> "np.ndarray":
        """Return [G] the number of movers of each group."""
        import numpy as np

        return np.bincount(self.group)

    @property
    def observed_order(self) -> "np.ndarray":
        """Return [1, movers] the movers, sorted by their groups."""
        import numpy as np

        return np.argsort(self.group, kind="stable")[None]


class GroupEstimate(NamedTuple):
    """A metric of each group under each of several arrangements; every array is [arrangements, G]."""

    value: "np.ndarray"
    """The metric; NaN where it is not defined."""
    variance: "np.ndarray"
    """Variance of the value over other movers."""
    weight: "np.ndarray"
    """Effective number of samples; 0 where the metric is not defined."""


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric that is compared between groups."""

    name: str
    estimate: Callable[["np.ndarray", "np.ndarray"], GroupEstimate]
    """(movers sorted by their groups [arrangements, movers], number of movers of each group [G]) -> metric by group."""
    classes: "np.ndarray | None" = None
    """[movers] movers are permuted within a class; None: within all."""
    is_share: bool = False
    """Whether it is a share of independent samples: then groups that do not differ have the same variance."""


class GroupDifference(NamedTuple):
    """A difference of a metric between groups, with its simultaneous interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class GroupComparison:
    """The differences of a metric between groups."""

    metric: str
    p: float
    """p of no difference in this metric, corrected for the metrics that were tested with it."""
    gap: GroupDifference
    """The largest difference between two groups. The interval excludes 0 only where p is below 1 - level."""
    highest: int
    """The group with the largest value."""
    lowest: int
    """The group with the smallest value."""
    versus_others: dict[int, GroupDifference]
    """Group -> its value less the mean of all other groups, weighted by their numbers of samples."""


def arrange(group: "np.ndarray", unit: "np.ndarray | None" = None) -> Grouping:
    """Return the grouping of samples.

    Args:
        group: [n] the group of each sample, from 0 on; no group is empty.
        unit: [n] the respondent (household, country) of each sample, from 0 on; None: each sample has its own.
    """
    import numpy as np

    n = len(group)
    if unit is None:
        return Grouping(np.arange(n), group, np.zeros(n, dtype=np.int64))
    unit_group = np.zeros(int(unit.max()) + 1, dtype=np.int64)
    unit_group[unit] = group
    is_whole = np.ones(len(unit_group), dtype=bool)
    is_whole[unit[group != unit_group[unit]]] = False
    # Whole units have the first numbers, then the samples of the other units.
    is_single = ~is_whole[unit]
    mover = np.where(is_single, is_whole.sum() + np.cumsum(is_single) - 1, (np.cumsum(is_whole) - 1)[unit])
    stratum = np.concatenate([np.zeros(is_whole.sum(), dtype=np.int64), 1 + unit[is_single]])
    return Grouping(mover, np.concatenate([unit_group[is_whole], group[is_single]]), stratum)


def make_mean_metric(
    name: str, grouping: Grouping, values: "np.ndarray", is_counted: "np.ndarray | None" = None
) -> Metric:
    """Return a metric that is the mean of one number for each sample.

    Args:
        name: of the metric.
        grouping: of the samples.
        values: [n] the number of each sample.
        is_counted: [n] whether a sample counts; None: all do. If some do not (the negative ones, for a true positive
            rate), those that count are permuted among themselves.
    """
    import numpy as np

    counts = np.ones(len(values)) if is_counted is None else is_counted.astype(float)
    sums, sizes = np.bincount(grouping.mover, np.where(counts > 0, values, 0.0)), np.bincount(grouping.mover, counts)
    squares, is_single = sums**2, bool(np.isin(sizes, (0, 1)).all())  # then sums times sizes are the sums

    def estimate(order: "np.ndarray", group_sizes: "np.ndarray") -> GroupEstimate:
        starts = np.cumsum(group_sizes) - group_sizes

        def total(numbers: "np.ndarray") -> "np.ndarray":
            return np.add.reduceat(numbers[order], starts, axis=1)

        n, group_sums = total(sizes), total(sums)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = group_sums / n
            deviations = total(squares) - 2 * mean * (group_sums if is_single else total(sums * sizes))
            deviations += mean**2 * (n if is_single else total(sizes**2))
            return GroupEstimate(mean, np.maximum(deviations, 0) / n**2, n)

    is_share = (
        not grouping.stratum.any() and len(sums) == len(values) and bool(np.isin(values[counts > 0], (0, 1)).all())
    )
    return Metric(name, estimate, None if is_counted is None else _classify(grouping, counts), is_share)


def make_auc_metric(
    grouping: Grouping, rank_order: "np.ndarray", positive: "np.ndarray", negative: "np.ndarray"
) -> Metric:
    """Return the area under the ROC curve, with the variance of DeLong et al. (1988).

    Args:
        grouping: of the samples.
        rank_order: [n] the number that ranks the samples.
        positive: [n] whether a sample is positive.
        negative: [n] whether it is negative; a sample that is neither does not count.
    """
    import numpy as np

    ranking = np.lexsort((positive, rank_order))  # among equal risks the negative samples first
    mover, is_positive, is_negative = grouping.mover[ranking], positive[ranking] * 1.0, negative[ranking] * 1.0
    values, block = np.unique(rank_order[ranking], return_inverse=True)
    has_ties, mover_sizes = len(values) < len(ranking), np.bincount(mover)
    movers = len(mover_sizes)

    def estimate(order: "np.ndarray", group_sizes: "np.ndarray") -> GroupEstimate:
        shape = rounds, groups = len(order), len(group_sizes)
        group = np.empty((rounds, movers), dtype=np.int16)
        np.put_along_axis(group, order, np.repeat(np.arange(groups, dtype=np.int16), group_sizes)[None], axis=1)
        part = (np.arange(rounds)[:, None] * groups + group).ravel()
        lengths = np.tile(group_sizes, rounds)
        if movers < len(mover):
            lengths = np.bincount(part, np.tile(mover_sizes, rounds), rounds * groups).astype(np.int64)
        group_order = np.argsort(group[:, mover], axis=1, kind="stable")  # within each group by risk
        classes = is_positive[group_order].ravel(), is_negative[group_order].ravel()
        placements = _compute_placements(lengths, *classes, block[group_order].ravel() if has_ties else None)
        if movers < len(mover):  # the samples of a unit together
            cell = (np.arange(rounds)[:, None] * movers + mover[group_order]).ravel()
            influence = np.bincount(cell, placements.influence, rounds * movers)
            variance = np.bincount(part, influence**2, rounds * groups)
        else:
            variance = np.add.reduceat(placements.influence**2, np.cumsum(lengths) - lengths)
        return GroupEstimate(placements.auc.reshape(shape), variance.reshape(shape), placements.weight.reshape(shape))

    return Metric("auc", estimate, _classify(grouping, positive))


def _classify(grouping: Grouping, is_member: "np.ndarray") -> "np.ndarray":
    """Return [movers] 0 where none of the mover's samples is a member, 2 where all are, otherwise 1."""
    import numpy as np

    share = np.bincount(grouping.mover, is_member) / np.bincount(grouping.mover)
    return np.where(share == 0, 0, np.where(share == 1, 2, 1))


class _Placements(NamedTuple):
    auc: "np.ndarray"
    """[parts] AUC of each part; NaN where it has one class."""
    weight: "np.ndarray"
    """[parts] effective number of samples."""
    influence: "np.ndarray"
    """[m] each sample's part of the AUC's deviation from its expectation."""


def _compute_placements(
    lengths: "np.ndarray", positive: "np.ndarray", negative: "np.ndarray", block: "np.ndarray | None"
) -> _Placements:
    """Compute the AUC of each part of a row of samples from the samples' placements (DeLong et al. 1988).

    Args:
        lengths: [parts] number of samples of each part; none is empty.
        positive: [m] 0 or 1; within a part the samples are sorted by risk, among equals the negative ones first.
        negative: [m] 0 or 1.
        block: [m] equal risks have the same number; None: no risks are equal.
    """
    import numpy as np

    starts = np.cumsum(lengths) - lengths

    def repeat(numbers: "np.ndarray") -> "np.ndarray":
        return np.repeat(numbers, lengths)

    positives, negatives = (np.add.reduceat(kind, starts) for kind in (positive, negative))
    smaller_negatives, positive_count = np.cumsum(negative) - negative, np.cumsum(positive)
    lower, upper = smaller_negatives, positive_count
    if block is not None:  # equals count half: the mean of the counts at the start and at the end of their block
        is_first = np.ones(len(positive), dtype=bool)
        is_first[1:] = block[1:] != block[:-1]
        is_first[starts] = True
        block_end = np.where(np.append(is_first[1:], True), positive_count, len(positive))
        lower = (lower + np.maximum.accumulate(smaller_negatives * is_first)) / 2
        upper = (upper + np.minimum.accumulate(block_end[::-1])[::-1]) / 2
    lower = lower - repeat(np.cumsum(negatives) - negatives)  # negative samples below a positive one
    upper = repeat(np.cumsum(positives)) - upper  # positive samples above a negative one, which precedes its equals
    safe_positives, safe_negatives = np.maximum(positives, 1), np.maximum(negatives, 1)
    placement = positive * lower / repeat(safe_negatives) + negative * upper / repeat(safe_positives)
    auc = np.add.reduceat(placement * positive, starts) / safe_positives
    is_defined = (positives > 0) & (negatives > 0)
    share = repeat(is_defined * 1.0) * (positive / repeat(safe_positives) + negative / repeat(safe_negatives))
    weight = positives * negatives / np.maximum(positives + negatives, 1)
    return _Placements(np.where(is_defined, auc, np.nan), weight, share * (placement - repeat(auc)))


def compare(grouping: Grouping, metrics: Sequence[Metric], level: float, permutations: int) -> list[GroupComparison]:
    """Compare each metric between the groups; metrics that do not vary, or that fewer than two groups have, are omitted.

    Args:
        grouping: of the samples.
        metrics: one family: p and intervals are corrected for all of them.
        level: at which all intervals together cover the true differences.
        permutations: number of permutations.
    """
    import numpy as np

    tests = [t for metric in metrics if (t := _permute(grouping, metric, permutations)) is not None]
    if not tests:
        return []
    statistics = np.array([t.statistics for t in tests])
    # Scaled by a large value of each metric, so that all have the same chance of being the largest (Beran 1988).
    scale = np.quantile(statistics, 0.9, axis=1, keepdims=True)
    statistics /= np.where(scale > 0, scale, 1)
    largest = np.sort(statistics.max(axis=0))

    def tail_share(statistic: "np.ndarray") -> "np.ndarray":
        return 1 - np.searchsorted(largest, statistic, side="left") / len(largest)

    # The largest statistic that is not significant. If it is the largest of all, because there are few arrangements, it is
    # uninformative, and intervals are at least as wide as those of normal values.
    is_insignificant = tail_share(largest) > 1 - level - 1e-12
    critical = scale[:, 0] * largest[is_insignificant].max() * (1 + 1e-9)
    if is_insignificant.all():
        contrasts = len(tests) * len(grouping.sizes) * (len(grouping.sizes) + 1) / 2
        critical = np.maximum(critical, NormalDist().inv_cdf(1 - (1 - level) / contrasts / 2))
    p_values = tail_share(statistics[:, 0])
    return [_make_comparison(t, float(p), float(c)) for t, p, c in zip(tests, p_values, critical, strict=True)]


def compare_constant(grouping: Grouping, metrics: Sequence[Metric], level: float) -> list[GroupComparison]:
    """Compare the metrics of a family that do not vary at all: their differences are 0, with p = 1.

    A permutation would change nothing. Intervals are Newcombe's (1998), of Wilson's limits, with Bonferroni's correction.
    Movers count, not samples: the samples of a unit may always be equal.
    """
    import numpy as np

    comparisons, groups = [], len(grouping.sizes)
    contrasts = max(1, len(metrics)) * groups * (groups + 1) / 2
    critical = NormalDist().inv_cdf(1 - (1 - level) / contrasts / 2)
    for metric in metrics:
        observed = metric.estimate(grouping.observed_order, grouping.sizes)
        value = np.round(observed.value, 12)
        is_counted = None if metric.classes is None else metric.classes > 0
        weight = np.bincount(grouping.group, is_counted, groups)[None]
        if (
            (observed.weight > 0).sum() < 2
            or np.nanmin(value) < np.nanmax(value)
            or np.nanmax(observed.variance) > 1e-12
        ):
            continue
        constant = GroupEstimate(value, np.zeros_like(value), weight)
        test = _MetricTest(replace(metric, is_share=True), 0.0, constant, value, np.zeros(1))
        with np.errstate(invalid="ignore"):
            comparisons.append(_make_comparison(test, 1.0, critical))
    return comparisons


@dataclass(frozen=True, eq=False)
class _MetricTest:
    """A metric with its permutation distribution."""

    metric: Metric
    sample_variance: float
    """Variance of a single sample over all groups."""
    observed: GroupEstimate
    """[1, G] the metric in the observed arrangement."""
    centred: "np.ndarray"
    """[1, G] the values that the test compares."""
    statistics: "np.ndarray"
    """[1 + permutations] the largest standardised difference: of the observed arrangement, then of each permutation."""


def _permute(grouping: Grouping, metric: Metric, permutations: int) -> _MetricTest | None:
    """Return the permutation distribution of a metric; None if it does not vary, or fewer than two groups have it."""
    import numpy as np

    overall = metric.estimate(grouping.observed_order, np.array([len(grouping.group)]))
    observed = metric.estimate(grouping.observed_order, grouping.sizes)
    sample_variance = float(overall.variance[0, 0] * overall.weight[0, 0])
    if not sample_variance > 1e-12 or (observed.weight > 0).sum() < 2:
        return None
    orders = _draw_orders(grouping, metric.classes, permutations)
    estimates = [metric.estimate(order, grouping.sizes) for order in orders]
    joined = GroupEstimate(*map(np.concatenate, zip(observed, *estimates, strict=True)))
    null = _set_null_variance(joined, metric, sample_variance)
    if grouping.stratum.any():  # some groups may have more samples of the units in which more is right
        is_defined = null.weight > 0
        mean = np.where(is_defined, null.value, 0).sum(axis=0) / np.maximum(is_defined.sum(axis=0), 1)
        null = null._replace(value=null.value - mean)
    # Statistics that are equal except for the order of a sum must stay equal.
    return _MetricTest(metric, sample_variance, observed, null.value[:1], np.round(_max_statistic(null), 9))


def _shrink_variance(estimate: GroupEstimate, sample_variance: float) -> GroupEstimate:
    """Return the estimate with variances that are shrunk towards that of all samples."""
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):
        squares = estimate.weight**2 * estimate.variance
        shrunk = (squares + _PRIOR * sample_variance) / (estimate.weight + _PRIOR)
        return estimate._replace(variance=shrunk / estimate.weight)


def _set_null_variance(estimate: GroupEstimate, metric: Metric, sample_variance: float) -> GroupEstimate:
    """Return the estimate with the variances that it has if groups do not differ, which the test uses."""
    import numpy as np

    if not metric.is_share:
        return _shrink_variance(estimate, sample_variance)
    with np.errstate(divide="ignore"):
        return estimate._replace(variance=sample_variance / estimate.weight)


def _draw_orders(grouping: Grouping, classes: "np.ndarray | None", permutations: int) -> Iterator["np.ndarray"]:
    """Draw batches [permutations, movers] of the movers in a random order within strata; columns are sorted by group."""
    import numpy as np

    strata = grouping.stratum * 3.0 + (0 if classes is None else classes)
    column_group = grouping.group[np.lexsort((grouping.group, strata))]
    columns = np.argsort(column_group, kind="stable")
    size = max(1, _BATCH // len(grouping.group))
    for batch, first in enumerate(range(0, permutations, size)):
        yield _shuffle_strata(strata.tobytes(), batch, min(size, permutations - first))[:, columns]


@functools.lru_cache(maxsize=64)
def _shuffle_strata(strata: bytes, batch: int, size: int) -> "np.ndarray":
    """Return [size, movers] the movers sorted by stratum, in a random order within each.

    The random numbers are the same for all columns and metrics, as far as their strata allow it.
    """
    import numpy as np

    stratum = np.frombuffer(strata)
    rng = np.random.default_rng([SEED, batch])
    return np.argsort(stratum + rng.random((size, len(stratum))), axis=1).astype(np.int32)


def _max_statistic(estimate: GroupEstimate) -> "np.ndarray":
    """Return [arrangements] the largest standardised difference between two groups, or a group and all others."""
    import numpy as np

    is_defined = estimate.weight > 0
    value, variance = np.where(is_defined, estimate.value, 0), np.where(is_defined, estimate.variance, np.inf)
    largest = np.zeros(len(value))
    for g in range(value.shape[1] - 1):
        statistic = np.abs(value[:, [g]] - value[:, g + 1 :]) / np.sqrt(variance[:, [g]] + variance[:, g + 1 :])
        np.maximum(largest, statistic.max(axis=1), out=largest)
    others = _average_others(GroupEstimate(value, np.where(is_defined, variance, 0), estimate.weight))
    with np.errstate(invalid="ignore"):
        statistic = np.abs(value - others.value) / np.sqrt(variance + others.variance)
    maximum: np.ndarray = np.maximum(largest, np.nan_to_num(statistic, nan=0).max(axis=1))
    return maximum


def _average_others(estimate: GroupEstimate) -> GroupEstimate:
    """Return, for each group, the weighted mean of all other groups."""
    import numpy as np

    value, variance, weight = estimate

    def sum_others(numbers: "np.ndarray") -> "np.ndarray":
        total: np.ndarray = numbers.sum(axis=-1, keepdims=True) - numbers
        return total

    weights = sum_others(weight)
    with np.errstate(invalid="ignore", divide="ignore"):
        return GroupEstimate(
            sum_others(weight * value) / weights, sum_others(weight**2 * variance) / weights**2, weights
        )


def _make_comparison(test: _MetricTest, p: float, critical: float) -> GroupComparison:
    import numpy as np

    metric, is_defined = test.metric, test.observed.weight[0] > 0
    groups = np.flatnonzero(is_defined)
    null = _set_null_variance(test.observed, metric, test.sample_variance)._replace(value=test.centred)
    estimates = GroupEstimate(*(a[0, is_defined] for a in _shrink_variance(test.observed, test.sample_variance)))
    centred = GroupEstimate(*(a[0, is_defined] for a in null))
    others, centred_others = _average_others(estimates), _average_others(centred)
    lower, upper = _compute_margins(estimates, critical, metric.is_share)
    others_lower, others_upper = _compute_margins(others, critical, metric.is_share)

    def make_difference(difference: Any, lower: Any, upper: Any, contrast: GroupEstimate) -> Any:
        """Return a Difference of arrays. Its intervals contain 0 where the test does not reject."""
        is_unclear = ~(np.round(np.abs(contrast.value) / np.sqrt(contrast.variance), 9) > critical)
        low, high = difference - lower, difference + upper
        low, high = np.where(is_unclear, np.minimum(low, 0), low), np.where(is_unclear, np.maximum(high, 0), high)
        return GroupDifference(difference, low, high)

    a, b = np.triu_indices(len(groups), 1)
    pairs = make_difference(
        estimates.value[a] - estimates.value[b], np.hypot(lower[a], upper[b]), np.hypot(upper[a], lower[b]),
        GroupEstimate(centred.value[a] - centred.value[b], centred.variance[a] + centred.variance[b], centred.weight[a]),
    )  # fmt: skip
    versus = make_difference(
        estimates.value - others.value, np.hypot(lower, others_upper), np.hypot(upper, others_lower),
        GroupEstimate(centred.value - centred_others.value, centred.variance + centred_others.variance, centred.weight),
    )  # fmt: skip
    gap = GroupDifference(
        float(np.ptp(estimates.value)),
        float(max(0, np.max(pairs.low), np.max(-pairs.high))),
        float(max(np.max(pairs.high), np.max(-pairs.low))),
    )
    highest, lowest = (int(groups[pick(estimates.value)]) for pick in (np.argmax, np.argmin))
    versus_others = {int(g): GroupDifference(*map(float, d)) for g, *d in zip(groups, *versus, strict=True)}
    return GroupComparison(metric.name, p, gap, highest, lowest, versus_others)


def _compute_margins(estimate: GroupEstimate, critical: float, is_share: bool) -> "tuple[np.ndarray, np.ndarray]":
    """Return the margins of error below and above each value.

    Those of shares are Wilson's, so that those of differences are Newcombe's (1998), which contain 0 where the test does
    not reject.
    """
    import numpy as np

    if not is_share:
        margin = critical * np.sqrt(estimate.variance)
        return margin, margin
    value, prior = estimate.value, critical**2 / estimate.weight
    centre = (value + prior / 2) / (1 + prior)
    half = np.sqrt(value * (1 - value) * prior + prior**2 / 4) / (1 + prior)
    return value - centre + half, centre + half - value
