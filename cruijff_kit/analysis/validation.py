"""The validation loss row by row, as recipes leave it in validation_losses.json: what tells whether one is lower.

{"epoch": N, "row": [row of the split], "loss": [its summed loss], "labels": [its labelled tokens]}
"""

import json
from typing import TYPE_CHECKING

from cruijff_kit.folder import RunFolder
from cruijff_kit.result import RunResult

if TYPE_CHECKING:
    import numpy as np


def row_losses(runs: list[RunResult]) -> "np.ndarray | None":
    """[runs, rows] numbers whose mean over rows is each run's validation loss; None where a run has left none, or of other
    rows.

    The loss is a mean over tokens: rows with more of them weigh more.
    """
    import numpy as np

    found = [_read(r) for r in runs]
    if not found or None in found or len({f[1] for f in found}) > 1:
        return None
    labels = np.array(found[0][1], dtype=float)
    if len(labels) < 2 or labels.sum() <= 0:
        return None
    losses = np.array([f[0] for f in found], dtype=float)
    total, n = labels.sum(), len(labels)
    means = losses.sum(1, keepdims=True) / total
    # Linearised ratio: a row's share of the error of sum(loss) / sum(tokens).
    return means + (losses - means * labels) * n / total


def _read(result: RunResult) -> tuple[tuple[float, ...], tuple[int, ...]] | None:
    try:
        tree = json.loads(RunFolder(result.paths["run"]).validation_losses.read_text(encoding="utf-8"))
        losses, labels = tuple(tree["loss"]), tuple(tree["labels"])
        is_of_last = tree["epoch"] == len(result.training["validation_losses"]) - 1
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (losses, labels) if is_of_last and len(losses) == len(labels) else None
