"""Validation loss over a whole split."""

import torch

from cruijff_kit.compat import TransformerDecoder
from cruijff_kit.data.batches import make_batch
from cruijff_kit.data.instruct import Example
from cruijff_kit.training.loss import LabelledCrossEntropy, attention_cost, batch_loss

_ROWS = 32  # rows per forward pass; without a backward pass memory is small


@torch.inference_mode()
def validation_loss(
    model: TransformerDecoder, examples: list[Example], loss_fn: LabelledCrossEntropy, device: torch.device
) -> float:
    """Mean loss per labelled token over all examples: sum of losses / number of labelled tokens.

    Every row counts once, also those of the last, smaller batch. The model's training mode is put back.
    """
    training = model.training
    model.eval()
    try:
        by_length = sorted(examples, key=lambda e: len(e.tokens))
        total, count, cost = 0.0, 0, attention_cost(model)
        for i in range(0, len(by_length), _ROWS):
            batch = make_batch(by_length[i : i + _ROWS], cost).to(device)
            total += batch_loss(model, batch, loss_fn).item()
            count += len(batch.targets)
        return total / count
    finally:
        model.train(training)
