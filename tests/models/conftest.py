"""Tiny random models of each family, written by transformers, with the tokenizer of the committed tiny Llama."""

import shutil
from pathlib import Path

import pytest
import torch

SHAPE = {
    "vocab_size": 259, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def save_model(tiny, tmp_path):
    """A function: family, its config's keys -> folder with a random model, as transformers saves it."""

    def save(family: str, shard: str = "5GB", name: str = "base", **keys) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(family, **SHAPE | keys)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(keys.get("dtype", torch.float32))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases begin at 0 and norms at 1, which would hide a mistake
                parameter.data += 0.3 * torch.randn_like(parameter)
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=shard)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny / file, folder)
        return folder

    return save


@pytest.fixture
def reference_logits():
    """A function: folder, ids -> [rows, tokens, vocabulary] by transformers, in fp32."""

    def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            return model(ids).logits

    return logits
