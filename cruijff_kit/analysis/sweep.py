"""Everything about a list of results, worked out once: for tables, the summary, the report, and --json."""

from dataclasses import dataclass
from typing import Any

from cruijff_kit.analysis.comparisons import VALIDATION, Comparison, MetricKey, compare_configurations
from cruijff_kit.analysis.configurations import Configuration, group_configurations
from cruijff_kit.analysis.estimates import estimate, estimate_loss
from cruijff_kit.analysis.headlines import list_scorers, pick_headline
from cruijff_kit.analysis.intervals import LEVEL, effective_sample_size
from cruijff_kit.analysis.measures import find_measure, is_computable, terms
from cruijff_kit.analysis.power import DetectableDifference, detectable_difference, detectable_error
from cruijff_kit.analysis.rankings import Ranking, mark_best, mean, rank
from cruijff_kit.analysis.samples import align, load_samples
from cruijff_kit.records.result import RunResult

ONE_SEED = (
    "Each configuration has one seed: these are comparisons of runs, and the effect of other seeds is unknown; "
    "seed=1,2,3 would take {runs} more runs, about {time}."
)
_FEW_PAIRS = 20  # of configurations, from which a correlation is observed


@dataclass(eq=False)
class Analysis:
    """What the results of a folder come to."""

    configurations: list[Configuration]
    metrics: list[MetricKey]
    """What is shown and compared: of each task and scorer its headline, and the objectives."""
    rankings: list[Ranking]
    comparisons: dict[str, list[Comparison]]
    """Name of a configuration -> its comparisons."""
    detectable: dict[str, DetectableDifference]
    """Task -> what its answers can show."""

    @property
    def ranking(self) -> Ranking | None:
        """The one ranking of all configurations with an objective; None where there are several, or nothing to rank."""
        return self.rankings[0] if len(self.rankings) == 1 and len(self.rankings[0].configurations) > 1 else None

    def find_configuration(self, result: RunResult) -> Configuration | None:
        """The configuration that a run belongs to; None where it is not done."""
        return next((c for c in self.configurations if any(r is result for r in c.runs)), None)

    def list_comparisons(self, result: RunResult) -> list[Comparison]:
        """Those of its configuration."""
        c = self.find_configuration(result)
        return self.comparisons[c.name] if c else []

    def is_best(self, result: RunResult) -> bool:
        """Whether a run is of a configuration that is among the best."""
        c = self.find_configuration(result)
        return self.ranking is not None and c in self.ranking.best

    def interval_level(self, c: Configuration, metric_key: MetricKey | None = None) -> float:
        """Level of a metric's interval: higher for one of the best, chosen by the rows that the metric is of."""
        cells = c.evaluations(metric_key[0]) if metric_key else []
        chosen = (r.level for r in self.rankings if c in r.best and cells and cells[0].split == r.split)
        return max(chosen, default=LEVEL)

    @property
    def no_best_reason(self) -> str:
        """Why no configuration is named best, and what names one; empty where one is, or where there is no choice."""
        if self.rankings or len(self.configurations) < 2:
            return ""
        results = [r for c in self.configurations for r in c.runs]
        named = sorted({r.objective_name for r in results if r.objective_name})
        reason = (
            f"the objective ({', '.join(named)}) is no finite number"
            if named
            else "the runs have no validation loss, and no objective was named"
        )
        metric_key = "/".join(self.metrics[0]) if self.metrics else "TASK/SCORER/METRIC"
        return f"No configuration is the best: {reason}. objective={metric_key} chooses one."

    @property
    def one_seed_notice(self) -> str:
        """What to know where several configurations have one seed each; empty elsewhere."""
        trained = [c for c in self.configurations if c.runs[0].training]
        if len(trained) < 2 or any(len(c.runs) > 1 for c in trained):
            return ""
        more = [(r, len({1, 2, 3} - {*c.seeds})) for c in trained for r in c.runs]
        seconds = sum(r.seconds.get("total", 0) * n for r, n in more)
        gpu = sum(r.gpu_hours() * n for r, n in more)
        time = f"{gpu:.2g} GPU-hours" if gpu else _duration(seconds)
        return ONE_SEED.format(runs=sum(n for _, n in more), time=time)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, beside the runs: best, configurations, detectable_difference."""
        return {
            "best": self.ranking.to_dict() if self.ranking else None,
            "configurations": [self._configuration(c) for c in self.configurations],
            "detectable_difference": {task: d.to_dict() for task, d in self.detectable.items()},
        }

    def _configuration(self, c: Configuration) -> dict[str, Any]:
        metric_key = ((e.task, s, m) for e in c.runs[-1].evaluation for s, values in e.metrics.items() for m in values)
        known = [m for m in dict.fromkeys(metric_key) if m in self.metrics or find_measure(m[2])]
        estimates = {"/".join(m): estimate(c, *m, level=self.interval_level(c, m)) for m in known}
        estimates |= {name: estimate_loss(c, name) for name in ("loss", "validation_loss")}
        return {
            "name": c.name,
            "swept": c.swept,
            "seeds": c.seeds,
            "runs": [r.name for r in c.runs],
            "config_hashes": [r.config_hash for r in c.runs],
            "estimates": {name: vars(e) for name, e in estimates.items() if e is not None},
            "comparisons": [comparison.to_dict() for comparison in self.comparisons[c.name]],
        }


def _duration(seconds: float) -> str:
    """ "40 seconds", "12 minutes", "3.4 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def analyse(results: list[RunResult]) -> Analysis:
    """Configurations, which is best, comparisons, and what could be found. The last results are not worked out again."""
    global _last
    if (
        _last is None
        or len(results) != len(_last[0])
        or any(a is not b for a, b in zip(results, _last[0], strict=True))
    ):
        _last = [*results], _analyse(results)
    return _last[1]


