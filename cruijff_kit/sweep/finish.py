"""Finish a sweep: results.csv, experiment_summary.md, the report, the table, and the exit code."""

from pathlib import Path

from cruijff_kit.records.result import RunResult
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import one_line
from cruijff_kit.util.progress import say


def print_summary(folder: Path, report: bool = True) -> None:
    """Write and print the results of a sweep (or of a single run), if there are any yet.

    Args:
        report: whether to write the page with figures too.
    Raises:
        SystemExit: with code 1, after the table, if a run failed.
    """
    from cruijff_kit.records.run_status import RunState
    from cruijff_kit.slurm.run_states import collect_states, find_runs

    if not folder.is_dir():
        return
    write_and_print(folder, report)
    _refresh_above(folder, report)
    infos, _ = collect_states(find_runs(folder))
    failed = [info for info in infos if info.state in (RunState.FAILED, RunState.CANCELLED)]
    if failed:
        fix = f"cruijff-kit status {folder} shows why; cruijff-kit resume {folder} tries them again"
        json_output.record(
            error=json_output.describe_error("run", f"{len(failed)} of {len(infos)} runs failed", fix, 1)
        )
        say(f"{len(failed)} of {len(infos)} runs failed; why: {folder}/*/result.json")
        raise SystemExit(1)


def write_and_print(sweep_dir: Path, report: bool = True) -> list[RunResult]:
    """Write results.csv, experiment_summary.md and the report, print the table (or record the results, for --json).

    Returns:
        The results, if any.
    """
    from cruijff_kit.analysis.results_frame import list_unfinished_runs
    from cruijff_kit.analysis.results_table import record_or_show
    from cruijff_kit.analysis.summary import write_overviews

    results = write_overviews(sweep_dir)
    if not results:
        return []
    record_or_show(sweep_dir, results)
    # Too early while runs are submitted or interrupted.
    if report and not (sweep_dir / "result.json").exists() and not list_unfinished_runs(sweep_dir):
        _report(sweep_dir)
    return results


def _refresh_above(folder: Path, report: bool) -> None:
    """Write again what a command once wrote into the folders above, such as the experiment's."""
    from cruijff_kit.analysis.summary import write_overviews

    for above in [*folder.absolute().parents][:2]:
        if (above / "results.csv").exists():
            write_overviews(above)
            if report and (above / "report.html").exists():
                _report(above)


def _report(sweep_dir: Path) -> None:
    """Write the report; an error is only printed: the sweep is done."""
    from cruijff_kit.analysis.report.build import write_report

    try:
        say(f"report: {write_report(sweep_dir).html}")
    except Exception as error:
        say(f"no report: {type(error).__name__}: {one_line(error)}; cruijff-kit report {sweep_dir} tries again")
