"""The launcher that Hydra starts for a sweep (-m). Installed as hydra_plugins.cruijff_kit_launcher.launcher.

Only the plugin's shell is here, because Hydra accepts launchers from its own namespace only; the work is in
cruijff_kit.launch.local.
"""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LocalLauncher(Launcher):
    """Runs the jobs of a sweep one after another in this process."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before launch."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Check all runs, then run them; a failed run does not stop the others."""
        from cruijff_kit.launch.local import launch

        return launch(self, job_overrides, initial_job_idx)
