"""What happens before a single run's folder is made: every check. And when a sweep ends: results.csv,
experiment_summary.md, the table, and the command's exit code.
"""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cruijff_kit.progress import say
from cruijff_kit.result import RunResult


class RunStart(Callback):
    """Hydra callback, set in conf/config.yaml: a run that is refused, or only shown, leaves no folder."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """As task.check_alone. (The runs of a sweep are checked by the launcher.)"""
        from cruijff_kit.launch.task import check_alone

        check_alone(config)


class SweepEnd(Callback):
    """Hydra callback, set in conf/config.yaml."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and show the sweep's results.

        Raises:
            SystemExit: with code 1, after the table, if a run failed. (Hydra swallows a callback's other exceptions.)
        """
        sweep_dir = Path(str(config.hydra.sweep.dir))
        results = write_and_show(sweep_dir)
        failed = [r for r in results if r.status != "done"]
        if failed:
            say(f"{len(failed)} of {len(results)} runs failed; why: {sweep_dir}/*/result.json")
            raise SystemExit(1)


def write_and_show(sweep_dir: Path) -> list[RunResult]:
    """Write results.csv and experiment_summary.md, print the table, and return the results (none: say nothing)."""
    from cruijff_kit.table import read_results, show_results, write_summary

    if not any(sweep_dir.rglob("result.json")):
        return []
    results = read_results(sweep_dir)
    write_summary(sweep_dir, results)
    show_results(sweep_dir, results)
    return results
