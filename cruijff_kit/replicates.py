"""Runs that differ in nothing but their seed, taken together: means and intervals over seeds.

How far runs of other seeds lie from each other is one error; how far another draw of test items would move a score is
another (each run's standard error). Both are shown.
"""

import math
from dataclasses import dataclass
from typing import Any

from cruijff_kit.result import RunResult
from cruijff_kit.table_cells import number

_LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """A number over seeds: runs it is known of, mean, and the 95% interval of the mean (Student's t; None for one run).

    item_error: root mean square of the runs' standard errors over items; None where a number has none.
    """

    runs: int
    mean: float
    low: float | None
    high: float | None
    item_error: float | None = None


@dataclass(frozen=True)
class Replicates:
    """Runs of one configuration, one a seed: its name without the seed, what varies in the sweep beside it, numbers.

    metrics: "loss", "validation_loss" and TASK/SCORER/METRIC of the trained model.
    """

    name: str
    swept: dict[str, Any]
    seeds: list[int]
    runs: list[str]
    config_hashes: list[str]
    metrics: dict[str, Spread]


def replicates(results: list[RunResult]) -> list[Replicates]:
    """The configurations that were finished with two seeds or more, in the order of the results."""
    groups: dict[str, dict[int, RunResult]] = {}
    for r in results:
        if r.status == "done" and "seed" in r.swept:
            groups.setdefault(_identity(r), {})[r.swept["seed"]] = r  # of a seed that ran twice the later run
    return [_together([runs[seed] for seed in sorted(runs)]) for runs in groups.values() if len(runs) > 1]


def _identity(result: RunResult) -> str:
    settings, swept = ({k: v for k, v in d.items() if k != "seed"} for d in (result.settings, result.swept))
    return repr((result.experiment, result.model, result.data_hash, sorted(settings.items()), sorted(swept.items())))


def _together(runs: list[RunResult]) -> Replicates:
    swept = {k: v for k, v in runs[0].swept.items() if k != "seed"}
    name = ",".join(f"{k.rpartition('.')[2]}={v}" for k, v in swept.items()) or runs[0].experiment
    values: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for r in runs:
        for metric, value, error in _numbers(r):
            values.setdefault(metric, []).append(value)
            errors.setdefault(metric, []).extend([] if error is None else [error])
    metrics = {m: spread(v, errors[m]) for m, v in values.items()}
    seeds, names, hashes = zip(*((r.swept["seed"], r.name, r.config_hash) for r in runs), strict=True)
    return Replicates(name, swept, [*seeds], [*names], [*hashes], metrics)


def _numbers(result: RunResult) -> list[tuple[str, float, float | None]]:
    """Every number of a run with its standard error over items."""
    found = [(k, result.training.get(k), None) for k in ("loss", "validation_loss")]
    for e in {e.task: e for e in result.evaluation}.values():  # of several epochs the last one
        for scorer, values in e.metrics.items():
            for metric, value in values.items():
                error = values.get("stderr") if metric in ("accuracy", "mean") else None
                found.append((f"{e.task}/{scorer}/{metric}", value, error))
    return [(m, v, e) for m, v, e in found if v is not None and math.isfinite(v) and not m.endswith("/stderr")]


def spread(values: list[float], item_errors: list[float] | None = None) -> Spread:
    """Mean and t interval of values, one a seed; of a single one no interval."""
    n, mean = len(values), sum(values) / len(values)
    error = math.sqrt(sum(e * e for e in item_errors) / len(item_errors)) if item_errors else None
    if n < 2:
        return Spread(n, mean, None, None, error)
    from scipy.stats import t

    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    reach = float(t.ppf((1 + _LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)
    return Spread(n, mean, mean - reach, mean + reach, error)


def replicate_cells(groups: list[Replicates]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that people see, a row a number: losses, and of each scorer one metric."""
    metrics = list(dict.fromkeys(m for g in groups for m in g.metrics))
    scorers: dict[str, str] = {}
    for m in metrics:
        scorer, _, what = m.rpartition("/")
        task = scorer.partition("/")[0]
        earlier = any(s != scorer and s.startswith(f"{task}/") and n.endswith("/accuracy") for s, n in scorers.items())
        if scorer and (scorer not in scorers or what == ("auc" if earlier else "accuracy")):
            scorers[scorer] = m
    kept = [m for m in metrics if "/" not in m or m in scorers.values()]
    several = len({m.partition("/")[0] for m in scorers}) > 1
    header = ["over seeds", "seeds", "", "mean", "95% interval over seeds", "over items"]
    rows = []
    for g in groups:
        of_group = [(m, g.metrics[m]) for m in kept if m in g.metrics]
        for i, (metric, value) in enumerate(of_group):
            name = metric if several or "/" not in metric else metric.partition("/")[2]
            about = [g.name, ", ".join(map(str, g.seeds))] if i == 0 else ["", ""]
            rows.append([*about, name.replace("/", " ").replace("_", " "), *_cells(value)])
    return header, rows


def _cells(value: Spread) -> list[str]:
    interval = "" if value.low is None else f"[{number(value.low)}, {number(value.high)}]"
    return [number(value.mean), interval, "" if value.item_error is None else f"±{number(value.item_error)}"]
