"""What we save is what peft loads: same logits as the model in memory, on the tiny model and on the real one."""

import pytest
import torch


@pytest.fixture
def trained(set_up_recipe, tmp_path):
    """A function: overrides -> the recipe after training."""

    def run(*overrides: str):
        small = ["dtype=fp32", "num_warmup_steps=1", "lr=5e-3", "dataset.validation_split=null"]
        recipe = set_up_recipe(f"output_dir={tmp_path}", *small, *overrides)
        recipe.train()
        recipe.cleanup()
        return recipe

    return run


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
def test_peft_loads_the_adapter(trained, tiny, lora):
    assert_peft_agrees(trained("model=hf_llama", f"model.path={tiny}", "dataset.max_samples=40", *lora))


@pytest.mark.real_model
def test_peft_loads_the_adapter_of_the_real_model(trained, smollm2):
    recipe = trained(f"model.path={smollm2}", "dataset.max_samples=16", "lora.rank=8")
    assert_peft_agrees(recipe)
