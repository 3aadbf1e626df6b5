"""The best configuration, by the validation loss or by what the user named, and those that cannot be distinguished from it.

The best is chosen without the test split unless the user chooses on it. Where that is done it is said, and the interval of
the best is made for all that it was chosen from: of 16 equal configurations the best is 5 points too high on average.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cruijff_kit.analysis.comparisons import BEST, VALIDATION, Comparison, MetricKey
from cruijff_kit.analysis.configurations import Configuration, is_finite, last_evaluation
from cruijff_kit.analysis.intervals import LEVEL
from cruijff_kit.records.result import RunResult, higher_is_better

UNSURE = "the effect of other rows on this choice is unknown"


@dataclass(eq=False)
class Ranking:
    """Configurations whose objective is the same number, the best first."""

    chosen_by: str
    """The objective: validation_loss, or what the user named."""
    source: MetricKey | None
    """Task, scorer and metric that it is; None for a loss or a metric of the user's own in training."""
    split: str
    """What it was measured on: validation, test, or train."""
    is_reported: bool
    """Whether numbers of that split are reported, too."""
    configurations: list[Configuration]
    best: list[Configuration] = field(default_factory=list)
    """The first one, and those that cannot be distinguished from it."""
    note: str = ""
    """What to know of the choice."""

    @property
    def leader(self) -> Configuration:
        """The first one."""
        return self.configurations[0]

    @property
    def is_higher_better(self) -> bool:
        """Whether more is better."""
        return higher_is_better(self.chosen_by)

    @property
    def is_optimistic(self) -> bool:
        """Whether the rows that chose the best are those that it is reported on: then its numbers are too good."""
        return self.is_reported and len(self.configurations) > 1

    @property
    def level(self) -> float:
        """Of the best one's intervals on the split that chose it: 95% for all that it was chosen from (Bonferroni)."""
        return 1 - (1 - LEVEL) / len(self.configurations)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "runs": [r.name for c in self.best for r in c.runs],
            "configurations": [c.name for c in self.best],
            "leader": self.leader.name,
            "value": mean(self.leader.objectives()),
            "chosen_by": self.chosen_by,
            "split": self.split,
            "of": len(self.configurations),
            "note": self.note or None,
        }


def rank(configurations: list[Configuration]) -> list[Ranking]:
    """Configurations by what their objective is, the most numerous first; those without one are left out."""
    groups: dict[tuple[Any, ...], Ranking] = {}
    for c in configurations:
        name = c.runs[0].objective_name
        if name is None or not all(is_finite(v) for v in c.objectives()):
            continue
        source = find_source(c.runs[0])
        split = find_split(c.runs[0], name, source)
        is_reported = any(e.split == split for r in c.runs for e in r.evaluation)
        groups.setdefault((source or name, split), Ranking(name, source, split, is_reported, [])).configurations.append(
            c
        )
    for ranking in groups.values():
        ranking.configurations.sort(key=_order(ranking))
        ranking.best = ranking.configurations[:1]
    return sorted(groups.values(), key=lambda r: -len(r.configurations))


def _order(ranking: Ranking) -> Callable[[Configuration], tuple[bool, float]]:
    sign = -1 if ranking.is_higher_better else 1

    def key(c: Configuration) -> tuple[bool, float]:
        return has_no_answers(c, ranking.source), sign * mean(c.objectives())

    return key


def has_no_answers(c: Configuration, source: MetricKey | None) -> bool:
    """Whether a scorer could read no answer of a run: then its numbers are the constant baseline's, and it is ranked last.

    Args:
        source: what it is ranked by; None (a loss): whether no scorer of a task could read any.
    """
    if source is not None:
        return any(e.coverage.get(source[1], 1.0) == 0 for e in c.evaluations(source[0]))
    cells = [last_evaluation(r, e.task) for r in c.runs for e in r.evaluation]
    return any(e.metrics and all(e.coverage.get(scorer, 1.0) == 0 for scorer in e.metrics) for e in cells)


def mark_best(ranking: Ranking, comparisons: dict[str, list[Comparison]]) -> None:
    """Add to the best those that cannot be told apart from the leader, by the metric that chose it."""
    metric_key = VALIDATION if ranking.chosen_by == VALIDATION[2] else ranking.source
    ranking.best, unknown = [ranking.leader], False
    for c in ranking.configurations[1:]:
        tested = [t for t in comparisons[c.name] if t.against == BEST and t.metric_key == metric_key]
        unknown = unknown or not tested
        is_equal = mean(c.objectives()) == mean(ranking.leader.objectives())
        if has_no_answers(c, ranking.source) and not has_no_answers(ranking.leader, ranking.source):
            continue
        if is_equal or tested and not tested[0].differs:
            ranking.best.append(c)
    ranking.note = UNSURE if unknown else ""


def find_source(result: RunResult) -> MetricKey | None:
    """Task, scorer and metric that a run's objective is, as RunResult.metrics finds it; None for a loss."""
    name = result.objective_name
    for e in {e.task: e for e in result.evaluation}.values():
        for scorer, values in e.metrics.items():
            for metric in values:
                if name in (metric, f"{scorer}/{metric}", f"{e.task}/{scorer}/{metric}"):
                    return e.task, scorer, metric
    return None


def find_split(result: RunResult, objective: str, source: MetricKey | None) -> str:
    """The split on which an objective is measured: validation, train or test."""
    if source is not None:
        return last_evaluation(result, source[0]).split
    return "validation" if objective.startswith("validation_") else "train"


def mean(values: list[float]) -> float:
    """Of the seeds."""
    return sum(values) / len(values)
