"""Compute DoRA (Liu et al. 2024, arXiv 2402.09353) as PEFT does: magnitude x (W + s B A) / ||W + s B A||, then the bias.

torchtune's layer scales the bias too, and multiplies B and A through a square identity matrix.

Magnitudes and row norms are fp32 (models/master_weights). Their ratio is within a few percent of 1. There bf16 has steps of
0.4 and 0.8%, but one training step moves the ratio by 0.01% (lr=1e-4). So the ratio itself is never cast to bf16: only the
ratio minus 1, and its product with B.
"""

import torch
import torch.nn.functional as F

from cruijff_kit.models.compat import DoRALinear


class BiasedDoRALinear(DoRALinear):
    """torchtune's DoRALinear, corrected for layers with a bias; with the same parameters under the same names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer, [..., in_dim] -> [..., out_dim]."""
        out = F.linear(x, self.weight)
        if not self.disabled:
            out = add_update(out, self.lora_a(self.dropout(x)), *self.factors(x.dtype))
        return out if self.bias is None else out + self.bias

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ratio - 1, [out_dim], and s ratio B, [out_dim, rank], where ratio is magnitude / row norm."""
        ratio = self.magnitude / self._row_norms()
        return (ratio - 1).to(dtype), ((self.scaling * ratio)[:, None] * self.lora_b.weight).to(dtype)

    @torch.no_grad()  # the norm is a constant in the backward pass (section 4.3 of the paper)
    def _row_norms(self) -> torch.Tensor:
        """Return the norms of the rows of W + s B A, [out_dim]."""
        a, b = self.lora_a.weight, self.lora_b.weight
        return torch.linalg.norm(torch.addmm(self.weight.to(a.dtype), b, a, alpha=self.scaling), dim=1)


def add_update(out: torch.Tensor, down: torch.Tensor, rest: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Add the update of a DoRA layer to the base's output; the bias is not included.

    Args:
        out: [..., out_dim], x W^T.
        down: [..., rank], x A^T.
        rest, up: as `BiasedDoRALinear.factors` returns them.
    Returns:
        [..., out_dim].
    """
    return out + torch.addcmul(F.linear(down, up), out, rest)  # small terms first: bf16 rounds 0.1% of `out` away
