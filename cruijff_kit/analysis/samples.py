"""The samples of .eval logs as arrays, for metrics, intervals and comparisons. What was read is kept in the cache.

Every sample counts, as in evaluation/metrics.py: one without an option is wrong; one without a risk or a number counts as
the constant baseline does.
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
_OF_THE_SAMPLE = ("id", "unit", "chance", "label", "positive", "is_positive", "target", "constant")
_FORMAT = 3  # of what is kept


def load_samples(log: str, scorer: str) -> tuple[list[str], Samples] | None:
    """Ids and samples of a scorer in a log; None where the log is gone, cannot be read, or has no such scorer."""
    columns = _load_columns(log).get(scorer)
    return (columns["id"], _make_samples(columns)) if columns else None


def load_constant_samples(log: str, scorer: str, metric: str) -> tuple[list[str], Samples] | None:
    """As `load_samples`, as if every answer were the constant baseline's; None where there is none.

    Args:
        metric: what is to be computed; an AUC needs no more than that nothing stands above anything.
    """
    columns = _load_columns(log).get(scorer, {})
    if metric == "auc" and columns:
        ids, own = load_samples(log, scorer)
        return ids, replace(own, order=own.value * 0)
    if any(c is None for c in columns.get("chance", [None])):
        return None
    same = {name: columns[name] for name in _OF_THE_SAMPLE if name in columns}
    said = [c or {} for c in columns.get("constant", [None] * len(columns["id"]))]
    made = {name: [c.get(name) for c in said] for name in ("predicted", "risk", "confidence")}
    made = {name: values for name, values in made.items() if None not in values}
    return columns["id"], _make_samples(
        same | made | {"value": columns["chance"], "scored": ["target" not in same] * len(said)}
    )


def item_scores(log: str) -> dict[str, dict[str, float]]:
    """scorer -> id of the sample -> its score, of those that were scored; empty where the log is gone or cannot be read."""
    return {
        scorer: {i: v for i, v in zip(columns["id"], columns["value"], strict=True) if v is not None}
        for scorer, columns in _load_columns(log).items()
    }


def align(found: Sequence[tuple[list[str], Samples] | None]) -> list[Samples] | None:
    """The samples that all have, in one order; None where one has none, or they have none in common."""
    if not found or any(f is None for f in found):
        return None
    common = set(found[0][0]).intersection(*(ids for ids, _ in found[1:]))
    order = [i for i in found[0][0] if i in common]
    if not order:
        return None
    rows = []
    for ids, samples in found:
        place = {i: n for n, i in enumerate(ids)}
        rows.append(select(samples, [place[i] for i in order]))
    return rows


def select(samples: Samples, places: Sequence[int]) -> Samples:
    """Some of the samples."""
    import numpy as np

    at = np.asarray(places)
    chosen = {f.name: getattr(samples, f.name) for f in fields(samples)}
    chosen = {name: values if values is None else values[at] for name, values in chosen.items()}
    if chosen["unit"] is not None:
        chosen["unit"] = np.unique(chosen["unit"], return_inverse=True)[1]
    return Samples(**chosen)


def cached(log: str, key: str, compute: Callable[[], Any]) -> Any:
    """What was computed from a log under this key, from the cache where it was before: a JSON value."""
    identity = _identity(log)
    if identity is None:
        return compute()
    kept = cache_dir() / "intervals" / f"{identity}.json"
    known = _read_json(kept)
    if key not in known:
        known[key] = compute()
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            write_text(kept, json.dumps(known))
    return known[key]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _identity(log: str) -> str | None:
    """A hash of a log; None where it is gone."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            return hashlib.sha256(f"{_FORMAT} {size} ".encode() + file.read()).hexdigest()[:24]
    except OSError:
        return None


def _load_columns(log: str) -> dict[str, dict[str, list[Any]]]:
    identity = _identity(log)
    return _read(log, identity) if identity else {}


@functools.lru_cache(maxsize=1024)
def _read(log: str, identity: str) -> dict[str, dict[str, list[Any]]]:
    kept = cache_dir() / "items" / f"{identity}.json"
    if known := _read_json(kept):
        return known
    from cruijff_kit.evaluation.eval_logs import read_scored_samples  # inspect-ai

    try:
        found = {scorer: _sort_by_id(columns) for scorer, columns in read_scored_samples(log).items()}
    except Exception:  # whatever is wrong with a file: the table says what it can without it
        return {}
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        write_text(kept, json.dumps(found))
    return found


