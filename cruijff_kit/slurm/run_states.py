"""Determine the state of every run below a folder from its status.json and from SLURM."""

import dataclasses
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cruijff_kit.records import failures
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import find_folders
from cruijff_kit.records.run_status import (
    HEARTBEAT_TIMEOUT,
    UNDER_WAY,
    RunState,
    RunStatus,
    read_status,
    seconds_since,
    write_status,
)
from cruijff_kit.records.sweep_manifest import (
    RunEntry,
    Submission,
    find_sweep_above,
    find_sweep_manifests,
    read_sweep_manifest,
    resolve_folder,
)
from cruijff_kit.slurm import client
from cruijff_kit.slurm.client import JobInfo
from cruijff_kit.util.errors import ClusterError, UserError
from cruijff_kit.util.files import require_folder
from cruijff_kit.util.suggest import did_you_mean

_CAUSES = {
    "TIMEOUT": (failures.TIME_LIMIT, "the time limit was reached before its state could be saved"),
    "OUT_OF_MEMORY": (failures.OUT_OF_MEMORY, "out of host memory"),
    "NODE_FAIL": (failures.NODE_FAILURE, "its node failed"),
    "BOOT_FAIL": (failures.NODE_FAILURE, "its node did not start"),
    "PREEMPTED": (failures.STOPPED, "preempted"),
    "DEADLINE": (failures.TIME_LIMIT, "its deadline has passed"),
}


@dataclass(frozen=True)
class RunRef:
    """A run's folder and its entry in a sweep's manifest."""

    folder: Path
    entry: RunEntry | None = None
    """None for a run without a manifest."""
    sweep_dir: Path | None = None
    """Folder of the manifest; None where there is none."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.entry.name if self.entry else self.folder.name

    @property
    def submission(self) -> Submission | None:
        """Its newest submission."""
        return self.entry.submissions[-1] if self.entry and self.entry.submissions else None


@dataclass
class RunInfo:
    """One row of `status`."""

    name: str
    """The run's name."""
    folder: str
    """The run's folder."""
    state: str
    """A RunState: planned, queued, running, evaluating, done, failed, cancelled or interrupted."""
    reason: str | None = None
    """Why it is in that state, in one line."""
    cause: str | None = None
    """The reason as one of cruijff_kit.records.failures.CAUSES."""
    step: int | None = None
    """Number of updates that are done."""
    total_steps: int | None = None
    """Number of updates in all epochs."""
    epoch: int | None = None
    """Current epoch, counted from 0."""
    epochs: int | None = None
    """Number of epochs."""
    loss: float | None = None
    """Per labelled token."""
    elapsed: float | None = None
    """Seconds since this start began."""
    left: float | None = None
    """Seconds of training that remain at the speed so far."""
    silent: float | None = None
    """Seconds since the last heartbeat, of a run that is under way."""
    node: str | None = None
    """Host of the run; None while it is queued."""
    job_id: str | None = None
    """Id of its newest SLURM job, such as 17_3; None outside SLURM."""
    slurm_state: str | None = None
    """SLURM's own word."""
    restarts: int = 0
    """Number of times that the run was started again."""
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings that retries changed: batch_size, gradient_accumulation_steps, slurm.mem."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """Warnings, for example that the code changed after submission."""
    log: str | None = None
    """File of the job's output; None for a run that was not submitted."""


def find_runs(folder: Path) -> list[RunRef]:
    """Find the runs of a run's folder, of a sweep's, or of any folder above them.

    Raises:
        UserError: no such folder, or no run in it.
    """
    require_folder(folder)
    refs = {ref.folder: ref for sweep_dir in find_sweep_manifests(folder) for ref in _runs_of_manifest(sweep_dir)}
    for run in find_folders(folder, "status.json", "result.json", "swept.json"):
        if run not in refs:
            refs[run] = find_run(run)
    if not refs:
        raise UserError(f"{folder} holds no runs; give a run's or a sweep's folder")
    return list(refs.values())


def _runs_of_manifest(sweep_dir: Path) -> list[RunRef]:
    entries = read_sweep_manifest(sweep_dir).runs
    return [RunRef(resolve_folder(sweep_dir, e), e, sweep_dir.absolute()) for e in entries]


