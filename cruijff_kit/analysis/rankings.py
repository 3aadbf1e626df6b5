"""The best configuration, by the validation loss or the user's objective, and those that cannot be distinguished from it.

The best is chosen without the test split unless the user's objective is on it. Then tables note the choice, and the
interval of the best is corrected for all candidates: the best of 16 equal configurations is 5 points too high on average.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cruijff_kit.analysis.comparisons import BEST, VALIDATION, Comparison, MetricKey
from cruijff_kit.analysis.configurations import Configuration, last_evaluation
from cruijff_kit.analysis.intervals import LEVEL
from cruijff_kit.records.result import RunResult, higher_is_better

UNKNOWN_VARIATION = "the effect of other rows on this choice is unknown"


@dataclass(eq=False)
class Ranking:
    """Configurations with one objective, the best first."""

    chosen_by: str
    """The objective: validation_loss, or the one that the user named."""
    source: MetricKey | None
    """Task, scorer and metric of the objective; None for a loss or a custom metric of training."""
    split: str
    """The split on which the objective is measured: validation, test, or train."""
    is_reported: bool
    """Whether scores on that split are reported, too."""
    configurations: list[Configuration]
    best: list[Configuration] = field(default_factory=list)
    """The leader, and the configurations that cannot be distinguished from it."""
    note: str = ""
    """A caveat about the choice."""

    @property
    def leader(self) -> Configuration:
        """Return the configuration with the best objective."""
        return self.configurations[0]

    @property
    def is_higher_better(self) -> bool:
        """Return whether the objective is to be maximised."""
        return higher_is_better(self.chosen_by)

    @property
    def is_optimistic(self) -> bool:
        """Return whether the best is reported on the rows that chose it: then its scores are too good."""
        return self.is_reported and len(self.configurations) > 1

    @property
    def level(self) -> float:
        """Return the level of the best one's intervals on the split that chose it: 95% for all candidates (Bonferroni)."""
        return 1 - (1 - LEVEL) / len(self.configurations)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value of the best."""
        return {
            "runs": [r.name for c in self.best for r in c.runs],
            "configurations": [c.name for c in self.best],
            "leader": self.leader.name,
            "value": mean_objective(self.leader),
            "chosen_by": self.chosen_by,
            "split": self.split,
            "of": len(self.configurations),
            "note": self.note or None,
        }


def rank(configurations: list[Configuration]) -> list[Ranking]:
    """Rank the configurations of each objective, the largest group first; those without an objective are omitted."""
    groups: dict[tuple[Any, ...], Ranking] = {}
    for c in configurations:
        name = c.runs[0].objective_name
        if name is None or not c.objectives():
            continue
        source = find_source(c.runs[0])
        split = find_split(c.runs[0], name, source)
        is_reported = any(e.split == split for r in c.runs for e in r.evaluation)
        groups.setdefault((source or name, split), Ranking(name, source, split, is_reported, [])).configurations.append(
            c
        )
    for ranking in groups.values():
        ranking.configurations.sort(key=_make_sort_key(ranking))
        ranking.best = ranking.configurations[:1]
    return sorted(groups.values(), key=lambda r: -len(r.configurations))


def _make_sort_key(ranking: Ranking) -> Callable[[Configuration], tuple[bool, float]]:
    sign = -1 if ranking.is_higher_better else 1

    def key(c: Configuration) -> tuple[bool, float]:
        return has_no_answers(c, ranking.source), sign * mean_objective(c)

    return key


def has_no_answers(c: Configuration, source: MetricKey | None) -> bool:
    """Return whether a scorer could read no answer of a run.

    Such a run has the constant baseline's scores, and is ranked last.

    Args:
        c: the configuration.
        source: the metric of its ranking; None (a loss): whether a task has no scorer that could read an answer.
    """
    if source is not None:
        return any(e.coverage.get(source[1], 1.0) == 0 for e in c.evaluations(source[0]))
    evaluations = [e for r in c.runs for e in {e.task: e for e in r.evaluation}.values()]  # each task in its last epoch
    return any(e.metrics and all(e.coverage.get(scorer, 1.0) == 0 for scorer in e.metrics) for e in evaluations)


def mark_best(ranking: Ranking, comparisons: dict[str, list[Comparison]]) -> None:
    """Add to the best the configurations that cannot be distinguished from the leader by the metric that chose it."""
    metric_key = VALIDATION if ranking.chosen_by == VALIDATION[2] else ranking.source
    ranking.best, is_unknown = [ranking.leader], False
    for c in ranking.configurations[1:]:
        tests = [t for t in comparisons[c.name] if t.against == BEST and t.metric_key == metric_key]
        is_unknown = is_unknown or not tests
        is_equal = mean_objective(c) == mean_objective(ranking.leader)
        if has_no_answers(c, ranking.source) and not has_no_answers(ranking.leader, ranking.source):
            continue
        if is_equal or tests and not tests[0].is_different:
            ranking.best.append(c)
    ranking.note = UNKNOWN_VARIATION if is_unknown else ""


def find_source(result: RunResult) -> MetricKey | None:
    """Return task, scorer and metric of a run's objective, in the order of RunResult.metrics; None for a loss."""
    name = result.objective_name
    for e in {e.task: e for e in result.evaluation}.values():  # each task in its last epoch
        for scorer, values in e.metrics.items():
            for metric in values:
                if name in (metric, f"{scorer}/{metric}", f"{e.task}/{scorer}/{metric}"):
                    return e.task, scorer, metric
    return None


def find_split(result: RunResult, objective: str, source: MetricKey | None) -> str:
    """Return the split on which an objective is measured: validation, train or test."""
    if source is not None:
        evaluation = last_evaluation(result, source[0])
        assert evaluation is not None, "the source is a metric of the run's evaluation"
        return evaluation.split
    return "validation" if objective.startswith("validation_") else "train"


def mean_objective(c: Configuration) -> float:
    """Return the mean objective of a configuration's runs."""
    return mean(c.objectives())


def mean(values: list[float]) -> float:
    """Return the mean of numbers."""
    return sum(values) / len(values)
