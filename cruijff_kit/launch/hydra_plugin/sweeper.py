"""The sweeper that makes lists of values into runs (-m). Installed as hydra_plugins.cruijff_kit_launcher.sweeper."""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra_plugins.cruijff_kit_launcher.launcher import SweepLauncher


class Sweeper(BasicSweeper):
    """Hydra's basic sweeper, without composing every run once before our launcher does it."""

    def validate_batch_is_legal(self, batch: list[list[str]]) -> None:
        """Leave it to our launcher, which refuses a bad run before it starts any."""
        if not isinstance(self.launcher, SweepLauncher):
            super().validate_batch_is_legal(batch)
