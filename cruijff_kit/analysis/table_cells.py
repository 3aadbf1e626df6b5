"""The tables that people see, as text, for 100 columns: scores before and after, comparisons, seeds. Called by table."""

import math
from collections.abc import Callable
from typing import Any

from cruijff_kit.analysis.comparisons import BASE_MODEL, BEST, CHANCE, VALIDATION, MetricKey, format_comparison
from cruijff_kit.analysis.configurations import Configuration, last_evaluation
from cruijff_kit.analysis.estimates import Estimate, estimate, estimate_evaluation, estimate_loss
from cruijff_kit.analysis.headlines import list_scorers, pick_headline
from cruijff_kit.analysis.rankings import Ranking
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


def table_cells(results: list[RunResult], analysis: Analysis, narrow: bool = False) -> Cells:
    """A row a run: losses, each scorer's headline before and after with intervals, what was left unscored; chance and the
    known best where they vary. A star marks the runs of the best configurations.

    Args:
        narrow: leave out the seconds, what varies where every run's name has it, and what the base model got where
            that is the same for all (`base_model_line`) or of a task's further scorers; intervals with two decimals.
    """
    several = len({e.task for e in _entries(results)}) > 1
    columns: list[tuple[str, list[str]]] = [("run", [("* " if analysis.is_best(r) else "") + r.name for r in results])]
    for key in dict.fromkeys(k for r in results for k in r.swept):
        values = [cell(r.swept.get(key)) for r in results]
        if not narrow or not all(
            f"{key.rpartition('.')[2]}={v}" in r.name for v, r in zip(values, results, strict=True)
        ):
            columns.append((key, values))
    columns.append(("loss", [cell(r.training.get("loss")) for r in results]))
    columns.append(("val. loss" if narrow else "validation loss", _losses(results, narrow)))
    first = {task: scorer for task, scorer in reversed(list_scorers(results))}
    for task, scorer in list_scorers(results):
        name = f"{task} {scorer}" if several else scorer
        what = pick_headline(results, task, scorer)
        before = _scores(results, analysis, (task, scorer, what), narrow, base_model=True)
        if not narrow or scorer == first[task] and len({*before}) > 1:
            columns.append((f"{name} {what} before", before))
        columns.append((f"{name} {what} after", _scores(results, analysis, (task, scorer, what), narrow)))
        if any(
            share < 1 for e in _entries(results) if e.task == task and (share := e.coverage.get(scorer)) is not None
        ):
            columns.append((f"{name} scored", [_shares(r, task, scorer) for r in results]))
    for (task, scorer, _), values in _chances(results).items():
        if len({*values} - {""}) > 1:
            columns.append((f"{task} {scorer} chance" if several else f"{scorer} chance", values))
    for (task, metric), values in _bayes_optima(results).items():
        if len({*values} - {""}) > 1:
            columns.append((f"{task} known best {metric}" if several else f"known best {metric}", values))
    if any(r.tier != "green" for r in results):
        columns.append(("tier", [r.tier for r in results]))
    columns.append(("seconds", [_seconds(r) for r in results]))
    columns.append(("status", [r.status for r in results]))
    kept = [c for c in columns if any(c[1]) and not (narrow and c[0] == "seconds")]
    return [name for name, _ in kept], [list(row) for row in zip(*(cells for _, cells in kept), strict=True)]


def base_model_line(results: list[RunResult], analysis: Analysis) -> str:
    """A line about what the base model got in each task's first scorer, where that is the same for all runs."""
    first = {
        task: (task, scorer, pick_headline(results, task, scorer)) for task, scorer in reversed(list_scorers(results))
    }
    found = []
    for metric_key in reversed(first.values()):
        before = {*_scores(results, analysis, metric_key, narrow=False, base_model=True)}
        if len(before) == 1 and before != {""}:
            found.append(f"{' '.join(metric_key if len(first) > 1 else metric_key[1:])} {before.pop()}")
    return f"base model: {', '.join(found)}" if found else ""


