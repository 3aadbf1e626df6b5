"""The cells of tables in the terminal and in the summary, as text for 100 columns: scores, comparisons, seeds."""

import math
from collections.abc import Callable
from typing import Any

from cruijff_kit.analysis.comparisons import BASE_MODEL, BEST, CHANCE, VALIDATION, MetricKey, format_comparison
from cruijff_kit.analysis.configurations import Configuration, last_evaluation
from cruijff_kit.analysis.estimates import Estimate, estimate, estimate_evaluation, estimate_loss
from cruijff_kit.analysis.headlines import list_scorers, pick_headline
from cruijff_kit.analysis.intervals import LEVEL
from cruijff_kit.analysis.rankings import Ranking, mean_objective
from cruijff_kit.analysis.sweep import Analysis
from cruijff_kit.records.result import Evaluation, RunResult
from cruijff_kit.util.format import format_number

VERSUS = "Difference [95% interval] p, item by item, corrected for the number of tests (simultaneous intervals; Holm)"
SEEDS = (
    "Means over seeds [95% interval over test items and seeds]; sd between seeds: without the variation between items"
)
INTERVALS = "[95% interval]: of scores over other test items, of validation losses over other validation rows"
Cells = tuple[list[str], list[list[str]]]
"""Header and rows."""


def make_result_cells(results: list[RunResult], analysis: Analysis, narrow: bool = False) -> Cells:
    """Make a row for each run: losses, each scorer's headline before and after training with intervals, and the share of
    scored samples; chance and Bayes optimum where they vary. A star marks the runs of the best configurations.

    Args:
        results: the runs.
        analysis: of the results.
        narrow: whether to omit the seconds, settings that every run's name has, and the base model's score where it is the
            same for all runs (`describe_base_model`) or not of a task's first scorer; intervals have two decimals.
    """
    has_tasks = len({e.task for e in _list_evaluations(results)}) > 1
    columns: list[tuple[str, list[str]]] = [("run", [("* " if analysis.is_best(r) else "") + r.name for r in results])]
    for key in dict.fromkeys(k for r in results for k in r.swept):
        values = [format_cell(r.swept.get(key)) for r in results]
        if not narrow or not all(
            f"{key.rpartition('.')[2]}={v}" in r.name for v, r in zip(values, results, strict=True)
        ):
            columns.append((key, values))
    columns.append(("loss", [format_cell(r.training.get("loss")) for r in results]))
    columns.append(("val. loss" if narrow else "validation loss", _format_losses(results, narrow)))
    first = {task: scorer for task, scorer in reversed(list_scorers(results))}
    for task, scorer in list_scorers(results):
        name = f"{task} {scorer}" if has_tasks else scorer
        metric = pick_headline(results, task, scorer)
        base_scores = _format_scores(results, analysis, (task, scorer, metric), narrow, base_model=True)
        if not narrow or scorer == first[task] and len({*base_scores}) > 1:
            columns.append((f"{name} {metric} before", base_scores))
        columns.append((f"{name} {metric} after", _format_scores(results, analysis, (task, scorer, metric), narrow)))
        coverage = [e.coverage.get(scorer, 1.0) for e in _list_evaluations(results) if e.task == task]
        if any(share < 1 for share in coverage):
            columns.append((f"{name} scored", [_format_coverage(r, task, scorer) for r in results]))
    for (task, scorer, _), values in _list_chances(results).items():
        if len({*values} - {""}) > 1:
            columns.append((f"{task} {scorer} chance" if has_tasks else f"{scorer} chance", values))
    for (task, metric), values in _list_bayes_optima(results).items():
        if len({*values} - {""}) > 1:
            columns.append((f"{task} known best {metric}" if has_tasks else f"known best {metric}", values))
    if any(r.tier != "green" for r in results):
        columns.append(("tier", [r.tier for r in results]))
    columns.append(("seconds", [_format_seconds(r) for r in results]))
    columns.append(("status", [r.status for r in results]))
    columns = [c for c in columns if any(c[1]) and not (narrow and c[0] == "seconds")]
    return [name for name, _ in columns], [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]


def describe_base_model(results: list[RunResult], analysis: Analysis) -> str:
    """Return a line with the base model's score by each task's first scorer, where it is the same for all runs."""
    first = {
        task: (task, scorer, pick_headline(results, task, scorer)) for task, scorer in reversed(list_scorers(results))
    }
    scores = []
    for metric_key in reversed(first.values()):
        values = {*_format_scores(results, analysis, metric_key, narrow=False, base_model=True)}
        if len(values) == 1 and values != {""}:
            scores.append(f"{' '.join(metric_key if len(first) > 1 else metric_key[1:])} {values.pop()}")
    return f"{BASE_MODEL}: {', '.join(scores)}" if scores else ""


