"""The constant baseline ("chance"): the score of the best answer that is the same for every sample.

For labels and exact answers it is the most frequent output of the training split (of several the first in order); for
risks the share of the positive label there; for numbers its median (absolute errors) or mean (squared errors). Where the
training split is not known, as for an external task, the task's own targets take its place. Exact answers have a constant
only where outputs repeat.

The metadata of each sample's score has the constant's score on this sample: "chance", in the score's own units (1 or 0, or
|difference|). For risks and numbers it also has the constant itself, which the metrics take where nothing was scored.
"""

import copy
import functools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from inspect_ai import Task
from inspect_ai.log import EvalSample
from inspect_ai.model import ModelOutput
from inspect_ai.scorer import SampleScore, Score, Scorer, Target, value_to_float
from inspect_ai.solver import TaskState

from cruijff_kit.evaluation import metrics
from cruijff_kit.evaluation.external_tasks import is_of_inspect_ai, log_names, metrics_over
from cruijff_kit.evaluation.numbers import find_number
from cruijff_kit.evaluation.scorers import plain

TRAIN, TEST = "train", "test"
MOST_LABELS = 20  # different targets that are labels, if each stands for two samples on average
_OF_TEXTS = ("match", "includes", "exact", "f1")  # of inspect-ai's scorers
_NOT_COMPARED = ("coverage", "parse_rate")
_COUNTS = "confusion"

Judge = Callable[[Score, TaskState, Target], Awaitable[dict[str, Any]]]
"""Takes a sample's score; returns what the constant adds to its metadata."""


def with_chance(task: Task, outputs: Counter[str], source: str) -> Task:
    """Make the task's scorers add the constant's scores, where there is a constant.

    Args:
        outputs: target text (as `plain` makes it) -> how often it occurs.
        source: where these are from: TRAIN, or TEST for the task's own targets.
    """
    task = copy.copy(task)  # an external task may be one and the same each time that it is built
    task.scorer = task.scorer and [_with_chance(scorer, outputs, source) for scorer in task.scorer]
    return task


def targets_of(task: Task) -> Counter[str]:
    """Count the targets of a task's samples, each where a sample has several; empty ones are left out."""
    targets = (s.target for s in task.dataset)
    texts = (plain(text) for target in targets for text in ([target] if isinstance(target, str) else target))
    return Counter(text for text in texts if text)


def constants_of(task: Task) -> list[Any]:
    """List the constant of each scorer, None where it has none: what results depend on besides the answers."""
    return [getattr(scorer, "constant", None) for scorer in task.scorer or []]


def chance_of(task: Task, samples: list[EvalSample]) -> tuple[dict[str, dict[str, float]], str | None]:
    """Compute the constant's scores on these samples, by the scorers' own metrics.

    Returns:
        Scorer -> metric -> value, and where the constant is from: TRAIN or TEST; None where there is none.
    """
    chance, sources = {}, []
    for name, scorer in zip(log_names(task), task.scorer or [], strict=True):
        scores = [(s.scores or {}).get(name) for s in samples]
        if not samples or any(score is None or "chance" not in (score.metadata or {}) for score in scores):
            continue
        constant = [
            SampleScore(score=_constant_score(score), sample_id=s.id, sample_metadata=s.metadata, scorer=name)
            for score, s in zip(scores, samples, strict=True)
        ]
        values = {
            metric: value
            for metric, group, value in _compute_quietly(metrics_over, scorer, name, constant)
            if metric not in _NOT_COMPARED and group != _COUNTS
        }
        if values:
            chance[name] = values
            sources.append(scorer.chance_from)
    return chance, next(iter(sources), None)


def is_constant(samples: list[EvalSample]) -> bool:
    """Return whether all answers (at least two) are the same text, or every scorer reads the same from all of them."""
    if len(samples) < 2:
        return False
    if len({s.output.completion.strip() for s in samples}) == 1:
        return True
    names = {name for s in samples for name in s.scores or {}}
    answers = [{score.answer if (score := (s.scores or {}).get(n)) else None for s in samples} for n in names]
    return bool(answers) and all(len(own) == 1 and None not in own for own in answers)


