"""The constant baseline ("chance"): what the best answer gets that is the same for every sample.

Of labels and exact answers the most frequent output of the training split (of several the first in order), of risks the
share of the positive label there, of numbers its median (for absolute errors) or mean (for squared ones). Where the
training split is not known, as for a task of the user's, that of the task's own targets. What an exact answer is measured
by has a constant only where outputs repeat.

Each sample's score says in its metadata what the constant gets on this sample: "chance", in the score's own units (1 or 0,
or |difference|), and for risks and numbers the constant itself, which the metrics take where nothing was scored.
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
"""From a sample's score to what the constant adds to its metadata."""


def with_chance(task: Task, outputs: Counter[str], source: str) -> Task:
    """The task, whose scorers say what the constant gets, where there is one.

    Args:
        outputs: text -> how often it is wanted, as `plain` has it.
        source: where these are from: TRAIN, or TEST for the task's own targets.
    """
    task = copy.copy(task)  # a task of the user's may be one and the same each time that it is built
    task.scorer = task.scorer and [_with_chance(scorer, outputs, source) for scorer in task.scorer]
    return task


def targets_of(task: Task) -> Counter[str]:
    """The targets of a task's samples; of a sample with several, each. An empty one is none."""
    targets = (s.target for s in task.dataset)
    texts = (plain(text) for target in targets for text in ([target] if isinstance(target, str) else target))
    return Counter(text for text in texts if text)


def constants_of(task: Task) -> list[Any]:
    """The constant of each scorer, None where it has none: what results depend on besides the answers."""
    return [getattr(scorer, "constant", None) for scorer in task.scorer or []]


def chance_of(task: Task, samples: list[EvalSample]) -> tuple[dict[str, dict[str, float]], str | None]:
    """scorer -> metric -> what the constant gets on these samples, by the scorers' own metrics; and where it is from."""
    found, sources = {}, []
    for name, scorer in zip(log_names(task), task.scorer or [], strict=True):
        scores = [(s.scores or {}).get(name) for s in samples]
        if not samples or any(score is None or "chance" not in (score.metadata or {}) for score in scores):
            continue
        constant = [
            SampleScore(score=_of_constant(score), sample_id=s.id, sample_metadata=s.metadata, scorer=name)
            for score, s in zip(scores, samples, strict=True)
        ]
        values = {
            metric: value
            for metric, group, value in _quietly(metrics_over, scorer, name, constant)
            if metric not in _NOT_COMPARED and group != _COUNTS
        }
        if values:
            found[name] = values
            sources.append(scorer.chance_from)
    return found, next(iter(sources), None)


def is_constant(samples: list[EvalSample]) -> bool:
    """Whether all answers, two at least, are one and the same text, or come to one in the eyes of every scorer."""
    if len(samples) < 2:
        return False
    if len({s.output.completion.strip() for s in samples}) == 1:
        return True
    names = {name for s in samples for name in s.scores or {}}
    answers = [{score.answer if (score := (s.scores or {}).get(n)) else None for s in samples} for n in names]
    return bool(answers) and all(len(found) == 1 and None not in found for found in answers)


def _with_chance(scorer: Scorer, outputs: Counter[str], source: str) -> Scorer:
    constant, judge = _judge(scorer, outputs, source)
    if judge is None:
        return scorer

    @functools.wraps(scorer)  # its name, parameters and metrics in inspect-ai's registry too
    async def score(state: TaskState, target: Target) -> Score | None:
        found = await scorer(state, target)
        if found is not None:
            found.metadata = (found.metadata or {}) | await judge(found, state, target)
        return found

    score.constant, score.chance_from = constant, source
    return score


def _judge(scorer: Scorer, outputs: Counter[str], source: str) -> tuple[Any, Judge | None]:
    """The constant for a scorer, and what says how it does; None where it has none."""
    if options := getattr(scorer, "options", None):
        return _judge_of_labels(options, outputs)
    if (decimal_comma := getattr(scorer, "decimal_comma", None)) is not None:
        return _judge_of_numbers(decimal_comma, outputs)
    text = min(outputs, key=lambda t: (-outputs[t], t), default=None)
    if text is None or outputs[text] < 2 or source == TEST and not _are_labels(outputs):
        return None, None
    # Scorers of texts alone cost nothing, so they are asked; of others it is supposed that the target is a right answer.
    of_texts = hasattr(scorer, "compares") or is_of_inspect_ai(scorer, *_OF_TEXTS)
    return text, _judge_of_texts(scorer, text) if of_texts else _judge_of_equality(text)


def _are_labels(outputs: Counter[str]) -> bool:
    return len(outputs) <= MOST_LABELS and 2 * len(outputs) <= outputs.total()


def _judge_of_labels(options: tuple[str, ...], outputs: Counter[str]) -> tuple[Any, Judge | None]:
    counts = Counter({o: outputs[plain(o)] for o in options if outputs[plain(o)]})
    if not counts:
        return None, None
    constant = metrics.constant_of_counts(counts, options[-1])

    async def judge(found: Score, state: TaskState, target: Target) -> dict[str, Any]:
        return {"chance": float(found.metadata["label"] == constant["predicted"]), "constant": constant}

    return constant, judge


def _judge_of_numbers(decimal_comma: bool, outputs: Counter[str]) -> tuple[Any, Judge | None]:
    values = [v for t, n in outputs.items() if (v := find_number(t, decimal_comma)) is not None for _ in range(n)]
    if not values:
        return None, None
    constant = metrics.constant_of_numbers(values)

    async def judge(found: Score, state: TaskState, target: Target) -> dict[str, Any]:
        return {"chance": abs(constant["median"] - found.metadata["target"]), "constant": constant}

    return constant, judge


def _judge_of_texts(scorer: Scorer, text: str) -> Judge:
    answer, to_float = ModelOutput.from_content("constant", text), value_to_float()

    async def judge(found: Score, state: TaskState, target: Target) -> dict[str, Any]:
        answered = copy.copy(state)
        answered.output = answer
        return {"chance": to_float((await scorer(answered, target)).value)}

    return judge


def _judge_of_equality(text: str) -> Judge:
    async def judge(found: Score, state: TaskState, target: Target) -> dict[str, Any]:
        if found.value not in ("C", "I", "P", "N") and not isinstance(found.value, bool):
            return {}
        return {"chance": float(any(plain(wanted) == text for wanted in target))}

    return judge


def _of_constant(score: Score) -> Score:
    """The score that the constant gets, as the metrics read it, from that of an answer."""
    kept = {k: v for k, v in score.metadata.items() if k != "log_odds"}
    constant = kept.get("constant", {})
    return Score(value=kept["chance"], metadata=kept | {"scored": "predicted" in constant} | constant)


def _quietly(compute: Callable[..., Any], *arguments: Any) -> Any:
    """What is not defined for the constant was said of the answers already."""
    said = logging.getLogger(metrics.__name__)
    was, said.disabled = said.disabled, True
    try:
        return compute(*arguments)
    finally:
        said.disabled = was
