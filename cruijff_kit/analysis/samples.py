"""The samples of .eval logs as arrays, for metrics, intervals and comparisons. The arrays are cached on disk.

Every sample counts, as in evaluation/metrics.py: one without an option is wrong; one without a risk or a number gets that
of the constant baseline.
"""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.measures import Samples
from cruijff_kit.util.cache import cache_dir
from cruijff_kit.util.files import write_text

if TYPE_CHECKING:
    import numpy as np

# The end of an .eval file holds its table of contents with a checksum of each part: a copy has the same, an edited log not.
_TAIL = 4096
_SAMPLE_COLUMNS = ("id", "unit", "chance", "label", "positive", "is_positive", "target", "constant")
_FORMAT = 3  # of the cached files
SampleTable = tuple[list[str], Samples]
"""Ids of the samples, and the samples in the same order."""


def load_samples(log: str, scorer: str) -> SampleTable | None:
    """Load the samples of a scorer in a log; None where the log is missing, cannot be read, or lacks the scorer."""
    columns = _load_columns(log).get(scorer)
    return (columns["id"], _make_samples(columns)) if columns else None


def load_constant_samples(log: str, scorer: str, metric: str) -> SampleTable | None:
    """Load the samples with the constant baseline's answer in place of each answer; None where there is no baseline.

    Args:
        metric: the metric that the samples are for; for an AUC it suffices that all samples have one rank.
    """
    columns = _load_columns(log).get(scorer)
    if not columns:
        return None
    if metric == "auc":
        samples = _make_samples(columns)
        return columns["id"], replace(samples, order=samples.value * 0)
    if any(c is None for c in columns.get("chance", [None])):
        return None
    sample_columns = {name: columns[name] for name in _SAMPLE_COLUMNS if name in columns}
    constants = [c or {} for c in columns.get("constant", [None] * len(columns["id"]))]
    answers = {name: [c.get(name) for c in constants] for name in ("predicted", "risk", "confidence")}
    answers = {name: values for name, values in answers.items() if None not in values}
    scores = {"value": columns["chance"], "scored": ["target" not in sample_columns] * len(constants)}
    return columns["id"], _make_samples(sample_columns | answers | scores)


def load_item_scores(log: str) -> dict[str, dict[str, float]]:
    """Load scorer -> id of the sample -> score, of the samples that have one; empty where the log is missing or cannot be
    read.
    """
    return {
        scorer: {i: v for i, v in zip(columns["id"], columns["value"], strict=True) if v is not None}
        for scorer, columns in _load_columns(log).items()
    }


def align(tables: Sequence[SampleTable | None]) -> list[Samples] | None:
    """Return the samples that all tables share, in one order; None where a table is missing or they share none."""
    present = [table for table in tables if table is not None]
    if not present or len(present) < len(tables):
        return None
    common = set(present[0][0]).intersection(*(ids for ids, _ in present[1:]))
    order = [i for i in present[0][0] if i in common]
    if not order:
        return None
    rows = []
    for ids, samples in present:
        index = {i: n for n, i in enumerate(ids)}
        rows.append(select(samples, [index[i] for i in order]))
    return rows


def select(samples: Samples, indices: Sequence[int]) -> Samples:
    """Return the samples at some indices, in the order of the indices."""
    import numpy as np

    rows = np.asarray(indices)
    arrays = {f.name: getattr(samples, f.name) for f in fields(samples)}
    arrays = {name: values if values is None else values[rows] for name, values in arrays.items()}
    if arrays["unit"] is not None:
        arrays["unit"] = np.unique(arrays["unit"], return_inverse=True)[1]
    return Samples(**arrays)


def load_or_compute(log: str, key: str, compute: Callable[[], Any]) -> Any:
    """Return a JSON value that is computed from a log, from the cache if it has the log and the key."""
    identity = _hash_log(log)
    if identity is None:
        return compute()
    path = cache_dir() / "intervals" / f"{identity}.json"
    values = _read_json(path)
    if key not in values:
        values[key] = compute()
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            write_text(path, json.dumps(values))
    return values[key]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _hash_log(log: str) -> str | None:
    """Return a hash of a log; None where the file is missing."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            return hashlib.sha256(f"{_FORMAT} {size} ".encode() + file.read()).hexdigest()[:24]
    except OSError:
        return None


def _load_columns(log: str) -> dict[str, dict[str, list[Any]]]:
    identity = _hash_log(log)
    return _read_columns(log, identity) if identity else {}


@functools.lru_cache(maxsize=1024)
def _read_columns(log: str, identity: str) -> dict[str, dict[str, list[Any]]]:
    """Return scorer -> column -> its values, one for each sample."""
    path = cache_dir() / "items" / f"{identity}.json"
    if scorers := _read_json(path):
        return scorers
    from cruijff_kit.evaluation.eval_logs import read_scored_samples  # inspect-ai

    try:
        scorers = {scorer: _sort_by_id(columns) for scorer, columns in read_scored_samples(log).items()}
    except Exception:  # whatever is wrong with a file: the table shows what it can without it
        return {}
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        write_text(path, json.dumps(scorers))
    return scorers


def _sort_by_id(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Sort the samples, so that resampling, which draws by index, does not depend on the order of the answers."""
    order = sorted(range(len(columns["id"])), key=columns["id"].__getitem__)
    return {name: [values[i] for i in order] for name, values in columns.items()}