def _with_chance(scorer: Scorer, outputs: Counter[str], source: str) -> Scorer:
    constant, judge = _make_judge(scorer, outputs, source)
    if judge is None:
        return scorer

    @functools.wraps(scorer)  # its name, parameters and metrics in inspect-ai's registry too
    async def score(state: TaskState, target: Target) -> Score | None:
        own = await scorer(state, target)
        if own is not None:
            own.metadata = (own.metadata or {}) | await judge(own, state, target)
        return own

    score.constant, score.chance_from = constant, source
    return score


def _make_judge(scorer: Scorer, outputs: Counter[str], source: str) -> tuple[Any, Judge | None]:
    """Choose the constant for a scorer, and make its judge; None where it has none."""
    if options := getattr(scorer, "options", None):
        return _judge_labels(options, outputs)
    if (decimal_comma := getattr(scorer, "decimal_comma", None)) is not None:
        return _judge_numbers(decimal_comma, outputs)
    text = min(outputs, key=lambda t: (-outputs[t], t), default=None)
    if text is None or outputs[text] < 2 or source == TEST and not _are_labels(outputs):
        return None, None
    # Scorers of texts alone cost nothing, so they score the constant; for others the target is taken for a right answer.
    is_of_texts = hasattr(scorer, "compares") or is_of_inspect_ai(scorer, *_OF_TEXTS)
    return text, _judge_texts(scorer, text) if is_of_texts else _judge_equality(text)


def _are_labels(outputs: Counter[str]) -> bool:
    return len(outputs) <= MOST_LABELS and 2 * len(outputs) <= outputs.total()


def _judge_labels(options: tuple[str, ...], outputs: Counter[str]) -> tuple[Any, Judge | None]:
    counts = Counter({o: outputs[plain(o)] for o in options if outputs[plain(o)]})
    if not counts:
        return None, None
    constant = metrics.constant_of_counts(counts, options[-1])

    async def judge(score: Score, state: TaskState, target: Target) -> dict[str, Any]:
        return {"chance": float(score.metadata["label"] == constant["predicted"]), "constant": constant}

    return constant, judge


def _judge_numbers(decimal_comma: bool, outputs: Counter[str]) -> tuple[Any, Judge | None]:
    values = [v for t, n in outputs.items() if (v := find_number(t, decimal_comma)) is not None for _ in range(n)]
    if not values:
        return None, None
    constant = metrics.constant_of_numbers(values)

    async def judge(score: Score, state: TaskState, target: Target) -> dict[str, Any]:
        return {"chance": abs(constant["median"] - score.metadata["target"]), "constant": constant}

    return constant, judge


def _judge_texts(scorer: Scorer, text: str) -> Judge:
    answer, to_float = ModelOutput.from_content("constant", text), value_to_float()

    async def judge(score: Score, state: TaskState, target: Target) -> dict[str, Any]:
        state = copy.copy(state)
        state.output = answer
        return {"chance": to_float((await scorer(state, target)).value)}

    return judge


def _judge_equality(text: str) -> Judge:
    async def judge(score: Score, state: TaskState, target: Target) -> dict[str, Any]:
        if score.value not in ("C", "I", "P", "N") and not isinstance(score.value, bool):
            return {}
        return {"chance": float(any(plain(t) == text for t in target))}

    return judge


def _constant_score(score: Score) -> Score:
    """Make the constant's score, as the metrics read it, from that of an answer."""
    metadata = {k: v for k, v in score.metadata.items() if k != "log_odds"}
    constant = metadata.get("constant", {})
    return Score(value=metadata["chance"], metadata=metadata | {"scored": "predicted" in constant} | constant)


def _compute_quietly(compute: Callable[..., Any], *arguments: Any) -> Any:
    """Compute without warnings: what is not defined for the constant was warned of for the answers already."""
    logger = logging.getLogger(metrics.__name__)
    was, logger.disabled = logger.disabled, True
    try:
        return compute(*arguments)
    finally:
        logger.disabled = was
