"""Keep adapters as fp32 master weights (Micikevicius et al. 2018, arXiv 1710.03740), whatever the base's precision.

A step of Adam is about as long as the learning rate. bf16 has 8 bits of precision: half of the distance between neighbours
near 0.02 is 6e-5, so at lr=5e-5 79% of A's entries never changed (tests/tiny/llama, 80 steps). The parameters, their
gradients and the optimiser's moments are fp32; matrix products use a copy in the precision of their input.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from cruijff_kit.models.compat import DoRALinear, LoRALinear, TransformerDecoder
from cruijff_kit.models.dora import BiasedDoRALinear


class MasterLinear(nn.Linear):
    """A matrix of an adapter: multiplies in its input's precision; its gradient is fp32."""

    copy: torch.Tensor | None = None
    """Within `cast_once`, the weight in the base's precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the matrix, [..., in_dim] -> [..., out_dim]."""
        return F.linear(x, cast_weight(self, x.dtype))


def cast_weight(matrix: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """Return a matrix of an adapter, [out_dim, in_dim], in a dtype; gradients flow to its parameter."""
    copy = getattr(matrix, "copy", None)
    return matrix.weight.to(dtype) if copy is None else copy


@contextlib.contextmanager
def cast_once(model: TransformerDecoder) -> Iterator[None]:
    """Cast all adapter matrices of a model in one call, for the forward and backward pass inside this context.

    Casting them one by one took 3% of a small step on a CPU, and on a GPU each cast is a kernel. The context must include
    the backward pass, because activation checkpointing computes layers again, and compiled layers would differ then.
    """
    matrices, dtype = model.adapter_matrices, model.tok_embeddings.weight.dtype
    if dtype == torch.float32 or not matrices:
        yield
        return
    for matrix, copy in zip(matrices, _Cast.apply(dtype, *(m.weight for m in matrices)), strict=True):
        matrix.__dict__["copy"] = copy  # no parameter or buffer of the module
    try:
        yield
    finally:
        for matrix in matrices:
            del matrix.__dict__["copy"]


class _Cast(torch.autograd.Function):
    """Casts tensors to another dtype, and their gradients back."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        ctx.dtype = tensors[0].dtype
        return tuple(_cast(tensors, dtype))

    @staticmethod
    def backward(ctx, *grads):
        return None, *_cast(grads, ctx.dtype)


def _cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def use_master_weights(model: TransformerDecoder) -> None:
    """Make a model's adapters fp32 in place, and list the matrices for `cast_once` in `model.adapter_matrices`.

    Args:
        model: on the meta device, in any precision.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear | DoRALinear)]
    for layer in layers:
        for matrix in (layer.lora_a, layer.lora_b):
            matrix.float().__class__ = MasterLinear
        if isinstance(layer, DoRALinear):
            layer.magnitude.data = layer.magnitude.data.float()
        if type(layer) is DoRALinear:
            layer.__class__ = BiasedDoRALinear
    # DoRA multiplies B by the ratio of magnitude and row norm before it casts it.
    model.adapter_matrices = [layer.lora_a for layer in layers]
    model.adapter_matrices += [layer.lora_b for layer in layers if isinstance(layer, LoRALinear)]
