"""Registers our launcher with Hydra.

Hydra finds plugins by walking the hydra_plugins namespace, which it cannot do in an editable install; so the launcher
is also registered by hand. Light: nothing but Hydra is imported.
"""

from dataclasses import dataclass


@dataclass
class LauncherConfig:
    """hydra/launcher=cruijff_kit: runs the sweep on this machine, in this process."""

    _target_: str = "hydra_plugins.cruijff_kit_launcher.launcher.LocalLauncher"


def register() -> None:
    """Make hydra/launcher=cruijff_kit known. Safe to call again."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from hydra_plugins.cruijff_kit_launcher.launcher import LocalLauncher

    ConfigStore.instance().store(
        group="hydra/launcher", name="cruijff_kit", node=LauncherConfig, provider="cruijff_kit"
    )
    Plugins.instance().register(LocalLauncher)
