"""Check a torchtune config before anything is loaded: its keys, its components and their arguments."""

import inspect
from typing import Any

import torch
from omegaconf import OmegaConf

from cruijff_kit.models.compat import ModelType, get_component, instantiate
from cruijff_kit.training.schedule import resolve_lr_scheduler
from cruijff_kit.training.trackers import check_trackers
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.suggest import did_you_mean

# Arguments that the recipe passes to a component.
_RECIPE_ARGUMENTS = {
    "optimizer": ("params",),
    "lr_scheduler": ("optimizer", "num_training_steps", "last_epoch"),
    "dataset": ("tokenizer",),
    "dataset_val": ("tokenizer",),
    "trackers": ("config", "reopen"),
}


def check_components(cfg: dict[str, Any]) -> None:
    """Check that every component accepts its arguments. config.loading checks top-level keys.

    Args:
        cfg: the torchtune config, resolved.
    Raises:
        UserError: an unknown key, a component that does not exist, or arguments that a component refuses.
    """
    for key, node in cfg.items():
        if isinstance(node, dict):
            _check_arguments(f"torchtune.{key}", node, _RECIPE_ARGUMENTS.get(key, ()))
    model_type = cfg["checkpointer"].get("model_type")
    known = [*ModelType.__members__]
    if model_type not in known:
        raise UserError(f"model.model_type={model_type} does not exist; {did_you_mean(str(model_type), known)}")
    check_trackers(cfg["trackers"]["names"])
    _build_light_components(cfg)


def _check_arguments(path: str, node: dict[str, Any], recipe_arguments: tuple[str, ...]) -> None:
    if "_component_" not in node:
        raise UserError(f"{path}._component_ is missing")
    component = _import_component(f"{path}._component_", node["_component_"])
    parameters = inspect.signature(component).parameters
    for name in recipe_arguments:
        if name in node:
            raise UserError(f"{path}.{name} is set by the recipe; leave it out")
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    valid = [p for p in parameters if p not in recipe_arguments]
    for name in node:
        if name != "_component_" and name not in valid:
            raise UserError(
                f"unknown key {path}.{name}: {node['_component_']} does not take it; {did_you_mean(name, valid)}"
            )


def _import_component(path: str, dotted: str) -> Any:
    try:
        return get_component(dotted)
    except Exception as error:  # torchtune raises InstantiationError for any failure to import
        raise UserError(f"{path}: {dotted} cannot be imported: {one_line(error)}") from error


def _build_light_components(cfg: dict[str, Any]) -> None:
    """Build the light components once with a dummy parameter, so that wrong values are reported now."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = _build("torchtune.optimizer", cfg["optimizer"], [parameter])
    scheduler = resolve_lr_scheduler(cfg, warmup=0)
    _build("torchtune.lr_scheduler", scheduler, optimizer, num_training_steps=1, last_epoch=-1)
    _build("torchtune.loss", cfg["loss"])


def _build(path: str, node: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return instantiate(OmegaConf.create(node), *args, **kwargs)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {node['_component_']} refuses its arguments: {one_line(error)}") from error
