"""The validation loss row by row, from validation_losses.json, for tests of whether one loss is lower than another.

Recipes write {"epoch": N, "row": [row of the split], "loss": [its summed loss], "labels": [its labelled tokens]}, and with
dataset.unit_column "unit": [a number that rows of one unit share].
"""

import json
from typing import TYPE_CHECKING, NamedTuple

from cruijff_kit.records.result import RunResult
from cruijff_kit.records.run_folder import RunFolder

if TYPE_CHECKING:
    import numpy as np


class _RowLosses(NamedTuple):
    """The losses of one run; the rows of two runs are the same if their labels and units are."""

    losses: tuple[float, ...]
    """Summed loss of each row."""
    labels: tuple[int, ...]
    """Number of labelled tokens of each row."""
    unit: tuple[int, ...] | None
    """Number of each row's unit; None without units."""


def read_row_losses(runs: list[RunResult]) -> "np.ndarray | None":
    """Return [runs, rows] numbers whose mean over rows is each run's validation loss.

    The loss is a mean over tokens: rows with more tokens weigh more. Rows of one unit (dataset.unit_column) count as one.

    Returns:
        None where a run has no losses of its last epoch, or the runs have different rows.
    """
    import numpy as np

    files = [file for r in runs if (file := _read_run(r)) is not None]
    if not files or len(files) < len(runs) or len({(f.labels, f.unit) for f in files}) > 1:
        return None
    labels: np.ndarray = np.array(files[0].labels, dtype=float)
    losses: np.ndarray = np.array([f.losses for f in files], dtype=float)
    unit = files[0].unit
    if unit is not None:
        labels = np.bincount(unit, labels)
        losses = np.stack([np.bincount(unit, row) for row in losses])
    if len(labels) < 2 or labels.sum() <= 0:
        return None
    total, n = labels.sum(), len(labels)
    means = losses.sum(1, keepdims=True) / total
    # Linearised ratio: a row's share of the error of sum(loss) / sum(tokens).
    linearised: np.ndarray = means + (losses - means * labels) * n / total
    return linearised


def _read_run(result: RunResult) -> _RowLosses | None:
    try:
        tree = json.loads(RunFolder(result.paths["run"]).validation_losses.read_text(encoding="utf-8"))
        losses, labels = tuple(tree["loss"]), tuple(tree["labels"])
        unit = tuple(tree["unit"]) if "unit" in tree else None
        is_last_epoch = tree["epoch"] == len(result.training["validation_losses"]) - 1
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _RowLosses(losses, labels, unit) if is_last_epoch and len(losses) == len(labels) else None
