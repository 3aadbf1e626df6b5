"""Validation over a whole split."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cruijff_kit.data.examples import IGNORE, Example
from cruijff_kit.models.compat import TransformerDecoder
from cruijff_kit.training.loss import StepOutput

_ROWS = 32  # rows per forward pass; without a backward pass memory is small


def validation_batches(examples: list[Example]) -> list[list[Example]]:
    """Rows of like length together; every row once, the last batch may be smaller."""
    by_length = sorted(examples, key=lambda e: len(e.tokens))
    return [by_length[i : i + _ROWS] for i in range(0, len(by_length), _ROWS)]


def validation_sums(
    batches: list[list[Example]], forward_only: Callable[[list[Example]], StepOutput]
) -> tuple[float, int]:
    """Sum the loss of all labelled tokens of some batches, and count these tokens."""
    outputs = [forward_only(batch) for batch in batches]
    return sum(output.loss_sum.item() for output in outputs), sum(output.num_labels for output in outputs)


class RowLosses:
    """The validation loss row by row: what tells later whether one run's validation loss is lower than another's.

    Of a loss of the user's own, which has no `of_each`, nothing is known of rows.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[list[Example], torch.Tensor]] = []

    def watching(self, loss_fn: Any, examples: list[Example]) -> Callable:
        """The same loss, which also remembers that of each of the rows that it is called for."""
        if not hasattr(loss_fn, "of_each"):
            return loss_fn

        def watched(hidden: torch.Tensor, targets: torch.Tensor, output: Callable) -> torch.Tensor:
            of_each = loss_fn.of_each(hidden, targets, output).double()
            rows = torch.stack([part.sum() for part in of_each.split([_labels(e) for e in examples])])
            self._parts.append((examples, rows))
            return rows.sum()

        return watched

    def take(self) -> dict[int, tuple[float, int]]:
        """Row -> (summed loss, labelled tokens), since they were last taken; of a row that was computed again the last."""
        parts, self._parts = self._parts, []
        return {
            e.row: (loss, _labels(e)) for rows, losses in parts for e, loss in zip(rows, losses.tolist(), strict=True)
        }


def _labels(example: Example) -> int:
    return sum(label != IGNORE for label in example.labels)


@contextmanager
def evaluating(model: TransformerDecoder) -> Iterator[None]:
    """Within this context a model is in eval mode, and nothing keeps a graph."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
