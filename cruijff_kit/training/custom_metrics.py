"""Compute a user's own metrics from the logits, in training and in validation.

A metric is a function (logits, labels, tokenizer, ignore_index) -> {name: value}, given by its dotted path:

    logits        [rows, positions, vocabulary] fp32
    labels        [rows, positions]: labels[r, p] is the token that logits[r, p] predicts, or ignore_index
    tokenizer     the run's (models.tokenizer.ChatTokenizer: encode, decode, eos_id)

The positions are the target positions of each row; shorter rows are padded with ignore_index. The values that functions
return are averaged over batches, weighted by labelled tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from cruijff_kit.data.examples import IGNORE, Example
from cruijff_kit.data.packing import PackedSequence, unpack
from cruijff_kit.models.compat import get_component
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.redaction import quote_names, silence

Metric = Callable[[torch.Tensor, torch.Tensor, Any, int], dict[str, float]]
Loss = Callable[[torch.Tensor, torch.Tensor, Callable], torch.Tensor]
_RESERVED = {
    "epoch",
    "step",
    "loss",
    "lr",
    "grad_norm",
    "validation_loss",
    "tokens_per_second_per_gpu",
    "peak_memory_bytes",
}


class CustomMetrics:
    """The metrics of a run, computed with the loss and averaged until `pop_means`.

    Args:
        names: dotted paths of the functions.
        tokenizer: argument of the functions.
    Raises:
        UserError: a name cannot be imported or is no function.
    """

    def __init__(self, names: list[str], tokenizer: Any) -> None:
        self.functions: dict[str, Metric] = {name: _import_function(name) for name in names}
        self.tokenizer = tokenizer
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # name -> [sum of value x weight, weight]

    def wrap(self, loss_fn: Loss, examples: Sequence[Example | PackedSequence]) -> Loss:
        """Wrap the loss function of some rows, so that their metrics are computed, too."""
        if not self.functions:
            return loss_fn

        def compute_loss(hidden: torch.Tensor, targets: torch.Tensor, output: Callable) -> torch.Tensor:
            with torch.no_grad():
                self.add(output(hidden.detach()).float(), targets, _count_targets(examples))
            return loss_fn(hidden, targets, output)

        return compute_loss

    def add(self, logits: torch.Tensor, targets: torch.Tensor, num_targets: list[int]) -> None:
        """Compute all metrics of a batch.

        Args:
            logits: [n, vocabulary] of the target positions, row by row.
            targets: [n] target tokens.
            num_targets: number of target tokens of each row.
        Raises:
            UserError: a function raised, or did not return named numbers.
        """
        by_row = pad_sequence(logits.split(num_targets), batch_first=True)
        labels = pad_sequence(targets.split(num_targets), batch_first=True, padding_value=IGNORE)
        for name, function in self.functions.items():
            try:
                with silence():
                    values = {str(k): float(v) for k, v in function(by_row, labels, self.tokenizer, IGNORE).items()}
            except Exception as error:
                raise UserError(f"custom_metrics: {name} raised {type(error).__name__}: {one_line(error)}") from error
            if not quote_names(values) and values:
                raise UserError(
                    f"custom_metrics: {name} returns names that are not names, and the data is red; rename them"
                )
            if reserved := _RESERVED.intersection(values):
                raise UserError(f"custom_metrics: {name} calls a value {min(reserved)!r}, which is reserved; rename it")
            for key, value in values.items():
                self.sums[key][0] += value * len(targets)
                self.sums[key][1] += len(targets)

    def pop_means(self) -> dict[str, float]:
        """Return the means since the last call, and reset."""
        means = {name: total / weight for name, (total, weight) in self.sums.items()}
        self.sums.clear()
        return means


def check_custom_metrics(names: list[str], tokenizer: Any, examples: Sequence[Example | PackedSequence]) -> list[str]:
    """Test every function on two rows with random logits.

    Args:
        names: dotted paths.
        tokenizer: the run's tokenizer.
        examples: rows of the run.
    Returns:
        Names of the values that the functions return.
    Raises:
        UserError: as CustomMetrics.
    """
    metrics, rows = CustomMetrics(names, tokenizer), examples[:2]
    targets = torch.tensor([label for e in rows for label in e.labels if label != IGNORE])
    if names:
        metrics.add(torch.randn(len(targets), tokenizer.vocab_size), targets, _count_targets(rows))
    return list(metrics.pop_means())


def _count_targets(examples: Sequence[Example | PackedSequence]) -> list[int]:
    return [sum(label != IGNORE for label in row.labels) for e in examples for row in unpack(e)]


def _import_function(name: str) -> Metric:
    try:
        with silence():
            function = get_component(name)
    except Exception as error:  # torchtune raises InstantiationError for any failure to import
        cause = error.__cause__ or error
        raise UserError(f"custom_metrics: {name} cannot be imported: {one_line(cause)}") from error
    if not callable(function):
        raise UserError(f"custom_metrics: {name} is a {type(function).__name__}, not a function")
    return function
