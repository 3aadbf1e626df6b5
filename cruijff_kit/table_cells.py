"""The tables that people see, as text, for 100 columns: scores before and after, comparisons. Called by table."""

import math
from typing import Any

from cruijff_kit.comparisons import BEST, UNTRAINED, Comparison, shown
from cruijff_kit.result import Evaluation, RunResult, higher_is_better

VERSUS = "Difference [95% interval] p, item by item; p corrected for the runs shown (Holm)"
SEEDS = "Means over seeds; the interval is that of other seeds, ± that of other test items"
Cells = tuple[list[str], list[list[str]]]
"""Header and rows."""


def best_run(results: list[RunResult]) -> RunResult | None:
    """The run with the best objective among those that are done; None where there is nothing to compare."""
    done = [r for r in results if r.status == "done" and r.objective is not None and math.isfinite(r.objective)]
    names = {r.objective_name for r in done}
    if len(results) < 2 or len(names) != 1:
        return None
    pick = max if higher_is_better(names.pop()) else min
    return pick(done, key=lambda r: r.objective)


def table_cells(results: list[RunResult], narrow: bool = False) -> Cells:
    """A row a run: losses, each scorer's headline before and after, what was left unscored, the known best where it varies.

    Args:
        narrow: leave out the seconds, what varies where every run's name has it, and what a task's further scorers gave
            the untrained model.
    """
    best = best_run(results)
    several = len({e.task for e in _entries(results)}) > 1
    columns: list[tuple[str, list[str]]] = [("run", [("* " if r is best else "") + r.name for r in results])]
    for key in dict.fromkeys(k for r in results for k in r.swept):
        values = [cell(r.swept.get(key)) for r in results]
        if not narrow or not all(
            f"{key.rpartition('.')[2]}={v}" in r.name for v, r in zip(values, results, strict=True)
        ):
            columns.append((key, values))
    columns.append(("loss", [cell(r.training.get("loss")) for r in results]))
    columns.append(
        ("val. loss" if narrow else "validation loss", [cell(r.training.get("validation_loss")) for r in results])
    )
    first = {task: scorer for task, scorer in reversed(_scorers(results))}
    for task, scorer in _scorers(results):
        name = f"{task} {scorer}" if several else scorer
        what = headline_name(results, task, scorer)
        if not narrow or scorer == first[task]:
            columns.append((f"{name} {what} before", [_score(r.baseline, task, scorer, what, False) for r in results]))
        columns.append((f"{name} {what} after", [_score(r.evaluation, task, scorer, what) for r in results]))
        if any(
            share < 1 for e in _entries(results) if e.task == task and (share := e.coverage.get(scorer)) is not None
        ):
            columns.append((f"{name} scored", [_shares(r, task, scorer) for r in results]))
    for (task, metric), values in _ceilings(results).items():
        if len({*values} - {""}) > 1:
            columns.append((f"{task} known best {metric}" if several else f"known best {metric}", values))
    if any(r.tier != "green" for r in results):
        columns.append(("tier", [r.tier for r in results]))
    columns.append(("seconds", [_seconds(r) for r in results]))
    columns.append(("status", [r.status for r in results]))
    kept = [c for c in columns if any(c[1]) and not (narrow and c[0] == "seconds")]
    return [name for name, _ in kept], [list(row) for row in zip(*(cells for _, cells in kept), strict=True)]


def known_best(results: list[RunResult]) -> str:
    """A line about the ceilings that all runs share which have one; empty where there is none."""
    several = len({e.task for e in _entries(results)}) > 1
    found = [
        f"{task} {metric} {max(values)}" if several else f"{metric} {max(values)}"
        for (task, metric), values in _ceilings(results).items()
        if len({*values} - {""}) == 1
    ]
    return f"best that any model can expect: {', '.join(found)}" if found else ""


