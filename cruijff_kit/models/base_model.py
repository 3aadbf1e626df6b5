"""Read the frozen base model once per process, and build a model with new adapters on it for each run."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from cruijff_kit.models.compat import (
    MODEL_KEY,
    DoRALinear,
    Llama3ScaledRoPE,
    NF4Tensor,
    RotaryPositionalEmbeddings,
    TransformerDecoder,
    get_adapter_params,
    instantiate,
    set_default_dtype,
    set_trainable_params,
    to_nf4,
)
from cruijff_kit.models.device import Machine
from cruijff_kit.models.master_weights import use_master_weights
from cruijff_kit.util.errors import UserError

_cache: dict[str, dict[str, torch.Tensor]] = {}  # holds at most one base model


def read_base(
    checkpointer: dict[str, Any], machine: Machine, quantize_base: bool = False
) -> dict[str, torch.Tensor | NF4Tensor]:
    """Read the base weights, and keep them in memory for the next run of this process.

    Args:
        checkpointer: the `checkpointer` node of a torchtune config.
        machine: the weights' device and dtype.
        quantize_base: quantize the layers' matrices to NF4, 4 bits (Dettmers et al. 2023, arXiv 2305.14314); the
            `model` node's key of that name.
    Returns:
        torchtune's name -> weight.
    Raises:
        UserError: a file is missing, broken, or of another architecture.
    """
    stats = [(str(f.absolute()), f.stat()) for f in weight_files(checkpointer)]
    versions = [(path, s.st_mtime_ns, s.st_ctime_ns, s.st_size) for path, s in stats]
    parts = [versions, checkpointer["_component_"], checkpointer.get("model_type"), quantize_base]
    key = json.dumps([*parts, str(machine.device), str(machine.dtype)])
    if key not in _cache:
        _cache.clear()
        weights = {}
        for name, tensor in _read_tensors(checkpointer):
            tensor = tensor.to(machine.device, machine.dtype)
            is_quantized = quantize_base and name.startswith("layers.") and tensor.ndim == 2
            weights[name] = _quantize(tensor) if is_quantized else tensor
        _cache[key] = weights
    return _cache[key]


def _quantize(matrix: torch.Tensor) -> torch.Tensor | NF4Tensor:
    """Quantize to NF4 in blocks of 64 values, with up to 256 block scales quantized together.

    A matrix whose size is not a multiple of 64 stays as it is.
    """
    blocks, rest = divmod(matrix.numel(), 64)
    return matrix if rest else to_nf4(matrix, 64, math.gcd(blocks, 256))


def _read_tensors(checkpointer: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    reader = instantiate(OmegaConf.create(checkpointer))
    if hasattr(reader, "tensors"):
        yield from reader.tensors()
        return
    weights = reader.load_checkpoint()[MODEL_KEY]  # a checkpointer of torchtune
    # Popping frees the copy in the file's precision before the next weight is converted.
    yield from ((name, weights.pop(name)) for name in list(weights))


def weight_files(checkpointer: dict[str, Any]) -> list[Path]:
    """Return the files with the base weights.

    Raises:
        UserError: a file is missing.
    """
    folder = Path(checkpointer["checkpoint_dir"])
    files = [folder / name for name in checkpointer["checkpoint_files"]]
    for file in files:
        if not file.is_file():
            raise UserError(f"model.path: {folder} has no {file.name}; a model needs its safetensors files there")
    return files


def build(model_config: dict[str, Any], base: dict[str, torch.Tensor], machine: Machine) -> TransformerDecoder:
    """Build the model of a run: the frozen base tensors, which runs share, and newly initialised, trainable adapters.

    The adapters' initial values depend only on torch's RNG state, not on earlier runs of the process.

    Args:
        model_config: the `model` node of a torchtune config.
        base: result of `read_base`.
        machine: device and dtype.
    Raises:
        UserError: the weights do not fit the builder.
    """
    is_quantized = any(isinstance(weight, NF4Tensor) for weight in base.values())
    assert is_quantized == model_config.get("quantize_base", False), "read_base ran with another quantize_base"
    model = build_on_meta(model_config, machine.dtype)
    adapters = get_adapter_params(model)
    set_trainable_params(model, adapters)
    with machine.device:
        for module in model.modules():
            if hasattr(module, "adapter_params"):
                module.to_empty(device=machine.device)
                module.initialize_parameters()
            if hasattr(module, "rope_init"):
                module.rope_init()
    try:
        missing, unexpected = model.load_state_dict(base, strict=False, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:2]]
        raise UserError(f"the weights do not fit model.builder {model_config['_component_']}: {lines[0]}") from error
    # A tied model may still list its output weights in the file.
    mismatches = [*(set(missing) - set(adapters)), *(set(unexpected) - {"output.weight"})]
    if mismatches:
        raise UserError(
            f"the weights do not fit model.builder {model_config['_component_']}: "
            f"{len(mismatches)} names differ, for example {sorted(mismatches)[0]}"
        )
    for module in model.modules():
        if isinstance(module, DoRALinear):
            module.initialize_dora_magnitude()  # computes the norms of the base weights, so they must be loaded
    return model


def build_on_meta(model_config: dict[str, Any], dtype: torch.dtype = torch.float32) -> TransformerDecoder:
    """Build the model on torch's meta device, without memory for its weights.

    Args:
        model_config: the `model` node of a torchtune config.
        dtype: dtype of the base parameters.
    Raises:
        UserError: the builder refuses its arguments, or its rotary positions are not those that adapters are saved for.
    """
    # `read_base` quantizes the weights; the model on the meta device has none.
    config = {k: v for k, v in model_config.items() if k != "quantize_base"}
    with set_default_dtype(dtype), torch.device("meta"):
        model = instantiate(OmegaConf.create(config))
    use_master_weights(model)
    rope = type(model.layers[0].attn.pos_embeddings)
    if not issubclass(rope, (Llama3ScaledRoPE, RotaryPositionalEmbeddings)):
        raise UserError(
            f"model.builder {model_config['_component_']} rotates positions by {rope.__name__}, and cruijff_kit does not "
            "order weights for it; use cruijff_kit.models.llama.lora_hf_llama for a Llama, Mistral or Qwen2.5 folder"
        )
    return model


def count_parameters(model: TransformerDecoder) -> tuple[int, int]:
    """Return the number of parameters of the adapters, and of the whole model."""
    return sum(p.numel() for p in get_adapter_params(model).values()), sum(p.numel() for p in model.parameters())


def clear_cache() -> None:
    """Free the base model that `read_base` keeps in memory."""
    _cache.clear()
