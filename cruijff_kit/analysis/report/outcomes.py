"""The numbers by which configurations are shown: what they were chosen by, and what they got on the test split."""

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
from cruijff_kit.analysis.report.load import Run, Runs, objective_name
from cruijff_kit.analysis.report.wording import units_of
from cruijff_kit.analysis.samples import align, load_samples
from cruijff_kit.analysis.sweep import Analysis
from cruijff_kit.analysis.table_cells import list_compared_metrics
from cruijff_kit.analysis.validation import read_row_losses
from cruijff_kit.records.result import Evaluation, higher_is_better

if TYPE_CHECKING:
    import numpy as np


@dataclass(eq=False)
class ConfiguredRuns:
    """A configuration with its runs as the report has them, one a seed, and the outcome of each."""

    configuration: Configuration
    runs: list[Run]
    values: list[float]

    @property
    def label(self) -> str:
        """Its name."""
        return self.configuration.name

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return sum(self.values) / len(self.values)


@dataclass(eq=False)
class Outcome:
    """A number of every configuration, the best first where it is what they were chosen by."""

    objective: str
    """The objective's name, or TASK/SCORER/METRIC."""
    source: MetricKey | None
    """Task, scorer and metric; None for a loss."""
    configurations: list[ConfiguredRuns]
    analysis: Analysis

    @property
    def name(self) -> str:
        """In words: "match accuracy (risk)"."""
        return objective_name(self.objective, self.source)

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        return higher_is_better(self.objective)

    @property
    def measured(self) -> MetricKey | None:
        """What comparisons of it have for task, scorer and metric; None: there are none."""
        return VALIDATION if self.objective == VALIDATION[2] else self.source

    def estimate(self, c: ConfiguredRuns) -> Estimate:
        """With its interval, where one is to be had."""
        own = c.configuration
        found = None
        if self.source is not None:
            found = estimate(own, *self.source, level=self.analysis.interval_level(own, self.source))
        elif self.objective in ("loss", "validation_loss"):
            found = estimate_loss(own, self.objective)
        return found or Estimate(c.value, seeds=len(c.runs))

    def interval(self, group: list[ConfiguredRuns]) -> tuple[float, float] | None:
        """Of the mean of some of its configurations, over other test items and seeds; None where nothing tells."""
        import numpy as np

        alone = [self.estimate(c) for c in group]
        is_known = all(e.low is not None for e in alone)
        if len(group) == 1 and is_known:
            return alone[0].low, alone[0].high
        mean, reach = sum(c.value for c in group) / len(group), 0.0
        if self._noise is not None:
            places = [self.configurations.index(c) for c in group]
            reach = float(np.quantile(abs(self._noise[:, places].mean(axis=1)), LEVEL))
        if reach <= 1e-12:  # nothing varies: what each one's items leave open is all that is known
            ends = [(e.low, e.high) for e in alone] if is_known else []
            return (
                (sum(low for low, _ in ends) / len(ends), sum(high for _, high in ends) / len(ends)) if ends else None
            )
        name = self.objective if self.source is None else self.source[2]
        least, most = BOUNDS.get(name, (-math.inf, math.inf))
        return max(least, mean - reach), min(most, mean + reach)

    @cached_property
    def _noise(self) -> "np.ndarray | None":
        return draw_noise([c.values for c in self.configurations], self.item_values())[0]

    @property
    def units(self) -> str:
        """What its intervals are over beside seeds: "test samples", "respondents"."""
        return units_of((r for c in self.configurations for r in c.configuration.runs), self.source is None)

    def base_model(self, c: ConfiguredRuns) -> float | None:
        """Of the base model on its test items."""
        values = c.configuration.values(*self.source, base_model=True) if self.source else []
        return values[0] if values else None

    def chance(self, c: ConfiguredRuns) -> float | None:
        """Of the constant baseline on its test items."""
        return self._of_cell(c, lambda e: e.chance.get(self.source[1], {}).get(self.source[2]))

    def bayes_optimum(self, c: ConfiguredRuns) -> float | None:
        """Return the Bayes optimum, where it is known."""
        return self._of_cell(c, lambda e: e.bayes_optimum.get(self.source[2]))

    def _of_cell(self, c: ConfiguredRuns, read: Callable[[Evaluation], Any]) -> float | None:
        cells = c.configuration.evaluations(self.source[0]) if self.source else []
        value = read(cells[0]) if cells else None
        return value if is_finite(value) else None

    def item_values(self) -> "np.ndarray | None":
        """[runs of all configurations in turn, items] numbers whose means are the runs' values; items are those of the test
        split (units, where these belong together), or rows of the validation split. None where these are not known.
        """
        import numpy as np

        results = [r.result for c in self.configurations for r in c.runs]
        if self.objective == VALIDATION[2]:
            return read_row_losses(results)
        if self.source is None:
            return None
        task, scorer, metric = self.source
        cells = [e for c in self.configurations for e in c.configuration.evaluations(task)]
        found = align([load_samples(e.log, scorer) for e in cells])
        if found is None or len(cells) != len(results) or not all(is_computable(metric, s) for s in found):
            return None
        return np.stack([item_values(metric, s) for s in found])


def outcomes_of(runs: Runs) -> list[Outcome]:
    """What families of configurations were chosen by; then every other number that is compared."""
    analysis = runs.analysis
    found = []
    for ranking in analysis.rankings:
        own = [ConfiguredRuns(c, runs.runs_of(c), c.objectives()) for c in ranking.configurations]
        found.append(Outcome(ranking.chosen_by, ranking.source, own, analysis))
    ranked = [c for r in analysis.rankings for c in r.configurations]
    everyone = [*ranked, *(c for c in analysis.configurations if c not in ranked)]
    chosen = [r.source for r in analysis.rankings]
    for measured in (m for m in list_compared_metrics(analysis) if m not in chosen):
        own = [ConfiguredRuns(c, runs.runs_of(c), values) for c in everyone if (values := c.values(*measured))]
        if own:
            found.append(Outcome("/".join(measured), measured, own, analysis))
    return found
