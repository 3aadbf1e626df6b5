"""Validation over a whole split."""

from collections.abc import Callable

import torch

from cruijff_kit.compat import TransformerDecoder
from cruijff_kit.data.instruct import Example

_ROWS = 32  # rows per forward pass; without a backward pass memory is small


@torch.no_grad()
def validation_sums(
    model: TransformerDecoder,
    examples: list[Example],
    loss: Callable[[list[Example]], tuple[torch.Tensor, int]],
) -> tuple[float, int]:
    """Summed loss of all labelled tokens, and their number: every row counts once, also those of a last, smaller batch.

    Args:
        model: put into eval mode meanwhile.
        examples: the split.
        loss: summed loss (scalar) and labelled tokens of some examples.
    """
    training = model.training
    model.eval()
    try:
        by_length = sorted(examples, key=lambda e: len(e.tokens))
        sums = [loss(by_length[i : i + _ROWS]) for i in range(0, len(by_length), _ROWS)]
        return sum(total.item() for total, _ in sums), sum(labels for _, labels in sums)
    finally:
        model.train(training)