def known_best(results: list[RunResult]) -> str:
    """A line with the Bayes optima that are the same in all runs that have one; empty where there is none."""
    several = len({e.task for e in _entries(results)}) > 1
    found = [
        f"{task} {metric} {max(values)}" if several else f"{metric} {max(values)}"
        for (task, metric), values in _bayes_optima(results).items()
        if len({*values} - {""}) == 1
    ]
    return f"Bayes optimum: {', '.join(found)}" if found else ""


def chance_line(results: list[RunResult]) -> str:
    """A line about what the constant baseline gets, where that is the same for all runs; empty where there is none."""
    several = len({e.task for e in _entries(results)}) > 1
    found = [
        f"{task} {scorer} {metric} {max(values)}" if several else f"{scorer} {metric} {max(values)}"
        for (task, scorer, metric), values in _chances(results).items()
        if len({*values} - {""}) == 1
    ]
    return f"chance (the best constant answer): {', '.join(found)}" if found else ""


def lines_below(results: list[RunResult], analysis: Analysis) -> list[str]:
    """What to know of the table, a line each."""
    lines = [known_best(results), chance_line(results), best_line(analysis.ranking) or analysis.no_best_reason]
    compared = len(analysis.configurations) > 1
    lines += [f"{task}: {d}" for task, d in analysis.detectable.items() if compared]
    return [line for line in [*lines, analysis.one_seed_notice] if line]


def best_line(ranking: Ranking | None) -> str:
    """Which configuration is best, by what, and which cannot be distinguished from it."""
    if ranking is None:
        return ""
    value = sum(ranking.leader.objectives()) / len(ranking.leader.runs)
    line = f"* best by {ranking.chosen_by} on the {ranking.split} split: {ranking.leader.name} ({value:.4g})"
    others = [c.name for c in ranking.best[1:]]
    some = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
    line += f"; indistinguishable from it: {some}" if others else ""
    if ranking.is_optimistic:
        line += (
            f"; the {ranking.split} split chose it, so that its scores are too good: their intervals allow for the "
            f"{len(ranking.configurations)} configurations that it was chosen from"
        )
    return f"{line}; {ranking.note}" if ranking.note else line


def versus_cells(analysis: Analysis) -> Cells | None:
    """A row a configuration and metric: against the base model, chance and the best; None: nothing to compare."""
    metrics = list_compared_metrics(analysis)
    several = len({t for t, _, _ in metrics}) > 1
    rows = []
    for c in analysis.configurations:
        for metric_key in [*metrics, VALIDATION]:
            cells = [format_comparison(analysis.comparisons[c.name], a, metric_key) for a in (BASE_MODEL, CHANCE, BEST)]
            star = "* " if analysis.ranking and c in analysis.ranking.best else ""
            words = metric_key[2:] if metric_key == VALIDATION else metric_key if several else metric_key[1:]
            rows.append([star + c.name, " ".join(words).replace("_loss", " loss"), *cells])
    rows = [row for row in rows if any(row[2:])]
    header = ["configuration", "scores", *(f"versus {a}" for a in (BASE_MODEL, CHANCE, BEST))]
    kept = [i for i in range(5) if any(row[i] for row in rows)]
    return ([header[i] for i in kept], [[row[i] for i in kept] for row in rows]) if rows else None


def list_compared_metrics(analysis: Analysis) -> list[MetricKey]:
    """Of each task its first scorer's headline, those that are no accuracy, and the objectives."""
    first = {m[0]: m for m in reversed(analysis.metrics)}
    chosen = [r.source for r in analysis.rankings]
    return [m for m in analysis.metrics if m is first[m[0]] or m[2] != "accuracy" or m in chosen]


def seed_cells(analysis: Analysis) -> Cells | None:
    """A row a number of each configuration of several seeds: losses, and what is compared; None where each has one seed."""
    rows = []
    for c in analysis.configurations:
        if len(c.runs) < 2:
            continue
        found = {"loss": estimate_loss(c, "loss"), "validation loss": estimate_loss(c, "validation_loss")}
        found |= {
            _words(m, analysis): estimate(c, *m, level=analysis.interval_level(c, m))
            for m in list_compared_metrics(analysis)
        }
        for i, (name, e) in enumerate((name, e) for name, e in found.items() if e is not None):
            about = [c.name, ", ".join(map(str, c.seeds))] if i == 0 else ["", ""]
            deviation = "" if e.seed_deviation is None else format_number(e.seed_deviation)
            rows.append([*about, name, format_estimate(e), deviation])
    return (["configuration", "seeds", "", "mean", "sd between seeds"], rows) if rows else None


