"""What happens before a single run's folder is made: every check. And when a sweep ends: results.csv,
experiment_summary.md, the report, the table, and the command's exit code.
"""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from cruijff_kit import answer
from cruijff_kit.errors import one_line
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
        """As show_end. (Hydra swallows a callback's exceptions, but for SystemExit.)"""
        show_end(Path(str(config.hydra.sweep.dir)), bool(config.report))


def show_end(folder: Path, report: bool = True) -> None:
    """Write and show the results of a sweep (or of a single run), if there are any yet.

    Args:
        report: whether the page with figures is wanted too.

    Raises:
        SystemExit: with code 1, after the table, if a run failed.
    """
    from cruijff_kit.run_status import CANCELLED, FAILED
    from cruijff_kit.survey import known_below, survey

    if not folder.is_dir():
        return
    write_and_show(folder, report)
    _refresh_above(folder, report)
    views, _ = survey(known_below(folder))
    failed = [v for v in views if v.state in (FAILED, CANCELLED)]
    if failed:
        fix = f"python -m cruijff_kit.status {folder} says why; python -m cruijff_kit.resume {folder} tries them again"
        answer.record(error=answer.error("run", f"{len(failed)} of {len(views)} runs failed", fix, 1))
        say(f"{len(failed)} of {len(views)} runs failed; why: {folder}/*/result.json")
        raise SystemExit(1)


def write_and_show(sweep_dir: Path, report: bool = True) -> list[RunResult]:
    """Write results.csv, experiment_summary.md and (if wanted) the report, print the table (or record the results, for a
    program that waits for them), and return the results, if any.
    """
    from cruijff_kit.summary import write_overviews
    from cruijff_kit.table import answer_or_show, unfinished_runs

    results = write_overviews(sweep_dir)
    if not results:
        return []
    answer_or_show(sweep_dir, results)
    # Of runs that are submitted or were interrupted it would be early.
    if report and not (sweep_dir / "result.json").exists() and not unfinished_runs(sweep_dir):
        _report(sweep_dir)
    return results


def _refresh_above(folder: Path, report: bool) -> None:
    """Bring up to date what a command wrote earlier into the folders above, such as the experiment's: all of it at once."""
    from cruijff_kit.summary import write_overviews

    for above in [*folder.absolute().parents][:2]:
        if (above / "results.csv").exists():
            write_overviews(above)
            if report and (above / "report.html").exists():
                _report(above)


def _report(sweep_dir: Path) -> None:
    """Write the report; whatever goes wrong with it is said, and the sweep is as it was."""
    from cruijff_kit.report.writing import write_report

    try:
        say(f"report: {write_report(sweep_dir).html}")
    except Exception as error:
        say(
            f"no report: {type(error).__name__}: {one_line(error)}; python -m cruijff_kit.report {sweep_dir} tries again"
        )
