"""Runs inspect-ai tasks over the model in memory and makes sure that every sample was answered and scored."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval
from inspect_ai.log import EvalLog

from cruijff_kit.config import RunConfig
from cruijff_kit.errors import UserError, one_line
from cruijff_kit.evaluation.engine import ChatModel
from cruijff_kit.evaluation.provider import open_model
from cruijff_kit.evaluation.tasks import TASKS
from cruijff_kit.folder import RunFolder
from cruijff_kit.hints import did_you_mean
from cruijff_kit.plan import Plan
from cruijff_kit.progress import progress, say
from cruijff_kit.result import Evaluation


class EvaluationError(RuntimeError):
    """A task did not answer and score all its samples; the message says which and why."""


def evaluate(
    chat_model: ChatModel, config: RunConfig, plan: Plan, folder: RunFolder, epoch: int, config_hash: str
) -> list[Evaluation]:
    """Every task of the config, answered by the trained model.

    Raises:
        EvaluationError: a task raised, or left a sample unanswered or unscored.
    """
    saved = str(folder.epoch(epoch)) if folder.epoch(epoch).exists() else None
    adapter = {"rank": config.lora.rank, "alpha": config.lora.alpha, "epoch": epoch, "folder": saved}
    metadata = {"run": config.run_name, "config_hash": config_hash, "data_hash": plan.data_hash, "adapter": adapter}
    return [
        run_task(name, chat_model, config, folder.eval, epoch, metadata, plan.prompts_checked.get(name, 0))
        for name in config.eval.tasks
    ]


def run_task(
    name: str,
    chat_model: ChatModel,
    config: RunConfig,
    log_dir: Path,
    epoch: int | None,
    metadata: dict[str, Any],
    prompts_checked: int = 0,
) -> Evaluation:
    """One task, one .eval log, one Evaluation.

    Raises:
        EvaluationError: the task raised, or left a sample unanswered or unscored.
    """
    started = time.monotonic()
    task = build_task(name, config)
    who = "untrained model" if epoch is None else f"epoch {epoch}"
    with progress(f"{name}, {who}", min(len(task.dataset), config.eval.limit or len(task.dataset))) as bar:
        model = open_model(chat_model, config.model.name, config.eval.batch_size, bar.advance)
        log = run_inspect(task, model, config, log_dir, {"base_model": config.model.path, **metadata})
    samples = _check(name, log)
    metrics = {s.name: {m: v.value for m, v in s.metrics.items()} for s in log.results.scores}
    seconds = round(time.monotonic() - started, 3)
    first = next(iter(metrics.values()), {})
    say(f"{name}, {who}: " + ", ".join(f"{m} {v:.3f}" for m, v in first.items()) + f" ({samples} samples, {seconds} s)")
    return Evaluation(name, epoch, samples, metrics, log.location, seconds, prompts_checked)


def build_task(name: str, config: RunConfig) -> Task:
    """The inspect-ai task of a name, with the run's data and prompt.

    Raises:
        UserError: no such task, or malformed data.
    """
    check_tasks(config)
    dataset = config.dataset
    return TASKS[name](
        data=dataset.path,
        split=dataset.test_split,
        prompt=dataset.prompt,
        system_prompt=dataset.system_prompt,
        input_column=dataset.column_map["input"],
        output_column=dataset.column_map["output"],
        messages_column=dataset.column_map.get("messages"),
        format=dataset.format,
        split_column=dataset.split_column,
        type=dataset.type,
        max_samples=dataset.max_test_samples,
        sample_seed=dataset.sample_seed,
    )


def check_tasks(config: RunConfig) -> None:
    """Raises UserError if a task of the config does not exist."""
    for name in config.eval.tasks:
        if name not in TASKS:
            raise UserError(f"eval.tasks: {name} does not exist; {did_you_mean(name, [*TASKS])}")


def run_inspect(task: Task, model, config: RunConfig, log_dir: Path, metadata: dict[str, Any]) -> EvalLog:
    """inspect-ai's eval with what must hold in a job: no display, no server, no retries; the first error ends it."""
    settings = config.eval
    options: dict[str, Any] = {
        "model": model,
        "metadata": metadata,
        "limit": settings.limit,
        "log_dir": str(log_dir),
        "log_format": "eval",
        "log_samples": True,
        "log_realtime": False,
        "log_level": "warning",
        "display": "none",
        "score_display": False,  # metrics of the samples so far, after each: nobody sees them
        "ctl_server": False,
        "fail_on_error": True,
        "score": True,
        "max_samples": settings.batch_size,
        "max_connections": settings.batch_size,
        "max_tokens": settings.max_tokens,
        "logprobs": True if settings.logprobs or settings.top_logprobs else None,
        "top_logprobs": settings.top_logprobs,
    }
    try:
        return _outside_event_loop(lambda: eval(task, **options))[0]
    finally:
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


def _check(name: str, log: EvalLog) -> int:
    """Number of samples that were answered and scored: all of them."""
    if log.status == "cancelled":  # inspect-ai took the Ctrl-C
        raise KeyboardInterrupt
    if log.status != "success":
        reason = log.error.message if log.error else log.status
        raise EvaluationError(f"task {name} ended as {log.status}: {one_line(reason)}")
    samples, expected = log.samples or [], log.results.total_samples
    failed = [s for s in samples if s.error]
    if failed:
        raise EvaluationError(
            f"task {name}: {len(failed)} of {expected} samples failed, first: {failed[0].error.message}"
        )
    scored = [s for s in samples if s.scores]
    if not expected or len(scored) != expected:
        raise EvaluationError(f"task {name}: {len(scored)} of {expected} samples were scored")
    return expected
