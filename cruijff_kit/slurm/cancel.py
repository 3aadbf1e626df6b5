"""Cancel submitted runs."""

from pathlib import Path

from cruijff_kit.records.run_status import ACTIVE, RunState, read_status, request_cancel, write_status
from cruijff_kit.records.sweep_manifest import read_sweep_manifest, resolve_folder
from cruijff_kit.slurm import client
from cruijff_kit.slurm.run_states import RunInfo, RunRef


def cancel_jobs(submitted: list[tuple[RunRef, RunInfo]]) -> None:
    """Cancel the jobs of runs with scancel, and mark queued runs as cancelled.

    If other runs of a job continue, the job is not cancelled: the run gets a request to stop.
    """
    cancelled = {ref.folder for ref, _ in submitted}
    shared = {info.job_id for ref, info in submitted if not _job_mates(ref) <= cancelled}
    client.cancel({info.job_id for _, info in submitted} - shared)
    for ref, info in submitted:
        if info.job_id in shared and info.state != RunState.QUEUED:
            request_cancel(ref.folder)
        status = read_status(ref.folder)
        if info.state == RunState.QUEUED and status is not None and status.state == RunState.QUEUED:
            status.state, status.reason = RunState.CANCELLED, "cancelled before it started"
            write_status(ref.folder, status)


def _job_mates(ref: RunRef) -> set[Path]:
    """The runs of a run's job that have not ended, itself among them."""
    if ref.sweep_dir is None or ref.submission is None:
        return {ref.folder}
    mates = {
        resolve_folder(ref.sweep_dir, e)
        for e in read_sweep_manifest(ref.sweep_dir).runs
        if e.submissions and e.submissions[-1].job_id == ref.submission.job_id
    }
    return {run for run in mates if (status := read_status(run)) is None or status.state in ACTIVE}
