"""Save and load adapters in PEFT's format; stock `peft` loads them onto the base folder without a network."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cruijff_kit.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cruijff_kit.models.compat import TransformerDecoder, get_adapter_params
from cruijff_kit.models.weights import deinterleave, interleave, to_hugging_face
from cruijff_kit.util.files import atomic

# Suffix of an adapter's parameters: torchtune's -> PEFT's.
_SUFFIXES = {
    ".lora_a.weight": ".lora_A.weight",
    ".lora_b.weight": ".lora_B.weight",
    ".magnitude": ".lora_magnitude_vector",
}


def adapter_parameters(model: TransformerDecoder) -> dict[str, torch.nn.Parameter]:
    """Return torchtune's name -> parameter of the model's adapters; the parameters are not copied."""
    # Activation checkpointing wraps layers and inserts its own word into the names.
    return {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in get_adapter_params(model).items()}


def adapter_state(model: TransformerDecoder) -> dict[str, torch.Tensor]:
    """Return torchtune's name -> value of the adapters' parameters, copied to the CPU."""
    return {name: p.detach().cpu().clone() for name, p in adapter_parameters(model).items()}


def load_adapter_state(model: TransformerDecoder, state: dict[str, torch.Tensor]) -> None:
    """Load a state of `adapter_state` into the model's adapters, in place."""
    parameters = adapter_parameters(model)
    assert parameters.keys() == state.keys(), "the state is of another adapter"
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state[name])


def save_adapter(model: TransformerDecoder, model_config: dict[str, Any], base_folder: str, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json. The folder is complete or absent.

    Args:
        model: the model in memory; not changed.
        model_config: the `model` node of the torchtune config it was built from.
        base_folder: Hugging Face folder of the base model.
        folder: where to write; replaced if it exists.
    """
    attention = model.layers[0].attn
    weights = peft_weights(adapter_state(model), attention.num_heads, attention.num_kv_heads)
    with atomic(folder) as draft:
        draft.mkdir()
        save_file({k: v.contiguous() for k, v in weights.items()}, draft / ADAPTER_WEIGHTS, {"format": "pt"})
        settings = peft_config(model_config, base_folder)
        (draft / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        # safetensors writes files that only their owner can read; use the permissions that the user's umask gives.
        shutil.copymode(draft / ADAPTER_CONFIG, draft / ADAPTER_WEIGHTS)
        shutil.rmtree(folder, ignore_errors=True)


def load_adapter(model: TransformerDecoder, folder: Path) -> None:
    """Load an adapter of `save_adapter` into the model's adapters, in place.

    Args:
        model: built with the same `model` node.
        folder: the adapter's folder.
    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: the adapter has other modules or another rank than the model.
    """
    weights = load_file(folder / ADAPTER_WEIGHTS)
    attention = model.layers[0].attn
    heads = {"q_proj": attention.num_heads, "k_proj": attention.num_kv_heads}
    state = {}
    for name, p in adapter_parameters(model).items():
        key, rotary_heads = peft_name(name, heads)
        value = weights.pop(key, None)
        if value is None or value.shape != p.shape:
            raise ValueError(f"{folder} does not fit the model: it has no {key} of shape {tuple(p.shape)}")
        state[name] = interleave(value, rotary_heads) if rotary_heads else value
    if weights:
        raise ValueError(f"{folder} does not fit the model, which has no {next(iter(weights))}")
    load_adapter_state(model, state)


def peft_name(name: str, heads: dict[str, int]) -> tuple[str, int | None]:
    """Return PEFT's name of an adapter's parameter, and for rotated rows the number of heads, else None.

    Args:
        name: torchtune's name.
        heads: q_proj and k_proj -> number of heads. PEFT orders the rows of their B and magnitude differently.
    """
    suffix = next(s for s in _SUFFIXES if name.endswith(s))
    module = name.removesuffix(suffix)
    rotary_heads = heads.get(module.rpartition(".")[2]) if suffix != ".lora_a.weight" else None
    return f"base_model.model.{to_hugging_face(module)}{_SUFFIXES[suffix]}", rotary_heads


def peft_weights(state: dict[str, torch.Tensor], num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """Convert a state of `adapter_state` to PEFT's names, with the rows of queries and keys in Hugging Face's order.

    Args:
        state: torchtune's names -> values.
        num_heads: query heads.
        num_kv_heads: key and value heads.
    """
    heads = {"q_proj": num_heads, "k_proj": num_kv_heads}
    weights = {}
    for name, value in state.items():
        key, rotary_heads = peft_name(name, heads)
        weights[key] = deinterleave(value, rotary_heads) if rotary_heads else value
    return weights


def peft_config(model_config: dict[str, Any], base_folder: str) -> dict[str, Any]:
    """Return the content of adapter_config.json (PEFT's LoraConfig) for the arguments of a torchtune LoRA builder."""
    modules = [f"layers.0.attn.{name}" for name in model_config["lora_attn_modules"]]
    modules += [f"layers.0.mlp.{name}" for name in ("w1", "w2", "w3") if model_config.get("apply_lora_to_mlp", False)]
    modules += ["output"] if model_config.get("apply_lora_to_output", False) else []
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(base_folder).expanduser().absolute()),
        "r": model_config["lora_rank"],
        "lora_alpha": model_config["lora_alpha"],
        "lora_dropout": model_config.get("lora_dropout", 0.0),
        "target_modules": sorted(to_hugging_face(module).rpartition(".")[2] for module in modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": model_config.get("use_dora", False),
        "use_rslora": False,
    }
