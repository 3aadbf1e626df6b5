"""Matrix products in evaluation, where weights do not change: adapters are brought to their precision once, not for every
token.

On a CPU by oneDNN, on weights in its own layout: up to three times as fast as torch's own in fp32. The weights are there
twice meanwhile, so only where memory is plenty. In fp32 the adapters are added to the copies; in bf16 the sums would be
rounded, so there they stay apart, as in training. The model's own weights are never touched.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from cruijff_kit.models.compat import LoRALinear, NF4Tensor, TiedLinear, TransformerDecoder
from cruijff_kit.models.dora import BiasedDoRALinear, with_update
from cruijff_kit.training.fused_lora import FusedLoRALinear

Product = Callable[..., torch.Tensor]


class Products:
    """A model's matrix products as they stand when this is made, adapters included or switched off.

    Args:
        copied: by oneDNN, on copies of the weights; else only what adapters need is copied.
    """

    @torch.inference_mode()
    def __init__(self, model: TransformerDecoder, copied: bool) -> None:
        self.copied = copied
        found = ((module, _product(module, weight, copied)) for module, weight in _matrices(model))
        self._forwards = [(module, forward) for module, forward in found if forward is not None]

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        """Within this context the model computes by them."""
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module, _ in self._forwards:
                module.__dict__.pop("forward", None)


def bytes_of_copies(model: TransformerDecoder) -> int | None:
    """Memory that `Products` on copies take; None: they are of no use on this machine or for this model."""
    weights = [weight for _, weight in _matrices(model) if not isinstance(weight.data, NF4Tensor)]
    return sum(w.numel() * w.element_size() for w in weights) if all(map(of_use_for, weights)) else None


def of_use_for(weight: torch.Tensor) -> bool:
    """Whether a copy of a matrix in oneDNN's layout is of use: its kind, and this machine's."""
    x86 = "AVX" in torch.backends.cpu.get_cpu_capability()
    if not (x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    plain = not isinstance(weight.data, NF4Tensor) and weight.dtype in (torch.float32, torch.bfloat16)
    return plain and weight.device.type == "cpu"


def product_of(weight: torch.Tensor, bias: torch.Tensor | None, copied: bool) -> Product:
    """[..., in_dim] -> [..., out_dim]; copied: by oneDNN, on a copy of the weight that is made now."""
    if not copied:
        return lambda x, *_: F.linear(x, weight, bias)
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return lambda x, *_: torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")


def dora_product(module: BiasedDoRALinear, product: Product) -> Product:
    """[..., in_dim] -> [..., out_dim] of a layer with DoRA, given its base's product without the bias."""
    dtype, bias = module.weight.dtype, module.bias
    (rest, up), a = module.factors(dtype), module.lora_a.weight.to(dtype)

    def apart(x: torch.Tensor) -> torch.Tensor:
        out = with_update(product(x), F.linear(x, a), rest, up)
        return out if bias is None else out + bias

    return apart


def _matrices(model: TransformerDecoder) -> list[tuple[nn.Module, torch.Tensor]]:
    """The modules that multiply by one matrix, and their matrices; others keep their own ways."""
    found = [
        (module, module.weight)
        for name, module in model.named_modules()
        if type(module) in (LoRALinear, FusedLoRALinear, BiasedDoRALinear)
        or (type(module) is nn.Linear and not name.endswith((".lora_a", ".lora_b")))
    ]
    if isinstance(model.output, TiedLinear):
        found.append((model.output.linear, model.output.tied_module.weight))
    return found


def _product(module: nn.Module, weight: torch.Tensor, copied: bool) -> Product | None:
    """What to call in place of the module's forward; the module is in evaluation, so nothing is dropped. None: its own."""
    copied = copied and not isinstance(weight.data, NF4Tensor)
    adapted = not getattr(module, "disabled", True)
    bias = getattr(module, "bias", None)
    if not adapted:
        return product_of(weight, bias, copied) if copied else None
    dora = isinstance(module, BiasedDoRALinear)
    if copied and weight.dtype == torch.float32:
        return product_of(_merged(module, weight), bias, copied)
    if dora:
        return dora_product(module, product_of(weight, None, copied))
    product = product_of(weight, bias, copied)
    a, b = (matrix.weight.to(weight.dtype) for matrix in (module.lora_a, module.lora_b))
    scale = module.alpha / module.rank

    def apart(x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        return product(rows).addmm_(rows @ a.t(), b.t(), alpha=scale).unflatten(0, x.shape[:-1])

    return apart


def _merged(module: LoRALinear | BiasedDoRALinear, weight: torch.Tensor) -> torch.Tensor:
    """[out_dim, in_dim] with what the adapter makes of it."""
    a = module.lora_a.weight
    if isinstance(module, BiasedDoRALinear):
        rest, up = module.factors(weight.dtype)
        return torch.addmm(weight + rest[:, None] * weight, up, a)
    return torch.addmm(weight, module.lora_b.weight, a, alpha=module.alpha / module.rank)
