"""Configurations: runs that differ only in their seed. Tables and reports compare configurations, not runs."""

import math
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from cruijff_kit.records.result import Evaluation, RunResult

SEED = "seed"


@dataclass(eq=False)
class Configuration:
    """The finished runs of one configuration, one for each seed, sorted by seed."""

    name: str
    """Name of the values that vary in the sweep, without the seed; for a single run the run's name."""
    swept: dict[str, Any]
    """The settings that vary in the sweep, without the seed: key -> value."""
    runs: list[RunResult] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        """Return the seed of each run."""
        return [get_seed(r) for r in self.runs]

    def evaluations(self, task: str, base_model: bool = False) -> list[Evaluation]:
        """Return each run's evaluation of a task, in its last epoch; empty where a run lacks one."""
        evaluations = [e for r in self.runs if (e := last_evaluation(r, task, base_model))]
        return evaluations if len(evaluations) == len(self.runs) else []

    def values(self, task: str, scorer: str, metric: str, base_model: bool = False) -> list[float]:
        """Return a metric of each run; empty where a run lacks it, or has one that is not finite."""
        values = [e.metrics.get(scorer, {}).get(metric) for e in self.evaluations(task, base_model)]
        numbers = [v for v in values if is_finite(v)]
        return numbers if len(numbers) == len(values) else []

    def objectives(self) -> list[float]:
        """Return the objective of each run; empty where a run lacks one, or has one that is not finite."""
        objectives = [r.objective for r in self.runs if is_finite(r.objective)]
        return objectives if len(objectives) == len(self.runs) else []


def get_seed(result: RunResult) -> int:
    """Return the seed of a run, whether or not it was swept."""
    seed: int = result.settings.get(SEED, result.seeds.get(SEED, 0))
    return seed


def last_evaluation(result: RunResult, task: str, base_model: bool = False) -> Evaluation | None:
    """Return a run's evaluation of a task, in its last epoch; None where it lacks one."""
    return next((e for e in reversed(result.baseline if base_model else result.evaluation) if e.task == task), None)


def is_finite(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def group_configurations(results: list[RunResult]) -> list[Configuration]:
    """Return the configurations of the finished runs, in the order of their first runs.

    If a seed ran twice, the later run counts.
    """
    groups: dict[str, dict[int, RunResult]] = {}
    for r in results:
        if r.status == "done":
            groups.setdefault(r.configuration_hash or r.config_hash, {})[get_seed(r)] = r
    configurations = [_make_configuration([runs[seed] for seed in sorted(runs)]) for runs in groups.values()]
    names = [c.name for c in configurations]
    for c in configurations:  # experiments in one folder may vary the same values, or none
        if names.count(c.name) > 1:
            c.name = f"{c.runs[0].experiment}: {c.name}" if c.name != c.runs[0].name else c.name
    return configurations


def _make_configuration(runs: list[RunResult]) -> Configuration:
    swept = {k: v for r in runs for k, v in r.swept.items() if k != SEED}
    name = runs[0].name
    if len(runs) > 1:
        name = ",".join(f"{k.rpartition('.')[2]}={v}" for k, v in swept.items()) or runs[0].experiment
    return Configuration(name, swept, runs)
