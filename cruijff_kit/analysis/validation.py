"""The validation loss row by row, as recipes leave it in validation_losses.json: what tells whether one is lower.

{"epoch": N, "row": [row of the split], "loss": [its summed loss], "labels": [its labelled tokens]}, and with
dataset.unit_column "unit": [a number that rows of one unit share].
"""

import json
from typing import TYPE_CHECKING

from cruijff_kit.records.result import RunResult
from cruijff_kit.records.run_folder import RunFolder

if TYPE_CHECKING:
    import numpy as np


def read_row_losses(runs: list[RunResult]) -> "np.ndarray | None":
    """[runs, rows] numbers whose mean over rows is each run's validation loss; None where a run has left none, or of other
    rows. Rows of one unit (dataset.unit_column) are one.

    The loss is a mean over tokens: rows with more of them weigh more.
    """
    import numpy as np

    found = [_read(r) for r in runs]
    if not found or None in found or len({f[1:] for f in found}) > 1:
        return None
    labels, unit = np.array(found[0][1], dtype=float), found[0][2]
    losses = np.array([f[0] for f in found], dtype=float)
    if unit is not None:
        labels = np.bincount(unit, labels)
        losses = np.stack([np.bincount(unit, row) for row in losses])
    if len(labels) < 2 or labels.sum() <= 0:
        return None
    total, n = labels.sum(), len(labels)
    means = losses.sum(1, keepdims=True) / total
    # Linearised ratio: a row's share of the error of sum(loss) / sum(tokens).
    return means + (losses - means * labels) * n / total


def _read(result: RunResult) -> tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...] | None] | None:
    """Losses, labels, units."""
    try:
        tree = json.loads(RunFolder(result.paths["run"]).validation_losses.read_text(encoding="utf-8"))
        losses, labels = tuple(tree["loss"]), tuple(tree["labels"])
        unit = tuple(tree["unit"]) if "unit" in tree else None
        is_of_last = tree["epoch"] == len(result.training["validation_losses"]) - 1
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (losses, labels, unit) if is_of_last and len(losses) == len(labels) else None