def describe_bayes_optima(results: list[RunResult]) -> str:
    """Return a line with the Bayes optima that are the same for all runs that have one; empty without any."""
    has_tasks = len({e.task for e in _list_evaluations(results)}) > 1
    optima = [
        f"{task} {metric} {max(values)}" if has_tasks else f"{metric} {max(values)}"
        for (task, metric), values in _list_bayes_optima(results).items()
        if len({*values} - {""}) == 1
    ]
    return f"Bayes optimum: {', '.join(optima)}" if optima else ""


def describe_chance(results: list[RunResult]) -> str:
    """Return a line with the constant baseline's scores that are the same for all runs; empty without any."""
    has_tasks = len({e.task for e in _list_evaluations(results)}) > 1
    scores = [
        f"{task} {scorer} {metric} {max(values)}" if has_tasks else f"{scorer} {metric} {max(values)}"
        for (task, scorer, metric), values in _list_chances(results).items()
        if len({*values} - {""}) == 1
    ]
    return f"chance (the best constant answer): {', '.join(scores)}" if scores else ""


def list_table_notes(results: list[RunResult], analysis: Analysis) -> list[str]:
    """Return the notes below the table, a line each."""
    best = describe_best(analysis.ranking) or analysis.no_best_reason
    lines = [describe_bayes_optima(results), describe_chance(results), best]
    if len(analysis.configurations) > 1:
        lines += [f"{task}: {d}" for task, d in analysis.detectable.items()]
    return [line for line in [*lines, analysis.one_seed_notice] if line]


def describe_best(ranking: Ranking | None) -> str:
    """Return a line with the best configuration, its objective, and the configurations indistinguishable from it."""
    if ranking is None:
        return ""
    value = mean_objective(ranking.leader)
    line = f"* best by {ranking.chosen_by} on the {ranking.split} split: {ranking.leader.name} ({value:.4g})"
    names = [c.name for c in ranking.best[1:]]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    line += f"; indistinguishable from it: {shown}" if names else ""
    if ranking.is_optimistic:
        line += (
            f"; the {ranking.split} split chose it, so that its scores are too good: their intervals allow for the "
            f"{len(ranking.configurations)} configurations that it was chosen from"
        )
    return f"{line}; {ranking.note}" if ranking.note else line


def make_comparison_cells(analysis: Analysis) -> Cells | None:
    """Make a row for each configuration and metric, with comparisons with the base model, chance and the best; None without
    comparisons.
    """
    metrics = list_compared_metrics(analysis)
    has_tasks = len({t for t, _, _ in metrics}) > 1
    rows = []
    for c in analysis.configurations:
        for metric_key in [*metrics, VALIDATION]:
            cells = [format_comparison(analysis.comparisons[c.name], a, metric_key) for a in (BASE_MODEL, CHANCE, BEST)]
            star = "* " if analysis.ranking and c in analysis.ranking.best else ""
            words = metric_key[2:] if metric_key == VALIDATION else metric_key if has_tasks else metric_key[1:]
            rows.append([star + c.name, " ".join(words).replace("_loss", " loss"), *cells])
    rows = [row for row in rows if any(row[2:])]
    header = ["configuration", "scores", *(f"versus {a}" for a in (BASE_MODEL, CHANCE, BEST))]
    columns = [i for i in range(5) if any(row[i] for row in rows)]
    return ([header[i] for i in columns], [[row[i] for i in columns] for row in rows]) if rows else None


def list_compared_metrics(analysis: Analysis) -> list[MetricKey]:
    """List the headlines of each task's first scorer, headlines other than accuracy, and the objectives."""
    first = {m[0]: m for m in reversed(analysis.metrics)}
    objectives = [r.source for r in analysis.rankings]
    return [m for m in analysis.metrics if m is first[m[0]] or m[2] != "accuracy" or m in objectives]


