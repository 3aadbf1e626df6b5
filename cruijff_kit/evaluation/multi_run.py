"""Runs that are evaluated together: tasks of one eval() whose models share passes, in this process or in several."""

import copy
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from inspect_ai import Task
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import GenerateConfig

from cruijff_kit.data.tiers import RED
from cruijff_kit.evaluation import log_redaction
from cruijff_kit.evaluation.engine import ChatModel, SharedPasses, base_of
from cruijff_kit.evaluation.fork_pool import CAN_FORK, AskingModel, AskingPasses, work_apart
from cruijff_kit.evaluation.provider import Turns, open_model
from cruijff_kit.evaluation.run_tasks import (
    Cell,
    build_task,
    call_inspect,
    evaluate_cell,
    evaluation_of,
    generation,
    option_tokens,
    tell,
)
from cruijff_kit.records.result import Evaluation
from cruijff_kit.training.out_of_memory import free_exception_frames
from cruijff_kit.util.errors import one_line
from cruijff_kit.util.progress import progress, say

_MOST_WORKERS = 8
_SAMPLES_OF_A_WORKER = 100  # so many at least: half a second of inspect-ai's own work


def evaluate_together(cells: list[Cell]) -> list[Evaluation | Exception]:
    """Cells of several runs, answered in common passes where their models share a base.

    Returns:
        Of each cell what `evaluate_cell` would have, or why it failed, in order; one's failure is not another's.
    """
    ended: list[Any] = [None] * len(cells)
    for numbers in _groups(cells):
        group = [cells[n] for n in numbers]
        for n, found in zip(numbers, _together(group) if len(group) > 1 else [_alone(group[0])], strict=True):
            ended[n] = found
    return ended


def _groups(cells: list[Cell]) -> list[list[int]]:
    """Places of cells that inspect-ai can run as tasks of one eval() and whose models can share passes."""
    found: dict[Any, list[int]] = {}
    asked = {}
    for n, cell in enumerate(cells):
        round = asked[id(cell.chat_model)] = asked.get(id(cell.chat_model), -1) + 1  # it answers one task at a time
        settings = cell.config.eval
        alone = cell.config.dataset.tier == RED
        key = n if alone else (base_of(cell.chat_model), settings.limit, settings.batch_size, round)
        found.setdefault(key, []).append(n)
    return [part for numbers in found.values() for part in _in_memory(numbers, cells[numbers[0]].chat_model)]


def _in_memory(numbers: list[int], chat_model: ChatModel) -> list[list[int]]:
    """A group in parts, where memory has no place for what all its models may want beside the base at once."""
    most = chat_model.copies_at_once()
    most = len(numbers) if most is None else max(1, most)
    return [numbers[start : start + most] for start in range(0, len(numbers), most)]


def _alone(cell: Cell) -> Evaluation | Exception:
    try:
        return evaluate_cell(**vars(cell))
    except Exception as error:
        free_exception_frames(error)
        return error


def _together(cells: list[Cell]) -> list[Evaluation | Exception]:
    """Cells of one group, in one eval()."""
    ended: dict[int, Evaluation | Exception] = {}
    tasks: dict[int, Task] = {}
    for n, cell in enumerate(cells):
        try:
            tasks[n] = copy.copy(build_task(cell.name, cell.config))
        except Exception as error:
            ended[n] = error
    asked = {n: cells[n] for n in tasks}
    try:
        ended |= _evaluations(asked, tasks) if len(asked) > 1 else {n: _alone(cell) for n, cell in asked.items()}
    except Exception as error:  # not a task's own, which its log would have: each may show by itself whose it is
        free_exception_frames(error)
        say(f"{len(asked)} runs cannot be evaluated together ({one_line(error)}); one after another")
        ended |= {n: _alone(cell) for n, cell in asked.items()}
    return [ended[n] for n in range(len(cells))]


def _evaluations(cells: dict[int, Cell], tasks: dict[int, Task]) -> dict[int, Evaluation | Exception]:
    started = time.monotonic()
    samples = {n: min(len(task.dataset), cells[n].config.eval.limit or len(task.dataset)) for n, task in tasks.items()}
    with progress(f"evaluating {len(cells)} runs", sum(samples.values())) as bar:
        ended, tokens = _answered(cells, tasks, _shares(cells, sum(samples.values())), bar.advance)
    seconds = time.monotonic() - started
    for n, cell in cells.items():
        if isinstance(ended[n], Evaluation):
            share = tokens[n] / tokens.total() if tokens.total() else 1 / len(cells)
            ended[n] = replace(ended[n], seconds=round(seconds * share, 3))
            tell(ended[n], f"{cell.config.run_name}: ")
    return ended


