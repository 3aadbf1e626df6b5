"""One training run the usual way: torchtune's own lora_finetune_single_device in a process of its own.

    python naive_train.py CONFIG.yaml MOMENTS.json

The recipe is started without the `tune` command, which would only add to its start-up. MOMENTS.json receives when the
set-up was done and when training and saving were done (seconds since the epoch).
"""

import importlib.util
import json
import sys
import time
from pathlib import Path

RECIPE = "lora_finetune_single_device"


class ChatRows:
    """Our rows as torchtune's recipes want them: tokens and labels. The ids are those that our recipe reads.

    Args:
        tokenizer: given by the recipe.
        settings: arguments of cruijff_kit's InstructDataset.
    """

    def __init__(self, tokenizer, **settings) -> None:
        from cruijff_kit.data.instruct import InstructDataset

        self.rows = InstructDataset(tokenizer, **settings)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        return {"tokens": row.tokens, "labels": row.labels}


def stock_recipe() -> type:
    """torchtune's recipe class; its wheel installs the recipes beside the package, where they cannot be imported."""
    import torchtune

    import cruijff_kit.models.compat  # noqa: F401  (torchtune 0.6.1 imports two names that torchao no longer has)

    path = Path(torchtune.__file__).parent.parent / "recipes" / f"{RECIPE}.py"
    spec = importlib.util.spec_from_file_location(RECIPE, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRAFinetuneRecipeSingleDevice


def main(config: str, moments: str) -> None:
    recipe_class = stock_recipe()
    from omegaconf import OmegaConf

    cfg = OmegaConf.load(config)
    recipe = recipe_class(cfg)
    recipe.setup(cfg)
    ready = time.time()
    recipe.train()
    recipe.cleanup()
    Path(moments).write_text(json.dumps({"ready": ready, "trained": time.time()}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
