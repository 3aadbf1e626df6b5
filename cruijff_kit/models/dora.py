"""DoRA (Liu et al. 2024, arXiv 2402.09353) as PEFT computes it: magnitude x (W + s B A) / ||W + s B A||, then the bias.

torchtune's layer scales the bias too, and multiplies B and A out through a square identity matrix.

Magnitudes and the lengths that divide them are fp32 (models/master_weights). Their quotient is within a few percent of 1,
where bf16 has steps of 0.4 and 0.8%, and a step of training moves it by 0.01% (lr=1e-4): it is never rounded as it stands,
only by how much it is not 1, and as a factor of B.
"""

import torch
import torch.nn.functional as F

from cruijff_kit.models.compat import DoRALinear


class BiasedDoRALinear(DoRALinear):
    """torchtune's DoRALinear, right for layers with a bias; parameters and names are its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        out = F.linear(x, self.weight)
        if not self.disabled:
            out = with_update(out, self.lora_a(self.dropout(x)), *self.factors(x.dtype))
        return out if self.bias is None else out + self.bias

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Of magnitude / length: how much it is not 1, [outputs]; its product with s B, [outputs, rank]."""
        ratio = self.magnitude / self._lengths()
        return (ratio - 1).to(dtype), ((self.scaling * ratio)[:, None] * self.lora_b.weight).to(dtype)

    @torch.no_grad()  # the length counts as a constant in the backward pass (section 4.3 of the paper)
    def _lengths(self) -> torch.Tensor:
        """[outputs] lengths of the rows of W + s B A."""
        a, b = self.lora_a.weight, self.lora_b.weight
        return torch.linalg.norm(torch.addmm(self.weight.to(a.dtype), b, a, alpha=self.scaling), dim=1)


def with_update(out: torch.Tensor, down: torch.Tensor, rest: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[..., outputs] of an adapted layer before its bias.

    Args:
        out: [..., outputs] of the base's weights.
        down: [..., rank] what A makes of the input.
        rest, up: as `BiasedDoRALinear.factors`.
    """
    return out + torch.addcmul(F.linear(down, up), out, rest)  # small ones first: of `out` bf16 sees no 0.1%
