"""Calls inspect-ai's eval()."""

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval
from inspect_ai.log import EvalLog
from inspect_ai.model import Model

from cruijff_kit.config.run import RunConfig
from cruijff_kit.data.tiers import RED
from cruijff_kit.evaluation import log_redaction
from cruijff_kit.util import redaction


def run_inspect(
    task: Task, model, config: RunConfig, log_dir: Path, metadata: dict[str, Any], score: bool = True
) -> EvalLog:
    """Run one task with what must hold in a job: no display, no server, no retries; the first error ends it.

    The log of red data is not in `log_dir` but in memory, whole.

    Raises:
        UserError: the data is red, and something installed would see the samples.
    """
    options = {"metadata": metadata, "score": score, **generation_options(task, config)}
    if config.dataset.tier != RED:
        return call_inspect([task], [model], config, **options, log_dir=str(log_dir))[0]
    with log_redaction.kept_in_memory() as folder, redaction.silence():
        return call_inspect([task], [model], config, **options, log_dir=folder, **log_redaction.IN_MEMORY)[0]


def generation_options(task: Task, config: RunConfig) -> dict[str, Any]:
    """Options of eval() for generation, which differ from task to task."""
    settings = config.eval
    return {
        "max_tokens": task.config.max_tokens or settings.max_tokens,
        "logprobs": True if settings.logprobs or settings.top_logprobs else None,
        "top_logprobs": settings.top_logprobs,
    }


def call_inspect(tasks: list[Task], models: list[Model], config: RunConfig, **own_options: Any) -> list[EvalLog]:
    """Call inspect-ai's eval() with the options that all our calls have in common."""
    settings = config.eval
    options: dict[str, Any] = {
        "model": models[0],  # of tasks that have none of their own
        "limit": settings.limit,
        "log_format": "eval",
        "log_samples": True,
        "log_realtime": False,
        "log_buffer": 1000,  # samples, instead of up to ten: an incomplete log is rewritten, never read
        "log_level": "warning",
        "display": "none",
        "score_display": False,  # metrics of the samples so far, after each: nobody sees them
        "ctl_server": False,
        "fail_on_error": True,
        "max_samples": settings.batch_size,
        "max_connections": settings.batch_size,
    } | own_options
    thresholds = gc.get_threshold()
    gc.set_threshold(10_000, *thresholds[1:])  # a quarter of inspect-ai's own time went into looking for garbage
    try:
        return call_outside_event_loop(lambda: eval(tasks, **options))
    finally:
        gc.set_threshold(*thresholds)
        for model in models:
            model.api.end()


def call_outside_event_loop(call: Callable[[], Any]) -> Any:
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
