"""Runs inspect-ai tasks over the model in memory and makes sure that every sample was answered and scored."""

import asyncio
import contextlib
import copy
import gc
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval
from inspect_ai.log import EvalLog, EvalScore, read_eval_log, write_eval_log
from inspect_ai.model import GenerateConfig, Model
from inspect_ai.scorer import NOANSWER, Score

from cruijff_kit import withheld
from cruijff_kit.config import RunConfig
from cruijff_kit.data.generators import ceiling_of
from cruijff_kit.errors import UserError, one_line
from cruijff_kit.evaluation import redaction
from cruijff_kit.evaluation.cells import cell_key, with_cell
from cruijff_kit.evaluation.engine import ChatModel, SharedPasses, base_of
from cruijff_kit.evaluation.foreign import build_foreign, check_arguments
from cruijff_kit.evaluation.names import TaskName
from cruijff_kit.evaluation.provider import Turns, open_model
from cruijff_kit.evaluation.tasks import TASKS
from cruijff_kit.evaluation.workers import CAN_FORK, AskingModel, AskingPasses, work_apart
from cruijff_kit.folder import RunFolder
from cruijff_kit.hints import did_you_mean
from cruijff_kit.models.adapter import adapter_state, load_adapter, load_adapter_state
from cruijff_kit.plan import EvaluationPlan
from cruijff_kit.progress import progress, say
from cruijff_kit.result import Evaluation
from cruijff_kit.tiers import RED, close_folder, withholds_samples
from cruijff_kit.training.passes import forget, told
from cruijff_kit.withheld import places_of

_MOST_WORKERS = 8
_SAMPLES_OF_A_WORKER = 100  # so many at least: half a second of inspect-ai's own work


class EvaluationError(RuntimeError):
    """A task did not answer and score all its samples; the message says which and why."""


@dataclass(frozen=True)
class Cell:
    """A task, to be answered by the adapter that the model holds now.

    epoch: whose adapter it is. hash: of the run's config. adapter_folder: where it lies, if not in the run's folder.
    """

    name: TaskName
    chat_model: ChatModel
    config: RunConfig
    plan: EvaluationPlan
    folder: RunFolder
    epoch: int
    hash: str
    adapter_folder: Path | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """What its log says of who answered."""
        place = self.adapter_folder or self.folder.epoch(self.epoch)
        saved = str(place) if place.exists() else None
        return log_metadata(self.name, self.config, self.plan.data_hash, self.hash, self.epoch, saved)

    @property
    def prompts_checked(self) -> int:
        """How many of its prompts were compared with training."""
        return self.plan.prompts_checked.get(self.name.label, 0)


def evaluate(
    chat_model: ChatModel, config: RunConfig, plan: EvaluationPlan, folder: RunFolder, last: int, config_hash: str
) -> list[Evaluation]:
    """Every cell: each task of the config, answered with the adapter of each epoch that is asked for.

    Args:
        chat_model: the trained model; afterwards it is what it was.
        last: the epoch whose adapter it holds; those before are read from their folders.
        config_hash: of the run, for the logs.
    Raises:
        EvaluationError: an adapter is missing, there is nothing to do, or a task raised, or left a sample unanswered or all
            of them unscored.
    """
    with contextlib.closing(evaluation_story(chat_model, config, plan, folder, last, config_hash)) as story:
        return told(story, lambda cell: evaluate_cell(**vars(cell)))


def evaluation_story(
    chat_model: ChatModel, config: RunConfig, plan: EvaluationPlan, folder: RunFolder, last: int, config_hash: str
) -> Generator[Cell, Evaluation, list[Evaluation]]:
    """As `evaluate`, by whoever makes the cells that it yields: it is sent each Evaluation, or thrown what went wrong."""
    if not config.eval.tasks:
        return []
    trained, cells = adapter_state(chat_model.model), []
    try:
        for epoch in config.evaluated_epochs:
            if epoch != last:
                load_epoch(chat_model, folder, epoch)
            else:
                load_adapter_state(chat_model.model, trained)
            for name in config.eval.names:
                cell = Cell(name, chat_model, config, plan, folder, epoch, config_hash)
                cells = with_cell(cells, (yield cell))
    finally:
        load_adapter_state(chat_model.model, trained)
    expected = len(config.eval.tasks) * len(config.evaluated_epochs)
    if not expected or len(cells) != expected:
        raise EvaluationError(f"{len(cells)} evaluations were made, {expected} were asked for")
    return cells