def versus_cells(results: list[RunResult], compared: list[list[Comparison]]) -> Cells | None:
    """A row a run and task: its first scorer against the untrained model and the best run; None: nothing to compare."""
    best = best_run(results)
    first = {task: scorer for task, scorer in reversed(_scorers(results))}
    rows = []
    for r, found in zip(results, compared, strict=True):
        for task, scorer in reversed(first.items()):
            cells = [shown(found, against, task, scorer) for against in (UNTRAINED, BEST)]
            name = ("* " if r is best else "") + r.name
            rows.append([name, f"{task} {scorer}" if len(first) > 1 else scorer, *cells])
    rows = [row for row in rows if any(row[2:])]
    header = ["run", "scores", f"versus {UNTRAINED}", f"versus {BEST}"]
    kept = [i for i in range(4) if any(row[i] for row in rows)]
    return ([header[i] for i in kept], [[row[i] for i in kept] for row in rows]) if rows else None


def headline(values: dict[str, float | None]) -> str | None:
    """The metric of a scorer that tables show: accuracy, else its first one; None where there is none."""
    return "accuracy" if "accuracy" in values else next(iter(values), None)


def headline_name(results: list[RunResult], task: str, scorer: str) -> str:
    """What tables show of a task's scorer: its `headline`; AUC where an earlier scorer of the task has an accuracy."""
    of_task = [e.metrics for e in _entries(results) if e.task == task and scorer in e.metrics]
    for metrics in of_task:
        earlier = [values for name, values in metrics.items() if [*metrics].index(name) < [*metrics].index(scorer)]
        if "auc" in metrics[scorer] and any("accuracy" in values for values in earlier):
            return "auc"
    return next((name for metrics in of_task if (name := headline(metrics[scorer]))), "")


def _entries(results: list[RunResult]) -> list[Evaluation]:
    return [e for r in results for e in r.evaluation + r.baseline]


def _scorers(results: list[RunResult]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((e.task, s) for e in _entries(results) for s in e.metrics))


def _last(evaluations: list[Evaluation], task: str) -> Evaluation | None:
    return next((e for e in reversed(evaluations) if e.task == task), None)  # the last epoch


def _score(evaluations: list[Evaluation], task: str, scorer: str, metric: str, with_error: bool = True) -> str:
    entry = _last(evaluations, task)
    values = entry.metrics.get(scorer, {}) if entry else {}
    if values.get(metric) is None or not math.isfinite(values[metric]):
        return ""
    error = values.get("stderr") if with_error and metric in ("accuracy", "mean") else None
    return number(values[metric]) + (f" ±{number(error)}" if error is not None and math.isfinite(error) else "")


def _shares(result: RunResult, task: str, scorer: str) -> str:
    """Shares of the samples that a scorer scored, before and after."""
    entries = [_last(result.baseline, task), _last(result.evaluation, task)]
    return " → ".join(f"{e.coverage[scorer]:.0%}" for e in entries if e and scorer in e.coverage)


def _ceilings(results: list[RunResult]) -> dict[tuple[str, str], list[str]]:
    """(task, metric) -> the ceiling of each run; of the metrics that tables show."""
    shown = {(task, headline_name(results, task, scorer)) for task, scorer in _scorers(results)}
    keys = dict.fromkeys((e.task, m) for e in _entries(results) for m in e.ceiling if (e.task, m) in shown)
    return {
        (task, metric): [number(entry.ceiling[metric]) if (entry := _either(r, task)) and metric in entry.ceiling
                         else "" for r in results]
        for task, metric in keys
    }  # fmt: skip


def _either(result: RunResult, task: str) -> Evaluation | None:
    """A task's cell of the trained model, else of the untrained one."""
    return _last(result.evaluation, task) or _last(result.baseline, task)


def _seconds(result: RunResult) -> str:
    return f"{result.seconds['total']:.1f}" if "total" in result.seconds else ""


def number(value: float) -> str:
    """A score as tables show it: three decimals, fewer where it is large."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def cell(value: Any) -> str:
    """A value as tables show it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
