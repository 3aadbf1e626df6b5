"""Linear maps with LoRA adapters that touch their large outputs and inputs once: adapters are added within the matrix
products. The sums are those of torchtune's LoRALinear, rounded less often.
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
    """A LoRALinear without bias, dropout or quantisation; made of one by `fuse_lora`. On a GPU it is not tried yet."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        if self.disabled:
            return super().forward(x)
        rows = x.flatten(0, -2)
        span = AdapterSpan(0, len(rows), 1, self.alpha / self.rank)
        matrices = (cast_weight(matrix, x.dtype) for matrix in (self.lora_a, self.lora_b))
        out = AdaptedLinear.apply(rows, self.weight, None, [span], *matrices)
        return out.unflatten(0, x.shape[:-1])


class AdapterSpan(NamedTuple):
    """Rows of several adapters in turn, equally many each."""

    begin: int
    end: int
    count: int  # type: ignore[assignment]  # a tuple has a method of this name
    """How many adapters."""
    scale: float | torch.Tensor
    """alpha / rank of all of them, or of each, [count, 1, 1]."""

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """[all rows, dim] -> [rows, dim] of the one adapter, or [count, rows, dim]; a view."""
        own = rows[self.begin : self.end]
        return own if self.count == 1 else own.unflatten(0, (self.count, -1))


class AdaptedLinear(torch.autograd.Function):
    """x W^T + bias, and on the rows of each span its adapters' scale x A^T B^T.

    The adapters of a span multiply in one batched product, ranks that differ padded with zeros.

    Args:
        x: [rows, in_dim]. matrices: A [rank, in_dim] and B [out_dim, rank] of each adapter in turn.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, spans, *matrices):
        out = F.linear(x, weight, bias)
        saved = [*_by_span(spans, matrices)]
        for n, (span, (a, b)) in enumerate(zip(spans, saved, strict=True)):
            down = span.of(x) @ a.mT
            _add_product(span.of(out), down, b.mT, span.scale)
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
            own = span.of(grad)
            grad_down = (own @ b).mul_(span.scale)
            if grad_x is not None:
                _add_product(span.of(grad_x), grad_down, a, 1.0)
            grad_a, grad_b = grad_down.mT @ span.of(x), (own.mT @ down).mul_(span.scale)
            own_ranks = [*itertools.islice(ranks, span.count)]
            if span.count == 1:
                gradients += [grad_a, grad_b]
                continue
            for own_a, own_b, rank in zip(grad_a, grad_b, own_ranks, strict=True):
                gradients += [own_a[:rank], own_b[:, :rank].contiguous()]
        return grad_x, None, None, None, *gradients


def _by_span(
    spans: Sequence[AdapterSpan], matrices: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield A and B of each span's adapters: matrices of one adapter, stacks of several."""
    left = iter(matrices)
    for span in spans:
        own = [*itertools.islice(left, 2 * span.count)]
        yield (own[0], own[1]) if span.count == 1 else (stack_padded(own[::2], 0), stack_padded(own[1::2], 1))


def stack_padded(matrices: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Stack matrices of one shape but for their ranks (dimension `dim`), [matrices, ...]: smaller ranks end in zeros."""
    if len({m.shape for m in matrices}) == 1:
        return torch.stack(matrices)
    shape = list(matrices[0].shape)
    shape[dim] = max(m.shape[dim] for m in matrices)
    stack = matrices[0].new_zeros(len(matrices), *shape)
    for place, m in zip(stack, matrices, strict=True):
        place.narrow(dim, 0, m.shape[dim]).copy_(m)
    return stack


def _add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float | torch.Tensor) -> None:
    """Add scale x left right to `out`; matrices or stacks of them."""
    if isinstance(scale, torch.Tensor):
        left, scale = (left * scale).to(left.dtype), 1.0
    (out.addmm_ if out.ndim == 2 else out.baddbmm_)(left, right, alpha=scale)


def fuse_lora(model: TransformerDecoder) -> None:
    """Make a model's plain LoRA layers fused ones. Safe to call again."""
    if getattr(model, "lora_is_fused", False):
        return
    for module in model.modules():
        plain = type(module) is LoRALinear and module.bias is None
        in_four_bits = plain and isinstance(module.weight.data, NF4Tensor)
        if plain and not in_four_bits and isinstance(module.dropout, nn.Identity):
            module.__class__ = FusedLoRALinear
    model.lora_is_fused = True
