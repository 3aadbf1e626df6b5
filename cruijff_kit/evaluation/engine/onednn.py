"""Weights prepared for evaluation, where they do not change: adapters are cast once, not for every token.

On a CPU oneDNN multiplies by copies of the weights in its own layout, up to three times as fast as torch in fp32. The
copies double the weights' memory, so they are made only where it is plenty. In fp32 the adapters are added to the copies;
in bf16 the sums would be rounded, so the adapters stay apart, as in training. The model's own weights are never changed.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from cruijff_kit.models.compat import LoRALinear, NF4Tensor, TiedLinear, TransformerDecoder
from cruijff_kit.models.dora import BiasedDoRALinear, add_update
from cruijff_kit.models.multi_lora_layout import ADAPTER_SUFFIXES, CUSTOM, adapter_kind

Matmul = Callable[..., torch.Tensor]


class PreparedWeights:
    """A model's weights as they are when this is made, adapters included or switched off.

    Args:
        copied: oneDNN multiplies by copies of the weights; else only the adapters are copied.
    """

    @torch.inference_mode()
    def __init__(self, model: TransformerDecoder, copied: bool) -> None:
        self.copied = copied
        forwards = ((module, _forward_of(module, weight, copied)) for module, weight in _list_matrices(model))
        self._forwards = [(module, forward) for module, forward in forwards if forward is not None]

    @contextlib.contextmanager
    def install(self) -> Iterator[None]:
        """Let the model compute with them within this context."""
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module, _ in self._forwards:
                module.__dict__.pop("forward", None)


def count_copy_bytes(model: TransformerDecoder) -> int | None:
    """Count the bytes of a model's copies; None: oneDNN cannot use them on this machine or for this model."""
    weights = [weight for _, weight in _list_matrices(model) if not isinstance(weight.data, NF4Tensor)]
    return sum(w.numel() * w.element_size() for w in weights) if all(map(is_supported, weights)) else None


def is_supported(weight: torch.Tensor) -> bool:
    """Return whether oneDNN can multiply by a copy of this matrix on this machine."""
    x86 = "AVX" in torch.backends.cpu.get_cpu_capability()
    if not (x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    plain = not isinstance(weight.data, NF4Tensor) and weight.dtype in (torch.float32, torch.bfloat16)
    return plain and weight.device.type == "cpu"


def matmul_for(weight: torch.Tensor, bias: torch.Tensor | None, copied: bool) -> Matmul:
    """Make [..., in_dim] -> [..., out_dim]; copied: by oneDNN, on a copy of the weight that is made now."""
    if not copied:
        return lambda x, *_: F.linear(x, weight, bias)
    copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return lambda x, *_: torch.ops.mkldnn._linear_pointwise(x, copy, bias, "none", [], "")


def dora_matmul_for(module: BiasedDoRALinear, base: Matmul) -> Matmul:
    """Make [..., in_dim] -> [..., out_dim] of a layer with DoRA, given its base's product without the bias."""
    dtype, bias = module.weight.dtype, module.bias
    (rest, up), a = module.factors(dtype), module.lora_a.weight.to(dtype)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        out = add_update(base(x), F.linear(x, a), rest, up)
        return out if bias is None else out + bias

    return multiply


def _list_matrices(model: TransformerDecoder) -> list[tuple[nn.Module, torch.Tensor]]:
    """List the modules that multiply by one matrix, with their matrices; others compute in their own way."""
    matrices = [
        (module, module.weight)
        for name, module in model.named_modules()
        if adapter_kind(module) != CUSTOM and not name.endswith(ADAPTER_SUFFIXES)
    ]
    if isinstance(model.output, TiedLinear):
        matrices.append((model.output.linear, model.output.tied_module.weight))
    return matrices


def _forward_of(module: nn.Module, weight: torch.Tensor, copied: bool) -> Matmul | None:
    """Make what replaces the module's forward; in evaluation nothing is dropped. None: the module's own forward."""
    copied = copied and not isinstance(weight.data, NF4Tensor)
    has_adapter = not getattr(module, "disabled", True)
    bias = getattr(module, "bias", None)
    if not has_adapter:
        return matmul_for(weight, bias, copied) if copied else None
    if copied and weight.dtype == torch.float32:
        return matmul_for(_merge(module, weight), bias, copied)
    if isinstance(module, BiasedDoRALinear):
        return dora_matmul_for(module, matmul_for(weight, None, copied))
    base = matmul_for(weight, bias, copied)
    a, b = (matrix.weight.to(weight.dtype) for matrix in (module.lora_a, module.lora_b))
    scale = module.alpha / module.rank

    def multiply(x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        return base(rows).addmm_(rows @ a.t(), b.t(), alpha=scale).unflatten(0, x.shape[:-1])

    return multiply


def _merge(module: LoRALinear | BiasedDoRALinear, weight: torch.Tensor) -> torch.Tensor:
    """[out_dim, in_dim] with the adapter added."""
    a = module.lora_a.weight
    if isinstance(module, BiasedDoRALinear):
        rest, up = module.factors(weight.dtype)
        return torch.addmm(weight + rest[:, None] * weight, up, a)
    return torch.addmm(weight, module.lora_b.weight, a, alpha=module.alpha / module.rank)
