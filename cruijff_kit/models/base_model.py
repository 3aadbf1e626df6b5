"""The frozen base model: fetched, read once per process, and wrapped in fresh adapters for each run."""

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

_cached: dict[str, dict[str, torch.Tensor]] = {}  # at most one base model


def read_base(
    checkpointer: dict[str, Any], machine: Machine, quantize_base: bool = False
) -> dict[str, torch.Tensor | NF4Tensor]:
    """The base weights under torchtune's names, kept in memory for the next run of this process.

    Args:
        checkpointer: the `checkpointer` node of a torchtune config.
        machine: the weights' device and dtype.
        quantize_base: the layers' matrices in NF4, 4 bits (Dettmers et al. 2023, arXiv 2305.14314); the model node's
            key of that name.
    Raises:
        UserError: a file is missing, broken, or of another architecture.
    """
    stats = [(str(f.absolute()), f.stat()) for f in weight_files(checkpointer)]
    versions = [(path, s.st_mtime_ns, s.st_ctime_ns, s.st_size) for path, s in stats]
    parts = [versions, checkpointer["_component_"], checkpointer.get("model_type"), quantize_base]
    key = json.dumps([*parts, str(machine.device), str(machine.dtype)])
    if key not in _cached:
        _cached.clear()
        held = {}
        for name, tensor in _tensors(checkpointer):
            tensor = tensor.to(machine.device, machine.dtype)
            quantized = quantize_base and name.startswith("layers.") and tensor.ndim == 2
            held[name] = _quantize(tensor) if quantized else tensor
        _cached[key] = held
    return _cached[key]


def _quantize(matrix: torch.Tensor) -> torch.Tensor | NF4Tensor:
    """In NF4, each 64 values with a scale, up to 256 scales quantized together; as it is where 64 does not divide it."""
    blocks, rest = divmod(matrix.numel(), 64)
    return matrix if rest else to_nf4(matrix, 64, math.gcd(blocks, 256))


def _tensors(checkpointer: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    reader = instantiate(OmegaConf.create(checkpointer))
    if hasattr(reader, "tensors"):
        yield from reader.tensors()
        return
    weights = reader.load_checkpoint()[MODEL_KEY]  # torchtune's own
    # Popped one by one, so that the copy in the file's precision does not stay beside the converted one.
    yield from ((name, weights.pop(name)) for name in list(weights))


def weight_files(checkpointer: dict[str, Any]) -> list[Path]:
    """The files with the base weights.

    Raises:
        UserError: one is missing.
    """
    folder = Path(checkpointer["checkpoint_dir"])
    files = [folder / name for name in checkpointer["checkpoint_files"]]
    for file in files:
        if not file.is_file():
            raise UserError(f"model.path: {folder} has no {file.name}; a model needs its safetensors files there")
    return files


def build(model_config: dict[str, Any], base: dict[str, torch.Tensor], machine: Machine) -> TransformerDecoder:
    """The model of a run: shared base tensors, frozen, and newly initialised adapters, trainable.

    The adapters' initial values depend on torch's random state alone, not on what the process did before.

    Args:
        model_config: the `model` node of a torchtune config.
        base: as `read_base`.
        machine: device and dtype.
    Raises:
        UserError: the weights do not fit the builder.
    """
    quantized = any(isinstance(weight, NF4Tensor) for weight in base.values())
    assert quantized == model_config.get("quantize_base", False), "read_base was told something else"
    model = skeleton(model_config, machine.dtype)
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
    strangers = [*(set(missing) - set(adapters)), *(set(unexpected) - {"output.weight"})]
    if strangers:
        raise UserError(
            f"the weights do not fit model.builder {model_config['_component_']}: "
            f"{len(strangers)} names differ, for example {sorted(strangers)[0]}"
        )
    for module in model.modules():
        if isinstance(module, DoRALinear):
            module.initialize_dora_magnitude()  # the norms of the base weights, which are there only now
    return model


def skeleton(model_config: dict[str, Any], dtype: torch.dtype = torch.float32) -> TransformerDecoder:
    """The model without any memory for its weights (on the meta device), for counting and for filling.

    Raises:
        UserError: the builder refuses its arguments, or rotates positions in another way than our adapters are saved for.
    """
    # In 4 bits are the weights that are filled in, not the outline.
    config = {k: v for k, v in model_config.items() if k != "quantize_base"}
    with set_default_dtype(dtype), torch.device("meta"):
        model = instantiate(OmegaConf.create(config))
    use_master_weights(model)
    rope = type(model.layers[0].attn.pos_embeddings)
    if not issubclass(rope, (Llama3ScaledRoPE, RotaryPositionalEmbeddings)):
        raise UserError(
            f"model.builder {model_config['_component_']} rotates positions by {rope.__name__}, which our weights are not "
            "ordered for; use cruijff_kit.models.llama.lora_hf_llama, which reads any Llama, Mistral or Qwen2.5 folder"
        )
    return model


def count_parameters(model: TransformerDecoder) -> tuple[int, int]:
    """Parameters of the adapters, and of the whole model."""
    return sum(p.numel() for p in get_adapter_params(model).values()), sum(p.numel() for p in model.parameters())


def clear_cache() -> None:
    """Forget the base model that is held in memory."""
    _cached.clear()
