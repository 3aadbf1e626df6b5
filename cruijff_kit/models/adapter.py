"""Adapters on disk, in PEFT's format: stock `peft` loads them onto the base folder without a network."""

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

# Parameters of an adapter, torchtune's name -> PEFT's.
_PARAMETERS = {
    ".lora_a.weight": ".lora_A.weight",
    ".lora_b.weight": ".lora_B.weight",
    ".magnitude": ".lora_magnitude_vector",
}


def adapter_parameters(model: TransformerDecoder) -> dict[str, torch.nn.Parameter]:
    """The adapters' parameters under torchtune's names, as they are in the model."""
    # Activation checkpointing wraps layers, which puts a word of its own into the names.
    return {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in get_adapter_params(model).items()}


def adapter_state(model: TransformerDecoder) -> dict[str, torch.Tensor]:
    """The adapters' parameters under torchtune's names, copied to the CPU."""
    return {name: p.detach().cpu().clone() for name, p in adapter_parameters(model).items()}


def load_adapter_state(model: TransformerDecoder, state: dict[str, torch.Tensor]) -> None:
    """Put a state of `adapter_state` back into the adapters, in place."""
    parameters = adapter_parameters(model)
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
    weights = peft_weights(adapter_state(model), attention.num_heads, attention.num_kv_heads)
    with atomic(folder) as draft:
        draft.mkdir()
        save_file({k: v.contiguous() for k, v in weights.items()}, draft / ADAPTER_WEIGHTS, {"format": "pt"})
        settings = peft_config(model_config, base_folder)
        (draft / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        # safetensors writes files that only their owner may read; follow the user's umask as for any other file.
        shutil.copymode(draft / ADAPTER_CONFIG, draft / ADAPTER_WEIGHTS)
        shutil.rmtree(folder, ignore_errors=True)


def load_adapter(model: TransformerDecoder, folder: Path) -> None:
    """Put an adapter that `save_adapter` wrote back into the model's adapters, in place.

    Args:
        model: built with the same `model` node.
        folder: of the adapter.
    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: it is of another adapter: other modules, or another rank.
    """
    weights = load_file(folder / ADAPTER_WEIGHTS)
    attention = model.layers[0].attn
    heads = {"q_proj": attention.num_heads, "k_proj": attention.num_kv_heads}
    state = {}
    for name, p in adapter_parameters(model).items():
        theirs, rotated = peft_name(name, heads)
        value = weights.pop(theirs, None)
        if value is None or value.shape != p.shape:
            raise ValueError(f"{folder} does not fit the model: {theirs} is not there in the shape {tuple(p.shape)}")
        state[name] = interleave(value, rotated) if rotated else value
    if weights:
        raise ValueError(f"{folder} does not fit the model, which has no {next(iter(weights))}")
    load_adapter_state(model, state)


def peft_name(name: str, heads: dict[str, int]) -> tuple[str, int | None]:
    """PEFT's name of an adapter's parameter, and the number of heads whose rows stand in another order there, if any."""
    end = next(e for e in _PARAMETERS if name.endswith(e))
    module = name.removesuffix(end)
    rotated = heads.get(module.rpartition(".")[2]) if end != ".lora_a.weight" else None
    return f"base_model.model.{to_hugging_face(module)}{_PARAMETERS[end]}", rotated


def peft_weights(state: dict[str, torch.Tensor], num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """A state of `adapter_state` under PEFT's names, queries' and keys' rows in Hugging Face's order.

    Args:
        state: torchtune's names -> values.
        num_heads: query heads.
        num_kv_heads: key and value heads.
    """
    heads = {"q_proj": num_heads, "k_proj": num_kv_heads}
    weights = {}
    for name, value in state.items():
        theirs, rotated = peft_name(name, heads)
        weights[theirs] = deinterleave(value, rotated) if rotated else value
    return weights


def peft_config(model_config: dict[str, Any], base_folder: str) -> dict[str, Any]:
    """PEFT's LoraConfig as a dict, for a torchtune LoRA builder's arguments."""
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
