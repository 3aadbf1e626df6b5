"""Several adapters on one base model: which of its linear maps they adapt, how, and where each one's tokens lie.

Training (training/multi_lora) and evaluation (evaluation/engine/multi_lora) join the tokens of several runs one behind
another, so that the base's matrices multiply all of them at once. Each adapter is added to its own run's tokens, and each
run attends by itself.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from cruijff_kit.models.compat import DoRALinear, LoRALinear, TiedLinear, TransformerDecoder
from cruijff_kit.models.dora import BiasedDoRALinear
from cruijff_kit.models.fused_lora import FusedLoRALinear

ADAPTER_SUFFIXES = (".lora_a", ".lora_b")
"""Ends of the names of adapters' own matrices."""

BASE, LORA, DORA, OWN = "base", "lora", "dora", "own"


def list_linears(model: TransformerDecoder) -> dict[str, nn.Module]:
    """List the linear maps of the layers by name, without adapters' own matrices."""
    return {
        f"layers.{name}": module
        for name, module in model.layers.named_modules()
        if isinstance(module, nn.Linear | LoRALinear | DoRALinear) and not name.endswith(ADAPTER_SUFFIXES)
    }


def adapter_kind(module: Any) -> str:
    """Tell how a linear map is adapted.

    Returns:
        BASE: not at all, or its adapter is switched off. LORA, DORA: by such an adapter. OWN: it computes in its own way.
    """
    if type(module) in (nn.Linear, TiedLinear):
        return BASE
    if type(module) in (LoRALinear, FusedLoRALinear, BiasedDoRALinear):
        return BASE if module.disabled else DORA if type(module) is BiasedDoRALinear else LORA
    return OWN


def base_weight(module: Any) -> torch.Tensor | None:
    """Return the base's matrix of a linear map, [out_dim, in_dim]; None: the map multiplies in its own way."""
    if isinstance(module, TiedLinear):
        return module.tied_module.weight
    return module.weight if isinstance(module, nn.Linear | LoRALinear | DoRALinear) else None


class TokenSpan(NamedTuple):
    """Where one adapter's tokens lie among all."""

    number: int
    """Of the adapter."""
    begin: int
    end: int


def lay_spans(sizes: Iterable[tuple[int, int]]) -> list[TokenSpan]:
    """Lay tokens one behind the other.

    Args:
        sizes: (number of the adapter, how many tokens), in order.
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
    """Let each region of the joined tokens attend by itself.

    Args:
        q, k, v: [1, heads, all tokens, d].
        shapes: (rows, tokens of each) of the regions, in order.
        attend: takes a region's number and its [rows, heads, tokens, d] of q, k and v; returns [rows, heads, tokens, d].
    Returns:
        [1, heads, all tokens, d].
    """
    sizes = [rows * tokens for rows, tokens in shapes]
    # Split at once: the way back through a slice fills a gradient of everybody's size.
    pieces = zip(*(x.squeeze(0).split(sizes, 1) for x in (q, k, v)), strict=True)
    out = []
    for number, (shape, piece) in enumerate(zip(shapes, pieces, strict=True)):
        rows = (x.unflatten(1, shape).transpose(0, 1) for x in piece)
        out.append(attend(number, *rows).transpose(0, 1).flatten(1, 2))
    return (torch.cat(out, 1) if len(out) > 1 else out[0])[None]
