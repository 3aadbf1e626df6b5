"""The fused LoRA layer computes what torchtune's does."""

import pytest
import torch
from torch import nn

from cruijff_kit.models.compat import LoRALinear
from cruijff_kit.models.fused_lora import FusedLoRALinear, fuse_lora


def layer(**settings) -> LoRALinear:
    torch.manual_seed(0)
    made = LoRALinear(12, 20, rank=4, alpha=6, **settings)
    nn.init.normal_(made.lora_b.weight)
    made.weight.requires_grad_(False)
    return made


@pytest.mark.parametrize("disabled", [False, True])
def test_output_and_gradients_equal_torchtunes(disabled):
    plain, model = layer(), nn.Sequential(layer())
    fuse_lora(model)
    (fused,) = model
    assert type(fused) is FusedLoRALinear and plain.state_dict().keys() == fused.state_dict().keys()
    plain.disabled = fused.disabled = disabled
    results = []
    for module in (plain, fused):
        x = torch.linspace(-1, 1, 2 * 3 * 12).view(2, 3, 12).requires_grad_()
        out = module(x)
        out.square().sum().backward()
        results.append([out, x.grad, *([] if disabled else [module.lora_a.weight.grad, module.lora_b.weight.grad])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_that_need_more_stay_as_they_are():
    model = nn.Sequential(layer(dropout=0.1), layer(use_bias=True))
    fuse_lora(model)
    assert {type(m) for m in model} == {LoRALinear}
