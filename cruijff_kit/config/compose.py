"""`cruijff_kit.compose`: a run's configuration without the command line."""

from datetime import datetime
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict

from cruijff_kit.config.explain import explain_errors
from cruijff_kit.config.hydra_nodes import register_nodes
from cruijff_kit.config.loading import load, register
from cruijff_kit.config.name_resolver import readable_name
from cruijff_kit.config.overrides import add_pluses
from cruijff_kit.config.run import RunConfig


def compose(overrides: list[str], config_dir: str | None) -> RunConfig:
    """Compose a config as `cruijff_kit.compose` does.

    The folder of the run is multirun/<experiment>/<time>/<run_name> unless output_dir is set.
    """
    cfg = compose_unresolved(overrides, config_dir)
    if not any(o.lstrip("+").startswith("output_dir=") for o in overrides):
        with open_dict(cfg):
            time = f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
            cfg.output_dir = str(Path("multirun", cfg.experiment.name, time, cfg.run_name).absolute())
    return load(cfg)


def compose_unresolved(overrides: list[str], config_dir: str | None) -> DictConfig:
    """Compose a config with Hydra, without resolving interpolations.

    Raises:
        UserError: what the command would refuse.
    """
    register()
    register_nodes()
    search = [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
    with explain_errors(), initialize_config_module("cruijff_kit.conf", version_base="1.3"):
        cfg = hydra_compose("config", overrides=[*search, *add_pluses(overrides)])
    if "${readable_name:" in str(OmegaConf.to_container(cfg)["run_name"]):  # Hydra leaves out what was typed
        cfg.run_name = readable_name(overrides, cfg.seed)
    return cfg
