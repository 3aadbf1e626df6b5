"""Evaluates several runs together: tasks of one eval() whose models share passes, in this process or in several."""

import copy
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from inspect_ai import Task
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import GenerateConfig

from cruijff_kit.data.tiers import RED
from cruijff_kit.evaluation import log_redaction
from cruijff_kit.evaluation.build_tasks import build_task, count_requests, option_tokens
from cruijff_kit.evaluation.engine import AnsweringModel, ChatModel, Engine, MultiLoraEngine, base_of
from cruijff_kit.evaluation.fork_pool import CAN_FORK, RemoteEngine, RemoteModel, run_in_workers
from cruijff_kit.evaluation.inspect_eval import call_inspect, generation_options
from cruijff_kit.evaluation.provider import BatchCollector, open_model
from cruijff_kit.evaluation.run_tasks import EvaluationItem, evaluate_item, evaluation_of, report_scores
from cruijff_kit.records.result import Evaluation
from cruijff_kit.training.out_of_memory import free_exception_frames
from cruijff_kit.util.errors import one_line
from cruijff_kit.util.progress import progress, say

_MAX_WORKERS = 8
_SAMPLES_PER_WORKER = 100  # at least: half a second of inspect-ai's own work

_Outcome = Evaluation | Exception


def evaluate_together(items: list[EvaluationItem]) -> list[Evaluation | Exception]:
    """Evaluate items of several runs, in common passes where their models share a base.

    Returns:
        Of each item what `evaluate_item` returns, or why it failed, in order; one's failure is not another's.
    """
    outcomes: list[Any] = [None] * len(items)
    for numbers in _group(items):
        group = [items[n] for n in numbers]
        for n, outcome in zip(
            numbers, _evaluate_group(group) if len(group) > 1 else [_evaluate_alone(group[0])], strict=True
        ):
            outcomes[n] = outcome
    return outcomes


def _group(items: list[EvaluationItem]) -> list[list[int]]:
    """Group the numbers of items that inspect-ai can run as tasks of one eval() and whose models can share passes."""
    groups: dict[Any, list[int]] = {}
    rounds: dict[int, int] = {}
    for n, item in enumerate(items):
        model = id(item.chat_model)
        rounds[model] = rounds.get(model, -1) + 1  # it answers one task at a time
        settings = item.config.eval
        is_alone = item.config.dataset.tier == RED
        key = n if is_alone else (base_of(item.chat_model), settings.limit, settings.batch_size, rounds[model])
        groups.setdefault(key, []).append(n)
    return [part for numbers in groups.values() for part in _split_by_memory(numbers, items[numbers[0]].chat_model)]


def _split_by_memory(numbers: list[int], chat_model: ChatModel) -> list[list[int]]:
    """Split a group where memory has no place for the copies of all its models beside the base's."""
    most = chat_model.count_models_with_copies()
    most = len(numbers) if most is None else max(1, most)
    return [numbers[start : start + most] for start in range(0, len(numbers), most)]


def _evaluate_alone(item: EvaluationItem) -> _Outcome:
    try:
        return evaluate_item(item)
    except Exception as error:
        free_exception_frames(error)
        return error


def _evaluate_group(items: list[EvaluationItem]) -> list[_Outcome]:
    """Evaluate the items of one group in one eval()."""
    outcomes: dict[int, _Outcome] = {}
    tasks: dict[int, Task] = {}
    for n, item in enumerate(items):
        try:
            tasks[n] = copy.copy(build_task(item.name, item.config))
        except Exception as error:
            outcomes[n] = error
    rest = {n: items[n] for n in tasks}
    try:
        outcomes |= _evaluate(rest, tasks) if len(rest) > 1 else {n: _evaluate_alone(item) for n, item in rest.items()}
    except Exception as error:  # not a task's own, which its log would have: each may show by itself whose it is
        free_exception_frames(error)
        say(f"{len(rest)} runs cannot be evaluated together ({one_line(error)}); one after another")
        outcomes |= {n: _evaluate_alone(item) for n, item in rest.items()}
    return [outcomes[n] for n in range(len(items))]


def _evaluate(items: dict[int, EvaluationItem], tasks: dict[int, Task]) -> dict[int, _Outcome]:
    started = time.monotonic()
    samples = {n: min(len(task.dataset), items[n].config.eval.limit or len(task.dataset)) for n, task in tasks.items()}
    with progress(f"evaluating {len(items)} runs", sum(samples.values())) as bar:
        outcomes, tokens = _answer(items, tasks, _share_out(items, sum(samples.values())), bar.advance)
    seconds = time.monotonic() - started
    for n, item in items.items():
        outcome = outcomes[n]
        if isinstance(outcome, Evaluation):
            share = tokens[n] / tokens.total() if tokens.total() else 1 / len(items)
            outcomes[n] = evaluation = replace(outcome, seconds=round(seconds * share, 3))
            report_scores(evaluation, f"{item.config.run_name}: ")
    return outcomes


