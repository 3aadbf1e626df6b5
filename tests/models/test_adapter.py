"""What we save is what peft loads: same logits as the model in memory."""

import pytest
from exactness import assert_peft_agrees


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
    recipe = trained("model=hf_llama", f"model.path={tiny}", "dataset.max_samples=40", *lora)
    assert_peft_agrees(recipe, recipe.folder.epoch(0))
