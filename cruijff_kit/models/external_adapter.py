"""Read adapters that other programs trained and PEFT saved, and load them into a model of cruijff_kit.

Such adapters may have other ranks and scalings per module (rank_pattern, alpha_pattern), rsLoRA, and modules or layers
without an adapter. The model has the largest rank everywhere: a smaller rank is padded with zeros, and B is rescaled for a
different scaling.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cruijff_kit.models.adapter import adapter_parameters, load_adapter_state, peft_name
from cruijff_kit.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cruijff_kit.models.compat import TransformerDecoder
from cruijff_kit.models.weights import interleave
from cruijff_kit.util.errors import UserError

# PEFT's module name -> torchtune's.
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")
_PARAMETER = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?$")


def base_model_name(folder: Path) -> str:
    """Return the base model that an adapter names: a folder, or a name on the Hugging Face hub."""
    return _read_config(folder).get("base_model_name_or_path") or ""


def lora_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the `lora` group for a model that this adapter can be loaded into.

    Raises:
        UserError: it is no LoRA adapter, a file is missing, or it changes what cruijff_kit cannot: biases, embeddings,
            other modules.
    """
    config, ranks = _read_config(folder), _read_ranks(folder)
    unsupported = {m for m in ranks if m.rpartition(".")[2] not in (*_ATTENTION, *_MLP, "lm_head")}
    if unsupported:
        raise UserError(
            f"{folder} adapts {min(unsupported)}; only adapters of {', '.join([*_ATTENTION, *_MLP, 'lm_head'])} "
            "can be evaluated"
        )
    kinds = {m.rpartition(".")[2] for m in ranks}
    rank = max(ranks.values())
    return {
        "rank": rank,
        "alpha": _scaling(config, "", config["r"]) * rank,
        "dropout": 0.0,
        "attn_modules": [name for peft_module, name in _ATTENTION.items() if peft_module in kinds],
        "apply_to_mlp": not kinds.isdisjoint(_MLP),
        "apply_to_output": "lm_head" in kinds,
        "use_dora": bool(config.get("use_dora", False)),
        "quantize_base": False,
    }


def load_peft_adapter(model: TransformerDecoder, folder: Path) -> None:
    """Load an adapter that PEFT saved into a model that was built with its `lora_settings`, in place.

    Raises:
        UserError: the adapter belongs to another base model.
    """
    load_adapter_state(model, read_peft_state(model, folder))


def read_peft_state(model: TransformerDecoder, folder: Path) -> dict[str, torch.Tensor]:
    """Read an adapter that PEFT saved as a state for `load_adapter_state`.

    Args:
        model: built with the adapter's `lora_settings`; it may be on the meta device.
        folder: the adapter's folder.
    Raises:
        UserError: the adapter belongs to another base model.
    """
    config, weights = _read_config(folder), load_file(folder / ADAPTER_WEIGHTS)
    tensors = {}
    for name, tensor in weights.items():
        module, parameter_name = _PARAMETER.match(name).groups()
        tensors[f"base_model.model.{module}.{parameter_name}"] = tensor
    attention = model.layers[0].attn
    heads = {"q_proj": attention.num_heads, "k_proj": attention.num_kv_heads}
    scaling = _scaling(config, "", config["r"])
    state = {}
    for name, parameter in adapter_parameters(model).items():
        key, rotary_heads = peft_name(name, heads)
        key = key.removesuffix(".weight")
        value = tensors.pop(key, None)
        if value is None and key.endswith("magnitude_vector"):
            raise UserError(f"{folder}: DoRA on some of the layers cannot be evaluated ({key} is missing)")
        if value is None:
            _check_may_lack(key, config, weights, folder)
            value = torch.zeros(parameter.shape)
        elif key.endswith("lora_B"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_B")
            value = value.float() * (_scaling(config, module, value.shape[1]) / scaling)
        value = _pad(value, parameter.shape, folder, key)
        state[name] = interleave(value, rotary_heads) if rotary_heads else value
    if tensors:
        raise UserError(f"{folder} does not fit the base model, which has no {next(iter(tensors))}")
    return state


def _check_may_lack(name: str, config: dict[str, Any], weights: dict[str, Any], folder: Path) -> None:
    """Check that a layer without an adapter was excluded on purpose; else the base model has too many layers."""
    kind = name.split(".")[-2]
    is_selective = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    is_selective = is_selective or isinstance(config.get("target_modules"), str)
    if not is_selective and any(f".{kind}.lora_" in weight for weight in weights):
        raise UserError(
            f"{folder} does not fit the base model: it has no {name}; is model.path the model that it was trained on?"
        )


def _pad(value: torch.Tensor, shape: torch.Size, folder: Path, name: str) -> torch.Tensor:
    """Pad a matrix with zeros to a larger rank: A [rank, in_dim] or B [out_dim, rank]."""
    rank_dim = 0 if name.endswith("lora_A") else 1
    fits = value.ndim == len(shape) and all(
        a <= b if dim == rank_dim and value.ndim == 2 else a == b
        for dim, (a, b) in enumerate(zip(value.shape, shape, strict=True))
    )
    if not fits:
        raise UserError(
            f"{folder} does not fit the base model: {name} is {list(value.shape)}, not {list(shape)}; is model.path the "
            "model that it was trained on?"
        )
    padded = torch.zeros(shape, dtype=value.dtype)
    padded[tuple(slice(n) for n in value.shape)] = value
    return padded


def _read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
        UserError: it is missing, malformed, or describes an adapter that cannot be evaluated.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no adapter ({ADAPTER_CONFIG} is missing)") from None
    except ValueError as error:
        raise UserError(f"{folder / ADAPTER_CONFIG} is not JSON: {error}") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} is an adapter of type {kind}; only LORA can be evaluated")
    if config.get("modules_to_save"):
        raise UserError(f"{folder} replaces whole modules ({config['modules_to_save']}), which cannot be evaluated")
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder} was trained with bias={config['bias']}; only bias=none can be evaluated")
    if config.get("fan_in_fan_out"):
        raise UserError(f"{folder} has fan_in_fan_out=true, for layers of GPT-2, which cannot be evaluated")
    return config


def _read_ranks(folder: Path) -> dict[str, int]:
    """Return PEFT's module name -> rank."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder} has no {ADAPTER_WEIGHTS}; save the adapter again with safe_serialization=True")
    ranks = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                match = _PARAMETER.match(name)
                if match is None:
                    raise UserError(f"{path} holds {name}, which is no LoRA parameter")
                if match[2] == "lora_A":
                    ranks[match[1]] = file.get_slice(name).get_shape()[0]
    except UserError:
        raise
    except Exception as error:  # safetensors' own
        raise UserError(f"{path} cannot be read: {error}") from error
    if not ranks:
        raise UserError(f"{path} holds no LoRA matrices")
    return ranks


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    """Return PEFT's factor of a module's update: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
