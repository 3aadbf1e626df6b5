"""Registers our launcher and sweeper with Hydra.

Hydra finds plugins by walking the hydra_plugins namespace, which it cannot do in an editable install; so they are also
registered by hand. Light: nothing but Hydra is imported.
"""

import sys
from dataclasses import dataclass
from typing import Any

_PLUGINS = "hydra_plugins.cruijff_kit_launcher"
_registered: list[type] = []


@dataclass
class LauncherConfig:
    """hydra/launcher=cruijff_kit: runs the sweep here or submits it, as each run's slurm group says."""

    _target_: str = f"{_PLUGINS}.launcher.SweepLauncher"


@dataclass
class SweeperConfig:
    """hydra/sweeper=cruijff_kit: every combination of the values that were given, as hydra/sweeper=basic; and values in
    pairs and runs one by one (launch/expanding.py).
    """

    _target_: str = f"{_PLUGINS}.sweeper.Sweeper"
    max_batch_size: int | None = None
    params: dict[str, Any] | None = None
    paired: list[Any] | None = None
    runs: list[Any] | None = None


def register() -> None:
    """Make hydra/launcher=cruijff_kit and hydra/sweeper=cruijff_kit known. Safe to call again."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    plugins = Plugins.instance()
    if _registered:
        return
    # Its search for plugins has just run every plugin's module again: classes that ours were derived from before are stale.
    for name in (f"{_PLUGINS}.launcher", f"{_PLUGINS}.sweeper"):
        sys.modules.pop(name, None)
    from hydra_plugins.cruijff_kit_launcher.launcher import SweepLauncher
    from hydra_plugins.cruijff_kit_launcher.sweeper import Sweeper

    store = ConfigStore.instance().store
    store(group="hydra/launcher", name="cruijff_kit", node=LauncherConfig, provider="cruijff_kit")
    store(group="hydra/sweeper", name="cruijff_kit", node=SweeperConfig, provider="cruijff_kit")
    for plugin in (SweepLauncher, Sweeper):
        plugins.register(plugin)
        _registered.append(plugin)