def _words(metric_key: MetricKey, analysis: Analysis) -> str:
    several = len({t for t, _, _ in analysis.metrics}) > 1
    return " ".join(metric_key if several else metric_key[1:]).replace("_", " ")


def format_estimate(e: Estimate, narrow: bool = False) -> str:
    """ "0.840 [0.756, 0.899]"; narrow: "0.840 [.76, .90]"."""
    if e.low is None:
        return format_number(e.value)
    ends = [format_number(v, 2).removeprefix("0") if narrow else format_number(v) for v in (e.low, e.high)]
    return f"{format_number(e.value)} [{', '.join(ends)}]"


def _entries(results: list[RunResult]) -> list[Evaluation]:
    return [e for r in results for e in r.evaluation + r.baseline]


def _scores(
    results: list[RunResult], analysis: Analysis, metric_key: MetricKey, narrow: bool, base_model: bool = False
) -> list[str]:
    """A score of each run with its interval."""
    cells = []
    for r in results:
        entry, c = last_evaluation(r, metric_key[0], base_model), analysis.find_configuration(r)
        level: dict[str, Any] = {} if base_model or c is None else {"level": analysis.interval_level(c, metric_key)}
        found = estimate_evaluation(entry, *metric_key[1:], **level) if entry else None
        cells.append(format_estimate(found, narrow) if found else "")
    return cells


def _losses(results: list[RunResult], narrow: bool) -> list[str]:
    """The validation loss of each run with its interval."""
    cells = []
    for r in results:
        found = estimate_loss(Configuration(r.name, {}, [r]), "validation_loss")
        ends = [] if found is None or found.low is None else [found.low, found.high]
        told = [format_number(v, 2).removeprefix("0") if narrow else cell(v) for v in ends]
        cells.append(cell(r.training.get("validation_loss")) + (f" [{', '.join(told)}]" if told else ""))
    return cells


def _shares(result: RunResult, task: str, scorer: str) -> str:
    """Shares of the samples that a scorer scored, before and after."""
    entries = [last_evaluation(result, task, base_model=True), last_evaluation(result, task)]
    return " → ".join(f"{e.coverage[scorer]:.0%}" for e in entries if e and scorer in e.coverage)


def _of_each(results: list[RunResult], task: str, read: Callable[[Evaluation], float | None]) -> list[str]:
    """A number of each run's cell of a task (the base model's where there is no other), as text."""
    entries = [last_evaluation(r, task) or last_evaluation(r, task, base_model=True) for r in results]
    values = [read(e) if e else None for e in entries]
    return ["" if v is None or not math.isfinite(v) else format_number(v) for v in values]


def _chances(results: list[RunResult]) -> dict[MetricKey, list[str]]:
    """(task, scorer, metric) -> what the constant baseline gets on each run's samples; of the metrics that tables show."""
    shown_metrics = [(t, s, pick_headline(results, t, s)) for t, s in list_scorers(results)]
    found = {}
    for t, s, m in shown_metrics:
        found[t, s, m] = _of_each(results, t, lambda e, s=s, m=m: e.chance.get(s, {}).get(m))  # type: ignore[misc]
    return {metric_key: values for metric_key, values in found.items() if any(values)}


def _bayes_optima(results: list[RunResult]) -> dict[tuple[str, str], list[str]]:
    """(task, metric) -> the Bayes optimum of each run; of the metrics that tables show."""
    keys = dict.fromkeys((task, pick_headline(results, task, scorer)) for task, scorer in list_scorers(results))
    found = {(t, m): _of_each(results, t, lambda e, m=m: e.bayes_optimum.get(m)) for t, m in keys}  # type: ignore[misc]
    return {key: values for key, values in found.items() if any(values)}


def _seconds(result: RunResult) -> str:
    return f"{result.seconds['total']:.1f}" if "total" in result.seconds else ""


def cell(value: Any) -> str:
    """A value as tables show it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
