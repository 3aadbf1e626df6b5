"""The configuration that a run started with, read from its folder; later edits of any YAML do not count."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from cruijff_kit.config.loading import escape_interpolations, load, register
from cruijff_kit.config.run import RunConfig
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.util.errors import UserError


def load_saved_config(run: Path, slurm: dict[str, Any] | None = None, agent: bool | None = None) -> RunConfig:
    """Load the config of a run, set to resume; its folder may have been moved.

    Args:
        run: its folder.
        slurm: keys of the slurm group that are to differ.
        agent: whether a coding agent gives this command, as the setting `agent`; a job of a cluster says False.
    Raises:
        UserError: the file is missing or not a configuration of this version.
    """
    cfg = _read(run)
    cfg.agent = agent
    cfg.resume_from_checkpoint = cfg.torchtune.resume_from_checkpoint = True
    cfg.torchtune.metric_logger.append = True
    for key, value in (slurm or {}).items():
        OmegaConf.update(cfg, f"slurm.{key}", value)
    return load(cfg)


def reload_with(run: Path, to: Path, changed: dict[str, Any], places: dict[str, str]) -> RunConfig:
    """Load the config of a run, set to start again in another folder, locally and without trackers.

    Args:
        run: its folder. to: the new one.
        changed: settings of the root that are to differ; where the torchtune config has them too, there as well.
        places: paths that are elsewhere now, old -> new.
    Raises:
        UserError: as `load_saved_config`.
    """
    tree = OmegaConf.to_container(_read(run))
    lies_in, new = tree["output_dir"], str(to.absolute())
    tree = _map_text(tree, lambda text: places.get(text, text))
    # What is read may lie in the folder of the run, or beside it under a longer name.
    moved = _map_text(tree, lambda text: text.replace(lies_in, new))
    moved |= {name: tree[name] for name in ("dataset", "model", "eval")}
    read = ("dataset", "dataset_val", "tokenizer", "model")
    moved["torchtune"] |= {name: tree["torchtune"][name] for name in read}
    moved["torchtune"]["checkpointer"]["checkpoint_dir"] = tree["torchtune"]["checkpointer"]["checkpoint_dir"]
    cfg = OmegaConf.create(moved)
    cfg.resume_from_checkpoint = cfg.torchtune.resume_from_checkpoint = cfg.dry_run = False
    cfg.torchtune.metric_logger.append = cfg.slurm.submit = False
    cfg.trackers, cfg.torchtune.trackers.names = [], []
    for key, value in changed.items():
        cfg[key] = value
        if key in cfg.torchtune:
            cfg.torchtune[key] = value
    return load(cfg)


def _read(run: Path) -> DictConfig:
    """config.yaml of a run, with the folder that it lies in now for the one that it began in; strings are literal."""
    register()
    try:
        text = (run / "config.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{run} has no config.yaml, so it cannot be started again") from None
    tree = OmegaConf.to_container(OmegaConf.create(text))
    began_in, lies_in = tree["output_dir"], str(run.absolute())
    if began_in != lies_in:
        tree = OmegaConf.to_container(OmegaConf.create(text.replace(began_in, lies_in)))
    cfg = OmegaConf.create(escape_interpolations(tree))
    cfg.agent = None  # whoever gives this command need not be who gave that one
    return cfg


def _map_text(tree: Any, change: Callable[[str], str]) -> Any:
    """Apply a function to every text in a tree."""
    if isinstance(tree, dict):
        return {k: _map_text(v, change) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_map_text(v, change) for v in tree]
    return change(tree) if isinstance(tree, str) else tree


def allow_sensitive(run: Path, permission: str) -> None:
    """Write into a run's config who allowed a coding agent to use its data, and when."""
    tree = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    tree["dataset"]["permission"] = permission
    RunFolder(run).write_yaml("config.yaml", tree)


def load_swept(run: Path) -> dict[str, Any]:
    """Read the overrides that distinguish a run in its sweep (swept.json)."""
    overrides: dict[str, Any] = json.loads((run / "swept.json").read_text(encoding="utf-8"))
    return overrides
