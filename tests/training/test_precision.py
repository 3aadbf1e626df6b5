"""What bf16 rounds is products: adapters, their gradients and the optimiser's moments are fp32 in every recipe."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import cruijff_kit
from cruijff_kit.models.adapter import adapter_state
from cruijff_kit.models.compat import DoRALinear, LoRALinear
from cruijff_kit.models.dora import BiasedDoRALinear
from cruijff_kit.models.fused_lora import fuse_lora
from cruijff_kit.models.master_weights import use_master_weights
from cruijff_kit.runs.plan import plan_run

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
    """80 steps. In bf16 throughout, 79% of A's entries stayed as they were at lr=5e-5; the loss was 1.5 times fp32's."""
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
        loss, *_ = recipe._forward([recipe.train_data[n] for n in examples])
        before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in recipe.trainable]
        own = torch.autograd.grad(loss, recipe.trainable, retain_graph=True)
        loss.backward()
        for p, earlier, more in zip(recipe.trainable, before, own, strict=True):
            assert p.grad.dtype == torch.float32 and torch.equal(p.grad, earlier + more)


def layer(kind: type[nn.Module], bias: bool) -> nn.Module:
    """An adapted layer as `models.base` makes it over a base in bf16, with an adapter that matters."""
    torch.manual_seed(0)
    holder = nn.Sequential(kind(48, 80, rank=4, alpha=8, use_bias=bias).bfloat16())
    use_master_weights(holder)
    (made,) = holder
    made.requires_grad_(False)
    nn.init.normal_(made.lora_a.weight, std=0.1)
    nn.init.normal_(made.lora_b.weight, std=0.1)
    adapter = [made.lora_a.weight, made.lora_b.weight]
    if isinstance(made, DoRALinear):
        made.initialize_dora_magnitude()
        made.magnitude += 1e-3 * torch.randn(80)
        adapter.append(made.magnitude)
    for p in adapter:
        p.requires_grad_()
    return made


def by_definition(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """LoRA, and DoRA as its paper has it, the length without a gradient; the bias as PEFT adds it."""
    dora = isinstance(module, DoRALinear)
    scale = module.scaling if dora else module.alpha / module.rank
    full = module.weight + scale * module.lora_b.weight @ module.lora_a.weight
    if dora:
        full = full * (module.magnitude / full.detach().norm(dim=1))[:, None]
    return F.linear(x, full, module.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear, BiasedDoRALinear])
def test_layers_over_a_base_in_bf16(kind, bias):
    """Outputs and gradients are those of fp64 as far as bf16 goes, torchtune's own DoRA layer included."""
    module = layer(kind, bias)
    exact = copy.deepcopy(module).double()
    fuse_lora(nn.Sequential(module))
    x, target = torch.randn(64, 48).bfloat16(), torch.randn(64, 80)
    out, expected = module(x), by_definition(exact, x.double())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)
    (out.float() * target).sum().backward()
    (expected * target).sum().backward()
    trained = [(p, q) for p, q in zip(module.parameters(), exact.parameters(), strict=True) if p.requires_grad]
    assert len(trained) == (2 if kind is LoRALinear else 3)
    for p, q in trained:
        assert p.dtype == p.grad.dtype == torch.float32
        assert (p.grad - q.grad).norm() < 0.01 * q.grad.norm()


@pytest.mark.parametrize("kind", [DoRALinear, BiasedDoRALinear])
def test_a_step_of_a_magnitude_is_seen_in_bf16(kind):
    """1e-4 of it, which its quotient by the length would lose in bf16: seen in the mean over many tokens."""
    module = layer(kind, False)
    x = torch.randn(4000, 48).bfloat16()
    with torch.no_grad():
        module.magnitude.copy_(module._row_norms())
        before = module(x)
        module.magnitude *= 1 + 1e-4
        after = module(x)
    change = ((after - before).double() * before).sum() / before.double().square().sum()
    assert change == pytest.approx(1e-4, rel=0.5)


@pytest.mark.parametrize(("dtype", "each"), [("bf16", 16 + 2 + 2), ("fp32", 16)])
@pytest.mark.parametrize("dora", ["false", "true"])
def test_the_plan_counts_what_adapters_take(tiny, tmp_path, dtype, each, dora):
    """In memory a parameter, its gradient and two moments in fp32, beside bf16 two copies; on disk 4 bytes."""

    def plan(rank: int):
        options = [*RUN, f"model.path={tiny}", f"lora.rank={rank}", "batch_size=64", f"lora.use_dora={dora}"]
        where = ["eval=none", "device=cpu", f"output_dir={tmp_path}"]
        return plan_run(cruijff_kit.compose([*options, *where, f"dtype={dtype}"]))

    small, large = plan(4), plan(32)
    more = large.trainable_parameters - small.trainable_parameters
    assert more > 10_000
    assert large.memory_bytes - small.memory_bytes == each * more
    assert large.disk_bytes == 4 * large.trainable_parameters
