"""What bf16 rounds is products: adapters, their gradients and the optimiser's moments are fp32 in every recipe."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import cruijff_kit
from cruijff_kit.compat import LoRALinear
from cruijff_kit.models.adapter import adapter_state
from cruijff_kit.models.dora import BiasedDoRALinear
from cruijff_kit.models.master_weights import MasterLinear, cast_once, use_master_weights

RUN = ["model=hf_llama", "num_warmup_steps=0", "batch_size=4", "dataset.max_samples=320", "seed=1234"]
SHORT = ["dataset.max_samples=24", "dataset.validation_split=null", "lr=1e-3", "lora.rank=4"]
KINDS = {
    "lora": [],
    "dora": ["lora.use_dora=true"],
    "dropout": ["lora.dropout=0.1"],
    "dora, dropout": ["lora.use_dora=true", "lora.dropout=0.1"],
}


@pytest.fixture
def trained(set_up_recipe, tiny, tmp_path):
    """A function: name, overrides -> the recipe, trained; its adapter as it began."""

    def run(name: str, *overrides: str):
        recipe = set_up_recipe(*RUN, f"model.path={tiny}", f"output_dir={tmp_path / name}", *overrides)
        before = adapter_state(recipe.model)
        recipe.train()
        recipe.cleanup()
        return recipe, before

    return run


@pytest.mark.parametrize("lr", ["1e-5", "5e-5", "1e-4"])
@pytest.mark.parametrize("dora", ["false", "true"])
def test_bf16_learns_what_fp32_learns(trained, lr, dora):
    """80 steps. In bf16 throughout, 79% of A's entries stayed as they were at lr=5e-5, and the loss was 1.5 times fp32's."""
    options = [f"lr={lr}", f"lora.use_dora={dora}"]
    exact, begun = trained("fp32", *options, "dtype=fp32")
    rounding, before = trained("bf16", *options, "dtype=bf16")
    assert {p.dtype for p in rounding.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(torch.equal(before[name], begun[name]) for name in before if "magnitude" not in name), "drawn in fp32"
    assert rounding.summary.validation_loss == pytest.approx(exact.summary.validation_loss, rel=0.03)
    after = adapter_state(rounding.model)
    moved = [(after[name] != before[name]).float().mean() for name in after if "lora_a" in name or "magnitude" in name]
    assert min(moved) == 1 if lr == "5e-5" else min(moved) > 0.99
    moments = [state[name] for state in rounding.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert {t.dtype for t in (*after.values(), *moments)} == {torch.float32}
    saved = load_file(rounding.folder.epoch(0) / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert any((t != t.bfloat16()).any() for t in saved.values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_computed_again_is_the_same(trained, kind):
    """Activation checkpointing computes the layers once more on the way back, when the copies of the pass are gone."""
    again = "enable_activation_checkpointing=true"
    adapters = [
        adapter_state(trained(name, *SHORT, *KINDS[kind], "dtype=bf16", *more)[0].model)
        for name, more in (("kept", ()), ("again", (again,)))
    ]
    assert all(torch.equal(t, adapters[1][name]) for name, t in adapters[0].items())


def test_micro_batches_are_summed_in_fp32(set_up_recipe, tiny, tmp_path):
    """Gradients of two micro-batches of an update, added up before they are clipped."""
    options = [*RUN, *SHORT, "dtype=bf16", f"model.path={tiny}", "clip_grad_norm=1", "gradient_accumulation_steps=2"]
    recipe = set_up_recipe(*options, f"output_dir={tmp_path}")
    for examples in ([0, 1, 2, 3], [4, 5, 6, 7]):
        loss, *_ = recipe._loss([recipe.train_data[n] for n in examples])
        before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in recipe.trainable]
        own = torch.autograd.grad(loss, recipe.trainable, retain_graph=True)
        loss.backward()
        for p, earlier, more in zip(recipe.trainable, before, own, strict=True):
            assert p.grad.dtype == torch.float32 and torch.equal(p.grad, earlier + more)


def layer(kind: type, bias: bool, dtype: torch.dtype) -> nn.Module:
    """An adapted layer as `models.base` makes it: the base in a precision, the adapter in fp32."""
    torch.manual_seed(0)
    made = kind(48, 80, rank=4, alpha=8, use_bias=bias)
    for p in (made.weight, made.bias) if bias else (made.weight,):
        p.data = p.data.to(torch.bfloat16).to(dtype)  # the same numbers in every precision
        p.requires_grad_(False)
    nn.init.normal_(made.lora_b.weight, std=0.1)
    holder = nn.Sequential(made)
    use_master_weights(holder)
    (made,) = holder
    if hasattr(made, "magnitude"):
        made.initialize_dora_magnitude()
        made.magnitude.data += 1e-3 * torch.randn(80)
    return made
