"""Validation over a whole split."""

from collections.abc import Callable

import torch

from cruijff_kit.compat import TransformerDecoder
from cruijff_kit.data.instruct import Example

_ROWS = 32  # rows per forward pass; without a backward pass memory is small


def validation_batches(examples: list[Example]) -> list[list[Example]]:
    """Rows of like length together; every row once, the last batch may be smaller."""
    by_length = sorted(examples, key=lambda e: len(e.tokens))
    return [by_length[i : i + _ROWS] for i in range(0, len(by_length), _ROWS)]


@torch.no_grad()
def validation_sums(
    model: TransformerDecoder,
    batches: list[list[Example]],
    loss: Callable[[list[Example]], tuple[torch.Tensor, int]],
) -> tuple[float, int]:
    """Summed loss of all labelled tokens, and their number.

    Args:
        model: put into eval mode meanwhile.
        batches: of the split.
        loss: summed loss (scalar) and labelled tokens of some examples.
    """
    training = model.training
    model.eval()
    try:
        sums = [loss(batch) for batch in batches]
        return sum(total.item() for total, _ in sums), sum(labels for _, labels in sums)
    finally:
        model.train(training)