def find_run(run: Path) -> RunRef:
    """Find the entry of a run in the nearest manifest above its folder."""
    sweep_dir = find_sweep_above(run)
    refs = _runs_of_manifest(sweep_dir) if sweep_dir else []
    return next((ref for ref in refs if ref.folder == run and not ref.entry.reused), RunRef(run))


def collect_states(runs: list[RunRef], ask_slurm: bool = True) -> tuple[list[RunInfo], str | None]:
    """Return the state of each run, and why SLURM did not answer, if it did not.

    What only SLURM knows, which forgets, is written into status.json: that a run died, and how.

    Args:
        runs: `find_runs`.
        ask_slurm: False: go by what the runs say themselves.
    """
    runs = [find_origin(ref) for ref in runs]
    statuses = [_read_status(ref) for ref in runs]
    ids = [_job_id(ref, s) for ref, s in zip(runs, statuses, strict=True)]
    open_ids = {
        i
        for i, s in zip(ids, statuses, strict=True)
        if i and s.state not in (RunState.DONE, RunState.FAILED, RunState.CANCELLED)
    }
    jobs: dict[str, JobInfo] | None = None
    trouble = None
    try:
        jobs = client.job_infos(open_ids) if ask_slurm else None
    except ClusterError as error:
        trouble = str(error)
    infos = []
    for ref, status, job_id in zip(runs, statuses, ids, strict=True):
        has_answer = jobs is not None and job_id in open_ids
        job = jobs.get(job_id) if has_answer else None
        if has_answer and (job is None or job.ended):
            status = _read_status(ref)  # it may have ended between our look at it and SLURM's
        merged = _merge(status, job, job_id) if has_answer else _without_slurm(status, job_id)
        silent = seconds_since(status.heartbeat) or 0
        if merged.state in (RunState.FAILED, RunState.CANCELLED) and merged != status and silent > HEARTBEAT_TIMEOUT:
            write_status(ref.folder, merged)
        infos.append(_info(ref, merged, job_id, job))
    return infos, trouble


def find_origin(ref: RunRef) -> RunRef:
    """Return a run with the manifest of the sweep that submitted it, where another sweep only reuses it."""
    return find_run(ref.folder) if ref.entry and ref.entry.reused else ref


def _read_status(ref: RunRef) -> RunStatus:
    status = read_status(ref.folder)
    if status is not None:
        return status
    path = ref.folder / "result.json"
    if path.exists():
        result = read_result(path)
        reason = f"{result.error.type}: {result.error.message}" if result.error else None
        return RunStatus(result.status, reason, started=result.started, heartbeat=result.finished or result.started)
    return RunStatus(RunState.QUEUED if ref.submission else RunState.PLANNED)


def _job_id(ref: RunRef, status: RunStatus) -> str | None:
    submission = ref.submission
    if submission is None:
        return None
    if submission.job_id is None and status.job_id is None and status.state == RunState.QUEUED:
        try:
            base = client.job_of_script(submission.script)
        except ClusterError:
            return None
        return f"{base}_{submission.task}" if base and submission.task is not None else base
    return submission.job_id or status.job_id


def _merge(status: RunStatus, job: JobInfo | None, job_id: str) -> RunStatus:
    """Correct a run's status by SLURM's record of its job."""
    if status.state in (RunState.DONE, RunState.FAILED, RunState.CANCELLED):
        return status
    if job is None:
        if status.state == RunState.INTERRUPTED:
            return status
        if status.state == RunState.QUEUED:
            return dataclasses.replace(
                status, state=RunState.CANCELLED, reason=f"job {job_id} left the queue and never started"
            )
        gone = f"job {job_id} is gone, and the cluster keeps no record of it"
        return dataclasses.replace(status, state=RunState.FAILED, reason=gone, cause=failures.KILLED)
    if job.ended:
        return _after_end(status, job)
    if job.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        restarted = "restarted by SLURM" if status.state in UNDER_WAY else status.reason
        reason = "; ".join(r for r in (restarted, job.reason) if r)
        return dataclasses.replace(status, state=RunState.QUEUED, reason=reason or None)
    if status.state == RunState.QUEUED and job.state == "RUNNING" and status.job_id == job_id:
        return status  # it waits for a slot in its group
    if status.state in (RunState.QUEUED, RunState.INTERRUPTED) and job.state == "RUNNING":
        return dataclasses.replace(status, state=RunState.RUNNING, reason="starting", host=job.node)
    silent = seconds_since(status.heartbeat) or 0
    if status.state in UNDER_WAY and silent > HEARTBEAT_TIMEOUT:
        return dataclasses.replace(status, reason=f"no heartbeat for {silent:.0f} s (SLURM: {job.state.lower()})")
    return status