_last: tuple[list[RunResult], Analysis] | None = None


def analyse_briefly(results: list[RunResult]) -> Analysis:
    """Configurations and their ranking alone, while further runs are under way: no log is read."""
    configurations = group_configurations(results)
    return Analysis(configurations, [], rank(configurations), {c.name: [] for c in configurations}, {})


def _analyse(results: list[RunResult]) -> Analysis:
    configurations = group_configurations(results)
    rankings = rank(configurations)
    done = [r for c in configurations for r in c.runs]
    metrics = [(t, s, name) for t, s in list_scorers(done) if (name := pick_headline(done, t, s))]
    metrics += [r.source for r in rankings if r.source and r.source not in metrics]
    leaders = {id(c): r.leader for r in rankings for c in r.configurations[1:]}
    chosen_by = {VALIDATION for r in rankings if r.chosen_by == VALIDATION[2]}
    comparisons = compare_configurations(configurations, metrics, leaders, chosen_by)
    for r in rankings:
        mark_best(r, comparisons)
    found = Analysis(configurations, metrics, rankings, comparisons, {})
    found.detectable = {t: d for t in dict.fromkeys(t for t, _, _ in metrics) if (d := _detectable(found, t))}
    return found


def _detectable(found: Analysis, task: str) -> DetectableDifference | None:
    """With the accuracy of the better half (of numbers the spread of errors) and the correlations that were observed."""
    metric_key = next((m for m in found.metrics if m[0] == task and m[2] in ("accuracy", "mae")), None)
    asked = [c for c in found.configurations if c.evaluations(task)]
    if metric_key is None or not asked:
        return None
    cells = [c.evaluations(task) for c in asked]
    n, k, seeds = min(own[0].samples for own in cells), max(2, len(asked)), min(len(c.runs) for c in asked)
    # One that gives all the same answer is right by the answer, not by the item.
    telling = [load_samples(own[0].log, metric_key[1]) for own in cells if not all(e.constant_answer for e in own)]
    both = align(telling)
    if both is None or not all(is_computable(metric_key[2], s) for s in both):
        both = []
    values = [terms(metric_key[2], s) for s in both]
    n, correlation = len(values[0]) if values else n, _correlation(values)
    design_effect = (
        mean([n / effective_sample_size(v, s.unit) for v, s in zip(values, both, strict=True)]) if values else 1.0
    )
    if metric_key[2] == "mae":
        spread = None if correlation is None else mean([float(v.std(ddof=1)) for v in values])
        return detectable_error(n, k, spread, correlation, seeds, design_effect)
    deviations = [e.seed_deviation for c in asked if (e := estimate(c, *metric_key)) and e.seed_deviation]
    deviation = mean([d**2 for d in deviations]) ** 0.5 if deviations and seeds > 1 else None
    best = max((float(v.mean()) for v in values), default=0.0)
    if correlation is None or not 0 < best < 1:
        best = correlation = None
    return detectable_difference(n, k, best, correlation, deviation, seeds, design_effect)


def _correlation(values: list[Any]) -> float | None:
    """The mean correlation of answers to one item over pairs of configurations; None where none varies."""
    import numpy as np

    varying = [v for v in values if v.std() > 0][:_FEW_PAIRS]
    if len(varying) < 2:
        return None
    found = np.corrcoef(varying)
    return float(found[np.triu_indices(len(varying), 1)].mean())