def _sort_by_id(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """In one order, whichever one the samples were answered in: resampling draws by place."""
    order = sorted(range(len(columns["id"])), key=columns["id"].__getitem__)
    return {name: [values[i] for i in order] for name, values in columns.items()}


def _make_samples(columns: dict[str, list[Any]]) -> Samples:
    import numpy as np

    n = len(columns["id"])
    scored = np.array([s is not False for s in columns.get("scored", [True] * n)])
    chance = _numbers(columns.get("chance"))
    value = np.array([0.0 if v is None else float(v) for v in columns["value"]])
    made: dict[str, Any] = {"chance": chance}
    if "target" in columns:
        made |= _number_arrays(columns, scored)
        value = np.where(scored, value, abs(made["prediction"] - made["target"]))
    elif "label" in columns or "is_positive" in columns:
        made |= _option_arrays(columns, scored)
    if all(u is not None for u in columns.get("unit", [None])):
        made["unit"] = np.unique(columns["unit"], return_inverse=True)[1]
    return Samples(value=value, **made)


def _numbers(values: list[Any] | None) -> "np.ndarray | None":
    import numpy as np

    return None if values is None or any(v is None for v in values) else np.array(values, dtype=float)


def _constants(columns: dict[str, list[Any]], name: str, scored: "np.ndarray") -> "np.ndarray | None":
    """[n] what the constant baseline says of each sample; None where a sample that was not scored has none."""
    import numpy as np

    said = [(c or {}).get(name) for c in columns.get("constant", [None] * len(scored))]
    if any(v is None for v, is_scored in zip(said, scored, strict=True) if not is_scored):
        return None
    return np.array([math.nan if v is None else v for v in said], dtype=float)


def _fill(columns: dict[str, list[Any]], name: str, constant: "np.ndarray | None", scored: "np.ndarray") -> Any:
    """[n] a column with the constant's value where a sample was not scored; None where that is not known."""
    import numpy as np

    if name not in columns or constant is None:
        return None
    own = np.array([math.nan if v is None else float(v) for v in columns[name]])
    filled = np.where(scored, own, constant)
    return None if np.isnan(filled).any() else filled


def _number_arrays(columns: dict[str, list[Any]], scored: "np.ndarray") -> dict[str, "np.ndarray | None"]:
    import numpy as np

    target = np.array(columns["target"], dtype=float)
    columns = {"prediction": [None] * len(target)} | columns
    own = {"median": float(np.median(target)), "mean": float(target.mean())}
    filled = {}
    for name, where in (("median", "prediction"), ("mean", "prediction_for_squares")):
        constant = _constants(columns, name, scored)
        constant = np.full(len(target), own[name]) if constant is None else constant
        filled[where] = _fill(columns, "prediction", constant, scored)
    return {"target": target, **filled}


def _option_arrays(columns: dict[str, list[Any]], scored: "np.ndarray") -> dict[str, "np.ndarray | None"]:
    import numpy as np

    n = len(scored)
    if "label" not in columns:  # red data: what was the label and what was predicted is withheld
        positive = np.array(columns["is_positive"], dtype=float)
        confirmed = np.array([float(v or 0) for v in columns["value"]])
        made: dict[str, Any] = {"positive": positive}
    else:
        labels, last = columns["label"], columns["positive"]
        said = columns.get("predicted", [None] * n)
        known = sorted({*labels, *(s for s in said if s is not None)} - {*last}) + sorted({*last})
        number = {text: i for i, text in enumerate(known)}
        label = np.array([number[text] for text in labels])
        predicted = np.array([number[s] if s is not None and ok else -1 for s, ok in zip(said, scored, strict=True)])
        positive = np.array([float(a == b) for a, b in zip(labels, last, strict=True)])
        written = np.array([int(s == b and ok) for s, b, ok in zip(said, last, scored, strict=True)])
        constant = [(c or {}).get("predicted") for c in columns.get("constant", [None] * n)]
        filled = [s if ok else c for s, c, ok in zip(said, constant, scored, strict=True)]
        confirmed = np.array([float(f == text) for f, text in zip(filled, labels, strict=True)])
        made = {"label": label, "predicted": predicted, "positive": positive, "predicted_positive": written}
    risk = _fill(columns, "risk", _constants(columns, "risk", scored), scored)
    if risk is None:
        return made
    confidence = _fill(columns, "confidence", _constants(columns, "confidence", scored), scored)
    made |= {"risk": risk, "order": _order(columns, risk, scored), "confidence": confidence}
    return made | {"confirmed": None if confidence is None else confirmed}


def _order(columns: dict[str, list[Any]], risk: "np.ndarray", scored: "np.ndarray") -> "np.ndarray":
    """What ranks the samples: log-odds where all that were scored have them, since risks near 0 and 1 round to ties."""
    import numpy as np

    odds = columns.get("log_odds", [None] * len(risk))
    if any(o is None for o, ok in zip(odds, scored, strict=True) if ok):
        return risk
    with np.errstate(divide="ignore"):
        otherwise = np.log(risk) - np.log1p(-risk)
    return np.where(scored, np.array([0.0 if o is None else o for o in odds], dtype=float), otherwise)