def load_epoch(chat_model: ChatModel, folder: RunFolder, epoch: int) -> None:
    """Put the adapter that a run saved after an epoch into the model.

    Raises:
        EvaluationError: it is missing, or of another shape.
    """
    try:
        load_adapter(chat_model.model, folder.epoch(epoch))
    except FileNotFoundError as error:
        raise EvaluationError(f"the adapter of epoch {epoch} is missing: {folder.epoch(epoch)}") from error
    except Exception as error:
        raise EvaluationError(f"the adapter of epoch {epoch} cannot be read: {one_line(error)}") from error


def evaluate_cell(
    name: TaskName,
    chat_model: ChatModel,
    config: RunConfig,
    plan: EvaluationPlan,
    folder: RunFolder,
    epoch: int,
    hash: str,
    adapter_folder: Path | None = None,
) -> Evaluation:
    """A task answered by the adapter that the model holds.

    Args:
        epoch: whose adapter it is. hash: of the run's config. adapter_folder: where it lies, if not in the run's folder.
    Raises:
        EvaluationError: as run_task.
    """
    cell = Cell(name, chat_model, config, plan, folder, epoch, hash, adapter_folder)
    return run_task(name, chat_model, config, folder.eval, epoch, cell.metadata, cell.prompts_checked)


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
        round = asked[id(cell.chat_model)] = (
            asked.get(id(cell.chat_model), -1) + 1
        )  # a model answers one task at a time
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
        forget(error)
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
        forget(error)
        say(f"{len(asked)} runs cannot be evaluated together ({one_line(error)}); one after another")
        ended |= {n: _alone(cell) for n, cell in asked.items()}
    return [ended[n] for n in range(len(cells))]


def _evaluations(cells: dict[int, Cell], tasks: dict[int, Task]) -> dict[int, Evaluation | Exception]:
    started = time.monotonic()
    samples = {n: min(len(task.dataset), cells[n].config.eval.limit or len(task.dataset)) for n, task in tasks.items()}
    with progress(f"evaluating {len(cells)} runs", sum(samples.values())) as bar:
        logs, tokens = _answered(cells, tasks, _shares(cells, sum(samples.values())), bar.advance)
    seconds = time.monotonic() - started
    share = {n: tokens[n] / tokens.total() if tokens.total() else 1 / len(cells) for n in cells}
    ended: dict[int, Evaluation | Exception] = {}
    for n, cell in cells.items():
        log = logs[n]
        try:
            log = read_eval_log(str(log)) if isinstance(log, Path) else log
            ended[n] = _evaluation(
                cell.name, cell.config, log, cell.epoch, seconds * share[n], cell.prompts_checked,
                who=f"{cell.config.run_name}: ",
            )  # fmt: skip
        except Exception as error:
            ended[n] = error
    return ended