def _share_out(items: dict[int, EvaluationItem], samples: int) -> list[list[int]]:
    """Distribute items over worker processes; one share means that there are no workers.

    The number of workers is at most that of the threads of the run (which are idle while inspect-ai works), that of the
    items, one per _SAMPLES_PER_WORKER samples, and _MAX_WORKERS. There are none with an external task or with hooks of
    inspect-ai: they may use threads, connections or the GPU, which do not survive a fork.
    """
    is_alone = not CAN_FORK or log_redaction.hooks() or not all(item.name.ships for item in items.values())
    threads = min(item.chat_model.machine.threads for item in items.values())
    workers = 1 if is_alone else max(1, min(threads, len(items), samples // _SAMPLES_PER_WORKER, _MAX_WORKERS))
    return [[*items][first::workers] for first in range(workers)]


def _answer(
    items: dict[int, EvaluationItem],
    tasks: dict[int, Task],
    shares: list[list[int]],
    on_done: Callable[..., object],
) -> tuple[dict[int, _Outcome], Counter[int]]:
    """Evaluate items. Returns the outcome of each, and the tokens that went through its model."""
    chat_models = {n: item.chat_model for n, item in items.items()}
    folder = next(iter(items.values())).folder.eval
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".together-") as logs:
        if len(shares) == 1:
            return _run_share(items, tasks, chat_models, MultiLoraEngine([*chat_models.values()]), on_done, logs)

        def run_share(numbers: list[int], engine: RemoteEngine) -> dict[int, _Outcome]:
            own, models = {n: items[n] for n in numbers}, {n: RemoteModel(n, chat_models[n]) for n in numbers}
            return _run_share(own, tasks, models, engine, engine.count_finished, logs)[0]

        rows = {n: item.config.eval.batch_size for n, item in items.items()}
        try:
            results, tokens = run_in_workers(
                [partial(run_share, numbers) for numbers in shares], chat_models, rows, on_done
            )
        finally:
            for chat_model in chat_models.values():
                chat_model.release()
    return {n: outcome for result in results for n, outcome in result.items()}, tokens


def _run_share(
    items: dict[int, EvaluationItem],
    tasks: dict[int, Task],
    models: Mapping[int, AnsweringModel],
    engine: Engine,
    on_done: Callable[..., object],
    logs_folder: str,
) -> tuple[dict[int, _Outcome], Counter[int]]:
    """Evaluate items as `_answer` does, in one process.

    inspect-ai writes the logs of an eval() into one folder and reads their samples when they are used, so the logs are
    moved to their runs' folders unread.

    Raises:
        KeyboardInterrupt: inspect-ai took it.
    """
    collector, opened = BatchCollector(engine), {}
    for n, item in items.items():
        settings, task = item.config.eval, tasks[n]
        opened[n] = open_model(
            models[n], item.config.model.name, settings.batch_size, on_done, collector, option_tokens(task),
            count_requests(task, item.config),
        )  # fmt: skip
        task.model = task.model or opened[n]
        task.metadata = item.metadata | (task.metadata or {})
        task.config = task.config.merge(GenerateConfig(**generation_options(task, item.config)))
    config = next(iter(items.values())).config
    own = [tasks[n] for n in items]
    logs = call_inspect(own, [*opened.values()], config, max_tasks=len(own), log_dir=logs_folder)
    if len(logs) != len(items) or any(log.status == "cancelled" for log in logs):
        raise KeyboardInterrupt
    outcomes = {
        n: _read_outcome(item, tasks[n], _move(log, item.folder.eval))
        for (n, item), log in zip(items.items(), logs, strict=True)
    }
    return outcomes, Counter({n: model.api.num_tokens for n, model in opened.items()})


def _read_outcome(item: EvaluationItem, task: Task, log: EvalLog | Path) -> _Outcome:
    try:
        log = read_eval_log(str(log)) if isinstance(log, Path) else log
        return evaluation_of(item.name, item.config, task, log, item.epoch, 0.0, item.prompts_checked)
    except Exception as error:
        return error


def _move(log: EvalLog, folder: Path) -> EvalLog | Path:
    """Move a log. Return its new path, or the log itself if it could not be written (its error says so)."""
    if not Path(log.location).is_file():
        return log
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(log.location, folder))
