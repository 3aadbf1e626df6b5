"""What we save is what peft loads: same logits as the model in memory, on the tiny model and on the real one."""

import pytest
import torch

import cruijff_kit
from cruijff_kit.plan import check
from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice


def trained(output, *overrides: str) -> LoRAFinetuneRecipeSingleDevice:
    config = cruijff_kit.compose(
        ["eval=none", "dtype=fp32", "device=cpu", f"output_dir={output}", "num_warmup_steps=1", "lr=5e-3",
         "dataset.validation_split=null", *overrides]
    )  # fmt: skip
    check(config)
    recipe = LoRAFinetuneRecipeSingleDevice(config.torchtune)
    recipe.setup()
    recipe.train()
    recipe.cleanup()
    return recipe


def assert_peft_agrees(recipe) -> None:
    """peft, offline, from the adapter folder alone: the base folder stands in its config."""
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(recipe.folder.epoch(0), dtype=torch.float32).eval()
    ids = torch.tensor([e.tokens for e in recipe.train_data if len(e.tokens) == len(recipe.train_data[0].tokens)][:4])
    with torch.inference_mode():
        recipe.model.eval()
        theirs = model(ids).logits
        torch.testing.assert_close(recipe.model(ids), theirs, rtol=0, atol=2e-4)
        with model.disable_adapter():
            assert (model(ids).logits - theirs).abs().max() > 0.01, (
                "the adapter does nothing, so the test proves nothing"
            )


@pytest.mark.parametrize(
    "lora",
    [
        ["lora.rank=4"],
        ["lora.rank=8", "lora.alpha=4", "lora.attn_modules=[q_proj,k_proj,v_proj,output_proj]"],
        ["lora.rank=2", "lora.attn_modules=[k_proj]", "lora.apply_to_mlp=false"],
        ["lora.rank=4", "enable_activation_checkpointing=true"],
    ],
    ids=" ".join,
)
def test_peft_loads_the_adapter(tiny, tmp_path, lora):
    assert_peft_agrees(trained(tmp_path, "model=hf_llama", f"model.path={tiny}", "dataset.max_samples=40", *lora))


@pytest.mark.real_model
def test_peft_loads_the_adapter_of_the_real_model(smollm2, tmp_path):
    recipe = trained(tmp_path, f"model.path={smollm2}", "dataset.max_samples=16", "lora.rank=8")
    assert_peft_agrees(recipe)
