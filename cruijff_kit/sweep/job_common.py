"""What every program inside a SLURM job needs: requeueing, memory, processors."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cruijff_kit.records.run_status import (
    HEARTBEAT_TIMEOUT,
    INTERRUPTED,
    UNDER_WAY,
    RunStatus,
    mark_queued,
    read_status,
    seconds_since,
    slurm_job_id,
    write_status,
)
from cruijff_kit.records.versions import code_hash
from cruijff_kit.slurm import client
from cruijff_kit.util.errors import ClusterError
from cruijff_kit.util.progress import say
from cruijff_kit.util.signals import StopSignals


def is_elsewhere(run: Path) -> bool:
    """Whether another job is at this run."""
    other = read_status(run)
    elsewhere = other is not None and other.state in UNDER_WAY and other.job_id != slurm_job_id()
    if not elsewhere or (seconds_since(other.heartbeat) or 0) >= HEARTBEAT_TIMEOUT:
        return False
    say(f"{run} is under way already, as job {other.job_id} on {other.host}")
    return True


def note_changed_code(status: RunStatus, code: str) -> None:
    """A warning in the status where the code is not that which submitted the run."""
    if code != code_hash():
        note = "the code of cruijff_kit changed between submission and start"
        status.notes = [*(n for n in status.notes if n != note), note]
        say(f"warning: {note}")


def use_granted_processors() -> None:
    """As many threads as SLURM granted, unless the user says otherwise."""
    granted = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
    if granted:
        os.environ.setdefault("OMP_NUM_THREADS", granted)


def leave_by(stop: StopSignals, after_signal: Callable[[], int]) -> None:
    """A signal that finds nothing to save, now or before, ends the process with the exit code that this returns."""

    def leave() -> NoReturn:
        code = after_signal()
        sys.stderr.flush()
        os._exit(code)

    stop.interrupt_now = leave
    if stop.received is not None:
        leave()


def requeue_all(statuses: dict[Path, RunStatus], most: int, reason: str, goes_on: Callable[[RunStatus], str]) -> None:
    """Put the job of several runs back into the queue, unless SLURM ends it anyway or nothing comes of it.

    Args:
        statuses: of the runs that are not done, written as interrupted.
        most: retries that are allowed. reason: why they were stopped. goes_on: what a run that waits again says.
    """
    try:
        if not statuses or not may_requeue() or max(s.retries for s in statuses.values()) > most:
            return
        for run, status in statuses.items():
            mark_queued(run, goes_on(status))
        client.requeue(os.environ["SLURM_JOB_ID"])
    except ClusterError as error:
        for run, status in statuses.items():
            status.state, status.reason = INTERRUPTED, f"{reason}, and SLURM would not requeue it: {error}"
            write_status(run, status)


def may_requeue() -> bool:
    """Whether the job is running still (somebody only sent it a signal), or is being ended for its time limit."""
    job = client.key_values(client.call("scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]))
    spent, limit = client.seconds(job.get("RunTime", "")), client.seconds(job.get("TimeLimit", ""))
    return job["JobState"] == "RUNNING" or (spent is not None and limit is not None and spent >= limit)


def granted_mb() -> int | None:
    """Host memory that SLURM granted this job, MB; None: the whole node's, or it does not say."""
    per_node, per_cpu = os.environ.get("SLURM_MEM_PER_NODE"), os.environ.get("SLURM_MEM_PER_CPU")
    if per_node:
        return int(per_node) or None  # 0: the whole node
    return int(per_cpu) * int(os.environ.get("SLURM_CPUS_ON_NODE", 1)) if per_cpu else None


def was_over_memory(used: int | None) -> bool:
    """Whether the kernel killed in this job's cgroup, or the process held as much as it was granted."""
    if _cgroup_kills():
        return True
    granted = granted_mb()
    return granted is not None and used is not None and used > 0.9 * granted * 2**20


def _cgroup_kills() -> int:
    """Processes that the kernel killed for memory in the control group of this job."""
    job = f"job_{os.environ['SLURM_JOB_ID']}"
    groups = [line.rpartition(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    kills = 0
    for group in (g for g in groups if f"/{job}" in g):
        inside = group[: group.index(f"/{job}") + len(job) + 1].lstrip("/")
        for file, key in (("/sys/fs/cgroup", "memory.events"), ("/sys/fs/cgroup/memory", "memory.oom_control")):
            events = Path(file, inside, key)
            if events.is_file():
                words = dict(line.split() for line in events.read_text().splitlines() if len(line.split()) == 2)
                kills += int(words.get("oom_kill", 0))
    return kills
