"""What each sample of an .eval log was worth, for comparisons item by item. Called by comparisons and heterogeneity."""

import math
from typing import Any

from inspect_ai.log import EvalSampleSummary, read_eval_log, read_eval_log_sample_summaries
from inspect_ai.scorer import Score, value_to_float

from cruijff_kit import withheld


def summaries(log: str) -> list[EvalSampleSummary]:
    """Every sample of a log without its messages: id, target, metadata, scores."""
    return read_eval_log_sample_summaries(log)


def item_scores(log: str) -> dict[str, dict[str, float]]:
    """scorer -> id of the sample -> its score; samples that were not scored are left out.

    Correct is 1, incorrect or no answer 0, partly correct 0.5; numbers are themselves; of a sample that was asked several
    times the mean. Scores that are lists or dicts have no one number: their scorer is left out.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for sample in summaries(log):
        for scorer, score in (sample.scores or {}).items():
            value = _value(score)
            if value is not None:
                found.setdefault(scorer, {}).setdefault(str(sample.id), []).append(value)
    return {s: {i: sum(v) / len(v) for i, v in items.items()} for s, items in found.items()}


_to_float = value_to_float()


def _value(score: Score) -> float | None:
    value: Any = score.value
    if not isinstance(value, str | int | float) or (score.metadata or {}).get("scored") is False:
        return None
    number = _to_float(value)
    return number if math.isfinite(number) else None


def groups_named(log: str) -> list[str]:
    """Keys of the samples' metadata that can name groups: those with fewer values than samples, in order of appearance."""
    values: dict[str, set[str]] = {}
    samples = summaries(log)
    for sample in samples:
        for key, value in (sample.metadata or {}).items():
            values.setdefault(key, set()).add(str(value))
    return [key for key, found in values.items() if 1 < len(found) <= len(samples) / 2]


def told_groups(log: str) -> list[str] | None:
    """Of a log of red data the columns that may name groups; None: any may."""
    said = read_eval_log(log, header_only=True).eval.metadata or {}
    if said.get("tier") != "red":
        return None
    withheld.begin()
    return [column for column in said.get("group_columns", "").split(",") if column]


def group_rows(log: str, group: str) -> list[dict[str, Any]]:
    """The scored samples of a log whose metadata name a group.

    Of the first scorer that gives risks, else the first one. Keys: group; correct, the score; positive (whether the label
    is the last option) and risk = P(last option), None where the scorer gives none.
    """
    samples = summaries(log)
    scorers = dict.fromkeys(name for s in samples for name in s.scores or {})
    risky = (n for n in scorers for s in samples if n in (s.scores or {}) and "risk" in (s.scores[n].metadata or {}))
    scorer = next(risky, next(iter(scorers), None))
    rows = []
    for sample in samples:
        score = (sample.scores or {}).get(scorer)
        name = (sample.metadata or {}).get(group)
        if score is None or name is None or (correct := _value(score)) is None:
            continue
        kept = score.metadata or {}
        positive = kept.get("is_positive", kept.get("label") == kept.get("positive")) if "risk" in kept else None
        rows.append({"group": str(name), "correct": correct, "positive": positive, "risk": kept.get("risk")})
    return rows