def _shares(cells: dict[int, Cell], samples: int) -> list[list[int]]:
    """Which cells each worker process takes; one share: there are none.

    As many as the run has threads, which rest while inspect-ai works. A task of the user's may use what does not survive a
    fork: threads, connections, the GPU; so may what is hooked into inspect-ai.
    """
    alone = not CAN_FORK or log_redaction.hooks() or not all(cell.name.ships for cell in cells.values())
    threads = min(cell.chat_model.machine.threads for cell in cells.values())
    workers = 1 if alone else max(1, min(threads, len(cells), samples // _SAMPLES_OF_A_WORKER, _MOST_WORKERS))
    return [[*cells][first::workers] for first in range(workers)]


def _answered(
    cells: dict[int, Cell], tasks: dict[int, Task], shares: list[list[int]], finished: Callable[..., object]
) -> tuple[dict[int, Evaluation | Exception], Counter[int]]:
    """What came of each cell, and the tokens that went through its model."""
    chats = {n: cell.chat_model for n, cell in cells.items()}
    folder = next(iter(cells.values())).folder.eval
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".together-") as place:
        if len(shares) == 1:
            return _work(cells, tasks, chats, SharedPasses([*chats.values()]), finished, place)

        def apart(numbers: list[int], passes: AskingPasses) -> dict[int, Evaluation | Exception]:
            own, models = {n: cells[n] for n in numbers}, {n: AskingModel(n, chats[n]) for n in numbers}
            return _work(own, tasks, models, passes, passes.finished, place)[0]

        rows = {n: cell.config.eval.batch_size for n, cell in cells.items()}
        try:
            found, tokens = work_apart([partial(apart, numbers) for numbers in shares], chats, rows, finished)
        finally:
            for chat in chats.values():
                chat.release()
    return {n: one for share in found for n, one in share.items()}, tokens


def _work(
    cells: dict[int, Cell],
    tasks: dict[int, Task],
    models: dict[int, Any],
    passes: Any,
    finished: Callable[..., object],
    place: str,
) -> tuple[dict[int, Evaluation | Exception], Counter[int]]:
    """As `_answered`, in one process. inspect-ai writes the logs of an eval() into one folder, `place`, and reads their
    samples when they are asked for: they are moved to their runs' folders unread.

    Raises:
        KeyboardInterrupt: inspect-ai took it.
    """
    turns, opened = Turns(passes), {}
    for n, cell in cells.items():
        settings, task = cell.config.eval, tasks[n]
        options = option_tokens(task)
        opened[n] = open_model(models[n], cell.config.model.name, settings.batch_size, finished, turns, options)
        task.model = task.model or opened[n]
        task.metadata = cell.metadata | (task.metadata or {})
        task.config = task.config.merge(GenerateConfig(**generation(task, cell.config)))
    config = next(iter(cells.values())).config
    asked = [tasks[n] for n in cells]
    logs = call_inspect(asked, [*opened.values()], config, max_tasks=len(asked), log_dir=place)
    if len(logs) != len(cells) or any(log.status == "cancelled" for log in logs):
        raise KeyboardInterrupt
    found = {
        n: _found(cell, tasks[n], _moved(log, cell.folder.eval))
        for (n, cell), log in zip(cells.items(), logs, strict=True)
    }
    return found, Counter({n: model.api.tokens for n, model in opened.items()})


def _found(cell: Cell, task: Task, log: EvalLog | Path) -> Evaluation | Exception:
    """What a log comes to."""
    try:
        log = read_eval_log(str(log)) if isinstance(log, Path) else log
        return evaluation_of(cell.name, cell.config, task, log, cell.epoch, 0.0, cell.prompts_checked)
    except Exception as error:
        return error


def _moved(log: EvalLog, folder: Path) -> EvalLog | Path:
    """Where a log lies now; the log itself if it could not be written, which it says."""
    if not Path(log.location).is_file():
        return log
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(log.location, folder))
