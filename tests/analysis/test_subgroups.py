"""Subgroups: scores as in scikit-learn and fairlearn, p as in scipy, false positives, and power."""

import warnings

import numpy as np
import pytest
from fairlearn import metrics as fairlearn
from scipy.stats import f_oneway, permutation_test
from sklearn.metrics import roc_auc_score

from cruijff_kit.analysis.permutation import arrange, compare, make_auc_metric, make_mean_metric
from cruijff_kit.analysis.subgroups import MIN_AUC, MIN_Z, QUALITY, Row, compare_columns, pool
from cruijff_kit.evaluation.metrics import expected_calibration_error
from cruijff_kit.util.errors import UserError

DESIGNS = ((2, 50), (4, 25), (5, 20), (5, 60), (10, 10), (10, 30), (8, 1000))


class Simulation:
    """Simulated samples of groups with given accuracies and shares of positive labels."""

    def __init__(self, rng, sizes, accuracies=0.85, shares=0.5, units=None):
        self.group = np.repeat(np.arange(len(sizes)), sizes)
        n = len(self.group)
        self.unit = None if units is None else np.arange(n) // units
        self.positive = rng.random(n) < np.broadcast_to(shares, len(sizes))[self.group]
        chance = np.broadcast_to(accuracies, len(sizes))[self.group]
        number = rng.random(n) if units is None else rng.random(n)[self.unit]  # all samples of a unit have one number
        self.right = number < chance
        confidence = 0.5 + 0.5 * rng.beta(2, 1.5, n)
        self.risk = np.where(self.right == self.positive, confidence, 1 - confidence)
        self.predicted = self.risk >= 0.5

    def rows(self, **fields) -> list[Row]:
        units = [None] * len(self.group) if self.unit is None else map(str, self.unit)
        columns = zip(self.group, self.right, self.positive, self.risk, self.predicted, units, strict=True)
        return [Row(f"g{g}", float(c), bool(y), float(r), float(p), unit=u, **fields) for g, c, y, r, p, u in columns]

    def compare(self, permutations=199):
        """Compare as compare_columns does, but without the scores of each group, which take most of its time."""
        grouping = arrange(self.group, self.unit)
        metrics = [
            make_mean_metric("accuracy", grouping, self.right.astype(float)),
            make_auc_metric(grouping, self.risk, self.positive, ~self.positive),
            make_mean_metric("calibration", grouping, self.risk - self.positive),
        ]
        return compare(grouping, metrics, 0.95, permutations)

    def is_flagged_by_version_1(self) -> bool:
        """Return whether version 1 flags the groups: by analysis of variance, or one of four thresholds."""
        parts = [self.group == g for g in range(self.group.max() + 1)]
        accuracies = np.array([self.right[own].mean() for own in parts])
        aucs = np.array([
            roc_auc_score(self.positive[own], self.risk[own]) for own in parts if 0 < self.positive[own].mean() < 1
        ])  # fmt: skip
        with warnings.catch_warnings():  # groups in which all are right
            warnings.simplefilter("ignore")
            p = f_oneway(*(self.right[own] for own in parts)).pvalue
        lowest = (accuracies.min() - accuracies.mean()) / accuracies.std() if accuracies.std() > 0 else 0
        return p < 0.05 or lowest < MIN_Z or aucs.std() > 0.1 or np.ptp(aucs) > 0.3 or aucs.min() < MIN_AUC


def flag_rates(simulate, repeats: int) -> tuple[float, float]:
    """Return the shares of repetitions with a flag: by version 1, and now. No interval contradicts its p."""
    version_1 = now = 0
    for _ in range(repeats):
        samples = simulate()
        comparisons = samples.compare()
        for c in comparisons:
            significant = [d for d in c.versus_others.values() if not d.low <= 0 <= d.high]
            assert c.p < 0.05 or (c.gap.low == 0 and not significant)
        version_1 += samples.is_flagged_by_version_1()
        now += min(c.p for c in comparisons) < 0.05
    return version_1 / repeats, now / repeats


