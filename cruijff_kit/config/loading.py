"""Convert a composed Hydra config to a RunConfig: schema and resolvers of conf/, and the strict merge."""

import datetime
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from cruijff_kit.config.data_policy import raise_tier
from cruijff_kit.config.explain import explain_errors
from cruijff_kit.config.hydra_messages import silence_notices
from cruijff_kit.config.name_resolver import readable_name
from cruijff_kit.config.run import LR_SCHEDULERS, RunConfig, processes_of
from cruijff_kit.config.torchtune_checks import check_torchtune
from cruijff_kit.data.generators import fitting_task, generated_path
from cruijff_kit.util.cache import cache_dir


def _resolve_generated(generator: str | None, arguments: DictConfig) -> str:
    return str(generated_path(generator, OmegaConf.to_container(arguments)))


def _fitting_task(generator: str | None, arguments: DictConfig) -> str:
    return fitting_task(generator, OmegaConf.to_container(arguments))


def _models(name: str, *, _root_: DictConfig) -> str:
    return str(Path(_root_.models_dir or "models").expanduser().absolute() / name)


def _safetensors(folder: str) -> ListConfig:
    index = Path(folder).expanduser() / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        names = {p.name for p in index.parent.glob("*.safetensors")}
    # `--resolve` cannot print a plain list that came from a resolver.
    return ListConfig(sorted(names) or ["model.safetensors"])


def _readable_name(seed: int, *, _root_: DictConfig) -> str:
    # Hydra removes its own node from the config that it passes to the run.
    hydra_config = HydraConfig.get() if HydraConfig.initialized() else None
    hydra = _root_.hydra if "hydra" in _root_ else hydra_config
    return readable_name([] if hydra is None else OmegaConf.to_container(hydra.overrides.task), seed)


def _lr_scheduler_component(name: str) -> str:
    # RunConfig refuses an unknown name and lists the valid ones.
    return LR_SCHEDULERS.get(name, name)


_RESOLVERS: dict[str, Callable[..., Any]] = {
    "times": lambda a, b: a * b,
    "stem": lambda path: Path(path if isinstance(path, str) else str(next(iter(path.values())))).stem,
    "cached": lambda name: str(cache_dir() / name),
    "models": _models,
    "today": lambda: datetime.date.today().isoformat(),
    "generated": _resolve_generated,
    "fitting_task": _fitting_task,
    "safetensors": _safetensors,
    "lr_scheduler_component": _lr_scheduler_component,
    "nproc": processes_of,
    "readable_name": _readable_name,
    "newline": lambda: "\n",  # Hydra's grammar cannot express one
}


def register() -> None:
    """Register the schema and the resolvers of conf/ with Hydra. Safe to call again."""
    silence_notices()
    for name, resolver in _RESOLVERS.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    ConfigStore.instance().store(name="run_config", node=RunConfig, provider="cruijff_kit")


def load(cfg: DictConfig) -> RunConfig:
    """Turn a composed config into a RunConfig, resolved and checked.

    Args:
        cfg: the composed config; its ``hydra`` node is ignored.
    Raises:
        UserError: an unknown key (also one added with ``+``), a wrong type, a missing or an impossible value, or a wrong
            TIER file beside the data.
    """
    with explain_errors():
        tree = {k: _resolve(cfg, k) for k in cfg if k != "hydra"}
        # The torchtune node has no schema, and merging it takes most of the time. The schema refuses keys added with `+`.
        torchtune = tree.pop("torchtune")
        strict = OmegaConf.merge(_schema(), escape_interpolations(tree))
        config: RunConfig = OmegaConf.to_object(strict)
        config.torchtune = torchtune
        check_torchtune(OmegaConf.to_container(strict) | {"torchtune": torchtune})
        raise_tier(config)  # before any row is read
        return config


def escape_interpolations(tree: Any) -> Any:
    """Escape a tree's strings, so that OmegaConf does not interpolate a shell's ${HOME}."""
    if isinstance(tree, dict):
        return {k: escape_interpolations(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [escape_interpolations(v) for v in tree]
    return tree.replace("${", "\\${") if isinstance(tree, str) else tree


def _resolve(cfg: DictConfig, key: str) -> Any:
    value = MISSING if OmegaConf.is_missing(cfg, key) else cfg[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


@functools.cache
def _schema() -> DictConfig:
    return OmegaConf.structured(RunConfig)  # merge copies it
