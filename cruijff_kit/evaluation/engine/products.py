"""A CPU's matrix products by oneDNN, on weights in its own layout: up to three times as fast as torch's own in fp32.

The weights are there twice meanwhile, so only where memory is plenty. In fp32 the adapters are added to the copies; in
bf16 the sums would be rounded, so there they stay apart, as in training. The model's own weights are never touched.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from cruijff_kit.compat import LoRALinear, NF4Tensor, TiedLinear, TransformerDecoder
from cruijff_kit.training.lora import FusedLoRALinear

Product = Callable[..., torch.Tensor]


class Products:
    """A model's matrix products as they stand when this is made, adapters included or switched off."""

    @torch.inference_mode()
    def __init__(self, model: TransformerDecoder) -> None:
        self._forwards = [(module, _product(module, weight)) for module, weight in _matrices(model)]

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
    """Memory that `Products` takes; None: they are of no use on this machine or for this model."""
    weights = [weight for _, weight in _matrices(model)]
    return sum(w.numel() * w.element_size() for w in weights) if all(map(of_use_for, weights)) else None


def of_use_for(weight: torch.Tensor) -> bool:
    """Whether a copy of a matrix in oneDNN's layout is of use: its kind, and this machine's."""
    x86 = "AVX" in torch.backends.cpu.get_cpu_capability()
    if not (x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    plain = not isinstance(weight.data, NF4Tensor) and weight.dtype in (torch.float32, torch.bfloat16)
    return plain and weight.device.type == "cpu"


def product_of(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """[..., in_dim] -> [..., out_dim], on a copy of the weight that is made now."""
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return lambda x: _times(x, copy, bias)


def _matrices(model: TransformerDecoder) -> list[tuple[nn.Module, torch.Tensor]]:
    """The modules that multiply by one matrix, and their matrices; others keep their own ways."""
    found = [
        (module, module.weight)
        for name, module in model.named_modules()
        if type(module) in (LoRALinear, FusedLoRALinear)
        or (type(module) is nn.Linear and not name.endswith((".lora_a", ".lora_b")))
    ]
    if isinstance(model.output, TiedLinear):
        found.append((model.output.linear, model.output.tied_module.weight))
    return [(module, weight) for module, weight in found if not isinstance(weight.data, NF4Tensor)]


def _product(module: nn.Module, weight: torch.Tensor) -> Product:
    """What to call in place of the module's forward; the module is in evaluation, so nothing is dropped."""
    adapted = isinstance(module, LoRALinear) and not module.disabled
    bias = getattr(module, "bias", None)
    if not adapted:
        copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        return lambda x, *_: _times(x, copy, bias)
    a, b = (matrix.weight.to(weight.dtype) for matrix in (module.lora_a, module.lora_b))
    scale = module.alpha / module.rank
    if weight.dtype == torch.float32:
        copy = torch.ops.mkldnn._reorder_linear_weight(torch.addmm(weight, b, a, alpha=scale))
        return lambda x: _times(x, copy, bias)
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def apart(x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        return _times(rows, copy, bias).addmm_(rows @ a.t(), b.t(), alpha=scale).unflatten(0, x.shape[:-1])

    return apart


def _times(x: torch.Tensor, copy: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[..., in_dim] -> [..., out_dim]."""
    return torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")
