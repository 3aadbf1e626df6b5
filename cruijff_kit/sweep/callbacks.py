"""Hydra callbacks: check a single run before its folder is created, and finish a sweep."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cruijff_kit.sweep.finish import print_summary


class RunStart(Callback):
    """Checks a single run; set in conf/config.yaml. A run that is refused, or only shown, leaves no folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check a single run with check_single. (The launcher checks the runs of a sweep.)"""
        from cruijff_kit.sweep.single_run import check_single

        check_single(config)


class SweepEnd(Callback):
    """Finishes a sweep; set in conf/config.yaml."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Call print_summary. (Hydra swallows all exceptions of a callback except SystemExit.)"""
        print_summary(Path(str(config.hydra.sweep.dir)), bool(config.report))
