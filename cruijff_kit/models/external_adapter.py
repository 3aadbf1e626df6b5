"""Adapters that were trained elsewhere and saved by PEFT: what they are, and how they get into a model of ours.

Ranks and scalings that differ from module to module (rank_pattern, alpha_pattern), rsLoRA, and modules or layers without an
adapter fit into one shape: the largest rank, with zeros where a module has less, and B scaled where its scaling is another.
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

_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
_MLP = ("gate_proj", "up_proj", "down_proj")
_PART = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?$")


def base_model_name(folder: Path) -> str:
    """The base model that an adapter names: a folder, or a name on the Hugging Face hub."""
    return _settings(folder).get("base_model_name_or_path") or ""


def lora_settings(folder: Path) -> dict[str, Any]:
    """What the lora group must say for a model that this adapter fits into.

    Raises:
        UserError: it is no LoRA, its file is missing, or it changes what ours cannot: biases, embeddings, other modules.
    """
    settings, ranks = _settings(folder), _ranks(folder)
    strange = {m for m in ranks if m.rpartition(".")[2] not in (*_ATTENTION, *_MLP, "lm_head")}
    if strange:
        raise UserError(f"{folder} adapts {min(strange)}; only {', '.join([*_ATTENTION, *_MLP, 'lm_head'])} can be")
    kinds = {m.rpartition(".")[2] for m in ranks}
    rank = max(ranks.values())
    return {
        "rank": rank,
        "alpha": _scaling(settings, "", settings["r"]) * rank,
        "dropout": 0.0,
        "attn_modules": [ours for theirs, ours in _ATTENTION.items() if theirs in kinds],
        "apply_to_mlp": not kinds.isdisjoint(_MLP),
        "apply_to_output": "lm_head" in kinds,
        "use_dora": bool(settings.get("use_dora", False)),
        "quantize_base": False,
    }


def load_peft_adapter(model: TransformerDecoder, folder: Path) -> None:
    """Put an adapter that PEFT saved into a model that was built with its `lora_settings`.

    Raises:
        UserError: it is of another base model.
    """
    load_adapter_state(model, read_peft_state(model, folder))


def read_peft_state(model: TransformerDecoder, folder: Path) -> dict[str, torch.Tensor]:
    """An adapter that PEFT saved as `load_adapter_state` takes it; the model may be an outline without weights.

    Raises:
        UserError: it is of another base model.
    """
    settings, weights = _settings(folder), load_file(folder / ADAPTER_WEIGHTS)
    tensors = {}
    for name, tensor in weights.items():
        module, part = _PART.match(name).groups()
        tensors[f"base_model.model.{module}.{part}"] = tensor
    attention = model.layers[0].attn
    heads = {"q_proj": attention.num_heads, "k_proj": attention.num_kv_heads}
    scaling = _scaling(settings, "", settings["r"])
    state = {}
    for name, parameter in adapter_parameters(model).items():
        theirs, rotated = peft_name(name, heads)
        theirs = theirs.removesuffix(".weight")
        value = tensors.pop(theirs, None)
        if value is None and theirs.endswith("magnitude_vector"):
            raise UserError(f"{folder}: DoRA on a part of the layers cannot be evaluated ({theirs} is missing)")
        if value is None:
            _check_left_out(theirs, settings, weights, folder)
            value = torch.zeros(parameter.shape)
        elif theirs.endswith("lora_B"):
            module = theirs.removeprefix("base_model.model.").removesuffix(".lora_B")
            value = value.float() * (_scaling(settings, module, value.shape[1]) / scaling)
        value = _pad(value, parameter.shape, folder, theirs)
        state[name] = interleave(value, rotated) if rotated else value
    if tensors:
        raise UserError(f"{folder} does not fit the base model, which has no {next(iter(tensors))}")
    return state


def _check_left_out(name: str, settings: dict[str, Any], weights: dict[str, Any], folder: Path) -> None:
    """Layers without an adapter that others have must be meant, or it is of a model with fewer layers."""
    kind = name.split(".")[-2]
    meant = settings.get("layers_to_transform") is not None or settings.get("exclude_modules")
    meant = meant or isinstance(settings.get("target_modules"), str)
    if not meant and any(f".{kind}.lora_" in other for other in weights):
        raise UserError(
            f"{folder} does not fit the base model: it has no {name}; is model.path the model that it was trained on?"
        )


def _pad(value: torch.Tensor, shape: torch.Size, folder: Path, name: str) -> torch.Tensor:
    """With zeros behind, to a shape: A [rank, in] in its rows, B [out, rank] in its columns."""
    growing = 0 if name.endswith("lora_A") else 1
    fits = value.ndim == len(shape) and all(
        a <= b if dim == growing and value.ndim == 2 else a == b
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


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no adapter ({ADAPTER_CONFIG} is missing)") from None
    except ValueError as error:
        raise UserError(f"{folder / ADAPTER_CONFIG} is not JSON: {error}") from error
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} is an adapter of type {kind}; only LORA can be evaluated")
    if settings.get("modules_to_save"):
        raise UserError(
            f"{folder} replaces whole modules ({settings['modules_to_save']}), which cannot be evaluated here"
        )
    if settings.get("bias", "none") != "none":
        raise UserError(f"{folder} was trained with bias={settings['bias']}; only bias=none can be evaluated")
    if settings.get("fan_in_fan_out"):
        raise UserError(f"{folder} has fan_in_fan_out=true, which is of GPT-2's layers; they cannot be evaluated")
    return settings


def _ranks(folder: Path) -> dict[str, int]:
    """Module (as PEFT calls it) -> rank."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder} has no {ADAPTER_WEIGHTS}; save the adapter again with safe_serialization=True")
    ranks = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                match = _PART.match(name)
                if match is None:
                    raise UserError(f"{path} holds {name}, which is no part of a LoRA")
                if match[2] == "lora_A":
                    ranks[match[1]] = file.get_slice(name).get_shape()[0]
    except UserError:
        raise
    except Exception as error:  # safetensors' own
        raise UserError(f"{path} cannot be read: {error}") from error
    if not ranks:
        raise UserError(f"{path} holds no LoRA matrices")
    return ranks


def _scaling(settings: dict[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies a module's update by: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
    patterns = settings.get("alpha_pattern") or {}
    alpha = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
