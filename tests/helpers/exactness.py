"""Adapters of runs that computed with others and of runs that did not, and as peft loads them."""

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


@functools.cache
def products_are_exact() -> bool:
    """Whether on this machine a row of a matrix product is the same, whatever other rows there are."""
    x = torch.randn(16 * 211, 336, generator=torch.Generator().manual_seed(0))
    shapes = ((128, 128), (128, 336), (336, 128), (64, 128))
    return all(torch.equal((x[:, :n] @ x[:n, :d])[211:422], x[211:422, :n] @ x[:n, :d]) for n, d in shapes)


def assert_same_adapters(ours: Path, theirs: Path, exactly: bool = True) -> None:
    """Of two epochs' folders: to the last bit, if asked and the machine allows it; else within 1% of their update."""
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    apart = torch.cat([(a[k] - b[k]).flatten() for k in b]).norm()
    moved = torch.cat([v.flatten() for k, v in b.items() if "lora_B" in k]).norm()
    assert apart == 0 if exactly and products_are_exact() else apart < 0.01 * moved


def assert_peft_agrees(recipe: Any, folder: Path) -> None:
    """peft, offline, gives the logits of the recipe's model from the adapter's folder alone: its config names the base."""
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([e.tokens for e in recipe.train_data if len(e.tokens) == len(recipe.train_data[0].tokens)][:4])
    with torch.inference_mode():
        recipe.model.eval()
        theirs = model(ids).logits
        torch.testing.assert_close(recipe.model(ids), theirs, rtol=0, atol=2e-4)
        with model.disable_adapter():
            assert (model(ids).logits - theirs).abs().max() > 0.01, (
                "the adapter does nothing, so the test proves nothing"
            )
