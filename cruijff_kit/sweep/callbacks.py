"""What happens before a single run's folder is made: every check. And when a sweep ends: results.csv,
experiment_summary.md, the report, the table, and the command's exit code.
"""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cruijff_kit.sweep.finish import print_summary


class RunStart(Callback):
    """Hydra callback, set in conf/config.yaml: a run that is refused, or only shown, leaves no folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """As check_single. (The runs of a sweep are checked by the launcher.)"""
        from cruijff_kit.sweep.single_run import check_single

        check_single(config)


class SweepEnd(Callback):
    """Hydra callback, set in conf/config.yaml."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """As print_summary. (Hydra swallows a callback's exceptions, but for SystemExit.)"""
        print_summary(Path(str(config.hydra.sweep.dir)), bool(config.report))
