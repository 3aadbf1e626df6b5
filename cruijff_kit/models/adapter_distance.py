"""Measure the difference between two adapter files."""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file


def adapter_difference(first: Path, second: Path) -> float:
    """Return the largest relative difference |a - b| / |a| (Frobenius norms) between the matrices of two adapters.

    Args:
        first, second: adapter_model.safetensors files.
    Returns:
        0 if the files are equal bit for bit; inf if they have different matrices, or if a matrix is zero in the first
        only.
    """
    first_matrices, second_matrices = load_file(first), load_file(second)
    if {k: v.shape for k, v in first_matrices.items()} != {k: v.shape for k, v in second_matrices.items()}:
        return math.inf
    return max((_relative_difference(a, second_matrices[name]) for name, a in first_matrices.items()), default=0.0)


def _relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.dtype == b.dtype and torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    distance, norm = (a - b).norm().item(), a.norm().item()
    if not math.isfinite(distance):
        return math.inf
    # Files that differ only in bits of equal numbers (0 and -0) are not equal.
    return max(distance / norm, 5e-324) if norm else (math.inf if distance else 5e-324)
