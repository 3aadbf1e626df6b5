"""The numbers of each configuration: its objective, and its scores on the test split."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.comparisons import VALIDATION, MetricKey
from cruijff_kit.analysis.configurations import Configuration, is_finite
from cruijff_kit.analysis.differences import item_values
from cruijff_kit.analysis.effects import draw_noise
from cruijff_kit.analysis.estimates import Estimate, estimate, estimate_loss
from cruijff_kit.analysis.intervals import LEVEL
from cruijff_kit.analysis.measures import BOUNDS, is_computable
from cruijff_kit.analysis.report.load import Runs, RunWithResult, name_objective
from cruijff_kit.analysis.report.wording import name_units
from cruijff_kit.analysis.samples import align, load_samples
from cruijff_kit.analysis.sweep import Analysis
from cruijff_kit.analysis.table_cells import list_compared_metrics
from cruijff_kit.analysis.validation import read_row_losses
from cruijff_kit.records.result import Evaluation, higher_is_better

if TYPE_CHECKING:
    import numpy as np


@dataclass(eq=False)
class ConfiguredRuns:
    """A configuration with the report's runs, and a number of each run."""

    configuration: Configuration
    runs: list[RunWithResult]
    """One for each seed."""
    values: list[float]
    """The outcome of each run."""

    @property
    def label(self) -> str:
        """Return the configuration's name."""
        return self.configuration.name

    @property
    def value(self) -> float:
        """Return the mean over seeds."""
        return sum(self.values) / len(self.values)


@dataclass(eq=False)
class Outcome:
    """A number of every configuration."""

    objective: str
    """The objective's name, or TASK/SCORER/METRIC."""
    source: MetricKey | None
    """Task, scorer and metric; None for a loss."""
    configurations: list[ConfiguredRuns]
    """Configurations, best first if the objective ranks them."""
    analysis: Analysis

    @property
    def name(self) -> str:
        """Return the outcome in words: "match accuracy (risk)"."""
        return name_objective(self.objective, self.source)

    @property
    def is_higher_better(self) -> bool:
        """Return whether a higher value is better."""
        return higher_is_better(self.objective)

    @property
    def metric_key(self) -> MetricKey | None:
        """Return task, scorer and metric as in the comparisons; None: there are no comparisons."""
        return VALIDATION if self.objective == VALIDATION[2] else self.source

    def estimate(self, c: ConfiguredRuns) -> Estimate:
        """Estimate the outcome of a configuration, with an interval if there is one."""
        configuration, result = c.configuration, None
        if self.source is not None:
            result = estimate(
                configuration, *self.source, level=self.analysis.interval_level(configuration, self.source)
            )
        elif self.objective in ("loss", "validation_loss"):
            result = estimate_loss(configuration, self.objective)
        return result or Estimate(c.value, seeds=len(c.runs))

    def interval(self, group: list[ConfiguredRuns]) -> tuple[float, float] | None:
        """Return the 95% interval of the mean of some configurations, over other test items and seeds; None if unknown."""
        import numpy as np

        estimates = [self.estimate(c) for c in group]
        intervals = [(e.low, e.high) for e in estimates if e.low is not None and e.high is not None]
        is_known = len(intervals) == len(estimates)
        if len(group) == 1 and is_known:
            return intervals[0]
        mean, half_width = sum(c.value for c in group) / len(group), 0.0
        if self._noise is not None:
            indices = [self.configurations.index(c) for c in group]
            half_width = float(np.quantile(abs(self._noise[:, indices].mean(axis=1)), LEVEL))
        if half_width <= 1e-12:  # nothing varies between runs: only the intervals over each one's items are known
            if not is_known:
                return None
            return sum(low for low, _ in intervals) / len(group), sum(high for _, high in intervals) / len(group)
        name = self.objective if self.source is None else self.source[2]
        minimum, maximum = BOUNDS.get(name, (-math.inf, math.inf))
        return max(minimum, mean - half_width), min(maximum, mean + half_width)

    @cached_property
    def _noise(self) -> "np.ndarray | None":
        return draw_noise([c.values for c in self.configurations], self.item_values())[0]

    @property
    def units(self) -> str:
        """Return the units that the intervals are over, besides seeds: "test samples", "respondents"."""
        return name_units((r for c in self.configurations for r in c.configuration.runs), self.source is None)

    def base_model(self, c: ConfiguredRuns) -> float | None:
        """Return the base model's value on the configuration's test items."""
        values = c.configuration.values(*self.source, base_model=True) if self.source else []
        return values[0] if values else None

    def chance(self, c: ConfiguredRuns) -> float | None:
        """Return the constant baseline's value on the configuration's test items."""
        if self.source is None:
            return None
        task, scorer, metric = self.source
        return _read_evaluation(c, task, lambda e: e.chance.get(scorer, {}).get(metric))

    def bayes_optimum(self, c: ConfiguredRuns) -> float | None:
        """Return the Bayes optimum, if known."""
        if self.source is None:
            return None
        task, _, metric = self.source
        return _read_evaluation(c, task, lambda e: e.bayes_optimum.get(metric))

    def item_values(self) -> "np.ndarray | None":
        """Return an array [runs, items] whose means over items are the runs' values; None if the items are unknown.

        Runs are in the order of the configurations. Items are those of the test split (units, if there is a unit column),
        or the rows of the validation split.
        """
        import numpy as np

        results = [r.result for c in self.configurations for r in c.runs]
        if self.objective == VALIDATION[2]:
            return read_row_losses(results)
        if self.source is None:
            return None
        task, scorer, metric = self.source
        evaluations = [e for c in self.configurations for e in c.configuration.evaluations(task)]
        samples = align([load_samples(e.log, scorer) for e in evaluations])
        if samples is None or len(evaluations) != len(results) or not all(is_computable(metric, s) for s in samples):
            return None
        return np.stack([item_values(metric, s) for s in samples])


def _read_evaluation(c: ConfiguredRuns, task: str, read: Callable[[Evaluation], Any]) -> float | None:
    """Return a number of the first run's evaluation of a task; None if it is missing or not finite."""
    evaluations = c.configuration.evaluations(task)
    value = read(evaluations[0]) if evaluations else None
    return value if is_finite(value) else None


def collect_outcomes(runs: Runs) -> list[Outcome]:
    """Return the objective of each family of configurations, then every other number that is compared."""
    analysis = runs.analysis
    outcomes = []
    for ranking in analysis.rankings:
        configured = [ConfiguredRuns(c, runs.runs_of(c), c.objectives()) for c in ranking.configurations]
        outcomes.append(Outcome(ranking.chosen_by, ranking.source, configured, analysis))
    ranked_configurations = [c for r in analysis.rankings for c in r.configurations]
    all_configurations = [
        *ranked_configurations,
        *(c for c in analysis.configurations if c not in ranked_configurations),
    ]
    chosen_sources = [r.source for r in analysis.rankings]
    for metric_key in (m for m in list_compared_metrics(analysis) if m not in chosen_sources):
        configured = [
            ConfiguredRuns(c, runs.runs_of(c), values) for c in all_configurations if (values := c.values(*metric_key))
        ]
        if configured:
            outcomes.append(Outcome("/".join(metric_key), metric_key, configured, analysis))
    return outcomes
