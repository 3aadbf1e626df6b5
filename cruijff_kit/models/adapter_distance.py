"""How far two adapter files are from each other."""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file


def adapter_difference(one: Path, other: Path) -> float:
    """Largest relative difference |a - b| / |a| (Frobenius norms) of the matrices of two adapter_model.safetensors.

    0: bit for bit the same. inf: they have other matrices, or one is zero in the first and not in the second.
    """
    first, second = load_file(one), load_file(other)
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in second.items()}:
        return math.inf
    return max((_relative(a, second[name]) for name, a in first.items()), default=0.0)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.dtype == b.dtype and torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    apart, size = (a - b).norm().item(), a.norm().item()
    if not math.isfinite(apart):
        return math.inf
    # What differs in its bits alone (0 and -0) is not the same file.
    return max(apart / size, 5e-324) if size else (math.inf if apart else 5e-324)
