"""A model for evaluation: on one device, or over several GPUs of one process, layer after layer, if one cannot hold it."""

import copy
from typing import Any

import torch

from cruijff_kit.models import base_model
from cruijff_kit.models.compat import TransformerDecoder
from cruijff_kit.models.device import Machine, check_devices, choose_machine


def for_evaluation(cfg: dict[str, Any]) -> tuple[TransformerDecoder, Machine]:
    """The model of a torchtune config, adapters as they are initialised, where it is to be evaluated.

    Raises:
        UserError: files that are missing or do not fit; a device that is not there.
    """
    machine, processes = choose_machine(cfg["device"], cfg["dtype"], cfg.get("threads")), cfg["nproc_per_node"]
    check_devices(machine.device, processes)
    several = processes > 1 and machine.device.type == "cuda"
    reading = Machine(torch.device("cpu"), machine.dtype, machine.threads) if several else machine
    quantize = cfg["model"].get("quantize_base", False)
    model = base_model.build(cfg["model"], base_model.read_base(cfg["checkpointer"], reading, quantize), reading)
    if several:
        spread(model, [torch.device("cuda", n) for n in range(processes)])
    return model, machine


def spread(model: TransformerDecoder, devices: list[torch.device]) -> None:
    """Put equal stretches of layers onto the devices, in order, and what is before and behind them onto the first.

    Hooks bring a layer's inputs to its device; whoever holds keys and values of a layer finds them there.

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
            layer.register_forward_pre_hook(_bringing_to(device), with_kwargs=True)
    if len(devices) > 1:
        model.norm.register_forward_pre_hook(_bringing_to(devices[0]), with_kwargs=True)


def _bringing_to(device: torch.device):
    def bring(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        def there(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return tuple(map(there, args)), {k: there(v) for k, v in kwargs.items()}

    return bring
