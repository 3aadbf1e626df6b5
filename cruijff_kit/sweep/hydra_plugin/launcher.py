"""The launcher that Hydra starts for a sweep (-m). Installed as hydra_plugins.cruijff_kit_launcher.launcher.

Only the plugin's shell is here, because Hydra accepts launchers from its own namespace only; the work is in
cruijff_kit.sweep.launch.
"""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher


class SweepLauncher(SlurmLauncher):
    """hydra-submitit-launcher's, but for what it launches: runs that are new, frozen, on SLURM or here, and it returns at
    once.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Check all runs, then submit or run them; a failed run does not stop the others."""
        from cruijff_kit.sweep.launch import launch

        return launch(self, job_overrides, initial_job_idx)