def make_seed_cells(analysis: Analysis) -> Cells | None:
    """Make a row for each loss and compared metric of each configuration of several seeds; None where all have one seed."""
    rows = []
    for c in analysis.configurations:
        if len(c.runs) < 2:
            continue
        estimates = {"loss": estimate_loss(c, "loss"), "validation loss": estimate_loss(c, "validation_loss")}
        for m in list_compared_metrics(analysis):
            estimates[_format_metric(m, analysis)] = estimate(c, *m, level=analysis.interval_level(c, m))
        for i, (name, e) in enumerate((name, e) for name, e in estimates.items() if e is not None):
            title = [c.name, ", ".join(map(str, c.seeds))] if i == 0 else ["", ""]
            deviation = "" if e.seed_deviation is None else format_number(e.seed_deviation)
            rows.append([*title, name, format_estimate(e), deviation])
    return (["configuration", "seeds", "", "mean", "sd between seeds"], rows) if rows else None


def _format_metric(metric_key: MetricKey, analysis: Analysis) -> str:
    has_tasks = len({t for t, _, _ in analysis.metrics}) > 1
    return " ".join(metric_key if has_tasks else metric_key[1:]).replace("_", " ")


def format_estimate(e: Estimate, narrow: bool = False) -> str:
    """Return, for example, "0.840 [0.756, 0.899]"; narrow: "0.840 [.76, .90]"."""
    if e.low is None or e.high is None:
        return format_number(e.value)
    ends = [format_number(v, 2).removeprefix("0") if narrow else format_number(v) for v in (e.low, e.high)]
    return f"{format_number(e.value)} [{', '.join(ends)}]"


def _list_evaluations(results: list[RunResult]) -> list[Evaluation]:
    return [e for r in results for e in r.evaluation + r.baseline]


def _format_scores(
    results: list[RunResult], analysis: Analysis, metric_key: MetricKey, narrow: bool, base_model: bool = False
) -> list[str]:
    """Return a score of each run with its interval."""
    cells = []
    for r in results:
        evaluation, c = last_evaluation(r, metric_key[0], base_model), analysis.find_configuration(r)
        level = LEVEL if base_model or c is None else analysis.interval_level(c, metric_key)
        e = estimate_evaluation(evaluation, *metric_key[1:], level) if evaluation else None
        cells.append(format_estimate(e, narrow) if e else "")
    return cells


def _format_losses(results: list[RunResult], narrow: bool) -> list[str]:
    """Return the validation loss of each run with its interval."""
    cells = []
    for r in results:
        e = estimate_loss(Configuration(r.name, {}, [r]), "validation_loss")
        ends = [] if e is None or e.low is None or e.high is None else [e.low, e.high]
        numbers = [format_number(v, 2).removeprefix("0") if narrow else format_cell(v) for v in ends]
        interval = f" [{', '.join(numbers)}]" if numbers else ""
        cells.append(format_cell(r.training.get("validation_loss")) + interval)
    return cells


def _format_coverage(result: RunResult, task: str, scorer: str) -> str:
    """Return the shares of the samples that a scorer scored, before and after training."""
    evaluations = [last_evaluation(result, task, base_model=True), last_evaluation(result, task)]
    return " → ".join(f"{e.coverage[scorer]:.0%}" for e in evaluations if e and scorer in e.coverage)


def _format_numbers(results: list[RunResult], task: str, read: Callable[[Evaluation], float | None]) -> list[str]:
    """Return a number of each run's evaluation of a task, or of its base model's, as text."""
    evaluations = [last_evaluation(r, task) or last_evaluation(r, task, base_model=True) for r in results]
    values = [read(e) if e else None for e in evaluations]
    return ["" if v is None or not math.isfinite(v) else format_number(v) for v in values]


def _list_chances(results: list[RunResult]) -> dict[MetricKey, list[str]]:
    """Return headline -> the constant baseline's score on each run's samples."""

    def read_chances(t: str, s: str, m: str) -> list[str]:
        return _format_numbers(results, t, lambda e: e.chance.get(s, {}).get(m))

    headlines = [(t, s, pick_headline(results, t, s)) for t, s in list_scorers(results)]
    return {metric_key: values for metric_key in headlines if any(values := read_chances(*metric_key))}


def _list_bayes_optima(results: list[RunResult]) -> dict[tuple[str, str], list[str]]:
    """Return (task, metric of a headline) -> the Bayes optimum of each run."""

    def read_optima(t: str, m: str) -> list[str]:
        return _format_numbers(results, t, lambda e: e.bayes_optimum.get(m))

    keys = dict.fromkeys((task, pick_headline(results, task, scorer)) for task, scorer in list_scorers(results))
    return {key: values for key in keys if any(values := read_optima(*key))}


def _format_seconds(result: RunResult) -> str:
    return f"{result.seconds['total']:.1f}" if "total" in result.seconds else ""


def format_cell(value: Any) -> str:
    """Return a value as tables show it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
