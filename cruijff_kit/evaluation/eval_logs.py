"""Reads .eval logs: each sample's scores, for comparisons sample by sample, and some samples in full."""

import math
from typing import Any

from inspect_ai.log import EvalSampleSummary, read_eval_log, read_eval_log_sample, read_eval_log_sample_summaries
from inspect_ai.scorer import Score, value_to_float

from cruijff_kit.evaluation.generate_config import temperature
from cruijff_kit.util import redaction

_COLUMNS = {"scored", "chance", "label", "positive", "is_positive", "predicted", "risk", "log_odds", "confidence", "target",
            "prediction", "constant"}  # fmt: skip


def read_summaries(log: str) -> list[EvalSampleSummary]:
    """Read every sample of a log without its messages: id, target, metadata, scores."""
    return read_eval_log_sample_summaries(log)


def read_scored_samples(log: str) -> dict[str, dict[str, Any]]:
    """Read each scorer's scores of all samples, as columns of one length, for `analysis.samples`.

    Always "id" (texts) and "value": correct is 1, incorrect 0, partly correct 0.5, numbers are themselves; null where the
    sample was not scored. Our own scorers add columns of their metadata (`_COLUMNS`). "unit", where the log names a column
    of units. A sample with several epochs has only its mean value. Scorers whose scores are lists or dicts are
    left out.

    Returns:
        Scorer -> column -> values.
    """
    unit = (read_eval_log(log, header_only=True).eval.metadata or {}).get("unit_column")
    rows_by_scorer: dict[str, list[dict[str, Any]]] = {}
    for sample in read_summaries(log):
        for scorer, score in (sample.scores or {}).items():
            value = _value(score)
            if value is None and (score.metadata or {}).get("scored") is not False:
                continue
            row = {k: v for k, v in (score.metadata or {}).items() if k in _COLUMNS}
            row |= {"id": str(sample.id), "value": value}
            if unit is not None and (sample.metadata or {}).get(unit) is not None:
                row["unit"] = str(sample.metadata[unit])
            rows_by_scorer.setdefault(scorer, []).append(row)
    return {scorer: _to_columns(_merge_repeats(rows)) for scorer, rows in rows_by_scorer.items()}


def _merge_repeats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_id.setdefault(row["id"], []).append(row)
    return [own[0] if len(own) == 1 else _average(own) for own in by_id.values()]


def _average(rows: list[dict[str, Any]]) -> dict[str, Any]:
    values = [row["value"] or 0.0 for row in rows]
    return {k: rows[0][k] for k in ("id", "unit", "chance") if k in rows[0]} | {"value": sum(values) / len(values)}


def _to_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


_to_float = value_to_float()


def _value(score: Score) -> float | None:
    value: Any = score.value
    if not isinstance(value, str | int | float) or (score.metadata or {}).get("scored") is False:
        return None
    number = _to_float(value)
    return number if math.isfinite(number) else None


def read_decoding(log: str) -> dict[str, float | int | None]:
    """Read how a log's answers were decoded: temperature (0: greedy), top_p, top_k, seed, max_tokens; None where not set.

    These are the settings of task and command; what a solver sets for a single sample is not among them.
    """
    config = read_eval_log(log, header_only=True).plan.config
    options = {name: getattr(config, name) for name in ("top_p", "top_k", "seed", "max_tokens")}
    return {"temperature": temperature(config), **options}


def list_group_columns(log: str) -> list[str]:
    """List the keys of the samples' metadata that can name groups: those with fewer values than samples, in order of
    appearance; of red data only those that may be reported.
    """
    reported = reported_groups(log)
    values: dict[str, set[str]] = {}
    samples = read_summaries(log)
    for sample in samples:
        for key, value in (sample.metadata or {}).items():
            values.setdefault(key, set()).add(str(value))
    columns = [key for key, own in values.items() if 1 < len(own) <= len(samples) / 2]
    return [key for key in columns if reported is None or key in reported]


def reported_groups(log: str) -> list[str] | None:
    """Columns of a log of red data that may name groups; None: any may."""
    metadata = read_eval_log(log, header_only=True).eval.metadata or {}
    if metadata.get("tier") != "red":
        return None
    redaction.enable()
    return [column for column in metadata.get("group_columns", "").split(",") if column]


def unit_column(log: str) -> str | None:
    """Return the column of the units of samples (dataset.unit_column) from a log."""
    return (read_eval_log(log, header_only=True).eval.metadata or {}).get("unit_column")


