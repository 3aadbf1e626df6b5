"""Checks that a log is complete: every sample was answered and scored."""

from inspect_ai.log import EvalLog, EvalScore
from inspect_ai.scorer import NOANSWER, Score

from cruijff_kit.util import redaction
from cruijff_kit.util.errors import one_line
from cruijff_kit.util.redaction import parse_frames


class EvaluationError(RuntimeError):
    """A task did not answer and score all its samples; the message says which and why."""


def check_log(name: str, log: EvalLog, may_score_none: bool) -> dict[str, int]:
    """Check that all samples were answered and that each scorer scored some.

    Args:
        may_score_none: whether our own scorers may score none, since they count such samples all the same: in a task that
            ships, whose model may write no number or option; in any task, where the model is not trained to yet.
    Returns:
        Scorer -> samples that it scored.
    Raises:
        EvaluationError: what is wrong, in one line.
    """
    if log.status == "cancelled":  # inspect-ai took the Ctrl-C
        raise KeyboardInterrupt
    if log.status != "success":
        reason = redaction.redact_log(log.error.message, log.error.traceback) if log.error else log.status
        error = EvaluationError(f"task {name} ended as {log.status}: {reason}")
        if log.error:
            error.add_note(
                "\n".join(f'  File "{file}", line {line}' for file, line in parse_frames(log.error.traceback))
            )
        raise error
    samples, expected = log.samples or [], log.results.total_samples
    failed = [s for s in samples if s.error]
    if failed:
        first = redaction.redact_log(failed[0].error.message, failed[0].error.traceback)
        raise EvaluationError(f"task {name}: {len(failed)} of {expected} samples failed, first: {first}")
    if not expected or len(samples) != expected:
        raise EvaluationError(f"task {name}: {len(samples)} of {expected} samples were answered")
    if not log.results.scores:
        raise EvaluationError(f"task {name} has no scorer: 0 of {expected} samples were scored")
    scored = {}
    for score in log.results.scores:
        # Our own scorers say themselves what they left out: inspect-ai would keep such samples from their metrics.
        share = next((score.metrics[m].value for m in ("coverage", "parse_rate") if m in score.metrics), None)
        left_out = score.unscored_samples or 0
        scored[score.name] = expected - left_out if share is None else round(share * expected)
        if share is None and _none_answered([s.scores or {} for s in samples], score):
            scored[score.name] = 0
        if not (score.scored_samples and scored[score.name]) and (share is None or not may_score_none):
            why = next((e for s in samples if (e := _reason_unscored(s.scores or {}, score))), "")
            raise EvaluationError(f"task {name}: scorer {score.name} scored 0 of {expected} samples{why}")
    return scored


def _none_answered(scores: list[dict[str, Score]], score: EvalScore) -> bool:
    """Return whether all values of a scorer are "N" (which inspect-ai's accuracy counts as wrong) or NaN."""
    sample_scores = [own for s in scores if (own := s.get(score.name) or s.get(score.scorer)) is not None]
    values = [g.value.get(score.name) if isinstance(g.value, dict) else g.value for g in sample_scores]
    return bool(values) and all(v == NOANSWER or v != v for v in values)  # NaN alone is not itself


def _reason_unscored(scores: dict[str, Score], score: EvalScore) -> str:
    """Return why a scorer did not score a sample, in its own words, as the end of a message."""
    sample_score = scores.get(score.name) or scores.get(score.scorer)
    reason = sample_score and (sample_score.explanation or sample_score.reason)
    return f"; the first: {one_line(reason)}" if reason else ""
