"""The configuration of our launcher and sweeper, as Hydra stores it."""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore

PLUGINS = "hydra_plugins.cruijff_kit_launcher"
"""Package in which Hydra searches both; pyproject.toml maps it to sweep/hydra_plugin."""


@dataclass
class LauncherConfig:
    """hydra/launcher=cruijff_kit: runs the sweep here or submits it, as each run's slurm group says."""

    _target_: str = f"{PLUGINS}.launcher.SweepLauncher"


@dataclass
class SweeperConfig:
    """hydra/sweeper=cruijff_kit: every combination of the values that were given, as hydra/sweeper=basic; and values in
    pairs and runs one by one (sweep/expand.py).
    """

    _target_: str = f"{PLUGINS}.sweeper.Sweeper"
    max_batch_size: int | None = None
    params: dict[str, Any] | None = None
    paired: list[Any] | None = None
    runs: list[Any] | None = None


def register_nodes() -> None:
    """Make hydra/launcher=cruijff_kit and hydra/sweeper=cruijff_kit known to Hydra's composition. Safe to call again."""
    store = ConfigStore.instance().store
    store(group="hydra/launcher", name="cruijff_kit", node=LauncherConfig, provider="cruijff_kit")
    store(group="hydra/sweeper", name="cruijff_kit", node=SweeperConfig, provider="cruijff_kit")
