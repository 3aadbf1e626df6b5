"""Compute the cross-entropy of labelled positions only."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cruijff_kit.data.batches import AttentionCost, Batch, Spans
from cruijff_kit.models.compat import TransformerDecoder
from cruijff_kit.models.fused_lora import fuse_lora
from cruijff_kit.training.cpu_kernels import apply_cpu_kernels

# Measured on a CPU: an operation of attention takes this many times as long as one of the linear layers,
# and an attention call, forward and backward, as long as this many pairs.
_SLOWER_ON_CPU, _CALL = 2, 1500


class StepOutput(NamedTuple):
    """Results of a forward pass of some rows."""

    loss_sum: torch.Tensor
    """Summed loss of the labelled tokens, a scalar."""
    num_labels: int
    """Number of labelled tokens."""
    num_tokens: int
    """Number of all tokens."""


def sum_outputs(outputs: Sequence[StepOutput], device: torch.device) -> StepOutput:
    """Add up the outputs of micro-batches, the loss in fp64."""
    loss_sum = sum((output.loss_sum for output in outputs), torch.zeros((), dtype=torch.float64, device=device))
    return StepOutput(loss_sum, sum(o.num_labels for o in outputs), sum(o.num_tokens for o in outputs))


class LabelledCrossEntropy(nn.Module):
    """Sum of the cross-entropy of labelled positions, in fp32.

    Equals torchtune's CEWithChunkedOutputLoss times the number of labelled tokens, but the output projection is computed
    for labelled positions only, which are few for a short answer to a long prompt.

    Args:
        num_output_chunks: with more than `rows_per_chunk` positions, the projection is computed in at most this many
            chunks, whose logits are not kept for the backward pass.
        rows_per_chunk: minimum number of positions per chunk.
    """

    def __init__(self, num_output_chunks: int = 8, rows_per_chunk: int = 512) -> None:
        super().__init__()
        self.num_output_chunks, self.rows_per_chunk = num_output_chunks, rows_per_chunk

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor, output: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Compute the summed loss, a scalar.

        Args:
            hidden: [n, d] normed hidden states of the positions that predict targets.
            targets: [n] token ids.
            output: the model's output projection, [n, d] -> [n, vocabulary].
        """
        chunks = min(self.num_output_chunks, -(-len(targets) // self.rows_per_chunk))
        if chunks <= 1:
            return _cross_entropy(hidden, targets, output)
        return torch.stack(
            [
                checkpoint(_cross_entropy, h, t, output, use_reentrant=False)
                for h, t in zip(hidden.chunk(chunks), targets.chunk(chunks), strict=True)
            ]
        ).sum()

    def position_losses(
        self, hidden: torch.Tensor, targets: torch.Tensor, output: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Compute the loss of each position, [n]; the arguments are those of `forward`."""
        parts = zip(hidden.split(self.rows_per_chunk), targets.split(self.rows_per_chunk), strict=True)
        return torch.cat([_cross_entropy(h, t, output, "none") for h, t in parts])


def _cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, output: Callable, reduction: str = "sum"
) -> torch.Tensor:
    return F.cross_entropy(output(hidden).float(), targets, reduction=reduction)


def hidden_states(
    model: TransformerDecoder, tokens: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor | Spans | None
) -> torch.Tensor:
    """Run the decoder up to its output projection: [b, s] ids -> [b, s, d] normed hidden states."""
    if tokens.device.type == "cpu":
        fuse_lora(model)
        apply_cpu_kernels(model)
    h = model.tok_embeddings(tokens)
    for layer in model.layers:
        h = layer(h, mask=mask, input_pos=positions)
    return model.norm(h)


def batch_loss(model: TransformerDecoder, batch: Batch, loss_fn: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Compute the summed loss of a batch's labelled positions, a scalar with a graph to the adapters."""
    hidden = hidden_states(model, batch.tokens, batch.positions, batch.mask)
    return loss_fn(hidden.flatten(0, 1)[batch.target_positions], batch.targets, model.output)


def attention_cost(model: TransformerDecoder) -> AttentionCost:
    """Estimate the cost of attention in a model on its device, for the choice of a batch's layout."""
    per_token = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    pair = 2 * len(model.layers) * model.num_heads * model.head_dim / per_token
    if next(model.parameters()).device.type != "cpu":
        return AttentionCost(pair)  # a kernel's launch costs more than the pairs that it saves
    return AttentionCost(_SLOWER_ON_CPU * pair, _CALL)
