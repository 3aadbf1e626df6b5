"""How many optimiser steps a run takes, by its config and its rows. No torch: the dry run and the checks use it."""

import math
from dataclasses import dataclass
from typing import Any

from cruijff_kit.util.errors import UserError

# The default warm-up: a tenth of the steps, and at most this many; 5 steps have none, 50 have 5, 5,000 have 100.
_WARMUP_SHARE, _MAX_WARMUP = 10, 100


@dataclass(frozen=True)
class StepSchedule:
    """StepSchedule of the optimiser, and the rows that each of them takes."""

    per_epoch: int
    """StepSchedule of an epoch."""
    total: int
    """StepSchedule of all epochs."""
    warmup: int
    """StepSchedule in which the learning rate rises."""
    rows_per_update: int
    """Rows of a step, on all processes together."""
    processes: int
    """Processes that share the rows."""

    @classmethod
    def of(cls, cfg: dict[str, Any], rows: int) -> "StepSchedule":
        """Derive them from a torchtune config and the number of training rows. No row is dropped: the rest is a step.

        Raises:
            UserError: warm-up that would never end.
        """
        processes = cfg["nproc_per_node"]
        each = cfg["batch_size"] * cfg["gradient_accumulation_steps"] * processes
        per_epoch = math.ceil(rows / each)
        if cfg["max_steps_per_epoch"] is not None:
            per_epoch = min(per_epoch, cfg["max_steps_per_epoch"])
        total = per_epoch * cfg["epochs"]
        warmup = cfg["lr_scheduler"].get("num_warmup_steps", 0)
        if warmup is None:
            warmup = min(total // _WARMUP_SHARE, _MAX_WARMUP)
        steps = cls(per_epoch, total, warmup, each, processes)
        if steps.warmup >= steps.total:
            raise UserError(
                f"num_warmup_steps={steps.warmup} never ends: training has {steps.total} steps "
                f"({rows} rows, {each} per step, "
                f"{cfg['epochs']} epochs); set num_warmup_steps to at most {max(0, steps.total // 3)}"
            )
        return steps


def resolve_lr_scheduler(cfg: dict[str, Any], warmup: int) -> dict[str, Any]:
    """The config of the learning-rate schedule, with a number of warm-up steps in place of null."""
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
