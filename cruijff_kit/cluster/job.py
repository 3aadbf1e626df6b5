"""What a SLURM job runs; the script that `submit` wrote calls it:

    srun python -m cruijff_kit.cluster.job RUNS.json              the run of this array task, a pack of runs (pack_job), or
                                                                  late evaluations (evaluation_job)
    python -m cruijff_kit.cluster.job RUNS.json --ended CODE      afterwards, if that failed: why, and whether to go again

Retries, by cause: over host memory is requeued with twice the memory; what a signal stopped is requeued and goes on from
its checkpoint; everything else is left as it is. (Out of GPU memory is the recipe's to mend: smaller micro-batches.)
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cruijff_kit import failures
from cruijff_kit.cluster import client
from cruijff_kit.cluster.client import ClusterError
from cruijff_kit.cluster.request import more_memory
from cruijff_kit.command import collect_rarely
from cruijff_kit.errors import one_line
from cruijff_kit.frozen import frozen, frozen_swept
from cruijff_kit.ledger import code_hash, is_done
from cruijff_kit.progress import say
from cruijff_kit.run_status import (
    FAILED,
    INTERRUPTED,
    QUEUED,
    SILENT_SECONDS,
    UNDER_WAY,
    Heartbeat,
    RunStatus,
    queued_again,
    read_status,
    seconds_since,
    slurm_job_id,
    write_status,
)
from cruijff_kit.stopping import StopSignals
from cruijff_kit.summary import refresh_above
from cruijff_kit.tiers import submitted


def main(argv: list[str] | None = None) -> int:
    """The job's program; returns its exit code."""
    stop = StopSignals(signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    stop.leave = lambda: None
    stop.listen()  # before anything slow: without a handler these signals kill; with this one they wait for `_run`
    parser = argparse.ArgumentParser("python -m cruijff_kit.cluster.job")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--ended", type=int)
    options = parser.parse_args(argv)
    submitted()
    collect_rarely()
    listed = json.loads(options.runs.read_text(encoding="utf-8"))
    chosen = listed["runs"][int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)]
    if options.ended is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # comes with the requeue that this may ask for
    if isinstance(chosen, dict):
        from cruijff_kit.cluster import pack_job

        runs = [Path(run) for run in chosen["pack"]]
        if options.ended is not None:
            return pack_job.after_death(runs, options.ended)
        return pack_job.start(runs, chosen["at_once"] or None, listed["code"], stop)
    if isinstance(chosen, list):
        from cruijff_kit.cluster import evaluation_job

        runs = [Path(run) for run in chosen]
        return (
            evaluation_job.start(runs, stop)
            if options.ended is None
            else evaluation_job.after_death(runs, options.ended)
        )
    run = Path(chosen)
    return _start(run, listed["code"], stop) if options.ended is None else _after_death(run, options.ended)


def _start(run: Path, code: str, stop: StopSignals) -> int:
    if is_done(run):
        say(f"{run} is done already")
        return 0
    if is_elsewhere(run):
        return 1
    use_granted_processors()
    heartbeat = Heartbeat(run)
    note_changed_code(heartbeat.status, code)
    return _run(run, heartbeat, stop)


def is_elsewhere(run: Path) -> bool:
    """Whether another job is at this run."""
    other = read_status(run)
    elsewhere = other is not None and other.state in UNDER_WAY and other.job_id != slurm_job_id()
    if not elsewhere or (seconds_since(other.heartbeat) or 0) >= SILENT_SECONDS:
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

    stop.leave = leave
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
            queued_again(run, goes_on(status))
        client.requeue(os.environ["SLURM_JOB_ID"])
    except ClusterError as error:
        for run, status in statuses.items():
            status.state, status.reason = INTERRUPTED, f"{reason}, and SLURM would not requeue it: {error}"
            write_status(run, status)


