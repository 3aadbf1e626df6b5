"""LoRA layers that touch their large outputs and inputs once: the adapter's part is added within its matrix product.

The same sums as torchtune's LoRALinear, rounded less often. In a module of its own, because on a GPU it is not tried yet.
"""

import torch
from torch import nn

from cruijff_kit.compat import LoRALinear, NF4Tensor, TransformerDecoder


class FusedLoRALinear(LoRALinear):
    """A LoRALinear without bias, dropout or quantisation; made of one by `fuse_lora`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_dim] -> [..., out_dim]."""
        if self.disabled:
            return super().forward(x)
        out = _LoRA.apply(x.flatten(0, -2), self.weight, self.lora_a.weight, self.lora_b.weight, self.alpha / self.rank)
        return out.unflatten(0, x.shape[:-1])


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, a, b, scale):
        down = x @ a.t()
        ctx.save_for_backward(x, weight, a, b, down)
        ctx.scale = scale
        return (x @ weight.t()).addmm_(down, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, down = ctx.saved_tensors
        grad_down = (grad @ b).mul_(ctx.scale)
        grad_x = (grad @ weight).addmm_(grad_down, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_down.t() @ x, (grad.t() @ down).mul_(ctx.scale), None


def fuse_lora(model: TransformerDecoder) -> None:
    """Let a model's plain LoRA layers compute so. Safe to call again."""
    if getattr(model, "lora_is_fused", False):
        return
    for module in model.modules():
        plain = type(module) is LoRALinear and module.bias is None
        in_four_bits = plain and isinstance(module.weight.data, NF4Tensor)
        if plain and not in_four_bits and isinstance(module.dropout, nn.Identity):
            module.__class__ = FusedLoRALinear
    model.lora_is_fused = True
