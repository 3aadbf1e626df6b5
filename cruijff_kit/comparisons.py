"""Each run against the untrained model and against the best run, item by item, corrected for how many runs are compared.

Read from the runs' .eval logs, once: what was read is kept in the cache.
"""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from cruijff_kit.cache import cache_dir
from cruijff_kit.folder import write_text
from cruijff_kit.result import Evaluation, RunResult

if TYPE_CHECKING:
    import numpy

UNTRAINED, BEST = "untrained", "best"
RESAMPLES, SEED = 2000, 0
# Above this many items the mean is normal for all purposes, and resampling would take long.
_MANY = 10_000
_LEVEL = 0.95
# The end of an .eval file holds its table of contents with a checksum of each part: a copy has the same, an edited log not.
_TAIL = 4096


@dataclass(frozen=True)
class Comparison:
    """One run's scores of a task less those of what it is compared with, over the items that both have.

    against: "untrained" or "best". items: how many. difference: of the means. low, high: its 95% interval.
    p: of no difference, two-sided; p_holm: corrected for all runs compared alike (Holm 1979). method: the test.
    """

    run: str
    against: str
    task: str
    scorer: str
    items: int
    difference: float
    low: float
    high: float
    p: float
    method: str
    p_holm: float = math.nan


def compare_runs(results: list[RunResult], best: RunResult | None) -> list[list[Comparison]]:
    """For each result its comparisons: every scorer of every task with the untrained model, then with the best run.

    A log that is gone, or two without a common item, give none.
    """
    found = [[*_compared(r, r.baseline, UNTRAINED)] for r in results]
    if best is not None:
        for comparisons, r in zip(found, results, strict=True):
            if r is not best:
                comparisons += _compared(r, best.evaluation, BEST)
    return _corrected(found)


def _compared(result: RunResult, others: list[Evaluation], against: str) -> Iterator[Comparison]:
    last = {e.task: e for e in others}  # of several epochs the last one
    for own in {e.task: e for e in result.evaluation}.values():
        if own.task not in last:
            continue
        other = last[own.task]
        mine, theirs = items_of(own.log), items_of(other.log)
        for scorer in own.metrics:
            a, b = mine.get(scorer, {}), theirs.get(scorer, {})
            pairs = [(a[i], b[i]) for i in a if i in b]
            if pairs:
                yield Comparison(result.name, against, own.task, scorer, len(pairs), *compare_pairs(pairs))


def _corrected(found: list[list[Comparison]]) -> list[list[Comparison]]:
    families: dict[tuple[str, str, str], list[Comparison]] = {}
    for c in (c for comparisons in found for c in comparisons):
        families.setdefault((c.against, c.task, c.scorer), []).append(c)
    holm_of = {id(c): p for f in families.values() for c, p in zip(f, holm([c.p for c in f]), strict=True)}
    return [[replace(c, p_holm=holm_of[id(c)]) for c in comparisons] for comparisons in found]


def compare_pairs(pairs: list[tuple[float, float]]) -> tuple[float, float, float, float, str]:
    """Difference of the means, its 95% interval (low, high), p of no difference, and the test.

    Scores of 0 and 1: exact McNemar, with Agresti and Min's interval. Others: bootstrap over items (seeded), from 10,000
    items on the paired t-test.

    Args:
        pairs: (own score, the other's) of each item.
    """
    import numpy as np

    own, other = np.array(pairs, dtype=float).T
    if np.isin([own, other], (0, 1)).all():
        return _mcnemar(int(((own == 1) & (other == 0)).sum()), int(((own == 0) & (other == 1)).sum()), len(own))
    return (_paired_t if len(own) > _MANY else _bootstrap)(own - other)


@functools.lru_cache(maxsize=4096)
def _mcnemar(gained: int, lost: int, items: int) -> tuple[float, float, float, float, str]:
    """Exact McNemar test; interval of Agresti & Min (2005, Statistics in Medicine 24): half an item more in each cell."""
    from scipy.special import bdtr  # scipy.stats, whose binomtest does the same, takes a second to import

    p = min(1.0, 2 * bdtr(min(gained, lost), gained + lost, 0.5))
    shift, changed, total = gained - lost, gained + lost + 1, items + 2
    reach = NormalDist().inv_cdf((1 + _LEVEL) / 2) * math.sqrt(changed - shift**2 / total) / total
    low, high = max(-1.0, shift / total - reach), min(1.0, shift / total + reach)
    return shift / items, float(low), float(high), float(p), "McNemar, exact"


def _bootstrap(differences: "numpy.ndarray") -> tuple[float, float, float, float, str]:
    """Percentile interval; p: how often the mean of a resample is as far from the mean as that is from 0."""
    import numpy as np

    mean = float(differences.mean())
    drawn = _resamples(len(differences)) @ differences / len(differences)
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    far = int((np.abs(drawn - mean) >= abs(mean) - 1e-12).sum())
    return mean, float(low), float(high), (1 + far) / (1 + RESAMPLES), "bootstrap over items"


@functools.lru_cache(maxsize=1)
def _resamples(items: int) -> "numpy.ndarray":
    """[resamples, items]: how often each item is in each resample."""
    import numpy as np

    draw = np.random.default_rng(SEED)
    counts = (np.bincount(draw.integers(0, items, items), minlength=items) for _ in range(RESAMPLES))
    return np.stack([c.astype(np.float32) for c in counts])


def _paired_t(differences: "numpy.ndarray") -> tuple[float, float, float, float, str]:
    from scipy.stats import ttest_1samp

    test = ttest_1samp(differences, 0)
    low, high = test.confidence_interval(_LEVEL)
    return float(differences.mean()), float(low), float(high), float(test.pvalue), "paired t"


def holm(p: list[float]) -> list[float]:
    """Holm's step-down correction (1979), in the order of the arguments."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def items_of(log: str) -> dict[str, dict[str, float]]:
    """scorer -> sample -> score of a log (evaluation.items); empty where the log is gone or cannot be read."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            identity = hashlib.sha256(str(size).encode() + file.read()).hexdigest()[:24]
    except OSError:
        return {}
    return _items(log, identity)


@functools.lru_cache(maxsize=1024)
def _items(log: str, identity: str) -> dict[str, dict[str, float]]:
    kept = cache_dir() / "items" / f"{identity}.json"
    try:
        return json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    from cruijff_kit.evaluation.items import item_scores  # inspect-ai

    try:
        found = item_scores(log)
    except Exception:  # whatever is wrong with a file: the table says what it can without it
        return {}
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        write_text(kept, json.dumps(found))
    return found


def columns(comparisons: list[Comparison]) -> dict[str, float | int | str]:
    """Columns of results.csv: "versus AGAINST TASK/SCORER/WHAT"."""
    kept = ("difference", "low", "high", "p", "p_holm", "items")
    return {f"versus {c.against} {c.task}/{c.scorer}/{k}": getattr(c, k) for c in comparisons for k in kept}


def shown(comparisons: list[Comparison], against: str, task: str, scorer: str) -> str:
    """A cell of the table: difference [interval] corrected p."""
    for c in comparisons:
        if (c.against, c.task, c.scorer) == (against, task, scorer):
            p = "p<0.001" if c.p_holm < 0.001 else f"p={c.p_holm:.3f}"
            return f"{_signed(c.difference)} [{_signed(c.low)}, {_signed(c.high)}] {p}"
    return ""


def _signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) < 10 else f"{value:+.3g}"


def as_dicts(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """For JSON."""
    return [{k: v for k, v in vars(c).items() if k != "run"} for c in comparisons]
