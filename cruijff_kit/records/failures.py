"""Why runs fail: the causes that retries distinguish."""

import dataclasses
from typing import Any

from cruijff_kit.config.run import RunConfig
from cruijff_kit.records.result import Failure
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError, one_line

OUT_OF_GPU_MEMORY = "out_of_gpu_memory"
OUT_OF_MEMORY = "out_of_memory"
NOT_FINITE = "not_finite"
USER_ERROR = "user_error"
ERROR = "error"
KILLED = "killed"
TIME_LIMIT = "time_limit"
STOPPED = "stopped"  # by a signal: preemption, the time limit, a person
NODE_FAILURE = "node_failure"
CAUSES = (OUT_OF_GPU_MEMORY, OUT_OF_MEMORY, NOT_FINITE, USER_ERROR, ERROR, KILLED, TIME_LIMIT, STOPPED, NODE_FAILURE)


def describe_failure(error: BaseException, phase: str) -> Failure:
    """Describe an exception for result.json.

    Args:
        phase: setup, baseline, train or evaluate.
    """
    return Failure(type(error).__name__, one_line(error), phase, redaction.format_traceback(error), find_cause(error))


def find_cause(error: BaseException) -> str:
    """Return the cause of an exception; torch's exceptions are recognised by name, without importing torch."""
    if isinstance(error, UserError):
        return USER_ERROR
    if type(error).__name__ == "OutOfMemoryError":
        return OUT_OF_GPU_MEMORY
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return OUT_OF_MEMORY
    if type(error).__name__ == "WorkerDied":
        return KILLED
    return NOT_FINITE if isinstance(error, FloatingPointError) else ERROR


def describe_exit(exit_code: int) -> str:
    """Describe an exit code in words; 128 + N is signal N."""
    return f"killed by signal {exit_code - 128}" if exit_code > 128 else f"exit code {exit_code}"


def apply_retry_overrides(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The config with the micro-batch that memory allowed before, in both places where it stands."""
    changed = {k: v for k, v in changes.items() if k in ("batch_size", "gradient_accumulation_steps")}
    return dataclasses.replace(config, **changed, torchtune={**config.torchtune, **changed}) if changed else config