def test_how_often_something_is_flagged():
    """In 5% at most if groups do not differ; the power if one group is 15 points less accurate is printed."""
    rng, equal, power = np.random.default_rng(0), {}, {}
    for groups, size in DESIGNS:
        repeats = 100 if groups * size < 1000 else 12
        equal[groups, size] = flag_rates(lambda k=groups, n=size: Simulation(rng, [n] * k), repeats)
        accuracies = [0.85] * (groups - 1) + [0.70]
        power[groups, size] = flag_rates(
            lambda k=groups, n=size, a=accuracies: Simulation(rng, [n] * k, a), repeats // 2
        )
    print("\ngroups x samples   equal: version 1, now   15 points: version 1, now")
    for (groups, size), (version_1, now) in equal.items():
        powers = "{:19.2f} {:7.2f}".format(*power[groups, size])
        print(f"{groups:6} x {size:5} {version_1:17.2f} {now:7.2f} {powers}")
    assert max(now for _, now in equal.values()) <= 0.10 and np.mean([now for _, now in equal.values()]) < 0.06
    assert max(version_1 for version_1, _ in equal.values()) > 0.9
    assert power[8, 1000][1] == 1 and power[5, 60][1] > 0.3 > power[10, 10][1]


@pytest.mark.parametrize("sizes", [(30, 300), (300, 30), (20, 100, 100)])
def test_groups_may_differ_in_their_share_of_positive_labels(sizes):
    """Risks are right on average in each group, and rank as well; then AUC and calibration do not differ."""
    rng, flagged = np.random.default_rng(1), 0
    for _ in range(150):
        group = np.repeat(np.arange(len(sizes)), sizes)
        risk = 1 / (1 + np.exp(-rng.normal(np.where(group == 0, 0, -2), 1)))
        positive = rng.random(len(group)) < risk
        grouping = arrange(group)
        metrics = [
            make_auc_metric(grouping, risk, positive, ~positive),
            make_mean_metric("calibration", grouping, risk - positive),
        ]
        flagged += min(c.p for c in compare(grouping, metrics, 0.95, 199)) < 0.05
    assert flagged / 150 < 0.1


def test_units_trade_groups_as_wholes():
    """Five answers of a respondent are right or wrong together: treated as independent, they are flagged far too often."""
    rng, clustered, plain = np.random.default_rng(2), 0, 0
    for _ in range(100):
        samples = Simulation(rng, [100] * 4, units=5)
        clustered += min(c.p for c in samples.compare()) < 0.05
        samples.unit = None
        plain += min(c.p for c in samples.compare()) < 0.05
    assert clustered / 100 < 0.11 and plain / 100 > 0.4


def test_units_with_samples_of_several_groups():
    """Countries that differ, and respondents with answers on several topics, which pair the topics."""
    rng, flagged, plain, rejections = np.random.default_rng(3), 0, 0, {True: 0, False: 0}

    def is_different(group, unit, right) -> bool:
        grouping = arrange(group, unit)
        metrics = [make_mean_metric("accuracy", grouping, right.astype(float))]
        risk, positive = np.where(right, 0.8, 0.4) + rng.normal(0, 0.01, len(right)), rng.random(len(right)) < 0.5
        metrics.append(make_auc_metric(grouping, risk, positive, ~positive))
        return min(c.p for c in compare(grouping, metrics, 0.95, 199)) < 0.05

    for _ in range(100):
        unit = np.repeat(np.arange(25), 20)
        group = (rng.random(500) < rng.beta(0.3, 0.3, 25)[unit]).astype(int)
        right = rng.random(500) < np.clip(rng.normal(0.7, 0.2, 25), 0, 1)[unit]
        flagged += is_different(group, unit, right)
        plain += is_different(group, None, right)
        unit, topic = np.repeat(np.arange(60), 2), np.tile([0, 1], 60)
        ability = rng.normal(0, 1, 60)[unit]
        right = ability + rng.normal(0, 0.3, 120) > np.where(topic == 0, -0.6, -0.1)
        for paired in rejections:
            rejections[paired] += is_different(topic, unit if paired else None, right)
    print(flagged, plain, rejections)
    assert flagged / 100 < 0.11 < plain / 100 and rejections[True] > rejections[False] + 15
    mixed = arrange(np.array([0, 0, 1, 0, 1, 1]), np.array([0, 0, 1, 2, 2, 3]))
    assert mixed.mover.tolist() == [0, 0, 1, 3, 4, 2] and mixed.group.tolist() == [0, 1, 1, 0, 1]
    assert mixed.stratum.tolist() == [0, 0, 0, 3, 3]