def _make_samples(columns: dict[str, list[Any]]) -> Samples:
    import numpy as np

    n = len(columns["id"])
    scored = np.array([s is not False for s in columns.get("scored", [True] * n)])
    chance = _numbers(columns.get("chance"))
    value = np.array([0.0 if v is None else float(v) for v in columns["value"]])
    arrays: dict[str, Any] = {"chance": chance}
    if "target" in columns:
        arrays |= _make_number_arrays(columns, scored)
        value = np.where(scored, value, abs(arrays["prediction"] - arrays["target"]))
    elif "label" in columns or "is_positive" in columns:
        arrays |= _make_option_arrays(columns, scored)
    if all(u is not None for u in columns.get("unit", [None])):
        arrays["unit"] = np.unique(columns["unit"], return_inverse=True)[1]
    return Samples(value=value, **arrays)


def _numbers(values: list[Any] | None) -> "np.ndarray | None":
    import numpy as np

    return None if values is None or any(v is None for v in values) else np.array(values, dtype=float)


def _constants(columns: dict[str, list[Any]], name: str, scored: "np.ndarray") -> "np.ndarray | None":
    """Return [n] the constant baseline's values; None where a sample without a score lacks one."""
    import numpy as np

    values = [(c or {}).get(name) for c in columns.get("constant", [None] * len(scored))]
    if any(v is None for v, is_scored in zip(values, scored, strict=True) if not is_scored):
        return None
    return np.array([math.nan if v is None else v for v in values], dtype=float)


def _fill(
    columns: dict[str, list[Any]], name: str, constant: "np.ndarray | None", scored: "np.ndarray"
) -> "np.ndarray | None":
    """Return [n] a column with the constant's value for the samples without a score; None where that is unknown."""
    import numpy as np

    if name not in columns or constant is None:
        return None
    values = np.array([math.nan if v is None else float(v) for v in columns[name]])
    values = np.where(scored, values, constant)
    return None if np.isnan(values).any() else values


def _make_number_arrays(columns: dict[str, list[Any]], scored: "np.ndarray") -> dict[str, "np.ndarray | None"]:
    import numpy as np

    target = np.array(columns["target"], dtype=float)
    columns = {"prediction": [None] * len(target)} | columns
    defaults = {"median": float(np.median(target)), "mean": float(target.mean())}
    arrays: dict[str, np.ndarray | None] = {"target": target}
    for name, field in (("median", "prediction"), ("mean", "prediction_for_squares")):
        constant = _constants(columns, name, scored)
        constant = np.full(len(target), defaults[name]) if constant is None else constant
        arrays[field] = _fill(columns, "prediction", constant, scored)
    return arrays


def _make_option_arrays(columns: dict[str, list[Any]], scored: "np.ndarray") -> dict[str, "np.ndarray | None"]:
    import numpy as np

    n = len(scored)
    arrays: dict[str, np.ndarray | None]
    if "label" not in columns:  # red data: labels and predictions are withheld
        confirmed = np.array([float(v or 0) for v in columns["value"]])
        arrays = {"positive": np.array(columns["is_positive"], dtype=float)}
    else:
        labels, positive_options = columns["label"], columns["positive"]
        predictions = columns.get("predicted", [None] * n)
        negatives = {*labels, *(p for p in predictions if p is not None)} - {*positive_options}
        number = {text: i for i, text in enumerate(sorted(negatives) + sorted({*positive_options}))}
        constant = [(c or {}).get("predicted") for c in columns.get("constant", [None] * n)]
        answers = [p if ok else c for p, c, ok in zip(predictions, constant, scored, strict=True)]
        confirmed = np.array([float(a == text) for a, text in zip(answers, labels, strict=True)])
        arrays = {
            "label": np.array([number[text] for text in labels]),
            "predicted": np.array([
                number[p] if p is not None and ok else -1 for p, ok in zip(predictions, scored, strict=True)
            ]),
            "positive": np.array([float(a == b) for a, b in zip(labels, positive_options, strict=True)]),
            "predicted_positive": np.array([
                int(p == b and ok) for p, b, ok in zip(predictions, positive_options, scored, strict=True)
            ]),
        }  # fmt: skip
    risk = _fill(columns, "risk", _constants(columns, "risk", scored), scored)
    if risk is None:
        return arrays
    confidence = _fill(columns, "confidence", _constants(columns, "confidence", scored), scored)
    arrays |= {"risk": risk, "order": _rank_order(columns, risk, scored), "confidence": confidence}
    return arrays | {"confirmed": None if confidence is None else confirmed}


def _rank_order(columns: dict[str, list[Any]], risk: "np.ndarray", scored: "np.ndarray") -> "np.ndarray":
    """Return [n] the numbers that rank the samples: log-odds where all samples with a score have them, since risks near 0
    and 1 round to ties; otherwise the risks.
    """
    import numpy as np

    odds = columns.get("log_odds", [None] * len(risk))
    if any(o is None for o, ok in zip(odds, scored, strict=True) if ok):
        return risk
    with np.errstate(divide="ignore"):
        computed_odds = np.log(risk) - np.log1p(-risk)
    return np.where(scored, np.array([0.0 if o is None else o for o in odds], dtype=float), computed_odds)