def _shares(cells: dict[int, Cell], samples: int) -> list[list[int]]:
    """Which cells each worker process takes; one share: there are none.

    As many as the run has threads, which rest while inspect-ai works. A task of the user's may use what does not survive a
    fork: threads, connections, the GPU; so may what is hooked into inspect-ai.
    """
    alone = not CAN_FORK or redaction.hooks() or not all(cell.name.ships for cell in cells.values())
    threads = min(cell.chat_model.machine.threads for cell in cells.values())
    workers = 1 if alone else min(threads, len(cells), samples // _SAMPLES_OF_A_WORKER, _MOST_WORKERS)
    return [[*cells][first::workers] for first in range(workers)] if workers > 1 else [[*cells]]


def _answered(
    cells: dict[int, Cell], tasks: dict[int, Task], shares: list[list[int]], finished: Callable[..., object]
) -> tuple[dict[int, EvalLog | Path], Counter[int]]:
    """The logs, and the tokens that went through each cell's model."""
    chats = {n: cell.chat_model for n, cell in cells.items()}

    def work(numbers: list[int], models: dict[int, Any], passes: Any, finished: Callable[[], object]) -> tuple:
        turns, opened = Turns(passes), {}
        for n in numbers:
            cell, task = cells[n], tasks[n]
            opened[n] = open_model(models[n], cell.config.model.name, cell.config.eval.batch_size, finished, turns)
            task.model = task.model or opened[n]
            task.metadata = cell.metadata | (task.metadata or {})
            task.config = task.config.merge(GenerateConfig(**_generation(task, cell.config)))
        logs = _run_together({n: cells[n] for n in numbers}, [tasks[n] for n in numbers], [*opened.values()], place)
        return logs, Counter({n: model.api.tokens for n, model in opened.items()})

    def apart(numbers: list[int], passes: AskingPasses) -> dict[int, EvalLog | Path]:
        return work(numbers, {n: AskingModel(n, chats[n]) for n in numbers}, passes, passes.finished)[0]

    folder = next(iter(cells.values())).folder.eval
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".together-") as place:
        if len(shares) == 1:
            return work(shares[0], chats, SharedPasses([*chats.values()]), finished)
        rows = {n: cell.config.eval.batch_size for n, cell in cells.items()}
        try:
            found, tokens = work_apart([partial(apart, numbers) for numbers in shares], chats, rows, finished)
        finally:
            for chat in chats.values():
                chat.release()
    return {n: log for logs in found for n, log in logs.items()}, tokens


def _run_together(
    cells: dict[int, Cell], tasks: list[Task], models: list[Model], place: str
) -> dict[int, EvalLog | Path]:
    """Each cell's log, in its run's folder. inspect-ai writes the logs of an eval() into one folder, `place`, and reads
    their samples when they are asked for: they are moved unread.

    Raises:
        KeyboardInterrupt: inspect-ai took it.
    """
    config = next(iter(cells.values())).config
    logs = _eval(tasks, models, config, max_tasks=len(tasks), log_dir=place)
    if len(logs) != len(cells) or any(log.status == "cancelled" for log in logs):
        raise KeyboardInterrupt
    return {n: _moved(log, cell.folder.eval) for (n, cell), log in zip(cells.items(), logs, strict=True)}


def _moved(log: EvalLog, folder: Path) -> EvalLog | Path:
    """Where a log lies now; the log itself if it could not be written, which it says."""
    if not Path(log.location).is_file():
        return log
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(log.location, folder))


def log_metadata(
    name: TaskName, config: RunConfig, data_hash: str, config_hash: str | None, epoch: int | None, adapter: str | None
) -> dict[str, Any]:
    """What a log says of who answered; one value each, so that inspect-ai's dataframes have them as columns.

    Args:
        config_hash: None for the untrained model, which many runs share.
        epoch: of the adapter, counted from 0; None for the untrained model.
        adapter: the folder of the adapter; None where it is not saved, or there is none.
    """
    lora = config.lora if epoch is not None else None
    return {
        "run": config.run_name if lora else "untrained",
        "task": str(name),
        "base_model": config.model.path,
        "adapter": adapter,
        "rank": lora and lora.rank,
        "alpha": lora and lora.alpha,
        "epoch": epoch,
        "config_hash": config_hash,
        "data_hash": data_hash,
    }


def run_task(
    name: TaskName,
    chat_model: ChatModel,
    config: RunConfig,
    log_dir: Path,
    epoch: int | None,
    metadata: dict[str, Any],
    prompts_checked: int = 0,
) -> Evaluation:
    """One task, one .eval log, one Evaluation.

    Raises:
        EvaluationError: the task raised, or left a sample unanswered or all of them unscored.
    """
    started = time.monotonic()
    task, label = build_task(name, config), name.label
    who = "untrained model" if epoch is None else f"epoch {epoch}"
    with progress(f"{label}, {who}", min(len(task.dataset), config.eval.limit or len(task.dataset))) as bar:
        model = open_model(chat_model, config.model.name, config.eval.batch_size, bar.advance)
        log = run_inspect(task, model, config, log_dir, metadata)
        if config.dataset.tier == RED:
            log = _keep_red(log, config, log_dir, metadata, name.ships)
    return _evaluation(name, config, log, epoch, time.monotonic() - started, prompts_checked)


