"""Logits of a few tokens, projected more exactly than in the model's own precision.

In bf16 a logit of 8 to 16 has steps of 1/16: 60 prompts of the census got 5 different log-odds from SmolLM2-135M, and 60
from the same hidden states projected so.
"""

from typing import Any

import torch

from cruijff_kit.models.compat import DoRALinear, NF4Tensor
from cruijff_kit.models.multi_lora_layout import base_weight


@torch.no_grad()
def option_logits(output: Any, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits of some tokens: summed in fp64, then rounded to fp32, so that equal rows come out equal in any batch.

    Args:
        output: the model's output projection, adapters on it included or switched off.
        hidden: [rows, d] normed hidden states.
        ids: [tokens] of the vocabulary.
    Returns:
        [rows, tokens] in fp32.
    """
    weight = base_weight(output)
    if weight is None or isinstance(weight.data, NF4Tensor):  # it multiplies in its own way
        return output(hidden).float()[:, ids]
    exact = torch.float32 if weight.device.type == "mps" else torch.float64  # MPS has no fp64
    ids = ids.to(weight.device)
    logits = hidden.to(weight.device, exact) @ _adapted_rows(output, weight, ids, exact).mT
    bias = getattr(output, "bias", None)
    return (logits if bias is None else logits + bias[ids].to(exact)).float()


def _adapted_rows(output: Any, weight: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[tokens, d]: these rows of the matrix, the adapter added."""
    rows = weight[ids].to(dtype)
    if getattr(output, "disabled", True):  # a plain map has no adapter
        return rows
    a, b = output.lora_a.weight.to(dtype), output.lora_b.weight[ids].to(dtype)
    dora = isinstance(output, DoRALinear)
    rows = rows + (output.scaling if dora else output.alpha / output.rank) * (b @ a)
    return rows * (output.magnitude[ids].to(dtype) / rows.norm(dim=1))[:, None] if dora else rows
