"""Registers our launcher and sweeper with Hydra.

Hydra finds plugins by walking the hydra_plugins namespace, which it cannot do in an editable install; so they are also
registered by hand. Light: nothing but Hydra is imported.
"""

import sys

from hydra.core.plugins import Plugins

from cruijff_kit.config.hydra_nodes import PLUGINS, register_nodes

_registered: list[type] = []


def register() -> None:
    """Make hydra/launcher=cruijff_kit and hydra/sweeper=cruijff_kit known. Safe to call again."""
    plugins = Plugins.instance()
    if _registered:
        return
    # Its search for plugins has just run every plugin's module again: classes that ours were derived from before are stale.
    for name in (f"{PLUGINS}.launcher", f"{PLUGINS}.sweeper"):
        sys.modules.pop(name, None)
    from hydra_plugins.cruijff_kit_launcher.launcher import SweepLauncher
    from hydra_plugins.cruijff_kit_launcher.sweeper import Sweeper

    register_nodes()
    for plugin in (SweepLauncher, Sweeper):
        plugins.register(plugin)
        _registered.append(plugin)