def _evaluation(
    name: TaskName,
    config: RunConfig,
    log: EvalLog,
    epoch: int | None,
    seconds: float,
    prompts_checked: int,
    who: str = "",
) -> Evaluation:
    """What came of a task.

    Args:
        who: what the line about it begins with.
    Raises:
        EvaluationError: as run_task.
    """
    label = name.label
    scored = _check(label, log, untrained=epoch is None)
    samples = log.results.total_samples
    metrics = {s.name: {m: v.value for m, v in s.metrics.items()} for s in log.results.scores}
    seconds = round(seconds, 3)
    first = next(iter(metrics.values()), {})
    who += f"{label}, " + ("untrained model" if epoch is None else f"epoch {epoch}")
    say(f"{who}: " + ", ".join(f"{m} {v:.3f}" for m, v in first.items()) + f" ({samples} samples, {seconds} s)")
    return Evaluation(
        label, epoch, samples, metrics, log.location, seconds, prompts_checked,
        unscored={s: samples - n for s, n in scored.items()},
        coverage={s: n / samples for s, n in scored.items()},
        ceiling=_ceiling(name, config),
        key=cell_key(name, config),
    )  # fmt: skip


def _keep_red(log: EvalLog, config: RunConfig, log_dir: Path, metadata: dict[str, Any], ships: bool) -> EvalLog:
    """Write a log of red data, which is in memory so far, without its samples' contents.

    Returns:
        The whole log with its new place, and with results that can be told.
    """
    withholds = withholds_samples(config)
    close_folder(log_dir)
    path = log_dir / redaction.file_name(log)
    metadata = redaction.marked(metadata, config, withholds)
    kept = told = redaction.redacted(log, config, metadata, ships)
    if not withholds:
        kept = log.model_copy(update={"eval": log.eval.model_copy(update={"metadata": metadata})})
    _outside_event_loop(lambda: write_eval_log(kept, str(path)))
    path.chmod(0o600)
    return log.model_copy(update={"location": str(path), "results": told.results})


def _ceiling(name: TaskName, config: RunConfig) -> dict[str, float]:
    data = config.dataset
    return ceiling_of(data.generator, data.arguments, name.split or data.test_split) if name.ships else {}


def build_task(name: TaskName, config: RunConfig) -> Task:
    """The inspect-ai task of a name; one that ships gets the run's data and prompt.

    Raises:
        UserError: no such task, a wrong argument, malformed data, or whatever a task of the user's does wrong.
    """
    arguments, dataset = config.eval.arguments_of(name), config.dataset
    if not name.ships:
        return build_foreign(name, arguments)
    if name.task not in TASKS:
        raise UserError(f"eval.tasks: {name.task} does not exist; {did_you_mean(name.task, [*TASKS])}")
    of_the_run = {
        "data": dataset.path,
        "split": name.split or dataset.test_split,
        "prompt": dataset.prompt,
        "system_prompt": dataset.system_prompt,
        "input_column": dataset.column_map["input"],
        "output_column": dataset.column_map["output"],
        "messages_column": dataset.column_map.get("messages"),
        "format": dataset.format,
        "split_column": dataset.split_column,
        "type": dataset.type,
        "max_samples": dataset.max_test_samples,
        "sample_seed": dataset.sample_seed,
    }
    check_arguments(name, TASKS[name.task], arguments, tuple(of_the_run))
    return TASKS[name.task](**of_the_run, **arguments)


def check_tasks(config: RunConfig) -> None:
    """Build every task of the config once; raises UserError as `build_task`."""
    for name in config.eval.names:
        build_task(name, config)


