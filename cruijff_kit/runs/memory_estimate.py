"""Estimate the memory and the disk space that a run needs."""

import math
from pathlib import Path
from typing import Any

from cruijff_kit.config.epochs import saved_epochs

_FP32 = 4  # bytes


def estimate_disk(cfg: dict[str, Any], trainable: int, files: list[Path]) -> int:
    """Estimate the bytes of all saved adapters and merged models.

    Args:
        cfg: the torchtune config. trainable: parameters of the adapter. files: of the base model's weights.
    """
    merged = sum(f.stat().st_size for f in files) if cfg["save_merged"] else 0
    return len(saved_epochs(cfg["epochs_to_save"], cfg["epochs"])) * (trainable * _FP32 + merged)


def estimate_memory(
    model: Any, total: int, trainable: int, machine: Any, cfg: dict[str, Any], lengths: list[int], files: list[Path]
) -> int:
    """Estimate the peak of a run in bytes: on a GPU of its memory (of each of several), on a CPU of all processes.

    Training holds the weights, the activations of one batch, and in fp32 the adapters, their gradients and two AdamW
    moments; over weights in bf16 also copies of the adapters and of their gradients in bf16. Per layer and token about 16
    values of the model's width and 5 of the MLP's stay for the backward pass (inputs of norms, projections and adapters;
    fp32 copies inside the norms count twice). On a CPU reading the files may need more than that: the files' weights beside
    the converted ones. There, Python and the libraries add half a gigabyte.
    """
    width, mlp = model.tok_embeddings.embedding_dim, model.layers[0].mlp.w1.weight.shape[0]
    size = machine.dtype.itemsize
    tokens = cfg["batch_size"] * max(lengths)
    kept_layers = 2 * math.sqrt(len(model.layers)) if cfg["enable_activation_checkpointing"] else len(model.layers)
    activations = tokens * kept_layers * (16 * width + 5 * mlp) * size
    weights, processes = (total - trainable) * size, cfg["nproc_per_node"]
    adapters = trainable * (4 * _FP32 + (2 * size if size < _FP32 else 0))
    if cfg["model"].get("quantize_base"):  # 4 bits a value, and a byte of scale for each 64
        layers = sum(p.numel() for n, p in model.layers.named_parameters() if p.ndim == 2 and "lora_" not in n)
        weights -= layers * (size - 0.5 - 1 / 64)
    training = weights / processes + adapters + activations
    if machine.device.type != "cpu":
        return round(training)
    reading = sum(f.stat().st_size for f in files) + total * size
    return round(max(processes * training, reading) + 0.5e9 * processes)
