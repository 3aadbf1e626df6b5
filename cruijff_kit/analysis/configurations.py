"""Configurations: runs that differ in nothing but their seed. Tables and reports compare these, not runs."""

import math
from dataclasses import dataclass, field
from typing import Any

from cruijff_kit.records.result import Evaluation, RunResult

SEED = "seed"


@dataclass(eq=False)
class Configuration:
    """Runs of one configuration that are done, one a seed, by seed."""

    name: str
    """What varies in the sweep beside the seed; of a single run its own name."""
    swept: dict[str, Any]
    """What varies in the sweep beside the seed: key -> value."""
    runs: list[RunResult] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        """Of each run."""
        return [get_seed(r) for r in self.runs]

    def evaluations(self, task: str, base_model: bool = False) -> list[Evaluation]:
        """Of each run the task's evaluation, of several epochs the last; empty where a run has none."""
        found = [last_evaluation(r, task, base_model) for r in self.runs]
        return [] if None in found else found

    def values(self, task: str, scorer: str, metric: str, base_model: bool = False) -> list[float]:
        """A metric of each run; empty where a run has none, or one that is not finite."""
        found = [e.metrics.get(scorer, {}).get(metric) for e in self.evaluations(task, base_model)]
        return found if found and all(is_finite(v) for v in found) else []

    def objectives(self) -> list[float]:
        """Of each run."""
        return [r.objective for r in self.runs]


def get_seed(result: RunResult) -> int:
    """The seed of a run, whether or not it was swept."""
    return result.settings.get(SEED, result.seeds.get(SEED, 0))


def last_evaluation(result: RunResult, task: str, base_model: bool = False) -> Evaluation | None:
    """A task's evaluation, of several epochs the last."""
    return next((e for e in reversed(result.baseline if base_model else result.evaluation) if e.task == task), None)


def is_finite(value: Any) -> bool:
    """Whether it is a number that can be compared."""
    return isinstance(value, int | float) and math.isfinite(value)


def group_configurations(results: list[RunResult]) -> list[Configuration]:
    """The configurations of the runs that are done, in order of the first run of each.

    Of a seed that ran twice the later run counts.
    """
    groups: dict[str, dict[int, RunResult]] = {}
    for r in results:
        if r.status == "done":
            groups.setdefault(r.configuration_hash or r.config_hash, {})[get_seed(r)] = r
    made = [_make_configuration([runs[seed] for seed in sorted(runs)]) for runs in groups.values()]
    names = [c.name for c in made]
    for c in made:  # of experiments in one folder that vary the same, or vary nothing
        if names.count(c.name) > 1:
            c.name = f"{c.runs[0].experiment}: {c.name}" if c.name != c.runs[0].name else c.name
    return made


def _make_configuration(runs: list[RunResult]) -> Configuration:
    swept = {k: v for r in runs for k, v in r.swept.items() if k != SEED}
    name = runs[0].name
    if len(runs) > 1:
        name = ",".join(f"{k.rpartition('.')[2]}={v}" for k, v in swept.items()) or runs[0].experiment
    return Configuration(name, swept, runs)