def _after_end(status: RunStatus, job: JobInfo) -> RunStatus:
    if job.state == "CANCELLED":
        return dataclasses.replace(
            status, state=RunState.CANCELLED, reason=f"cancelled {job.reason or ''}".strip(), cause=None
        )
    if status.state == RunState.INTERRUPTED:
        return status
    if status.state == RunState.QUEUED and status.job_id is not None and not status.started:
        return dataclasses.replace(status, state=RunState.INTERRUPTED, reason="its job ended before the run started")
    cause, reason = _CAUSES.get(job.state, (failures.KILLED, None))
    if reason is None:
        reason = f"ended without a result ({failures.describe_exit(job.exit_code or 0)})"
    return dataclasses.replace(status, state=RunState.FAILED, reason=reason, cause=cause)


def _without_slurm(status: RunStatus, job_id: str | None) -> RunStatus:
    """Correct a run's status without SLURM: a run on this machine, or any run while SLURM does not answer."""
    if status.state not in (RunState.QUEUED, *UNDER_WAY) or job_id is not None:
        return status
    if status.host == socket.gethostname() and status.pid is not None and not _is_alive(status.pid):
        if status.state == RunState.QUEUED:
            return dataclasses.replace(
                status, state=RunState.INTERRUPTED, reason="the sweep ended before the run started"
            )
        reason = f"its process {status.pid} is gone"
        return dataclasses.replace(status, state=RunState.FAILED, reason=reason, cause=failures.KILLED)
    silent = seconds_since(status.heartbeat) or 0
    if status.state in UNDER_WAY and silent > HEARTBEAT_TIMEOUT:
        return dataclasses.replace(status, reason=f"no heartbeat for {silent:.0f} s")
    return status


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True


def _info(ref: RunRef, status: RunStatus, job_id: str | None, job: JobInfo | None) -> RunInfo:
    under_way = status.state in UNDER_WAY
    end = None if under_way else seconds_since(status.heartbeat)
    age = seconds_since(status.started)
    return RunInfo(
        name=ref.name,
        folder=str(ref.folder),
        state=status.state,
        reason=status.reason,
        cause=status.cause,
        step=status.step,
        total_steps=status.total_steps,
        epoch=status.epoch,
        epochs=status.epochs,
        loss=status.loss,
        elapsed=None if age is None or status.state == RunState.QUEUED else round(age - (end or 0)),
        left=_estimate_remaining_seconds(status) if status.state == RunState.RUNNING else None,
        silent=seconds_since(status.heartbeat) if under_way else None,
        node=(job.node if job and under_way else None) or (None if status.state == RunState.QUEUED else status.host),
        job_id=job_id,
        slurm_state=job.state if job else None,
        restarts=status.restarts,
        changes=status.changes,
        notes=status.notes,
        log=str(log) if (log := log_path(ref, job_id)) else None,
    )


def _estimate_remaining_seconds(status: RunStatus) -> float | None:
    if status.training_since is None or not status.total_steps or (status.step or 0) <= status.first_step:
        return None
    spent = seconds_since(status.training_since) - seconds_since(status.heartbeat)
    return round(spent / (status.step - status.first_step) * (status.total_steps - status.step))


def log_path(ref: RunRef, job_id: str | None) -> Path | None:
    """Return the file that a submitted run's output goes to."""
    if ref.submission is None or job_id is None or ref.sweep_dir is None:
        return None
    return ref.sweep_dir / ".submitit" / f"{job_id}_0_log.out"


def select_runs(runs: list[RunRef], names: list[str]) -> list[RunRef]:
    """Return the runs of these names; all of them if none is named.

    Raises:
        UserError: no run has that name.
    """
    by_name = {ref.name: ref for ref in runs}
    for name in names:
        if name not in by_name:
            raise UserError(f"no run is called {name}; {did_you_mean(name, [*by_name])}")
    return [by_name[n] for n in names] if names else runs
