"""What each sample of an .eval log was worth, for comparisons item by item. Called by analysis and report."""

import math
from typing import Any

from inspect_ai.log import EvalSampleSummary, read_eval_log, read_eval_log_sample, read_eval_log_sample_summaries
from inspect_ai.scorer import Score, value_to_float

from cruijff_kit.evaluation.generate_config import temperature
from cruijff_kit.util import redaction

_COLUMNS = {"scored", "chance", "label", "positive", "is_positive", "predicted", "risk", "log_odds", "confidence", "target",
            "prediction", "constant"}  # fmt: skip


def summaries(log: str) -> list[EvalSampleSummary]:
    """Every sample of a log without its messages: id, target, metadata, scores."""
    return read_eval_log_sample_summaries(log)


def scored_samples(log: str) -> dict[str, dict[str, Any]]:
    """scorer -> what it says of every sample, as columns of one length, for `analysis.samples`.

    Always "id" (texts) and "value": correct is 1, incorrect 0, partly correct 0.5, numbers are themselves; null where the
    sample was not scored. Of scorers of ours also what any sample's score says of itself (`_COLUMNS`). "unit", where the
    log names a column of units. Of a sample that was asked several times there is the mean value alone. Scores that are
    lists or dicts have no one number: their scorer is left out.
    """
    unit = (read_eval_log(log, header_only=True).eval.metadata or {}).get("unit_column")
    found: dict[str, list[dict[str, Any]]] = {}
    for sample in summaries(log):
        for scorer, score in (sample.scores or {}).items():
            value = _value(score)
            if value is None and (score.metadata or {}).get("scored") is not False:
                continue
            row = {k: v for k, v in (score.metadata or {}).items() if k in _COLUMNS}
            row |= {"id": str(sample.id), "value": value}
            if unit is not None and (sample.metadata or {}).get(unit) is not None:
                row["unit"] = str(sample.metadata[unit])
            found.setdefault(scorer, []).append(row)
    return {scorer: _as_columns(_one_row_a_sample(rows)) for scorer, rows in found.items()}


