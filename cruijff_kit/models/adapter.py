"""Adapters on disk, in PEFT's format: stock `peft` loads them onto the base folder without a network."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cruijff_kit.compat import (
    TransformerDecoder,
    get_adapter_params,
    get_lora_module_names,
    tune_to_peft_adapter_config,
    tune_to_peft_adapter_weights,
)


def _parameters(model: TransformerDecoder) -> dict[str, torch.nn.Parameter]:
    # Activation checkpointing wraps layers, which puts a word of its own into the names.
    return {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in get_adapter_params(model).items()}


def adapter_state(model: TransformerDecoder) -> dict[str, torch.Tensor]:
    """The adapters' parameters under torchtune's names, copied to the CPU."""
    return {name: p.detach().cpu().clone() for name, p in _parameters(model).items()}


def load_adapter_state(model: TransformerDecoder, state: dict[str, torch.Tensor]) -> None:
    """Put a state of `adapter_state` back into the adapters, in place."""
    parameters = _parameters(model)
    assert parameters.keys() == state.keys(), "the state is of another adapter"
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state[name])


def save_adapter(model: TransformerDecoder, model_config: dict[str, Any], base_folder: str, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json; the folder appears whole or not at all.

    Args:
        model: the model in memory; not changed.
        model_config: the `model` node of the torchtune config it was built from.
        base_folder: Hugging Face folder of the base model.
        folder: where to write; replaced if it exists.
    """
    attention = model.layers[0].attn
    weights = tune_to_peft_adapter_weights(
        adapter_state(model),
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        dim=model.tok_embeddings.embedding_dim,
        head_dim=attention.head_dim,
    )
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, draft / "adapter_model.safetensors", {"format": "pt"})
    settings = peft_config(model_config, base_folder)
    (draft / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    # safetensors writes files that only their owner may read; follow the user's umask as for any other file.
    shutil.copymode(draft / "adapter_config.json", draft / "adapter_model.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)


def peft_config(model_config: dict[str, Any], base_folder: str) -> dict[str, Any]:
    """PEFT's LoraConfig as a dict, for a torchtune LoRA builder's arguments."""
    targets = get_lora_module_names(
        list(model_config["lora_attn_modules"]),
        model_config.get("apply_lora_to_mlp", False),
        model_config.get("apply_lora_to_output", False),
    )
    targets = tune_to_peft_adapter_config({"target_modules": targets, "r": 0, "lora_alpha": 0})["target_modules"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base_folder).expanduser().absolute()),
        "r": model_config["lora_rank"],
        "lora_alpha": model_config["lora_alpha"],
        "lora_dropout": model_config.get("lora_dropout", 0.0),
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
