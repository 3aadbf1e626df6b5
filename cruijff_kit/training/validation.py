"""Validation over a whole split."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cruijff_kit.compat import TransformerDecoder
from cruijff_kit.data.instruct import Example
from cruijff_kit.training.passes import Pass, Story

_ROWS = 32  # rows per forward pass; without a backward pass memory is small


def validation_batches(examples: list[Example]) -> list[list[Example]]:
    """Rows of like length together; every row once, the last batch may be smaller."""
    by_length = sorted(examples, key=lambda e: len(e.tokens))
    return [by_length[i : i + _ROWS] for i in range(0, len(by_length), _ROWS)]


def validation_sums(batches: list[list[Example]], by: Any = None) -> Story[tuple[float, int]]:
    """Summed loss of all labelled tokens of some batches, and their number; `by`: the recipe that asks."""
    sums = []
    for batch in batches:
        loss, labels, _ = yield Pass(batch, learn=False, by=by)
        sums.append((loss.item(), labels))
    return sum(loss for loss, _ in sums), sum(labels for _, labels in sums)


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