def read_group_rows(log: str, columns: list[str], unit: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """Read the scored samples of each group column, as arguments of analysis.subgroups.Row.

    Scores are those of the first scorer that gives risks, else of the first one; what it does not give is None.

    Args:
        unit: key of the metadata that says which samples belong together (respondent, household).
    Returns:
        Column -> the samples whose metadata have it.
    """
    samples = read_summaries(log)
    scorers = dict.fromkeys(name for s in samples for name in s.scores or {})
    risky = (n for n in scorers for s in samples if n in (s.scores or {}) and "risk" in (s.scores[n].metadata or {}))
    scorer = next(risky, next(iter(scorers), None))
    scored = [(s.metadata or {}, row) for s in samples if (row := _group_row((s.scores or {}).get(scorer), s.id))]
    positive = [row["positive"] for _, row in scored if row["positive"] is not None]
    has_risks = any(row["risk"] is not None for _, row in scored)
    rows: dict[str, list[dict[str, Any]]] = {column: [] for column in columns}
    for metadata, row in scored:
        row["unit"] = None if metadata.get(unit) is None else str(metadata[unit])
        if not row.pop("scored") and row["risk"] is None and has_risks:
            row["risk"] = sum(positive) / len(positive)
        for column in columns:
            if metadata.get(column) is not None:
                rows[column].append({"group": str(metadata[column]), **row})
    return rows


def _group_row(score: Score | None, sample: int | str) -> dict[str, Any] | None:
    """Return correct, positive, risk, predicted and order of a sample; None where it has no score.

    An answer without an option is wrong where the label is known, and has the risk of the constant baseline: that of the
    training split, or (see `read_group_rows`) the share of positive labels.
    """
    if score is None:
        return None
    own, correct = score.metadata or {}, _value(score)
    has_options = "label" in own and "positive" in own
    if own.get("scored") is False and (has_options or "is_positive" in own):
        correct, own = 0.0, {"predicted": None, "risk": (own.get("constant") or {}).get("risk"), **own}
    if correct is None:
        return None
    positive = own.get("is_positive", own["label"] == own["positive"] if has_options else None)
    predicted = own["predicted"] == own["positive"] if has_options and "predicted" in own else None
    return {
        "sample": str(sample), "correct": correct, "positive": positive, "risk": own.get("risk"), "predicted": predicted,
        "order": own.get("log_odds"), "scored": own.get("scored") is not False,
    }  # fmt: skip


def risks(log: str) -> dict[str, list[tuple[bool, float]]]:
    """Read scorer -> (whether the label is the last option, risk = P(last option)) of each sample that has a risk."""
    pairs: dict[str, list[tuple[bool, float]]] = {}
    for sample in read_summaries(log):
        for scorer, score in (sample.scores or {}).items():
            own = score.metadata or {}
            if own.get("scored") and own.get("risk") is not None:
                # a log of red data has no more of the label
                is_positive = own["is_positive"] if "is_positive" in own else own["label"] == own["positive"]
                pairs.setdefault(scorer, []).append((is_positive, float(own["risk"])))
    return pairs


def read_prompts_and_completions(log: str, each: int) -> list[dict[str, str | bool | None]]:
    """Read some samples of a log in full: those that its first scorer found right, then those that it found wrong.

    Where scores are numbers (a distance from the target) right is None, and the smallest scores come first. Keys: right,
    prompt (all that was sent), target, answer, score.

    Args:
        each: how many right ones and how many wrong ones, spread over the log.
    """
    scored = [
        (s, value)
        for s in read_summaries(log)
        if s.scores and (value := _value(next(iter(s.scores.values())))) is not None
    ]
    if all(value in (0, 0.5, 1) for _, value in scored):
        kinds = [(right, [s for s, value in scored if (value == 1) == right]) for right in (True, False)]
        samples = [(right, s) for right, own in kinds for s in _pick_evenly(own, each)]
    else:
        ordered = [s for s, _ in sorted(scored, key=lambda pair: pair[1])]
        samples = [(None, s) for s in _pick_evenly(ordered, 2 * each)]
    return [{"right": right, **_read_in_full(log, s)} for right, s in samples]


def _pick_evenly(samples: list[EvalSampleSummary], number: int) -> list[EvalSampleSummary]:
    """Pick the first, the last, and some between at equal distances."""
    if len(samples) <= number:
        return samples
    return [samples[round(i * (len(samples) - 1) / max(1, number - 1))] for i in range(number)]


def _read_in_full(log: str, summary: EvalSampleSummary) -> dict[str, str]:
    sample = read_eval_log_sample(log, id=summary.id, epoch=summary.epoch)
    messages = [m for m in sample.messages if m.role != "assistant"]
    prompt = "\n\n".join(m.text if m.role == "user" else f"[{m.role}] {m.text}" for m in messages)
    target = sample.target if isinstance(sample.target, str) else "\n".join(sample.target)
    scores = [f"{name}: {_describe_score(score)}" for name, score in (sample.scores or {}).items()]
    return {"prompt": prompt, "target": target, "answer": sample.output.completion, "score": ", ".join(scores)}


def _describe_score(score: Score) -> str:
    risk = (score.metadata or {}).get("risk")
    value = {"C": "right", "I": "wrong", "N": "no answer", "P": "partly right"}.get(str(score.value), score.value)
    value = f"{value:.4g}" if isinstance(value, float) else str(value)
    return value if risk is None else f"{value}, risk {risk:.3f}"
