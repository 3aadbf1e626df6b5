"""Places a model for evaluation: on one device, or layer after layer over several GPUs of one process."""

import copy
from typing import Any

import torch

from cruijff_kit.models import base_model
from cruijff_kit.models.compat import TransformerDecoder
from cruijff_kit.models.device import Machine, check_devices, choose_machine


def place_for_evaluation(cfg: dict[str, Any]) -> tuple[TransformerDecoder, Machine]:
    """Build the model of a torchtune config, adapters as they are initialised, on the devices that evaluate it.

    Raises:
        UserError: files that are missing or do not fit; a device that is not there.
    """
    machine, processes = choose_machine(cfg["device"], cfg["dtype"], cfg.get("threads")), cfg["nproc_per_node"]
    check_devices(machine.device, processes)
    is_sharded = processes > 1 and machine.device.type == "cuda"
    reading = Machine(torch.device("cpu"), machine.dtype, machine.threads) if is_sharded else machine
    quantize = cfg["model"].get("quantize_base", False)
    model = base_model.build(cfg["model"], base_model.read_base(cfg["checkpointer"], reading, quantize), reading)
    if is_sharded:
        shard_layers(model, [torch.device("cuda", n) for n in range(processes)])
    return model, machine


def shard_layers(model: TransformerDecoder, devices: list[torch.device]) -> None:
    """Put equal stretches of layers onto the devices, in order; what is before and behind the layers goes to the first.

    Hooks move a layer's inputs to its device, so its keys and values come to lie there.

    Args:
        model: on any device; changed in place.
        devices: one or more; one: the whole model goes there.
    """
    each = -(-len(model.layers) // len(devices))
    # The layers share one table of rotations; each device needs one.
    rotations = [copy.deepcopy(model.layers[0].attn.pos_embeddings).to(device) for device in devices]
    for name, part in model.named_children():
        if name != "layers":
            part.to(devices[0])
    for number, layer in enumerate(model.layers):
        device = devices[number // each]
        layer.attn.pos_embeddings = rotations[number // each]
        layer.to(device)
        if len(devices) > 1:
            layer.register_forward_pre_hook(_make_mover(device), with_kwargs=True)
    if len(devices) > 1:
        model.norm.register_forward_pre_hook(_make_mover(devices[0]), with_kwargs=True)


def _make_mover(device: torch.device):
    def move(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        def move_one(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return tuple(map(move_one, args)), {k: move_one(v) for k, v in kwargs.items()}

    return move