def _run(run: Path, heartbeat: Heartbeat, stop: StopSignals) -> int:
    leave_by(stop, lambda: _after_signal(run, heartbeat, stop))
    heartbeat.__enter__()  # before the imports, which take seconds
    try:
        from cruijff_kit.run import Start, train_then_eval

        result = train_then_eval(frozen(run), frozen_swept(run), Start(heartbeat, stop))
        say(f"done: {result.outcome}")
        return 0
    except KeyboardInterrupt:
        return _after_signal(run, heartbeat, stop)
    except Exception as error:
        cause = failures.cause_of(error)
        if cause == failures.KILLED and was_over_memory(heartbeat.status.memory_bytes):
            heartbeat.__exit__()
            _ask_for_more_memory(run)
            return 1
        heartbeat.set(state=FAILED, reason=f"{type(error).__name__}: {one_line(error)}", cause=cause)
        say(f"failed: {type(error).__name__}: {one_line(error)}")
        return 1
    finally:
        heartbeat.__exit__()
        refresh_above(run)


def _after_signal(run: Path, heartbeat: Heartbeat, stop: StopSignals) -> int:
    """The state is saved: go back into the queue, unless SLURM ends the job anyway or nothing comes of it.

    Returns:
        The exit code: 128 + the signal's number.
    """
    received = stop.received or signal.SIGINT
    name, status, most = received.name, heartbeat.status, frozen(run).slurm.max_retries
    status.retries = 0 if (status.step or 0) > status.first_step else status.retries + 1
    reason = f"stopped by {name} at step {status.step or 0}"
    heartbeat.set(state=INTERRUPTED, reason=reason, cause=failures.STOPPED)
    heartbeat.__exit__()
    code = 128 + received
    try:
        if not may_requeue():  # SLURM requeues what it preempts, and `status` tells what a person cancelled
            return code
        if status.retries > most:
            heartbeat.set(
                reason=f"{reason}, the {status.retries}th time without getting further; with more time: "
                "python -m cruijff_kit.resume DIR slurm.time=HH:MM:SS"
            )
            return code
        queued_again(run, f"goes on from step {status.step or 0} ({name})")
        client.requeue(os.environ["SLURM_JOB_ID"])
    except ClusterError as error:
        heartbeat.set(state=INTERRUPTED, reason=f"{reason}, and SLURM would not requeue it: {error}")
    return code


def may_requeue() -> bool:
    """Whether the job is running still (somebody only sent it a signal), or is being ended for its time limit."""
    job = client.key_values(client.call("scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]))
    spent, limit = client.seconds(job.get("RunTime", "")), client.seconds(job.get("TimeLimit", ""))
    return job["JobState"] == "RUNNING" or (spent is not None and limit is not None and spent >= limit)


def _after_death(run: Path, code: int) -> int:
    """The run's process has gone with an exit code: say why where it could not, and go again if more memory may help."""
    status = read_status(run)
    if status is None or status.state not in (QUEUED, *UNDER_WAY):
        return 0
    if status.state == QUEUED and not may_requeue():  # it is on its way back into the queue
        return 0
    if status.state in UNDER_WAY and status.job_id != slurm_job_id():
        return 0
    how = failures.how_it_ended(code)
    if code == 128 + signal.SIGKILL and was_over_memory(status.memory_bytes):
        return _ask_for_more_memory(run)
    if (
        code - 128 in (signal.SIGUSR2, signal.SIGTERM)
        and status.retries < frozen(run).slurm.max_retries
        and may_requeue()
    ):
        status.retries += 1  # it came before Python could listen
        queued_again(run, f"{how} before it began; again", before=status)
        client.requeue(os.environ["SLURM_JOB_ID"])
        return 0
    began = "" if status.started else " before it began; see its log"
    status.state, status.reason, status.cause = FAILED, f"ended without a result ({how}){began}", failures.KILLED
    write_status(run, status)
    return 0


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


def _ask_for_more_memory(run: Path) -> int:
    config, status = frozen(run), read_status(run)
    granted = granted_mb()
    asked = status.changes.get("slurm.mem") or config.slurm.mem
    reason = f"out of host memory ({asked or f'{granted}M'})"
    status.state, status.reason, status.cause = FAILED, reason, failures.OUT_OF_MEMORY
    if status.retries >= config.slurm.max_retries or granted is None:
        write_status(run, status)
        return 0
    status.retries += 1
    mem = more_memory(asked, granted)
    queued_again(run, f"{reason}; again with {mem}", {"slurm.mem": mem}, status)
    try:
        client.requeue(os.environ["SLURM_JOB_ID"], mem_mb=2 * granted)
    except ClusterError as error:
        status.reason = (
            f"{reason}, and SLURM would not grant more: {error}; python -m cruijff_kit.resume asks for {mem}"
        )
        write_status(run, status)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
