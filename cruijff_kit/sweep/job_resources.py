"""Read the resources of this process's SLURM job: processors, host memory, whether it may requeue itself."""

import os
from pathlib import Path

from cruijff_kit.slurm import client


def use_granted_processors() -> None:
    """Return the number of threads that SLURM granted, unless the user sets another."""
    granted = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
    if granted:
        os.environ.setdefault("OMP_NUM_THREADS", granted)


def granted_mb() -> int | None:
    """Return the host memory of this job in MB; None: the whole node's, or unknown."""
    per_node, per_cpu = os.environ.get("SLURM_MEM_PER_NODE"), os.environ.get("SLURM_MEM_PER_CPU")
    if per_node:
        return int(per_node) or None  # 0: the whole node
    return int(per_cpu) * int(os.environ.get("SLURM_CPUS_ON_NODE", 1)) if per_cpu else None


def was_over_memory(used: int | None) -> bool:
    """Return whether the kernel killed a process of the job for its memory, or the process used all memory of the job.

    Args:
        used: most host memory of the process and its workers, bytes.
    """
    if _cgroup_kills():
        return True
    granted = granted_mb()
    return granted is not None and used is not None and used > 0.9 * granted * 2**20


def _cgroup_kills() -> int:
    """Number of processes that the kernel killed for memory in the control group of this job."""
    job = f"job_{os.environ['SLURM_JOB_ID']}"
    groups = [line.rpartition(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    kills = 0
    for group in (g for g in groups if f"/{job}" in g):
        inside = group[: group.index(f"/{job}") + len(job) + 1].lstrip("/")
        for root, key in (("/sys/fs/cgroup", "memory.events"), ("/sys/fs/cgroup/memory", "memory.oom_control")):
            events = Path(root, inside, key)
            if events.is_file():
                counts = dict(line.split() for line in events.read_text().splitlines() if len(line.split()) == 2)
                kills += int(counts.get("oom_kill", 0))
    return kills


def can_requeue() -> bool:
    """Return whether the job may requeue itself: it still runs (it only received a signal), or reached its time limit.

    Otherwise it was cancelled, or SLURM requeues it already.

    Raises:
        ClusterError: SLURM does not answer.
    """
    job = client.key_values(client.call("scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]))
    spent, limit = client.seconds(job.get("RunTime", "")), client.seconds(job.get("TimeLimit", ""))
    return job["JobState"] == "RUNNING" or (spent is not None and limit is not None and spent >= limit)
