"""The analysis of a list of results, computed once: for tables, the summary, the report, and --json."""

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
_MAX_CORRELATED = 20  # configurations whose answers are correlated


@dataclass(eq=False)
class Analysis:
    """The analysis of the results of a folder."""

    configurations: list[Configuration]
    metrics: list[MetricKey]
    """The metrics that are shown and compared: the headline of each scorer, and the objectives."""
    rankings: list[Ranking]
    """One ranking for each objective, the largest first."""
    comparisons: dict[str, list[Comparison]]
    """Name of a configuration -> its comparisons."""
    detectable: dict[str, DetectableDifference]
    """Task -> the difference that its number of items can detect."""

    @property
    def ranking(self) -> Ranking | None:
        """Return the ranking of all configurations with an objective; None if there are several, or one configuration."""
        return self.rankings[0] if len(self.rankings) == 1 and len(self.rankings[0].configurations) > 1 else None

    def find_configuration(self, result: RunResult) -> Configuration | None:
        """Return the configuration of a run; None for a run that is not done."""
        return next((c for c in self.configurations if any(r is result for r in c.runs)), None)

    def list_comparisons(self, result: RunResult) -> list[Comparison]:
        """Return the comparisons of a run's configuration."""
        c = self.find_configuration(result)
        return self.comparisons[c.name] if c else []

    def is_best(self, result: RunResult) -> bool:
        """Return whether a run is of a configuration that is among the best."""
        c = self.find_configuration(result)
        return self.ranking is not None and c in self.ranking.best

    def interval_level(self, c: Configuration, metric_key: MetricKey | None = None) -> float:
        """Return the level of a metric's interval: higher for one of the best on the split that chose it."""
        evaluations = c.evaluations(metric_key[0]) if metric_key else []
        split = evaluations[0].split if evaluations else None
        return max((r.level for r in self.rankings if c in r.best and r.split == split), default=LEVEL)

    @property
    def no_best_reason(self) -> str:
        """Return why no configuration is the best, and the setting that chooses one; empty if not needed."""
        if self.rankings or len(self.configurations) < 2:
            return ""
        results = [r for c in self.configurations for r in c.runs]
        objectives = sorted({r.objective_name for r in results if r.objective_name})
        reason = (
            f"the objective ({', '.join(objectives)}) is no finite number"
            if objectives
            else "the runs have no validation loss, and no objective was named"
        )
        metric = "/".join(self.metrics[0]) if self.metrics else "TASK/SCORER/METRIC"
        return f"No configuration is the best: {reason}. objective={metric} chooses one."

    @property
    def one_seed_notice(self) -> str:
        """Return a notice if several configurations have one seed each; otherwise empty."""
        configurations = [c for c in self.configurations if c.runs[0].training]
        if len(configurations) < 2 or any(len(c.runs) > 1 for c in configurations):
            return ""
        missing_seeds = [(r, len({1, 2, 3} - {*c.seeds})) for c in configurations for r in c.runs]
        seconds = sum(r.seconds.get("total", 0) * n for r, n in missing_seeds)
        gpu_hours = sum(r.gpu_hours() * n for r, n in missing_seeds)
        time = f"{gpu_hours:.2g} GPU-hours" if gpu_hours else _format_duration(seconds)
        return ONE_SEED.format(runs=sum(n for _, n in missing_seeds), time=time)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON value beside the runs: best, configurations, detectable_difference."""
        return {
            "best": self.ranking.to_dict() if self.ranking else None,
            "configurations": [self._configuration_to_dict(c) for c in self.configurations],
            "detectable_difference": {task: d.to_dict() for task, d in self.detectable.items()},
        }

    def _configuration_to_dict(self, c: Configuration) -> dict[str, Any]:
        keys = ((e.task, s, m) for e in c.runs[-1].evaluation for s, values in e.metrics.items() for m in values)
        metrics = [m for m in dict.fromkeys(keys) if m in self.metrics or find_measure(m[2])]
        estimates = {"/".join(m): estimate(c, *m, level=self.interval_level(c, m)) for m in metrics}
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


def _format_duration(seconds: float) -> str:
    """Return, for example, "40 seconds", "12 minutes", "3.4 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def analyse(results: list[RunResult]) -> Analysis:
    """Analyse results: configurations, rankings, comparisons, detectable differences. The last analysis is cached."""
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
    """Return configurations and their rankings alone, without reading logs, while other runs are active."""
    configurations = group_configurations(results)
    return Analysis(configurations, [], rank(configurations), {c.name: [] for c in configurations}, {})


