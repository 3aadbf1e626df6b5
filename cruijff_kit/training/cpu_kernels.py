"""Replace parts of a model by faster or more reproducible code on a CPU.

Attention accepts concatenated rows (Spans): each row attends to the shared prefix and to itself. It is computed in fp32: in
bf16 torch's kernel takes up to three times as long, most of it in the backward pass, and is less exact.

Activations do not depend on a token's position in the batch, to the last bit. torch computes whole vectors, and the
remaining elements of each thread one by one with another exponential function; padding leaves no remaining elements.

The gradient of the input of a linear layer with an adapter is summed for that layer first, then with the gradients of
other layers with the same input. training/multi_lora.py and models/fused_lora.py sum in this order, too.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from cruijff_kit.data.batches import Spans
from cruijff_kit.models.compat import DoRALinear, FeedForward, LoRALinear, TransformerDecoder
from cruijff_kit.models.fused_lora import FusedLoRALinear

_VECTORS = 64  # elements: two vectors of the shortest type
_GRAIN = 32768  # elements: the minimum per thread (at::internal::GRAIN_SIZE)


def apply_cpu_kernels(model: TransformerDecoder) -> None:
    """Apply the CPU code to a model in place; its attention then accepts Spans as mask. Safe to call again."""
    if getattr(model, "has_cpu_kernels", False):
        return
    for layer in model.layers:
        layer.attn._attention_call = functools.partial(_attend, layer.attn._attention_call)
        if isinstance(layer.mlp, FeedForward):
            layer.mlp.activation = _WholeVectors(layer.mlp.activation)
        for module in layer.modules():
            if isinstance(module, LoRALinear | DoRALinear) and not isinstance(module, FusedLoRALinear):
                module.register_forward_pre_hook(_view)
    model.has_cpu_kernels = True


def _view(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].view_as(inputs[0]),)


class _WholeVectors(nn.Module):
    """An element-wise activation, padded with tokens so that each thread computes whole vectors."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the activation, [..., dim]."""
        if torch.compiler.is_compiling():  # the compiler makes loops of its own
            return self.activation(x)
        dim, count = x.shape[-1], x.numel() // x.shape[-1]
        block = _VECTORS * min(torch.get_num_threads(), -(-x.numel() // _GRAIN))
        padding = -count % (block // math.gcd(dim, block))
        if not padding:
            return self.activation(x)
        return self.activation(F.pad(x.reshape(count, dim), (0, 0, 0, padding)))[:count].view_as(x)


def _attend(call: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask, **settings) -> torch.Tensor:
    dtype, q, k, v = q.dtype, q.float(), k.float(), v.float()
    if isinstance(mask, Spans):
        return _attend_by_rows(q, k, v, mask).to(dtype)
    return call(q, k, v, mask=mask, **settings).to(dtype)


def _attend_by_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans) -> torch.Tensor:
    sizes = [spans.prefix, *spans.own]
    (q_prefix, *q), (k_prefix, *k), (v_prefix, *v) = (x.split(sizes, dim=2) for x in (q, k, v))
    if not spans.prefix:
        rows = [F.scaled_dot_product_attention(*row, is_causal=True) for row in zip(q, k, v, strict=True)]
        return torch.cat(rows, dim=2)
    rows = [F.scaled_dot_product_attention(q_prefix, k_prefix, v_prefix, is_causal=True)]
    for query, key, value in zip(q, k, v, strict=True):
        keys, values = torch.cat([k_prefix, key], dim=2), torch.cat([v_prefix, value], dim=2)
        mask = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).tril(spans.prefix)
        rows.append(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask))
    return torch.cat(rows, dim=2)
