"""DoRA (Liu et al. 2024, arXiv 2402.09353) as PEFT computes it: magnitude x (W + s B A) / ||W + s B A||, then the bias.

torchtune's layer scales the bias too, and multiplies B and A out through a square identity matrix.
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
            with torch.no_grad():  # the length counts as a constant in the backward pass (section 4.3 of the paper)
                norm = self._get_weight_norm(self.weight.to(x.dtype), self.lora_b.weight @ self.lora_a.weight)
            update = self.lora_b(self.lora_a(self.dropout(x)))
            out = (self.magnitude / norm) * (out + self.scaling * update)
        return out if self.bias is None else out + self.bias