def _analyse(results: list[RunResult]) -> Analysis:
    configurations = group_configurations(results)
    rankings = rank(configurations)
    results = [r for c in configurations for r in c.runs]
    metrics = [(t, s, name) for t, s in list_scorers(results) if (name := pick_headline(results, t, s))]
    metrics += [r.source for r in rankings if r.source and r.source not in metrics]
    leaders = {id(c): r.leader for r in rankings for c in r.configurations[1:]}
    chosen_by = {VALIDATION for r in rankings if r.chosen_by == VALIDATION[2]}
    comparisons = compare_configurations(configurations, metrics, leaders, chosen_by)
    for r in rankings:
        mark_best(r, comparisons)
    analysis = Analysis(configurations, metrics, rankings, comparisons, {})
    tasks = dict.fromkeys(t for t, _, _ in metrics)
    analysis.detectable = {t: d for t in tasks if (d := _find_detectable_difference(analysis, t))}
    return analysis


def _find_detectable_difference(analysis: Analysis, task: str) -> DetectableDifference | None:
    """Return the detectable difference for the observed accuracy of the best (or the deviation of errors) and the observed
    correlation of answers.
    """
    metric_key = next((m for m in analysis.metrics if m[0] == task and m[2] in ("accuracy", "mae")), None)
    configurations = [c for c in analysis.configurations if c.evaluations(task)]
    if metric_key is None or not configurations:
        return None
    _, scorer, metric = metric_key
    evaluations = [c.evaluations(task) for c in configurations]
    n, k = min(own[0].samples for own in evaluations), max(2, len(configurations))
    seeds = min(len(c.runs) for c in configurations)
    # The scores of a configuration that always gives one answer depend on the labels alone: they would distort the
    # correlation.
    varying = [own[0] for own in evaluations if not all(e.constant_answer for e in own)]
    samples = align([load_samples(e.log, scorer) for e in varying])
    if samples is None or not all(is_computable(metric, s) for s in samples):
        samples = []
    values = [terms(metric, s) for s in samples]
    n, correlation = len(values[0]) if values else n, _mean_correlation(values)
    sizes = [effective_sample_size(v, s.unit) for v, s in zip(values, samples, strict=True)]
    design_effect = mean([n / size for size in sizes]) if values else 1.0
    if metric == "mae":
        error_deviation = None if correlation is None else mean([float(v.std(ddof=1)) for v in values])
        return detectable_error(n, k, error_deviation, correlation, seeds, design_effect)
    estimates = [estimate(c, *metric_key) for c in configurations]
    deviations = [e.seed_deviation for e in estimates if e and e.seed_deviation]
    deviation = mean([d**2 for d in deviations]) ** 0.5 if deviations and seeds > 1 else None
    best = max((float(v.mean()) for v in values), default=0.0)
    if correlation is None or not 0 < best < 1:
        return detectable_difference(n, k, None, None, deviation, seeds, design_effect)
    return detectable_difference(n, k, best, correlation, deviation, seeds, design_effect)


def _mean_correlation(values: list[Any]) -> float | None:
    """Return the mean correlation of answers to one item over pairs of configurations; None if fewer than two vary."""
    import numpy as np

    varying = [v for v in values if v.std() > 0][:_MAX_CORRELATED]
    if len(varying) < 2:
        return None
    correlations = np.corrcoef(varying)
    return float(correlations[np.triu_indices(len(varying), 1)].mean())
