"""Place a model for evaluation: on one device, or its layers sharded over several GPUs of one process."""

import copy
from typing import Any

import torch

from cruijff_kit.models import base_model
from cruijff_kit.models.compat import TransformerDecoder
from cruijff_kit.models.device import Machine, check_devices, choose_machine


def place_for_evaluation(cfg: dict[str, Any]) -> tuple[TransformerDecoder, Machine]:
    """Build the model of a torchtune config, with newly initialised adapters, on the devices that evaluate it.

    Args:
        cfg: the torchtune config, resolved.
    Raises:
        UserError: a file is missing or does not fit, or a device does not exist.
    """
    machine, processes = choose_machine(cfg["device"], cfg["dtype"], cfg.get("threads")), cfg["nproc_per_node"]
    check_devices(machine.device, processes)
    is_sharded = processes > 1 and machine.device.type == "cuda"
    # A sharded model is read into CPU memory, because no GPU might hold all of it.
    load_machine = Machine(torch.device("cpu"), machine.dtype, machine.threads) if is_sharded else machine
    quantize_base = cfg["model"].get("quantize_base", False)
    weights = base_model.read_base(cfg["checkpointer"], load_machine, quantize_base)
    model = base_model.build(cfg["model"], weights, load_machine)
    if is_sharded:
        shard_layers(model, [torch.device("cuda", n) for n in range(processes)])
    return model, machine


def shard_layers(model: TransformerDecoder, devices: list[torch.device]) -> None:
    """Move equal numbers of layers to the devices, in order; embeddings, final norm and output go to the first device.

    Hooks move a layer's inputs to its device, so its keys and values are stored there.

    Args:
        model: on any device; changed in place.
        devices: at least one; a single device gets the whole model.
    """
    layers_per_device = -(-len(model.layers) // len(devices))
    # The layers share one table of rotary embeddings; each device needs its own copy.
    ropes = [copy.deepcopy(model.layers[0].attn.pos_embeddings).to(device) for device in devices]
    for name, module in model.named_children():
        if name != "layers":
            module.to(devices[0])
    for number, layer in enumerate(model.layers):
        device = devices[number // layers_per_device]
        layer.attn.pos_embeddings = ropes[number // layers_per_device]
        layer.to(device)
        if len(devices) > 1:
            layer.register_forward_pre_hook(_make_mover(device), with_kwargs=True)
    if len(devices) > 1:
        model.norm.register_forward_pre_hook(_make_mover(devices[0]), with_kwargs=True)


def _make_mover(device: torch.device):
    def move_inputs(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return tuple(map(move, args)), {k: move(v) for k, v in kwargs.items()}

    return move_inputs
