"""Checks a torchtune config before anything is loaded: its keys, its components and their arguments."""

import inspect
from importlib.resources import files
from typing import Any

import torch
from omegaconf import OmegaConf

from cruijff_kit.compat import get_component, instantiate
from cruijff_kit.errors import UserError
from cruijff_kit.hints import did_you_mean


def check_components(cfg: dict[str, Any]) -> None:
    """Refuse what the recipe would not read and what a component would not take.

    Args:
        cfg: the torchtune config, resolved.
    Raises:
        UserError: an unknown key, a component that does not exist, or arguments that it refuses.
    """
    known = OmegaConf.create(files("cruijff_kit.conf").joinpath("torchtune.yaml").read_text())
    for key, node in cfg.items():
        if key not in known:
            raise UserError(f"unknown key torchtune.{key}; {did_you_mean(key, [*known])}")
        if isinstance(node, dict) and "_component_" in node:
            _check_arguments(f"torchtune.{key}", node)
    _try_out(cfg)


def _check_arguments(path: str, node: dict[str, Any]) -> None:
    component = _component(f"{path}._component_", node["_component_"])
    parameters = inspect.signature(component).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in node:
        if name != "_component_" and name not in parameters:
            raise UserError(
                f"unknown key {path}.{name}: {node['_component_']} does not take it; {did_you_mean(name, [*parameters])}"
            )


def _component(path: str, dotted: str) -> Any:
    try:
        return get_component(dotted)
    except Exception as error:  # torchtune raises InstantiationError for any failure to import
        raise UserError(f"{path}: {dotted} cannot be imported: {_one_line(error)}") from error


def _try_out(cfg: dict[str, Any]) -> None:
    """Build the light components once with a stand-in parameter, so that bad values show now."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = _build("torchtune.optimizer", cfg["optimizer"], [parameter])
    _build("torchtune.lr_scheduler", cfg["lr_scheduler"], optimizer, num_training_steps=1, last_epoch=-1)
    _build("torchtune.loss", cfg["loss"])


def _build(path: str, node: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return instantiate(OmegaConf.create(node), *args, **kwargs)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {node['_component_']} refuses its arguments: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