@pytest.mark.parametrize(("sizes", "accuracies"), [((60,) * 4, (0.85, 0.85, 0.85, 0.65)), ((300, 30), (0.95, 0.7))])
def test_intervals_of_differences_cover(sizes, accuracies):
    rng, gap_hits, versus_hits = np.random.default_rng(4), 0, 0
    truth, n = np.array(accuracies), np.array(sizes)
    versus = truth - ((n * truth).sum() - n * truth) / (n.sum() - n)
    for _ in range(150):
        c = Simulation(rng, sizes, truth).compare()[0]
        gap_hits += c.gap.low <= np.ptp(truth) <= c.gap.high
        versus_hits += all(d.low <= versus[g] <= d.high for g, d in c.versus_others.items())
    assert gap_hits / 150 > 0.91 and versus_hits / 150 > 0.91


def test_p_is_that_of_scipys_permutation_test():
    """Two groups, one metric: the largest standardised difference is the difference of the means."""
    samples = Simulation(np.random.default_rng(5), [40, 60], (0.85, 0.7))
    grouping, right = arrange(samples.group), samples.right.astype(float)
    (c,) = compare(grouping, [make_mean_metric("accuracy", grouping, right)], 0.95, 9999)
    parts = [right[samples.group == g] for g in (0, 1)]
    expected = permutation_test(parts, lambda a, b: abs(a.mean() - b.mean()), alternative="greater", rng=0)
    assert c.p == pytest.approx(expected.pvalue, abs=0.012)


def test_figures_are_those_of_scikit_learn_and_fairlearn():
    samples = Simulation(np.random.default_rng(6), [60, 80, 50, 90], (0.9, 0.8, 0.6, 0.8), (0.5, 0.3, 0.6, 0.5))
    (report,) = compare_columns(("region", samples.rows()), permutations=199)
    labels, predicted, names = samples.positive, samples.predicted, samples.group
    frame = fairlearn.MetricFrame(
        metrics={"selection_rate": fairlearn.selection_rate, "true_positive_rate": fairlearn.true_positive_rate,
                 "false_positive_rate": fairlearn.false_positive_rate},
        y_true=labels, y_pred=predicted, sensitive_features=names,
    )  # fmt: skip
    for number, group in enumerate(report.groups):
        own = names == number
        assert group.auc == pytest.approx(roc_auc_score(labels[own], samples.risk[own]))
        assert group.accuracy == pytest.approx((labels == predicted)[own].mean())
        assert group.r_ece == pytest.approx(expected_calibration_error(samples.risk[own], labels[own]))
        assert group.calibration == pytest.approx(samples.risk[own].mean() - labels[own].mean())
        for name in frame.by_group:
            assert getattr(group, name) == pytest.approx(frame.by_group[name][number])
        for name, (low, high) in group.intervals.items():
            assert low <= getattr(group, name) <= high
        assert {"accuracy", "auc", "calibration", "r_ece", "selection_rate"} <= set(group.intervals)
    parity = fairlearn.demographic_parity_difference(labels, predicted, sensitive_features=names)
    odds = fairlearn.equalized_odds_difference(labels, predicted, sensitive_features=names)
    assert report.demographic_parity.difference == pytest.approx(parity)
    assert report.equalized_odds.difference == pytest.approx(odds)
    for d in (*report.differences, report.demographic_parity, report.equalized_odds):
        assert 0 <= d.low <= d.difference <= d.high
    assert [d.metric for d in report.differences] == [*QUALITY]
    assert report.p == min(d.p for d in report.differences) == report.p_holm


