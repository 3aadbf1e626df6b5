"""Attention on a CPU, over rows that may stand one behind the other: each sees the prefix that they share, and itself."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from cruijff_kit.compat import TransformerDecoder
from cruijff_kit.data.batches import Spans


def attend_on_cpu(model: TransformerDecoder) -> None:
    """Teach a model's attention to take Spans where it takes a mask, and to compute in fp32. On a CPU in bf16, torch's
    kernel takes up to three times as long and is less exact; most of it is the way back. Safe to call again."""
    for layer in model.layers:
        plain = layer.attn._attention_call
        if not (isinstance(plain, functools.partial) and plain.func is _attend):
            layer.attn._attention_call = functools.partial(_attend, plain)


def _attend(plain: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask, **settings) -> torch.Tensor:
    dtype, q, k, v = q.dtype, q.float(), k.float(), v.float()
    if isinstance(mask, Spans):
        return _by_rows(q, k, v, mask).to(dtype)
    return plain(q, k, v, mask=mask, **settings).to(dtype)


def _by_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans) -> torch.Tensor:
    sizes = [spans.prefix, *spans.own]
    (q_prefix, *q), (k_prefix, *k), (v_prefix, *v) = (x.split(sizes, dim=2) for x in (q, k, v))
    if not spans.prefix:
        rows = [F.scaled_dot_product_attention(*row, is_causal=True) for row in zip(q, k, v, strict=True)]
        return torch.cat(rows, dim=2)
    rows = [F.scaled_dot_product_attention(q_prefix, k_prefix, v_prefix, is_causal=True)]
    for query, key, value in zip(q, k, v, strict=True):
        keys, values = torch.cat([k_prefix, key], dim=2), torch.cat([v_prefix, value], dim=2)
        seen = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).tril(spans.prefix)
        rows.append(F.scaled_dot_product_attention(query, keys, values, attn_mask=seen))
    return torch.cat(rows, dim=2)
