"""Cancel submitted runs: `python -m cruijff_kit.cancel DIR [RUN ...] [--yes] [--json]`.

A run that is training saves its state first; `python -m cruijff_kit.resume DIR` goes on from there. It asks at a terminal
only; --json never asks. --json: {"cancelled": [{"name", "folder", "job_id"}]}.
"""

import argparse
from pathlib import Path

from cruijff_kit import answer
from cruijff_kit.cluster import client
from cruijff_kit.command import Parser
from cruijff_kit.errors import UserError
from cruijff_kit.ledger import read_ledger, run_folder
from cruijff_kit.logs import chosen_runs
from cruijff_kit.run_status import ACTIVE, CANCELLED, QUEUED, ask_to_cancel, read_status, write_status
from cruijff_kit.summary import write_summary
from cruijff_kit.survey import Known, RunView, known_below, survey


def cancel(folder: Path, names: list[str], sure: bool) -> list[RunView]:
    """Cancel the runs of these names (none: all) that are queued or running, and return those that were cancelled.

    Raises:
        UserError: no such run; or `sure` is False and there is no terminal to ask at.
        ClusterError: SLURM does not answer.
    """
    runs = chosen_runs(known_below(folder), names)
    views, trouble = survey(runs)
    if trouble:
        raise client.ClusterError(trouble)
    active = [(k, v) for k, v in zip(runs, views, strict=True) if v.state in ACTIVE]
    here = [v for _, v in active if v.job_id is None]
    submitted = [(k, v) for k, v in active if v.job_id is not None]
    if here:
        raise UserError(f"{here[0].name} runs on this machine, not on SLURM: press Ctrl-C where it was started")
    if not submitted:
        print("nothing to cancel: no run is queued or running")
        return []
    if not sure and not _confirmed([v for _, v in submitted]):
        print("nothing was cancelled")
        return []
    cancel_jobs(submitted)
    for sweep_dir in {k.sweep_dir for k, _ in submitted if k.sweep_dir is not None}:
        write_summary(sweep_dir)
    print(f"{len(submitted)} run{'s' * (len(submitted) != 1)} cancelled; python -m cruijff_kit.resume {folder} goes on")
    return [v for _, v in submitted]


def cancel_jobs(submitted: list[tuple[Known, RunView]]) -> None:
    """scancel, and write it down for those that had not begun and so cannot say it themselves.

    A run whose job goes on for other runs (a pack) is asked to stop by itself.
    """
    gone = {known.folder for known, _ in submitted}
    shared = {v.job_id for known, v in submitted if not _job_mates(known) <= gone}
    client.cancel({v.job_id for _, v in submitted} - shared)
    for known, view in submitted:
        if view.job_id in shared and view.state != QUEUED:
            ask_to_cancel(known.folder)
        status = read_status(known.folder)
        if view.state == QUEUED and status is not None and status.state == QUEUED:
            status.state, status.reason = CANCELLED, "cancelled before it began"
            write_status(known.folder, status)


def _job_mates(known: Known) -> set[Path]:
    """The runs of a run's job that have not ended."""
    if known.sweep_dir is None or known.attempt is None:
        return {known.folder}
    mates = {
        run_folder(known.sweep_dir, e)
        for e in read_ledger(known.sweep_dir).runs
        if e.attempts and e.attempts[-1].job_id == known.attempt.job_id
    }
    return {run for run in mates if (status := read_status(run)) is None or status.state in ACTIVE}


def _confirmed(views: list[RunView]) -> bool:
    names = ", ".join(v.name for v in views[:5]) + (", ..." if len(views) > 5 else "")
    if not answer.at_terminal():
        raise UserError(f"{len(views)} runs would be cancelled ({names}); add --yes")
    return answer.agreed(f"cancel {len(views)} runs ({names})?")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = Parser("cancel", "Cancel submitted runs.", "which runs were cancelled, as one JSON document")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a sweep's or a run's folder")
    parser.add_argument("runs", metavar="RUN", nargs="*", help="names of runs; none: all of them")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")

    def command(options: argparse.Namespace) -> dict[str, list[dict[str, str | None]]]:
        gone = cancel(options.folder, options.runs, options.yes)
        return {"cancelled": [{"name": v.name, "folder": v.folder, "job_id": v.job_id} for v in gone]}

    return parser.run(argv, command)


if __name__ == "__main__":
    raise SystemExit(main())
