"""Cancel submitted runs."""

from pathlib import Path

from cruijff_kit.records.run_status import ACTIVE, CANCELLED, QUEUED, ask_to_cancel, read_status, write_status
from cruijff_kit.records.sweep_manifest import read_sweep_manifest, resolve_folder
from cruijff_kit.slurm import client
from cruijff_kit.slurm.run_states import RunInfo, RunRef


def cancel_jobs(submitted: list[tuple[RunRef, RunInfo]]) -> None:
    """scancel, and write it down for those that had not begun and so cannot say it themselves.

    A run whose job goes on for other runs (a pack) is asked to stop by itself.
    """
    gone = {known.folder for known, _ in submitted}
    shared = {v.job_id for known, v in submitted if not _job_mates(known) <= gone}
    client.cancel({v.job_id for _, v in submitted} - shared)
    for known, info in submitted:
        if info.job_id in shared and info.state != QUEUED:
            ask_to_cancel(known.folder)
        status = read_status(known.folder)
        if info.state == QUEUED and status is not None and status.state == QUEUED:
            status.state, status.reason = CANCELLED, "cancelled before it began"
            write_status(known.folder, status)


def _job_mates(known: RunRef) -> set[Path]:
    """The runs of a run's job that have not ended."""
    if known.sweep_dir is None or known.attempt is None:
        return {known.folder}
    mates = {
        resolve_folder(known.sweep_dir, e)
        for e in read_sweep_manifest(known.sweep_dir).runs
        if e.submissions and e.submissions[-1].job_id == known.attempt.job_id
    }
    return {run for run in mates if (status := read_status(run)) is None or status.state in ACTIVE}
