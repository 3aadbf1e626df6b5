"""DoRA (Liu et al. 2024, arXiv 2402.09353) as PEFT computes it: magnitude x (W + s B A) / ||W + s B A||, then the bias.

torchtune's layer scales the bias too, and multiplies B and A out through a square identity matrix.

Magnitudes are fp32 (models/master_weights), and so are the lengths that divide them. The quotient is within a few percent
of 1, where bf16 has steps of 0.4 and 0.8%, and a step of training moves it by 0.01% (lr=1e-4): over a base in bf16 it is
never rounded as it stands, only by how much it is not 1, and as a factor of B.
"""

import torch
import torch.nn.functional as F

from cruijff_kit.compat import DoRALinear


class BiasedDoRALinear(DoRALinear):
    """torchtune's DoRALinear, right for layers with a bias; parameters and names are its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        out = F.linear(x, self.weight)
        if not self.disabled:
            ratio, down = self.magnitude / self._lengths(x.dtype), self.lora_a(self.dropout(x))
            if x.dtype == ratio.dtype:
                out = ratio * (out + self.scaling * self.lora_b(down))
            else:  # the same, multiplied out
                up = (self.scaling * ratio)[:, None] * self.lora_b.weight
                out = out + (ratio - 1).to(x.dtype) * out + F.linear(down, up.to(x.dtype))
        return out if self.bias is None else out + self.bias

    @torch.no_grad()  # the length counts as a constant in the backward pass (section 4.3 of the paper)
    def _lengths(self, dtype: torch.dtype) -> torch.Tensor:
        """[outputs] lengths of the rows of W + s B A."""
        a, b = self.lora_a.weight, self.lora_b.weight
        if dtype == a.dtype:
            return self._get_weight_norm(self.weight.to(dtype), b @ a)
        return torch.linalg.norm(self.weight.to(a.dtype).addmm_(b, a, alpha=self.scaling), dim=1)


class MixedDoRALinear(DoRALinear):
    """torchtune's DoRALinear over a base in another precision than its adapter's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        return super().forward(x).to(x.dtype)

    def _get_weight_norm(self, weight: torch.Tensor, lora_weight: torch.Tensor) -> torch.Tensor:
        return super()._get_weight_norm(weight.to(self.magnitude.dtype), lora_weight.to(self.magnitude.dtype))