def _one_row_a_sample(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_id.setdefault(row["id"], []).append(row)
    return [own[0] if len(own) == 1 else _mean_of(own) for own in by_id.values()]


def _mean_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    values = [row["value"] or 0.0 for row in rows]
    return {k: rows[0][k] for k in ("id", "unit", "chance") if k in rows[0]} | {"value": sum(values) / len(values)}


def _as_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


_to_float = value_to_float()


def _value(score: Score) -> float | None:
    value: Any = score.value
    if not isinstance(value, str | int | float) or (score.metadata or {}).get("scored") is False:
        return None
    number = _to_float(value)
    return number if math.isfinite(number) else None


def decoding_of(log: str) -> dict[str, float | int | None]:
    """How a log's answers were decoded: temperature (0: greedy), top_p, top_k, seed and max_tokens, None where not set.

    Of the task and the command; what a solver of the task's own asks for at a single sample is not in it.
    """
    config = read_eval_log(log, header_only=True).plan.config
    same = {name: getattr(config, name) for name in ("top_p", "top_k", "seed", "max_tokens")}
    return {"temperature": temperature(config), **same}


def groups_named(log: str) -> list[str]:
    """Keys of the samples' metadata that can name groups: those with fewer values than samples, in order of appearance; of
    red data those that may be told.
    """
    told = told_groups(log)
    values: dict[str, set[str]] = {}
    samples = summaries(log)
    for sample in samples:
        for key, value in (sample.metadata or {}).items():
            values.setdefault(key, set()).add(str(value))
    named = [key for key, found in values.items() if 1 < len(found) <= len(samples) / 2]
    return [key for key in named if told is None or key in told]


def told_groups(log: str) -> list[str] | None:
    """Of a log of red data the columns that may name groups; None: any may."""
    said = read_eval_log(log, header_only=True).eval.metadata or {}
    if said.get("tier") != "red":
        return None
    redaction.enable()
    return [column for column in said.get("group_columns", "").split(",") if column]


def unit_column(log: str) -> str | None:
    """The column that says which samples belong together (dataset.unit_column), as a log knows it."""
    return (read_eval_log(log, header_only=True).eval.metadata or {}).get("unit_column")


def group_rows(log: str, columns: list[str], unit: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """column -> the scored samples whose metadata have it, as arguments of analysis.subgroups.Row.

    Of the first scorer that gives risks, else the first one; what it does not give is None.

    Args:
        unit: key of the metadata that says which samples belong together (respondent, household).
    """
    samples = summaries(log)
    scorers = dict.fromkeys(name for s in samples for name in s.scores or {})
    risky = (n for n in scorers for s in samples if n in (s.scores or {}) and "risk" in (s.scores[n].metadata or {}))
    scorer = next(risky, next(iter(scorers), None))
    found = [(s.metadata or {}, row) for s in samples if (row := _group_row((s.scores or {}).get(scorer), s.id))]
    positive = [row["positive"] for _, row in found if row["positive"] is not None]
    has_risks = any(row["risk"] is not None for _, row in found)
    rows: dict[str, list[dict[str, Any]]] = {column: [] for column in columns}
    for said, row in found:
        row["unit"] = None if said.get(unit) is None else str(said[unit])
        if not row.pop("scored") and row["risk"] is None and has_risks:
            row["risk"] = sum(positive) / len(positive)
        for column in columns:
            if said.get(column) is not None:
                rows[column].append({"group": str(said[column]), **row})
    return rows


def _group_row(score: Score | None, sample: int | str) -> dict[str, Any] | None:
    """correct, positive, risk, predicted and order of a sample; None where it has no score.

    Without an option, where the label is known, it is wrong, and has the risk that the constant baseline has: that of the
    training split, or (see `group_rows`) the share of positive labels.
    """
    if score is None:
        return None
    said, correct = score.metadata or {}, _value(score)
    has_options = "label" in said and "positive" in said
    if said.get("scored") is False and (has_options or "is_positive" in said):
        correct, said = 0.0, {"predicted": None, "risk": (said.get("constant") or {}).get("risk"), **said}
    if correct is None:
        return None
    positive = said.get("is_positive", said["label"] == said["positive"] if has_options else None)
    predicted = said["predicted"] == said["positive"] if has_options and "predicted" in said else None
    return {
        "sample": str(sample), "correct": correct, "positive": positive, "risk": said.get("risk"), "predicted": predicted,
        "order": said.get("log_odds"), "scored": said.get("scored") is not False,
    }  # fmt: skip


def risks(log: str) -> dict[str, list[tuple[bool, float]]]:
    """scorer -> (whether the label is the last option, risk = P(last option)) of each sample that it scored with a risk."""
    found: dict[str, list[tuple[bool, float]]] = {}
    for sample in summaries(log):
        for scorer, score in (sample.scores or {}).items():
            kept = score.metadata or {}
            if kept.get("scored") and kept.get("risk") is not None:
                # a log of red data says no more of the label
                is_positive = kept["is_positive"] if "is_positive" in kept else kept["label"] == kept["positive"]
                found.setdefault(scorer, []).append((is_positive, float(kept["risk"])))
    return found


def asked_and_answered(log: str, each: int) -> list[dict[str, str | bool | None]]:
    """Some samples of a log in full: those that its first scorer found right, then those that it found wrong.

    Where scores are numbers (a distance from the target) right is None, and the smallest scores come first. Keys: right,
    prompt (all that was sent), target, answer, score.

    Args:
        each: how many right ones and how many wrong ones, spread over the log.
    """
    scored = [
        (s, value) for s in summaries(log) if s.scores and (value := _value(next(iter(s.scores.values())))) is not None
    ]
    if all(value in (0, 0.5, 1) for _, value in scored):
        kinds = [(right, [s for s, value in scored if (value == 1) == right]) for right in (True, False)]
        chosen = [(right, s) for right, found in kinds for s in _spread(found, each)]
    else:
        ordered = [s for s, _ in sorted(scored, key=lambda pair: pair[1])]
        chosen = [(None, s) for s in _spread(ordered, 2 * each)]
    return [{"right": right, **_in_full(log, s)} for right, s in chosen]


def _spread(found: list[EvalSampleSummary], number: int) -> list[EvalSampleSummary]:
    """The first, the last, and some between at equal distances."""
    if len(found) <= number:
        return found
    return [found[round(i * (len(found) - 1) / max(1, number - 1))] for i in range(number)]


def _in_full(log: str, summary: EvalSampleSummary) -> dict[str, str]:
    sample = read_eval_log_sample(log, id=summary.id, epoch=summary.epoch)
    sent = [m for m in sample.messages if m.role != "assistant"]
    prompt = "\n\n".join(m.text if m.role == "user" else f"[{m.role}] {m.text}" for m in sent)
    target = sample.target if isinstance(sample.target, str) else "\n".join(sample.target)
    scores = [f"{name}: {_in_words(score)}" for name, score in (sample.scores or {}).items()]
    return {"prompt": prompt, "target": target, "answer": sample.output.completion, "score": ", ".join(scores)}


def _in_words(score: Score) -> str:
    risk = (score.metadata or {}).get("risk")
    value = {"C": "right", "I": "wrong", "N": "no answer", "P": "partly right"}.get(str(score.value), score.value)
    value = f"{value:.4g}" if isinstance(value, float) else str(value)
    return value if risk is None else f"{value}, risk {risk:.3f}"
