"""Lay out a forward pass with several adapters on one base model: adapted layers, tokens of each adapter, attention.

Training (training/multi_lora) and evaluation (evaluation/engine/multi_lora) concatenate the tokens of several runs, so that
the base's matrices multiply all of them at once. Each adapter is added to its own run's tokens, and attention runs
separately for each run.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from cruijff_kit.models.compat import DoRALinear, LoRALinear, TiedLinear, TransformerDecoder
from cruijff_kit.models.dora import BiasedDoRALinear
from cruijff_kit.models.fused_lora import FusedLoRALinear

ADAPTER_SUFFIXES = (".lora_a", ".lora_b")
"""Suffixes of the names of adapters' matrices."""

BASE, LORA, DORA, CUSTOM = "base", "lora", "dora", "custom"


def list_linears(model: TransformerDecoder) -> dict[str, nn.Module]:
    """Return name -> linear layer of all transformer layers, without the adapters' matrices."""
    return {
        f"layers.{name}": module
        for name, module in model.layers.named_modules()
        if isinstance(module, nn.Linear | LoRALinear | DoRALinear) and not name.endswith(ADAPTER_SUFFIXES)
    }


def adapter_kind(module: Any) -> str:
    """Return how a linear layer is adapted.

    Returns:
        BASE: it has no adapter, or its adapter is off. LORA, DORA: it has such an adapter. CUSTOM: an unknown class.
    """
    if type(module) in (nn.Linear, TiedLinear):
        return BASE
    if type(module) in (LoRALinear, FusedLoRALinear, BiasedDoRALinear):
        return BASE if module.disabled else DORA if type(module) is BiasedDoRALinear else LORA
    return CUSTOM


def base_weight(module: Any) -> torch.Tensor | None:
    """Return the base's matrix of a linear layer, [out_dim, in_dim]; None for an unknown class."""
    if isinstance(module, TiedLinear):
        return module.tied_module.weight
    return module.weight if isinstance(module, nn.Linear | LoRALinear | DoRALinear) else None


class TokenSpan(NamedTuple):
    """Positions of one adapter's tokens in the concatenated tokens."""

    number: int
    """Number of the adapter."""
    begin: int
    end: int


def lay_spans(sizes: Iterable[tuple[int, int]]) -> list[TokenSpan]:
    """Compute the spans of concatenated tokens.

    Args:
        sizes: (number of the adapter, number of tokens), in order.
    """
    spans, begin = [], 0
    for number, size in sizes:
        spans.append(TokenSpan(number, begin, begin + size))
        begin += size
    return spans


def attend_by_region(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shapes: Sequence[tuple[int, int]],
    attend: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Compute attention separately for each region of the concatenated tokens.

    Args:
        q, k, v: [1, heads, all tokens, head_dim].
        shapes: (rows, tokens per row) of the regions, in order.
        attend: takes a region's number and its q, k and v, [rows, heads, tokens, head_dim]; returns the same shape.
    Returns:
        [1, heads, all tokens, head_dim].
    """
    sizes = [rows * tokens for rows, tokens in shapes]
    # One split, not a slice per region: the backward pass of a slice fills a gradient of the size of all regions.
    pieces = zip(*(x.squeeze(0).split(sizes, 1) for x in (q, k, v)), strict=True)
    out = []
    for number, (shape, piece) in enumerate(zip(shapes, pieces, strict=True)):
        rows = (x.unflatten(1, shape).transpose(0, 1) for x in piece)
        out.append(attend(number, *rows).transpose(0, 1).flatten(1, 2))
    return (torch.cat(out, 1) if len(out) > 1 else out[0])[None]