def run_inspect(
    task: Task, model, config: RunConfig, log_dir: Path, metadata: dict[str, Any], score: bool = True
) -> EvalLog:
    """inspect-ai's eval with what must hold in a job: no display, no server, no retries; the first error ends it.

    The log of red data is not in `log_dir` but in memory, whole.

    Raises:
        UserError: the data is red, and something installed would see the samples.
    """
    asked = {"metadata": metadata, "score": score, **_generation(task, config)}
    if config.dataset.tier != RED:
        return _eval([task], [model], config, **asked, log_dir=str(log_dir))[0]
    with redaction.kept_in_memory() as folder, withheld.muted():
        return _eval([task], [model], config, **asked, log_dir=folder, **redaction.IN_MEMORY)[0]


def _generation(task: Task, config: RunConfig) -> dict[str, Any]:
    """Settings of generation, which differ from task to task."""
    settings = config.eval
    return {
        "max_tokens": task.config.max_tokens or settings.max_tokens,
        "logprobs": True if settings.logprobs or settings.top_logprobs else None,
        "top_logprobs": settings.top_logprobs,
    }


def _eval(tasks: list[Task], models: list[Model], config: RunConfig, **more: Any) -> list[EvalLog]:
    settings = config.eval
    options: dict[str, Any] = {
        "model": models[0],  # of tasks that have none of their own
        "limit": settings.limit,
        "log_format": "eval",
        "log_samples": True,
        "log_realtime": False,
        "log_buffer": 1000,  # samples, instead of up to ten: a log that was cut off is made anew, never read
        "log_level": "warning",
        "display": "none",
        "score_display": False,  # metrics of the samples so far, after each: nobody sees them
        "ctl_server": False,
        "fail_on_error": True,
        "max_samples": settings.batch_size,
        "max_connections": settings.batch_size,
    } | more
    often = gc.get_threshold()
    gc.set_threshold(10_000, *often[1:])  # a quarter of inspect-ai's own time went into looking for garbage
    try:
        return _outside_event_loop(lambda: eval(tasks, **options))
    finally:
        gc.set_threshold(*often)
        for model in models:
            model.api.end()


def _outside_event_loop(call: Callable[[], Any]) -> Any:
    """Call here, or in a thread where an event loop is running already (a notebook), which eval() would refuse."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        running = False
    else:
        running = True
    if not running:
        return call()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def _check(name: str, log: EvalLog, untrained: bool) -> dict[str, int]:
    """scorer -> samples that it scored; all of them were answered, and none of the scorers left all of them out.

    Args:
        untrained: then our own scorers may score none: it has not been taught yet to write a number or an option.
    Raises:
        EvaluationError: what is wrong, in one line.
    """
    if log.status == "cancelled":  # inspect-ai took the Ctrl-C
        raise KeyboardInterrupt
    if log.status != "success":
        reason = withheld.of_log(log.error.message, log.error.traceback) if log.error else log.status
        error = EvaluationError(f"task {name} ended as {log.status}: {reason}")
        if log.error:
            error.add_note("\n".join(f'  File "{file}", line {line}' for file, line in places_of(log.error.traceback)))
        raise error
    samples, expected = log.samples or [], log.results.total_samples
    failed = [s for s in samples if s.error]
    if failed:
        first = withheld.of_log(failed[0].error.message, failed[0].error.traceback)
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
        if not (score.scored_samples and scored[score.name]) and (share is None or not untrained):
            why = next((e for s in samples if (e := _reason(s.scores or {}, score))), "")
            raise EvaluationError(f"task {name}: scorer {score.name} scored 0 of {expected} samples{why}")
    return scored


def _none_answered(scores: list[dict[str, Score]], score: EvalScore) -> bool:
    """Whether all that a scorer gave is "N" (which inspect-ai's accuracy counts as wrong) or NaN."""
    given = [found for s in scores if (found := s.get(score.name) or s.get(score.scorer)) is not None]
    values = [g.value.get(score.name) if isinstance(g.value, dict) else g.value for g in given]
    return bool(values) and all(v == NOANSWER or v != v for v in values)  # NaN alone is not itself


def _reason(scores: dict[str, Score], score: EvalScore) -> str:
    """Why a scorer did not score a sample, in its own words, as the end of a message."""
    given = scores.get(score.name) or scores.get(score.scorer)
    said = given and (given.explanation or given.reason)
    return f"; the first: {one_line(said)}" if said else ""
