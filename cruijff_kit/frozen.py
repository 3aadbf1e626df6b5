"""The configuration that a run began with, as its folder keeps it; edits of any YAML since then mean nothing to it."""

import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from cruijff_kit.config import RunConfig, literal, load, register
from cruijff_kit.errors import UserError
from cruijff_kit.folder import RunFolder


def frozen(run: Path, slurm: dict[str, Any] | None = None) -> RunConfig:
    """The config of a run, set to resume; its folder may have been moved.

    Args:
        run: its folder.
        slurm: keys of the slurm group that are to differ.
    Raises:
        UserError: the file is missing or not a configuration of this version.
    """
    register()
    try:
        text = (run / "config.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{run} has no config.yaml, so it cannot be started again") from None
    tree = OmegaConf.to_container(OmegaConf.create(text))
    began_in, lies_in = tree["output_dir"], str(run.absolute())
    if began_in != lies_in:
        tree = OmegaConf.to_container(OmegaConf.create(text.replace(began_in, lies_in)))
    cfg = OmegaConf.create(literal(tree))
    cfg.resume_from_checkpoint = cfg.torchtune.resume_from_checkpoint = True
    cfg.torchtune.metric_logger.append = True
    cfg.agent = None  # whoever gives this command need not be who gave that one
    for key, value in (slurm or {}).items():
        OmegaConf.update(cfg, f"slurm.{key}", value)
    return load(cfg)


def permit(run: Path, permission: str) -> None:
    """Write down in a run's config who allowed a coding agent to use its data, and when."""
    tree = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    tree["dataset"]["permission"] = permission
    RunFolder(run).write_yaml("config.yaml", tree)


def frozen_swept(run: Path) -> dict[str, Any]:
    """The values that distinguish a run in its sweep."""
    return json.loads((run / "swept.json").read_text(encoding="utf-8"))
