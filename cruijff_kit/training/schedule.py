"""Compute the number of optimiser steps from a config and the number of rows. No torch: dry runs and checks use it."""

import math
from dataclasses import dataclass
from typing import Any

from cruijff_kit.util.errors import UserError

# The default warm-up: a tenth of the steps, and at most this many; 5 steps have none, 50 have 5, 5,000 have 100.
_WARMUP_SHARE, _MAX_WARMUP = 10, 100


@dataclass(frozen=True)
class StepSchedule:
    """Numbers of optimiser steps, and the rows of each."""

    per_epoch: int
    """Steps of an epoch."""
    total: int
    """Steps of all epochs."""
    warmup: int
    """Steps during which the learning rate rises."""
    rows_per_update: int
    """Rows of a step, summed over all processes."""
    processes: int
    """Processes that share the rows."""

    @classmethod
    def from_config(cls, cfg: dict[str, Any], rows: int) -> "StepSchedule":
        """Compute the schedule from a torchtune config and the number of training rows.

        No row is dropped: the last step of an epoch may have fewer rows.

        Raises:
            UserError: the warm-up is as long as the training.
        """
        processes = cfg["nproc_per_node"]
        rows_per_update = cfg["batch_size"] * cfg["gradient_accumulation_steps"] * processes
        per_epoch = math.ceil(rows / rows_per_update)
        if cfg["max_steps_per_epoch"] is not None:
            per_epoch = min(per_epoch, cfg["max_steps_per_epoch"])
        total = per_epoch * cfg["epochs"]
        warmup = cfg["lr_scheduler"].get("num_warmup_steps", 0)
        if warmup is None:
            warmup = min(total // _WARMUP_SHARE, _MAX_WARMUP)
        steps = cls(per_epoch, total, warmup, rows_per_update, processes)
        if steps.warmup >= steps.total:
            raise UserError(
                f"num_warmup_steps={steps.warmup} never ends: training has {steps.total} steps "
                f"({rows} rows, {rows_per_update} per step, "
                f"{cfg['epochs']} epochs); set num_warmup_steps to at most {max(0, steps.total // 3)}"
            )
        return steps


def resolve_lr_scheduler(cfg: dict[str, Any], warmup: int) -> dict[str, Any]:
    """Return the config of the learning-rate schedule, with the number of warm-up steps in place of null."""
    node = cfg["lr_scheduler"]
    return node | {"num_warmup_steps": warmup} if node.get("num_warmup_steps", 0) is None else node


def smaller_micro_batch(batch_size: int, rows_per_update: int) -> dict[str, int] | None:
    """Divide the rows per forward pass by their smallest divisor, after memory has run out.

    Args:
        batch_size: rows per forward pass until now.
        rows_per_update: of one process; they stay as they are.
    Returns:
        batch_size and gradient_accumulation_steps; None if `batch_size` is 1.
    """
    divisor = next((d for d in range(2, batch_size + 1) if batch_size % d == 0), None)
    if divisor is None:
        return None
    size = batch_size // divisor
    return {"batch_size": size, "gradient_accumulation_steps": rows_per_update // size}
