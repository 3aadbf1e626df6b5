"""Validate on a whole split."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cruijff_kit.data.examples import IGNORE, Example
from cruijff_kit.models.compat import TransformerDecoder
from cruijff_kit.training.loss import StepOutput

_ROWS = 32  # rows per forward pass; without a backward pass memory is small


def validation_batches(examples: list[Example]) -> list[list[Example]]:
    """Batch all rows by length; the last batch may be smaller."""
    by_length = sorted(examples, key=lambda e: len(e.tokens))
    return [by_length[i : i + _ROWS] for i in range(0, len(by_length), _ROWS)]


def validation_sums(
    batches: list[list[Example]], forward_only: Callable[[list[Example]], StepOutput]
) -> tuple[float, int]:
    """Return the summed loss of all labelled tokens of some batches, and the number of these tokens."""
    outputs = [forward_only(batch) for batch in batches]
    return sum(output.loss_sum.item() for output in outputs), sum(output.num_labels for output in outputs)


class RowLosses:
    """The validation loss of each row, for paired tests between two runs.

    A user's own loss function without `position_losses` gives no row losses.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[list[Example], torch.Tensor]] = []

    def wrap(self, loss_fn: Any, examples: list[Example]) -> Callable:
        """Wrap the loss function of some rows, so that the loss of each row is recorded."""
        if not hasattr(loss_fn, "position_losses"):
            return loss_fn

        def compute_loss(hidden: torch.Tensor, targets: torch.Tensor, output: Callable) -> torch.Tensor:
            losses = loss_fn.position_losses(hidden, targets, output).double()
            row_losses = torch.stack([part.sum() for part in losses.split([_count_labels(e) for e in examples])])
            self._batches.append((examples, row_losses))
            return row_losses.sum()

        return compute_loss

    def pop(self) -> dict[int, tuple[float, int]]:
        """Return row -> (summed loss, number of labelled tokens) since the last call, and reset.

        A row that was computed twice has its last loss.
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
    """Return a context in which the model is in eval mode and computes no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
