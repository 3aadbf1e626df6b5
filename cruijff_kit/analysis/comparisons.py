"""Each configuration against the base model, the constant baseline (chance), and the best configuration.

Paired item by item, over the items that both answered. Everything that is tested on one page is one family for Holm's
correction. A configuration that gives every item the same answer is no evidence of anything: it gets no p. Nor is one that
is better than the base model, but no better than a constant: it may have learnt only the form of the answers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.configurations import Configuration
from cruijff_kit.analysis.differences import Difference, SeedVariance, compare, item_values, pool_seeds, with_holm
from cruijff_kit.analysis.measures import BOUNDS, Samples, is_computable
from cruijff_kit.analysis.samples import align, load_constant_samples, load_samples
from cruijff_kit.analysis.validation import read_row_losses
from cruijff_kit.records.result import higher_is_better
from cruijff_kit.util.json_output import to_plain

if TYPE_CHECKING:
    import numpy as np

BASE_MODEL, CHANCE, BEST = "base model", "chance", "best"
VALIDATION = ("validation", "loss", "validation_loss")
"""What a comparison of validation losses has for task, scorer and metric."""
SAME_ANSWER = "no test: one answer to all"
NO_BETTER_THAN_CHANCE = "no test: no better than chance"
_OF_RISKS = ("auc", "brier", "r_ece")  # they do not depend on which option is written
MetricKey = tuple[str, str, str]
"""(task, scorer, metric)."""


@dataclass(frozen=True)
class Comparison:
    """A configuration's metric less that of what it is compared with."""

    configuration: str
    against: str
    """base model, chance or best."""
    task: str
    scorer: str
    metric: str
    items: int
    """Items (or units of them, or validation rows) that both have."""
    seeds: int
    """Runs of the configuration."""
    difference: float
    low: float
    """End of the 95% interval, which holds together with those of all other comparisons of the page."""
    high: float
    p: float
    """Of no difference, two-sided; NaN where there is no test."""
    p_holm: float
    """Corrected for all tests of the page (Holm 1979)."""
    method: str
    """The test, or why there is none."""

    @property
    def differs(self) -> bool:
        """Whether a difference was found at 5%."""
        return self.p_holm < 0.05

    @property
    def metric_key(self) -> MetricKey:
        """Task, scorer and metric."""
        return self.task, self.scorer, self.metric

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite is null."""
        return to_plain(self)


@dataclass(frozen=True)
class _Test:
    configuration: Configuration
    against: str
    metric_key: MetricKey
    found: Difference
    untested: str = ""
    """Why there is no test; empty: there is one."""


def compare_configurations(
    configurations: list[Configuration],
    metrics: list[MetricKey],
    leaders: dict[int, Configuration],
    chosen_by: set[MetricKey],
) -> dict[str, list[Comparison]]:
    """Name of each configuration -> its comparisons: with the base model, with chance, with the best.

    Args:
        metrics: what is compared.
        leaders: id of a configuration -> the best one of those that it is ranked with; not of the best itself.
        chosen_by: metrics by which the best are chosen, compared with the best beside `metrics`.
    """
    tried: list[Any] = []
    for metric_key in metrics:
        between = _between_seeds(configurations, metric_key)
        for c in configurations:
            tried += _against_fixed(c, metric_key, between)
            if id(c) in leaders:
                tried += _against_best(c, leaders[id(c)], metric_key, between)
    if VALIDATION in chosen_by:
        tried += [t for c in configurations if id(c) in leaders for t in _against_best_by_validation(c, leaders[id(c)])]
    return _correct(configurations, tried)


def _correct(configurations: list[Configuration], tried: list[_Test]) -> dict[str, list[Comparison]]:
    corrected = iter(with_holm([t.found for t in tried if not t.untested]))
    made: dict[str, list[Comparison]] = {c.name: [] for c in configurations}
    for t in tried:
        d = t.found
        (low, high, p_holm), p, method = (*d.interval(0.95), math.nan), math.nan, t.untested
        if not t.untested:
            (low, high, p_holm), p, method = next(corrected), d.p, d.method
        if BOUNDS.get(t.metric_key[2]) == (0, 1):
            low, high = max(-1.0, low), min(1.0, high)
        made[t.configuration.name].append(
            Comparison(t.configuration.name, t.against, *t.metric_key, d.items, len(t.configuration.runs), d.difference,
                       low, high, p, p_holm, method)
        )  # fmt: skip
    order = (BASE_MODEL, CHANCE, BEST)
    return {name: sorted(found, key=lambda c: order.index(c.against)) for name, found in made.items()}


def _against_fixed(c: Configuration, metric_key: MetricKey, between: SeedVariance | None) -> Iterator[_Test]:
    """Against what was not trained: the base model, and the constant baseline."""
    task, scorer, metric = metric_key
    cells = c.evaluations(task)
    if not cells or scorer not in cells[0].metrics:
        return
    untested = SAME_ANSWER if _is_constant(c, metric_key) else ""
    own = [load_samples(e.log, scorer) for e in cells]
    before = [load_samples(e.log, scorer) for e in c.evaluations(task, base_model=True)[:1]]
    is_above_chance = True  # where there is no constant
    for against, others in ((CHANCE, [load_constant_samples(cells[0].log, scorer, metric)]), (BASE_MODEL, before)):
        both = align([*own, *others]) if others else None
        if both is None or not all(is_computable(metric, s) for s in both):
            continue
        # Of one seed it is this run that is compared with what was not trained, whatever other seeds would do.
        seeds = between if len(cells) > 1 else None
        found = compare(_rows(metric, both[:-1]), _rows(metric, both[-1:]), seeds, other_is_fixed=True)
        gain = found.difference if higher_is_better(metric) else -found.difference
        if against == CHANCE:
            is_above_chance = gain > 0
        elif gain > 0 and not is_above_chance:
            untested = untested or NO_BETTER_THAN_CHANCE
        yield _Test(c, against, metric_key, found, untested)


def _is_constant(c: Configuration, metric_key: MetricKey) -> bool:
    """Whether each run gives every item the same answer, so that the metric tells nothing of the model."""
    task, _, metric = metric_key
    return metric not in _OF_RISKS and all(e.constant_answer for e in c.evaluations(task))


def _against_best(
    c: Configuration, best: Configuration, metric_key: MetricKey, between: SeedVariance | None
) -> Iterator[_Test]:
    task, scorer, metric = metric_key
    own, others = ([load_samples(e.log, scorer) for e in side.evaluations(task)] for side in (c, best))
    both = align([*own, *others]) if own and others else None
    if both is None or not all(is_computable(metric, s) for s in both):
        return
    found = compare(_rows(metric, both[: len(own)]), _rows(metric, both[len(own) :]), between)
    untested = SAME_ANSWER if _is_constant(c, metric_key) and _is_constant(best, metric_key) else ""
    yield _Test(c, BEST, metric_key, found, untested)


def _against_best_by_validation(c: Configuration, best: Configuration) -> Iterator[_Test]:
    """Validation losses, row by row; by seeds alone where the rows were not kept."""
    rows = read_row_losses([*c.runs, *best.runs])
    if rows is not None:
        between = pool_seeds([rows[: len(c.runs)], rows[len(c.runs) :]])
        yield _Test(c, BEST, VALIDATION, compare(rows[: len(c.runs)], rows[len(c.runs) :], between))


def _rows(metric: str, samples: list[Samples]) -> "np.ndarray":
    import numpy as np

    return np.stack([item_values(metric, s) for s in samples])


def _between_seeds(configurations: list[Configuration], metric_key: MetricKey) -> SeedVariance | None:
    """What seeds do, from the configurations that have several."""
    task, scorer, metric = metric_key
    sides = []
    for c in configurations:
        found = align([load_samples(e.log, scorer) for e in c.evaluations(task)]) if len(c.runs) > 1 else None
        if found and all(is_computable(metric, s) for s in found):
            sides.append(_rows(metric, found))
    return pool_seeds(sides)


def format_comparison(comparisons: list[Comparison], against: str, metric_key: MetricKey) -> str:
    """A cell of the table: difference [interval] corrected p."""
    for c in comparisons:
        if (c.against, c.metric_key) == (against, metric_key):
            return f"{_signed(c.difference)} [{_signed(c.low)}, {_signed(c.high)}] {_p(c)}"
    return ""


def _p(c: Comparison) -> str:
    if math.isnan(c.p_holm):
        return c.method
    return "p<0.001" if c.p_holm < 0.001 else f"p={c.p_holm:.3f}"


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return "-" if value < 0 else "+"
    return f"{value:+.2f}" if abs(value) < 10 else f"{value:+.3g}"


def csv_columns(comparisons: list[Comparison]) -> dict[str, float | int | str]:
    """Columns of results.csv: "versus AGAINST TASK/SCORER/METRIC WHAT"."""
    kept = ("difference", "low", "high", "p", "p_holm", "items")
    return {f"versus {c.against} {'/'.join(c.metric_key)} {k}": getattr(c, k) for c in comparisons for k in kept}
