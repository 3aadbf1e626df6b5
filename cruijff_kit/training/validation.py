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
    """Put rows of similar length together; every row once, and the last batch may be smaller."""
    by_length = sorted(examples, key=lambda e: len(e.tokens))
    return [by_length[i : i + _ROWS] for i in range(0, len(by_length), _ROWS)]


def validation_sums(
    batches: list[list[Example]], forward_only: Callable[[list[Example]], StepOutput]
) -> tuple[float, int]:
    """Sum the loss of all labelled tokens of some batches, and count these tokens."""
    outputs = [forward_only(batch) for batch in batches]
    return sum(output.loss_sum.item() for output in outputs), sum(output.num_labels for output in outputs)


class RowLosses:
    """The validation loss of each row, for paired tests of one run's validation loss against another's.

    A loss of the user's own has no `of_each`; then there are no losses of rows.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[list[Example], torch.Tensor]] = []

    def watch(self, loss_fn: Any, examples: list[Example]) -> Callable:
        """Wrap the loss of some rows, so that the loss of each row is recorded."""
        if not hasattr(loss_fn, "of_each"):
            return loss_fn

        def watched(hidden: torch.Tensor, targets: torch.Tensor, output: Callable) -> torch.Tensor:
            of_each = loss_fn.of_each(hidden, targets, output).double()
            rows = torch.stack([part.sum() for part in of_each.split([_count_labels(e) for e in examples])])
            self._batches.append((examples, rows))
            return rows.sum()

        return watched

    def take(self) -> dict[int, tuple[float, int]]:
        """Return row -> (summed loss, labelled tokens) since the last call, and start anew.

        Of a row that was computed twice it is the last loss.
        """
        batches, self._batches = self._batches, []
        return {
            e.row: (loss, _count_labels(e))
            for rows, losses in batches
            for e, loss in zip(rows, losses.tolist(), strict=True)
        }


def _count_labels(example: Example) -> int:
    return sum(label != IGNORE for label in example.labels)


@contextmanager
def eval_mode(model: TransformerDecoder) -> Iterator[None]:
    """Put a model into eval mode without gradients, within this context."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
