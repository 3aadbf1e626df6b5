"""The table that people see, as text: losses, scores before and after, comparisons. Called by table."""

import math
from typing import Any

from cruijff_kit.comparisons import BEST, UNTRAINED, compare_runs, shown
from cruijff_kit.result import Evaluation, RunResult, higher_is_better


def best_run(results: list[RunResult]) -> RunResult | None:
    """The run with the best objective among those that are done; None where there is nothing to compare."""
    done = [r for r in results if r.status == "done" and r.objective is not None and math.isfinite(r.objective)]
    names = {r.objective_name for r in done}
    if len(results) < 2 or len(names) != 1:
        return None
    pick = max if higher_is_better(names.pop()) else min
    return pick(done, key=lambda r: r.objective)


def table_cells(results: list[RunResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that people see; of each task's comparisons those of its first scorer."""
    best = best_run(results)
    swept = list(dict.fromkeys(k for r in results for k in r.swept))
    tasks = list(dict.fromkeys((e.task, s) for r in results for e in r.evaluation + r.baseline for s in e.metrics))
    several = len({t for t, _ in tasks}) > 1
    header = ["run", *swept, "loss", "validation loss"]
    for task, scorer in tasks:
        name = f"{task} {scorer}" if several else scorer
        what = headline_name(results, task, scorer)
        header += [f"{name} {what} before", f"{name} {what} after"]
    compared = compare_runs(results, best)
    first = {task: scorer for task, scorer in reversed(tasks)}
    versus = [(a, t, s) for t, s in [x for x in tasks if first[x[0]] == x[1]] for a in (UNTRAINED, BEST)]
    versus = [v for v in versus if any(shown(c, *v) for c in compared)]
    header += [f"{f'{t} {s}' if several else s} versus {a}" for a, t, s in versus]
    rows = []
    for r, c in zip(results, compared, strict=True):
        cells = [("* " if r is best else "") + r.name, *(cell(r.swept.get(k)) for k in swept)]
        cells += [cell(r.training.get("loss")), cell(r.training.get("validation_loss"))]
        for task, scorer in tasks:
            cells += [_score(r.baseline, task, scorer), _score(r.evaluation, task, scorer)]
        rows.append([*cells, *(shown(c, *v) for v in versus), _seconds(r), r.status])
    return [*header, "seconds", "status"], rows


def headline(values: dict[str, float | None]) -> str | None:
    """The metric of a scorer that tables show: accuracy, else its first one; None where there is none."""
    return "accuracy" if "accuracy" in values else next(iter(values), None)


def headline_name(results: list[RunResult], task: str, scorer: str) -> str:
    """What `headline` is for a task's scorer, in the first result that has it."""
    found = (
        e.metrics[scorer] for r in results for e in r.evaluation + r.baseline if e.task == task and scorer in e.metrics
    )
    return next((name for name in map(headline, found) if name), "")


def _score(evaluations: list[Evaluation], task: str, scorer: str) -> str:
    for e in reversed(evaluations):  # the last epoch
        values = e.metrics.get(scorer, {}) if e.task == task else {}
        if (name := headline(values)) is not None and values[name] is not None:
            error = values.get("stderr")
            return f"{values[name]:.3f}" + (f" ± {error:.3f}" if error is not None else "")
    return ""


def _seconds(result: RunResult) -> str:
    return f"{result.seconds['total']:.1f}" if "total" in result.seconds else ""


def cell(value: Any) -> str:
    """A value as tables show it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
