"""Why runs end before they are done, and what starting again would change: the causes that retries distinguish."""

import dataclasses
from typing import Any

from cruijff_kit.config import RunConfig
from cruijff_kit.errors import UserError

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


def cause_of(error: BaseException) -> str:
    """The cause that an exception stands for (torch's are known by name: this module does not import it)."""
    if isinstance(error, UserError):
        return USER_ERROR
    if type(error).__name__ == "OutOfMemoryError":
        return OUT_OF_GPU_MEMORY
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return OUT_OF_MEMORY
    return NOT_FINITE if isinstance(error, FloatingPointError) else ERROR


def how_it_ended(exit_code: int) -> str:
    """An exit code in words; 128 + N stands for signal N."""
    return f"killed by signal {exit_code - 128}" if exit_code > 128 else f"exit code {exit_code}"


def with_changes(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The config with another micro-batch (`smaller_micro_batch`), in both places where it stands."""
    changed = {k: v for k, v in changes.items() if k in ("batch_size", "gradient_accumulation_steps")}
    return dataclasses.replace(config, **changed, torchtune={**config.torchtune, **changed}) if changed else config


def smaller_micro_batch(config: RunConfig, changes: dict[str, Any]) -> dict[str, Any] | None:
    """Half the rows per forward pass and twice the passes: the same rows per update. None if one row is left.

    An odd batch is divided by its smallest divisor.

    Args:
        config: of the run, as frozen.
        changes: what retries have changed before.
    """
    used = with_changes(config, changes)
    size = used.batch_size
    divisor = next((d for d in range(2, size + 1) if size % d == 0), None)
    if divisor is None:
        return None
    return {
        "batch_size": size // divisor,
        "gradient_accumulation_steps": used.gradient_accumulation_steps * divisor,
    }
