"""A model over several GPUs of one process, layer after layer: for evaluating what one of them cannot hold."""

import copy
from typing import Any

import torch

from cruijff_kit.compat import TransformerDecoder


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
