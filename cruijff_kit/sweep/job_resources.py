"""What SLURM grants the job of this process: processors, host memory, another start."""

import os
from pathlib import Path

from cruijff_kit.slurm import client


def use_granted_processors() -> None:
    """As many threads as SLURM granted, unless the user says otherwise."""
    granted = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
    if granted:
        os.environ.setdefault("OMP_NUM_THREADS", granted)


def granted_mb() -> int | None:
    """Host memory of this job, MB; None: the whole node's, or SLURM does not say."""
    per_node, per_cpu = os.environ.get("SLURM_MEM_PER_NODE"), os.environ.get("SLURM_MEM_PER_CPU")
    if per_node:
        return int(per_node) or None  # 0: the whole node
    return int(per_cpu) * int(os.environ.get("SLURM_CPUS_ON_NODE", 1)) if per_cpu else None


def was_over_memory(used: int | None) -> bool:
    """Whether the kernel killed in this job's cgroup, or the process held as much as the job was granted.

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
    """Whether the job still runs (somebody only sent it a signal), or ends for its time limit.

    Otherwise somebody cancelled it, or SLURM requeues it already.

    Raises:
        ClusterError: SLURM does not answer.
    """
    job = client.key_values(client.call("scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]))
    spent, limit = client.seconds(job.get("RunTime", "")), client.seconds(job.get("TimeLimit", ""))
    return job["JobState"] == "RUNNING" or (spent is not None and limit is not None and spent >= limit)