@pytest.mark.parametrize("predicted", ["all", "none", "positive ones", "negative ones"])
@pytest.mark.parametrize("unit", [False, True])
def test_groups_that_are_all_predicted_alike(predicted, unit):
    """Their differences are 0, as in fairlearn, but the intervals of few samples are wide."""
    rng = np.random.default_rng(9)
    names, positive = np.repeat(["a", "b", "c"], (20, 40, 60)), rng.random(120) < 0.5
    answers = {"all": positive | True, "none": positive & False, "positive ones": positive, "negative ones": ~positive}[
        predicted
    ]
    rows = [Row(str(g), float(p == y), bool(y), 0.9 if p else 0.1, float(p), unit=f"u{i // 2}" if unit else None)
            for i, (g, y, p) in enumerate(zip(names, positive, answers, strict=True))]  # fmt: skip
    (report,) = compare_columns(("x", rows), permutations=199)
    parity = fairlearn.demographic_parity_difference(positive, answers, sensitive_features=names)
    odds = fairlearn.equalized_odds_difference(positive, answers, sensitive_features=names)
    assert (
        report.demographic_parity.difference == pytest.approx(parity) and report.equalized_odds.difference == odds == 0
    )
    constant = [report.equalized_odds] + ([report.demographic_parity] if predicted in ("all", "none") else [])
    for d in constant:
        assert d.low == 0 and 0.1 < d.high < 1 and d.p == 1
    for group in report.groups:
        difference, low, high = group.versus_others["true_positive_rate"]
        assert low < difference == 0 < high


