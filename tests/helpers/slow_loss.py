"""A loss that waits, for runs that tests catch in the middle of training: they leave the processors to other tests."""

import os
import time
from collections.abc import Callable

import torch

from cruijff_kit.training.loss import LabelledCrossEntropy


class SlowCrossEntropy(LabelledCrossEntropy):
    """The recipe's own loss, after SLOW_LOSS_SECONDS (0.1 unless it is set) in each step."""

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor, output: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """As LabelledCrossEntropy."""
        if torch.is_grad_enabled():
            time.sleep(float(os.environ.get("SLOW_LOSS_SECONDS", "0.1")))
        return super().forward(hidden, targets, output)
