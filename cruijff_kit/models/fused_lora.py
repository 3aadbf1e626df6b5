"""Fuse LoRA layers: add the adapters' products into the base's output in place (addmm), so that large tensors are read and
written once. The sums are those of torchtune's LoRALinear, rounded less often.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from cruijff_kit.models.compat import LoRALinear, NF4Tensor, TransformerDecoder
from cruijff_kit.models.master_weights import cast_weight


class FusedLoRALinear(LoRALinear):
    """A LoRALinear without bias, dropout or quantisation; `fuse_lora` makes it. Not tested on a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer, [..., in_dim] -> [..., out_dim]."""
        if self.disabled:
            return super().forward(x)
        rows = x.flatten(0, -2)
        span = AdapterSpan(0, len(rows), 1, self.alpha / self.rank)
        matrices = (cast_weight(matrix, x.dtype) for matrix in (self.lora_a, self.lora_b))
        out = AdaptedLinear.apply(rows, self.weight, None, [span], *matrices)
        return out.unflatten(0, x.shape[:-1])


class AdapterSpan(NamedTuple):
    """Consecutive rows of several adapters, with the same number of rows each."""

    begin: int
    end: int
    count: int  # type: ignore[assignment]  # a tuple has a method of this name
    """Number of adapters."""
    scale: float | torch.Tensor
    """alpha / rank: one number for all adapters, or [count, 1, 1]."""

    def select(self, rows: torch.Tensor) -> torch.Tensor:
        """Select the span's rows, [all rows, dim] -> [rows, dim], or [count, rows, dim] of several adapters; a view."""
        span_rows = rows[self.begin : self.end]
        return span_rows if self.count == 1 else span_rows.unflatten(0, (self.count, -1))


class AdaptedLinear(torch.autograd.Function):
    """Computes x W^T + bias, plus scale x A^T B^T of its own adapter on the rows of each span.

    The adapters of a span multiply in one batched product; smaller ranks are padded with zeros.

    Args:
        x: [rows, in_dim].
        weight, bias: the base's.
        spans: the adapters' rows; they must not overlap.
        matrices: A [rank, in_dim] and B [out_dim, rank] of each adapter in turn.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, spans, *matrices):
        out = F.linear(x, weight, bias)
        saved = [*_stack_by_span(spans, matrices)]
        for n, (span, (a, b)) in enumerate(zip(spans, saved, strict=True)):
            down = span.select(x) @ a.mT
            _add_product(span.select(out), down, b.mT, span.scale)
            saved[n] += (down,)
        ctx.save_for_backward(x, weight, *itertools.chain(*saved))
        ctx.spans, ctx.ranks = spans, [len(a) for a in matrices[::2]]
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, *saved = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        gradients, ranks = [], iter(ctx.ranks)
        for span, a, b, down in zip(ctx.spans, saved[::3], saved[1::3], saved[2::3], strict=True):
            grad_out = span.select(grad)
            grad_down = (grad_out @ b).mul_(span.scale)
            if grad_x is not None:
                _add_product(span.select(grad_x), grad_down, a, 1.0)
            grad_a, grad_b = grad_down.mT @ span.select(x), (grad_out.mT @ down).mul_(span.scale)
            span_ranks = [*itertools.islice(ranks, span.count)]
            if span.count == 1:
                gradients += [grad_a, grad_b]
                continue
            for adapter_grad_a, adapter_grad_b, rank in zip(grad_a, grad_b, span_ranks, strict=True):
                gradients += [adapter_grad_a[:rank], adapter_grad_b[:, :rank].contiguous()]
        return grad_x, None, None, None, *gradients


def _stack_by_span(
    spans: Sequence[AdapterSpan], matrices: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield A and B for each span: the matrices of one adapter, or stacks of the matrices of several."""
    iterator = iter(matrices)
    for span in spans:
        pairs = [*itertools.islice(iterator, 2 * span.count)]
        yield (pairs[0], pairs[1]) if span.count == 1 else (stack_padded(pairs[::2], 0), stack_padded(pairs[1::2], 1))


def stack_padded(matrices: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Stack matrices that may differ in rank (dimension `dim`), [matrices, ...]; smaller ranks are padded with zeros."""
    if len({m.shape for m in matrices}) == 1:
        return torch.stack(matrices)
    shape = list(matrices[0].shape)
    shape[dim] = max(m.shape[dim] for m in matrices)
    stack = matrices[0].new_zeros(len(matrices), *shape)
    for padded, m in zip(stack, matrices, strict=True):
        padded.narrow(dim, 0, m.shape[dim]).copy_(m)
    return stack


def _add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float | torch.Tensor) -> None:
    """Add scale x left right to `out` in place; all are matrices, or stacks of matrices."""
    if isinstance(scale, torch.Tensor):
        left, scale = (left * scale).to(left.dtype), 1.0
    (out.addmm_ if out.ndim == 2 else out.baddbmm_)(left, right, alpha=scale)


def fuse_lora(model: TransformerDecoder) -> None:
    """Turn a model's LoRA layers into FusedLoRALinear in place, where possible. Safe to call again."""
    if getattr(model, "lora_is_fused", False):
        return
    for module in model.modules():
        if type(module) is not LoRALinear or module.bias is not None:
            continue
        is_quantized = isinstance(module.weight.data, NF4Tensor)
        if not is_quantized and isinstance(module.dropout, nn.Identity):
            module.__class__ = FusedLoRALinear
    model.lora_is_fused = True