def test_intervals_of_groups_that_are_all_predicted_alike():
    """Rates so low that a group often has no positive prediction: the interval still covers the true difference."""
    covered = 0
    for seed in range(300):
        predictions = np.random.default_rng(seed).random(80) < np.repeat([0.01, 0.06], 40)
        rows = [Row("ab"[i // 40], 1.0, True, None, float(p)) for i, p in enumerate(predictions)]
        parity = compare_columns(("x", rows), permutations=99)[0].demographic_parity
        covered += parity.low <= 0.05 <= parity.high
    assert covered / 300 >= 0.93


def test_flags_and_notes():
    rng = np.random.default_rng(7)
    unequal = Simulation(rng, [80] * 5, [0.9] * 4 + [0.55]).rows()
    equal = [Row("fm"[i % 2], *list(vars(r).values())[1:]) for i, r in enumerate(unequal)]
    region, sex = compare_columns(("region", unequal), ("sex", equal))
    assert len(region.flags) == 1 and region.flags[0].startswith("region: accuracy and AUC differ between groups (p ")
    assert ", corrected for all columns " in region.flags[0] and sex.flags == [] and sex.p > 0.1
    assert region.p_holm == 2 * region.p and region.level == 0.975
    worst = region.groups[4]
    assert worst.notes and not any(g.notes for g in region.groups[:4])
    assert worst.versus_others["accuracy"][2] < 0 and f"g4: {worst.notes[0]}" in region.notes
    assert (region.differences[0].lowest, region.differences[0].low > 0) == ("g4", True)
    # Thresholds alone flag nothing.
    small = compare_columns(("x", [Row(g, c) for g, cs in (("a", "1101"), ("b", "1011"), ("c", "1110"), ("d", "0010"))
                                   for c in map(float, cs)]))[0]  # fmt: skip
    assert small.flags == [] and any("z of accuracy" in note for note in small.notes)


def test_few_of_several_columns_are_flagged():
    """Ten columns that are independent of the answers: one report of twenty flags one."""
    rng, flagged = np.random.default_rng(8), 0
    for _ in range(60):
        right = (rng.random(150) < 0.8) * 1.0
        columns = {f"c{c}": [Row(str(g), r) for g, r in zip(rng.integers(0, 3, 150), right, strict=True)]
                   for c in range(10)}  # fmt: skip
        reports = compare_columns(*columns.items(), permutations=499)
        flagged += any(r.flags for r in reports)
        assert all(r.differences[0].low == 0 or r.p_holm < 0.05 for r in reports)
    assert flagged / 60 < 0.13


def test_undefined_numbers():
    (report,) = compare_columns(("x", [Row("a", 1, True, 0.9), Row("a", 1, True, 0.8), Row("b", 1), Row("b", 1)]))
    assert (report.p, report.p_holm, report.all.auc, report.auc_std, report.flags) == (None, None, None, None, [])
    assert report.demographic_parity is report.equalized_odds is None and report.groups[0].selection_rate is None
    separate = compare_columns(("x", [Row("a", 1.0)] * 8 + [Row("b", 0.0)] * 8))[0]
    assert separate.p < 0.01 and separate.flags and separate.differences[0].low > 0
    few = compare_columns(("x", [Row("a", 1.0)] * 2 + [Row("b", 0.0)] * 2))[0]  # 6 arrangements: no p below a third
    assert few.p > 0.3 and few.flags == [] and few.differences[0].low == 0 and few.differences[0].high == 1
    one_class = compare_columns(("x", [Row(g, 1.0 - i % 3, False, 0.2, i % 3) for g in "ab" for i in (0, 1, 0, 0)]))[0]
    assert one_class.groups[0].auc is None and one_class.groups[0].true_positive_rate is None
    assert one_class.groups[0].false_positive_rate == 0.25 and one_class.equalized_odds is None
    with pytest.raises(UserError, match="x names 1 groups"):
        compare_columns(("x", [Row("a", 1)]))


def test_some_samples_without_a_risk():
    """They count for accuracy alone."""
    samples = Simulation(np.random.default_rng(9), [50, 50])
    rows = samples.rows()
    more_rows = rows + [Row(g, 0.0, True) for g in ("g0", "g1") for _ in range(5)]
    plain, report = (compare_columns(("x", r), permutations=99)[0] for r in (rows, more_rows))
    assert [g.auc for g in report.groups] == [g.auc for g in plain.groups]
    assert report.groups[0].samples == 55 and report.groups[0].accuracy < plain.groups[0].accuracy
    assert report.differences[1].difference == pytest.approx(plain.differences[1].difference)


def test_log_odds_rank_where_risks_are_rounded():
    rows = [Row("ab"[i % 2], 1, i > 9, 1.0, order=40.0 + i) for i in range(20)]
    report = compare_columns(("x", rows), permutations=99)[0]
    assert [g.auc for g in report.groups] == [1.0, 1.0] and report.all.auc == 1.0
    plain = compare_columns(("x", [Row(r.group, 1, r.positive, r.risk) for r in rows]), permutations=99)[0]
    assert plain.all.auc == 0.5
    mixed = compare_columns(("x", [*rows, Row("a", 0, True, 0.5)]), permutations=99)[0]  # log-odds 0, below all
    assert mixed.all.auc == pytest.approx(10 / 11)


def test_runs_are_pooled():
    first = [Row("a", 1, True, 0.9, 1.0, sample="1"), Row("b", 0, False, 0.6, 1.0, sample="2")]
    second = [
        Row("b", 1, False, 0.2, 0.0, sample="2"),
        Row("a", 1, True, 0.7, 1.0, sample="1"),
        Row("a", 1, sample="3"),
    ]
    pooled = pool([first, second])
    assert pooled == [
        Row("a", 1, True, pytest.approx(0.8), 1.0, sample="1"),
        Row("b", 0.5, False, 0.4, 0.5, sample="2"),
    ]
    assert pool([first]) == first
    assert pool([[Row("a", 1, sample="1"), Row("a", 0, sample="1")]]) == [Row("a", 0.5, sample="1")]


def test_results_are_reproducible():
    rows = Simulation(np.random.default_rng(10), [30] * 3).rows()
    assert compare_columns(("x", rows)) == compare_columns(("x", rows))
